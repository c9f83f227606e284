"""The report of `sinkbook probe`: a model measured on texts, printed, and written to a folder.

Everything that is said comes from one dataset, which `result.nc` keeps.
"""

import shlex
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from functools import partial
from pathlib import Path

import numpy as np
import xarray as xr
from rich.console import Group
from rich.table import Table
from rich.text import Text

from sinkbook import files, provenance
from sinkbook.annotations import check_arguments
from sinkbook.arguments import check_token_ids, check_whole_number
from sinkbook.data import corpora
from sinkbook.errors import NotFiniteError, SinkbookError
from sinkbook.figures import style
from sinkbook.models import token_windows
from sinkbook.models.pretrained import LanguageModel, load
from sinkbook.probe.measure import VARIABLES, measure
from sinkbook.progress import progress
from sinkbook.report import figures, headroom, summary
from sinkbook.report.html import html_page

MEASURED = (
    "sink_attention",
    "sink_logit",
    "attention_entropy",
    "key_importance",
    "even_importance",
)
# Not every architecture has these: not differential attention, nor several residual streams.
NORMS = ("value_norm", "head_output_norm", "residual_norm", "residual_max_abs")
TOKENS_AT_ONCE = 1024


@dataclass(frozen=True)
class Reading:
    """Which texts are read: windows of `length` tokens of one document, or of a domain's texts."""

    about: str
    option: tuple[str, ...]  # how the command line asks for them
    # In a model's own tokens. Raises SinkbookError if they cannot be filled.
    windows: Callable[[LanguageModel], token_windows.Windows]

    @classmethod
    def of(cls, text: Path | None, domain: str, *, texts: int, length: int) -> "Reading":
        """Of a document if there is one. Raises SinkbookError for what cannot be read."""
        check_whole_number("texts", texts, 1)
        check_whole_number("length", length, 2)
        if text is None:
            source = corpora.one_by_one(domain, 5 * length)
            cut = token_windows.of_texts
            about, option = corpora.DOMAINS[domain].about, ("--domain", domain)
        else:
            source, cut = token_windows.read_document(text), token_windows.of_document
            about, option = f"windows of {text.name}", ("--text", text.name)
        option += ("--texts", str(texts), "--length", str(length))

        def windows(language_model: LanguageModel) -> token_windows.Windows:
            token_windows.check_length(language_model, length)
            return cut(language_model, source, count=texts, length=length)

        return cls(about, option, windows)


@check_arguments
def probe(
    model: str,
    *,
    text: Path | None = None,
    domain: str = "prose-en",
    texts: int = 8,
    length: int = 256,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> xr.Dataset:
    """Measure a model on windows of `length` tokens: of one document, or of a domain's texts.

    Returns what `measure_windows` does; `attrs` also has what was run, and on what. Raises
    SinkbookError for texts and models that cannot be used, texts first.
    """
    reading = Reading.of(text, domain, texts=texts, length=length)
    language_model = load(model, revision=revision, trust_remote_code=trust_remote_code)
    result = measure_windows(language_model, reading.windows(language_model))
    command = ["sinkbook", "probe", model, *reading.option]
    command += ["--revision", revision] if revision else []
    command += ["--trust-remote-code"] if trust_remote_code else []
    result.attrs |= {
        "weights": language_model.card,
        "texts": reading.about,
        "command": shlex.join(command),
    }
    return result


@check_arguments
def measure_windows(language_model: LanguageModel, tokens: token_windows.Windows) -> xr.Dataset:
    """Measure a model on windows of tokens, a few at a time; shows progress.

    Returns the variables in `MEASURED` and `NORMS`, those that the model does not have as NaN,
    and `token` (batch, position), the tokens as text. Raises NotFiniteError as `measure` does, and
    where the losses of the first window are no numbers: then what reads the last layer is damaged.
    """
    check_token_ids("tokens", tokens)
    present = [name for name in NORMS if _has(language_model, tokens[:1, :2], name)]
    measure(language_model.model, tokens[:1], ("loss",))  # refused if the output head is damaged
    results = []
    with progress("measuring", len(tokens)) as show:
        for batch in tokens.split(max(1, TOKENS_AT_ONCE // tokens.shape[1])):
            results.append(measure(language_model.model, batch, (*MEASURED, *present)))
            show(sum(result.sizes["batch"] for result in results))
    result = xr.concat(results, dim="batch", combine_attrs="override")
    result = result.assign_coords(batch=np.arange(len(tokens)))
    sizes = {**result.sizes, "residual_layer": result.sizes["layer"] + 1}
    for name in set(NORMS) - set(present):
        dims = VARIABLES[name][0]
        result[name] = dims, np.full([sizes[dim] for dim in dims], np.nan, dtype=np.float32)
    words = {token: language_model.tokenizer.decode([token]) for token in tokens.unique().tolist()}
    words = {token: word.replace("\0", "␀") for token, word in words.items()}  # NetCDF has no NUL
    result["token"] = ("batch", "position"), [[words[i] for i in row] for row in tokens.tolist()]
    result.attrs |= {
        "model": language_model.name,
        "device": provenance.device(),
        "seconds": round(sum(part.attrs["seconds"] for part in results), 1),
        "sinkbook": provenance.versions()["sinkbook"],
        "date": date.today().isoformat(),
    }
    return result


def _has(language_model: LanguageModel, tokens: token_windows.Windows, name: str) -> bool:
    try:
        measure(language_model.model, tokens, (name,))
    except NotFiniteError:
        raise
    except SinkbookError:
        return False
    return True


def plain(text: str) -> Text:
    """Names that others have given, for a title: no markup, nothing that steers a terminal."""
    return Text(files.printable(text), style="bold")


@check_arguments
def terminal(result: xr.Dataset) -> Group:
    """The report as a table, a verdict, and the sinks at other tokens, to print with rich."""
    table = Table(
        title=plain(f"{result.attrs['model']}: {describe_texts(result)}"),
        title_justify="left",
        caption=f"above null: {summary.ABOVE_NULL}. value ratio: median over heads. residual ratio "
        "and largest entry of any token: after the layer.",
        caption_justify="left",
    )
    for title in summary.LAYER_COLUMNS:
        words = title == "strongest heads"
        table.add_column(title, justify="left" if words else "right", no_wrap=words)
    for layer, row in summary.layer_table(result).iterrows():
        heads = summary.strongest_heads(row, "  ")
        numbers = (row.sink_rate, row.above_null, row.value_drain_ratio, row.residual_peak_ratio)
        rate, above, value, residual = ("-" if np.isnan(x) else f"{x:.2f}" for x in numbers)
        largest = headroom.magnitude(row.residual_max_abs)
        table.add_row(str(layer), rate, above, heads or "-", value, residual, largest)
    room = headroom.headroom(result)
    lines = [
        Text(summary.verdict(result), style="bold"),
        Text(headroom.sentence(room)),
        Text(headroom.advice(room, summary.has_sinks(result))),
    ]
    others = summary.sink_positions(result)
    others = others[~others["first"]]
    if len(others):
        shown = "; ".join(
            f"{row.token} in {row.texts} of {result.sizes['batch']} texts, {row.heads:.0f} heads"
            for row in others.head(3).itertuples()
        )
        lines.append(Text(f"Sinks at other tokens: {shown}."))
    return Group(table, "", *lines)


def describe_texts(result: xr.Dataset) -> str:
    """How many texts of what were measured, in words."""
    count, length = result.sizes["batch"], result.sizes["position"]
    return f"{count} text{'s' if count > 1 else ''} of {length} tokens ({result.attrs['texts']})"


# --- Files -----------------------------------------------------------------------------------


FILES = (
    "result.nc",
    "summary.csv",
    *(f"{name}.{kind}" for name in figures.FIGURES for kind in ("png", "svg")),
    "report.html",  # shows all of it
)


@check_arguments
def check_folder(folder: Path, *, force: bool) -> None:
    """Refuse a folder that cannot be written to or, unless `force`, already holds a report."""
    otherwise = "Name another folder"
    files.check_output(folder / FILES[-1], "a report", force=True, otherwise=otherwise)
    files.recover_folder(folder.absolute())
    present = [name for name in FILES if (folder / name).exists()]
    if present and not force:
        raise SinkbookError(
            f"{str(folder)!r} already holds {present[-1]}. Name another folder, or let the report "
            "in it be replaced with `force=True`."
        )


@check_arguments
@style.applied()
def write(result: xr.Dataset, folder: Path, *, force: bool = False) -> None:
    """Write `FILES` to a folder, which is made if need be: in one step, so that all are of one run.

    Raises SinkbookError as `check_folder` does, and if the file system refuses.
    """
    check_folder(folder, force=force)
    page, table = html_page(result), summary.head_table(result)
    otherwise = "name another folder"
    with files.replacing(folder, FILES, otherwise=otherwise) as made:
        to_write = partial(files.write, otherwise=otherwise)
        files.write_netcdf(made / "result.nc", result, otherwise=otherwise)
        to_write(
            made / "summary.csv",
            lambda part: table.to_csv(part, index=False, float_format="%.6g"),
        )
        for name, draw in figures.FIGURES.items():
            figure = draw(result)
            for kind, how in {"png": {"dpi": 150}, "svg": {"metadata": {"Date": None}}}.items():
                to_write(made / f"{name}.{kind}", partial(figure.savefig, format=kind, **how))
        to_write(made / "report.html", lambda part: part.write_text(page, encoding="utf-8"))
