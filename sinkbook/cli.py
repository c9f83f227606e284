"""The command line: `build`, `run`, `probe`, `compare`, `checkpoints`, `fetch`, `claims`, `record`.

Each command imports what it needs when it runs, so that `sinkbook --help` answers at once.
"""

import json
import os
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer

from sinkbook import terminal
from sinkbook.errors import SinkbookError

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

INTERRUPTED = 130  # the status that typer ends with after Ctrl-C
CONDITION_MET = 3  # the status of `sinkbook probe --fail-if` when it is so

# Those of `data.corpora` and of `quantization`, which take longer to import than `--help` should.
RANGES = "tensor, sink apart, token, token and channel"
DOMAINS = "prose-en, prose-fr, prose-es, repeated-prose, json, code, shakespeare, numbers"

Profile = Annotated[str, typer.Option(help="quick: minutes on two CPU cores. paper: for one GPU.")]
Seed = Annotated[int, typer.Option(help="The seed that every chapter starts from.")]
Jobs = Annotated[int, typer.Option(min=1, help="How many chapters run at once.")]
Output = Annotated[
    Path | None, typer.Option(help="The build folder.", show_default="build, in the repository")
]
Document = Annotated[
    Path | None, typer.Option(metavar="FILE", help="A UTF-8 text file, cut into windows.")
]
Domain = Annotated[
    str | None,
    typer.Option(metavar="NAME", help=f"Texts of this domain: {DOMAINS}.", show_default="prose-en"),
]
Texts = Annotated[int, typer.Option(min=1, help="How many texts; windows of a FILE at most.")]
Length = Annotated[int, typer.Option(min=2, help="Tokens of each, the first included.")]
Force = Annotated[bool, typer.Option("--force", help="Replace what is there already.")]
Remote = Annotated[bool, typer.Option("--trust-remote-code", help="Let a model's own code run.")]


Version = Annotated[bool, typer.Option("--version", help="What is installed, and exit.")]


@app.callback(invoke_without_command=True)
def options(version: Version = False) -> None:
    """Attention sinks, value drains and residual peaks: a book that runs, and a probe."""
    if version:
        from sinkbook.provenance import versions

        print(" · ".join(map(" ".join, versions().items())))
        raise typer.Exit


@app.command()
def build(
    profile: Profile = "quick",
    seed: Seed = 0,
    jobs: Jobs = 1,
    output: Output = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Run every chapter, also those that have not changed.")
    ] = False,
) -> None:
    """Run every chapter that has changed and render the book; prints the path of its first page."""
    from sinkbook.book.build import build_book, workplace

    place = workplace(profile, output)
    started = time.monotonic()
    index, executions = build_book(place=place, seed=seed, jobs=jobs, fresh=fresh)
    kept = sum(execution.from_cache for execution in executions)
    print(
        f"Rendered in {time.monotonic() - started:.0f} s; {len(executions) - kept} chapters were "
        f"run, {kept} taken from the cache (--fresh runs them too)."
    )
    print(index)


@app.command()
def run(
    chapters: Annotated[list[str], typer.Argument(help="Names or numbers: 03, 03_active_dormant.")],
    profile: Profile = "quick",
    seed: Seed = 0,
    jobs: Jobs = 1,
    output: Output = None,
    dask: Annotated[
        str | None,
        typer.Option(metavar="ADDRESS", help="Train on the Dask cluster of this scheduler."),
    ] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Make kept measurements again.")] = False,
) -> None:
    """Run chapters and keep the executed copies, without rendering; prints their paths."""
    from sinkbook import parallel
    from sinkbook.book.build import run_chapters, workplace
    from sinkbook.book.settings import KEEP

    if keep:
        os.environ[KEEP] = f"sinkbook run {' '.join(chapters)} --keep"
    if dask is not None:
        with parallel.cluster(dask):  # nobody there? Say so before the chapters start
            os.environ[parallel.ADDRESS] = dask
    for execution in run_chapters(chapters, place=workplace(profile, output), seed=seed, jobs=jobs):
        print(execution.path)


@app.command()
def fetch(
    name: Annotated[
        str | None, typer.Argument(help="One download; without: all by default.")
    ] = None,
    list_them: Annotated[bool, typer.Option("--list", help="Show what there is and stop.")] = False,
    accept_license: Annotated[
        bool, typer.Option("--accept-license", help="Accept the terms that a download is under.")
    ] = False,
) -> None:
    """Download texts and weights into the cache folder, checked against their pinned hashes."""
    from sinkbook.data import corpora

    if list_them:
        _print_sources()
        return
    free = [source.name for source in corpora.SOURCES.values() if not source.terms]
    for wanted in [name] if name else free:
        print(f"{wanted:14} ", end="", flush=True)
        print(corpora.fetch(wanted, accept_license=accept_license))


def _print_sources() -> None:
    from sinkbook.data.corpora import SOURCES

    for source in SOURCES.values():
        print(f"{source.name:14} {source.megabytes:4} MB  {source.about}")
        print(f"{'':23}{source.licence}; from {source.origin}")
        if source.terms:
            print(f"{'':23}only with --accept-license: {source.terms}")


@app.command()
def probe(
    model: Annotated[str, typer.Argument(help="A short name, a folder, a .gguf file, a hub id.")],
    text: Document = None,
    domain: Domain = None,
    texts: Texts = 8,
    length: Length = 256,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write report, data and figures there.")
    ] = None,
    force: Force = False,
    revision: Annotated[
        str | None, typer.Option(help="A branch, tag or commit of a model on the hub.")
    ] = None,
    trust_remote_code: Remote = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    fail_if: Annotated[
        list[str] | None,
        typer.Option(
            metavar="CONDITION",
            help="End with status 3 if this is so, such as 'sink_rate<0.4'; may be given often.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Measure sinks, drains and peaks of a causal language model; prints a table and a verdict."""
    _check_texts(text, domain)
    from sinkbook.report import quantities, report

    conditions = [quantities.condition(written) for written in fail_if or []]
    if out is not None:
        report.check_folder(out, force=force)
    result = report.probe(
        model,
        text=text,
        domain=domain or "prose-en",
        texts=texts,
        length=length,
        revision=revision,
        trust_remote_code=trust_remote_code,
    )
    if out is not None:
        report.write(result, out, force=force)
    page = None if out is None else out / "report.html"
    if as_json:
        written = {} if page is None else {"report": str(page)}
        print(json.dumps(quantities.plain(result) | written, indent=2, allow_nan=False))
    else:
        _print_with_page(
            report.terminal(result), page, "--out DIR: a page, the data as NetCDF and CSV, figures"
        )
    if met := quantities.met(result, conditions):
        print("".join(f"sinkbook: {line}\n" for line in met), end="", file=sys.stderr)
        raise typer.Exit(CONDITION_MET)


@app.command()
def compare(
    a: Annotated[str, typer.Argument(help="A short name, a folder, a .gguf file, a hub id.")],
    b: Annotated[str | None, typer.Argument(help="Another, with the same tokenizer.")] = None,
    int8_b: Annotated[
        str | None,
        typer.Option(
            metavar="RANGES",
            help=f"Compute B, or A where there is no B, in simulated int8; ranges: {RANGES}.",
        ),
    ] = None,
    text: Document = None,
    domain: Domain = None,
    texts: Texts = 8,
    length: Length = 256,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write a page with maps of the heads.")
    ] = None,
    force: Force = False,
    revision_a: Annotated[str | None, typer.Option(help="A branch, tag or commit of A.")] = None,
    revision_b: Annotated[str | None, typer.Option(help="The same of B.")] = None,
    trust_remote_code: Remote = False,
) -> None:
    """Measure two models on the same texts, or one and itself in int8; prints what differs."""
    _check_texts(text, domain)
    from sinkbook.report import comparison, comparison_page

    if out is not None:
        comparison_page.check_file(out, force=force)
    found = comparison.compare(
        a,
        b,
        int8_b=int8_b,
        text=text,
        domain=domain or "prose-en",
        texts=texts,
        length=length,
        revision_a=revision_a,
        revision_b=revision_b,
        trust_remote_code=trust_remote_code,
    )
    if out is not None:
        comparison_page.write(found, out, force=force)
    _print_with_page(comparison.terminal(found), out, "--out FILE: a page with maps of the heads")


def _check_texts(text: Path | None, domain: str | None) -> None:
    if text is not None and domain is not None:
        raise typer.BadParameter("give --text or --domain, not both.")


def _print_with_page(shown, page: Path | None, instead: str) -> None:
    """Print something of rich, then where the page is, or what an option would write."""
    from rich.console import Console

    Console().print(shown)
    print(page or f"No files were written. With {instead}.")


@app.command()
def checkpoints(
    model: Annotated[str, typer.Argument(help="A hub id whose revisions are named after steps.")],
    steps: Annotated[
        str | None,
        typer.Option(metavar="0,1000,...", help="Only these steps.", show_default="all"),
    ] = None,
    list_them: Annotated[bool, typer.Option("--list", help="Show the revisions and stop.")] = False,
    text: Annotated[
        Path | None, typer.Option(metavar="FILE", help="A UTF-8 text file, a text a line.")
    ] = None,
    domain: Domain = "prose-en",
    texts: Annotated[int, typer.Option(min=1, help="How many texts, at most.")] = 8,
    length: Annotated[int, typer.Option(min=9, help="Tokens of each, the first included.")] = 64,
    free: Annotated[
        bool, typer.Option("--free", help="Remove each checkpoint's weights once it is measured.")
    ] = False,
    dask: Annotated[
        str | None, typer.Option(metavar="ADDRESS", help="The scheduler of a Dask cluster.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the dataset there, as NetCDF.")
    ] = None,
    force: Force = False,
) -> None:
    """Measure sinks, drains and peaks along a pretraining; an interrupted sweep goes on."""
    from rich.console import Console

    from sinkbook.files import check_output, write_netcdf
    from sinkbook.llm import checkpoint_metrics
    from sinkbook.llm.checkpoints import measure_checkpoints, revisions_of
    from sinkbook.parallel import cluster

    if list_them:
        Console().print(checkpoint_metrics.table_of_revisions(model, revisions_of(model)))
        return
    if out is not None:
        check_output(out, "the dataset", force=force, otherwise="Name another file with --out")
    chosen = None if steps is None else _parse_steps(steps)
    passages = _texts_to_measure(text, domain, count=texts, length=length)
    with nullcontext() if dask is None else cluster(dask) as executor:
        dataset = measure_checkpoints(
            model, chosen, passages, length=length, free=free, executor=executor
        )
    Console().print(checkpoint_metrics.table(dataset))
    if out is not None:
        write_netcdf(out, dataset, otherwise="name another file with --out")
        print(out)


def _parse_steps(steps: str) -> list[int]:
    try:
        return [int(step) for step in steps.split(",")]
    except ValueError as error:
        raise SinkbookError(
            f"--steps {steps!r} is no list of steps. Write it as --steps 0,1000,10000"
        ) from error


def _texts_to_measure(file: Path | None, domain: str, *, count: int, length: int) -> list[str]:
    """The first texts of a domain, or of a file with a text on every line."""
    from sinkbook.llm.checkpoints import texts_to_measure
    from sinkbook.models.token_windows import read_document

    if file is None:
        return texts_to_measure(domain, count=count, length=length)
    lines = [line.strip() for line in read_document(file).splitlines()]
    return [line for line in lines if line][:count]


@app.command()
def claims(
    as_json: Annotated[bool, typer.Option("--json", help="Print a list of objects.")] = False,
    chapter: Annotated[
        str | None, typer.Option(help="Only those of a chapter: 06, 06_variations.")
    ] = None,
    verdict: Annotated[
        str | None, typer.Option(help="Only those with this verdict, such as contradicts.")
    ] = None,
) -> None:
    """Show what the book claims, what was last measured, and whether it holds."""
    from sinkbook.book import claims as book_claims

    ledger = book_claims.ledger(chapter=chapter, verdict=verdict)
    if as_json:
        print(json.dumps([claim.row() for claim in ledger.verdicts], indent=2))
    else:
        print(ledger)


@app.command()
def record(
    name: Annotated[str | None, typer.Argument(help="Which one; without: list them.")] = None,
    all_missing: Annotated[
        bool, typer.Option("--all", help="Those that are missing or unfinished, in order of need.")
    ] = False,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    minutes: Annotated[
        float, typer.Option(min=0, help="Stop then and keep what there is.", show_default="none")
    ] = float("inf"),
) -> None:
    """Train runs that are too long for a page and keep their measurements in book/records."""
    from sinkbook.book import records

    if name is not None:
        from sinkbook.book.records import makers

        print(makers.make(name, device=device, until=time.time() + 60 * minutes))
        return
    if all_missing:
        from sinkbook.book.records import makers

        makers.make_missing(device=device, minutes=minutes)
    for known in records.NAMES:
        print(records.about(known))


def main() -> None:
    """Entry point: an expected failure is one message on stderr and exit status 1."""
    with terminal.speaking():
        try:
            app(terminal.words())
        except SinkbookError as error:
            terminal.say(terminal.with_options(str(error), _options()))
            raise SystemExit(1) from None
        except SystemExit as end:
            if end.code == INTERRUPTED:
                terminal.say("interrupted. What had finished is kept.")
            raise


def _options() -> dict[str, str]:
    """The options of all commands, by the names of the arguments that they stand for."""
    commands = typer.main.get_command(app).commands.values()
    return {parameter.name: parameter.opts[0] for c in commands for parameter in c.params}


if __name__ == "__main__":
    main()
