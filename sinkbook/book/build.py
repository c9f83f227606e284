"""From notebooks to the rendered book: each chapter is run once, then jupyter-book renders.

Papermill executes the chapters, one process each. The executed copies are kept under a hash of all
that decides their content, so that a chapter runs again only when something changed. They are
staged in a tree that mirrors the repository and rendered with execution off; the finished pages
replace the old ones in one step.
"""

import hashlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
from base64 import b64decode
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from tempfile import TemporaryDirectory

import filelock
import yaml

from sinkbook import provenance
from sinkbook.arguments import check_seed
from sinkbook.book import claims
from sinkbook.book.chapters import status_folder
from sinkbook.book.execution import execute, temporary_folder, told
from sinkbook.book.notebooks import Execution, Source, is_code, parsed, read_content, stamp
from sinkbook.book.settings import PROFILES, check_profile
from sinkbook.children import lifeline
from sinkbook.dependencies import FOLDER, Closure, closure
from sinkbook.errors import SinkbookError
from sinkbook.files import reading, recover_folder, replace_folder, write_json
from sinkbook.pages import vendor
from sinkbook.pages.scripts import FOLDERS, STATIC, lab_scripts, question_scripts

# Pages that tabulate what the chapters left behind: they run last, and always.
APPENDICES = ("claims", "status")
# How the folders begin in which chapters and pages are made. What a kill leaves is swept away.
SCRATCH = ".making-"


@dataclass(frozen=True)
class Workplace:
    """Where the sources are and where everything built goes."""

    root: Path  # the repository
    output: Path  # the build folder
    profile: str

    @property
    def executed(self) -> Path:
        return self.output / "executed" / self.profile

    @property
    def staged(self) -> Path:
        return self.output / f"src-{self.profile}"

    @property
    def pages(self) -> Path:
        return _pages(self.output, self.profile)

    @property
    def logs(self) -> Path:
        return self.output / "logs"


def _pages(output: Path, profile: str) -> Path:
    return output / f"html-{profile}"


def workplace(profile: str, output: Path | None = None) -> Workplace:
    """The repository that the working directory lies in, and its build folder or `output`.

    Raises `SinkbookError` outside of a repository and for an unknown profile.
    """
    root = provenance.repository()
    if root is None:
        raise SinkbookError(
            f"no book here: neither {Path.cwd()} nor a folder above it has a _toc.yml and a "
            "book/claims.yml. Change to a copy of the repository and run it there."
        )
    return Workplace(root, Path(os.path.realpath(output or root / "build")), check_profile(profile))


# ---------------------------------------------------------------------------------------------
# Running
# ---------------------------------------------------------------------------------------------


def chapters(root: Path) -> dict[str, Path]:
    """Every notebook of the book by its name, appendices last."""
    found = {path.stem: path for path in sorted((root / "book").glob("*.ipynb"))}
    return dict(sorted(found.items(), key=lambda item: (item[0] in APPENDICES, item[0])))


def select(names: Iterable[str], root: Path) -> list[Path]:
    """The notebooks called by name (`03_active_dormant`) or number (`03`), in the book's order.

    Raises `SinkbookError` for a name that is no chapter, with the nearest ones there are.
    """
    known = chapters(root)
    chosen = set()
    for name in names:
        stem = Path(name).name.removesuffix(".ipynb")
        matches = [known_name for known_name in known if known_name.split("_")[0] == stem]
        if stem in known:
            matches = [stem]
        if not matches:
            near = get_close_matches(stem, known, n=3, cutoff=0.4)
            hint = (
                f"Did you mean {' or '.join(near)}?" if near else f"There are {', '.join(known)}."
            )
            raise SinkbookError(f"no chapter named {name!r}. {hint}")
        chosen.update(matches)
    return [path for stem, path in known.items() if stem in chosen]


def content_hash(notebook: Path, place: Workplace, seed: int) -> str:
    """A hash of all that decides what a chapter's executed copy says.

    The notebook, the code that its cells use, its claims, the records that it may read, the
    profile, the seed, and the versions of what computes.
    """
    return read_source(notebook, place, seed).hash


def read_source(path: Path, place: Workplace, seed: int) -> Source:
    """A chapter as it is now, with its `content_hash`. What is no notebook is a `SinkbookError`."""
    content, notebook = read_content(path)
    records, found = place.root / "book" / "records", claims.claims_file()
    # Looked at before they are read, so that no change in between is missed.
    before = {each: stamp(each) for each in [found, *records.rglob("*"), *FOLDER.rglob("*")]}
    used = _code_of(notebook)
    read = _records_of(used, records)
    digest = hashlib.sha256(used.hash.encode())
    digest.update(f"{path.name}\0".encode() + content + b"\0")
    for record in read:
        digest.update(f"{record.name}\0".encode() + record.read_bytes() + b"\0")
    of_chapter = [vars(c) for c in claims.known().values() if c.chapter == path.stem]
    digest.update(json.dumps([of_chapter, place.profile, seed, provenance.versions()]).encode())
    stamps = {each: before.get(each) for each in [found, *read, *sorted(used.paths)]}
    return Source(path, content, digest.hexdigest()[:16], stamps)


def _code_of(notebook: dict) -> Closure:
    """The code of the package that a notebook's cells use."""
    cells = [cell["source"] for cell in notebook["cells"] if is_code(cell)]
    lines = "\n".join(cells).splitlines()
    python = "\n".join(line for line in lines if not line.lstrip().startswith(("%", "!")))
    try:
        parsed(python)
    except SyntaxError:  # IPython may understand it
        return closure("sinkbook")
    return closure(cells=python)


def _records_of(used: Closure, folder: Path) -> list[Path]:
    """The records that some code may read: those whose names begin as a word in it does.

    All of them, if it goes through all names. The words of the modules of the records themselves,
    which have lists of all, do not count.
    """
    records = "sinkbook.book.records"
    if not any(module.startswith(records) for module in used.modules):
        return []
    users = [dump for (m, _), dump in used.definitions.items() if not m.startswith(records)]
    words = {word for dump in users for word in re.findall(r"'([^'\n]{4,})'", dump)}
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    if "NAMES" in words:
        return files
    beginnings = tuple(word.replace("_", "-") for word in words)
    return [path for path in files if path.name.startswith(beginnings)]


def run_chapters(
    names: Iterable[str] = (),
    *,
    place: Workplace,
    seed: int = 0,
    jobs: int = 1,
    fresh: bool = True,
    failed: Callable[[str, SinkbookError], None] | None = None,
    limit: float = math.inf,
) -> list[Execution]:
    """Execute chapters, each once and `jobs` at a time, and keep their executed copies.

    Without names: all of them. With `fresh=False` a copy whose sources have not changed is taken
    from the build folder. Raises `SinkbookError` at the first cell that fails; with `failed`,
    which gets the chapter's name and the error, the other chapters go on. One that has not ended
    after `limit` seconds has failed.
    """
    check_seed(seed)
    with _writing_to(place.output):
        return _run_chapters(names, place, seed, jobs, fresh, failed, limit)


def _run_chapters(names, place, seed, jobs, fresh, failed=None, limit=math.inf) -> list[Execution]:
    notebooks = select(names, place.root) if names else list(chapters(place.root).values())
    sources = []
    for path in notebooks:
        with told(failed, path.stem):
            sources.append(read_source(path, place, seed))
    kept = {}
    if not fresh:
        for source in sources:
            found = Execution.kept(place.executed / source.path.name, source.hash)
            if found and source.name not in APPENDICES:
                kept[source.name] = found
    for execution in kept.values():
        _remember(execution)
    # The later chapters read large models and take longest: they begin, and no core waits.
    turns = sorted(reversed(sources), key=lambda source: source.name in APPENDICES)
    with _scratch(place) as folder:
        done = execute(
            turns,
            kept=kept,
            last=APPENDICES,
            folder=place.executed,
            scratch=folder,
            logs=place.logs,
            parameters={"profile": place.profile, "seed": seed},
            jobs=jobs,
            after=_remember,
            failed=failed,
            limit=limit,
        )
    return [done[path.stem] for path in notebooks if path.stem in done]


def _remember(execution: Execution) -> None:
    """Put a chapter's measurements into the ledger and its run into the status table."""
    for record in execution.outputs("sinkbook.claim"):
        claims.keep(record)
    for facts in execution.outputs("sinkbook.facts"):
        record = {"chapter": execution.chapter, "seconds": execution.seconds, **facts}
        write_json(status_folder() / f"{execution.chapter}.json", record)


# ---------------------------------------------------------------------------------------------
# Rendering
# ---------------------------------------------------------------------------------------------


def build_book(
    *, place: Workplace, seed: int = 0, jobs: int = 1, fresh: bool = False
) -> tuple[Path, list[Execution]]:
    """Run what has changed, render everything; returns the index page and the executions."""
    check_contents(place.root)
    install_scripts(place.root)  # before all else, since it may need the network
    with _writing_to(place.output):
        executions = _run_chapters((), place, seed, jobs, fresh)
        stage(executions, place)
        return render(place), executions


def check_contents(root: Path) -> None:
    """Raise `SinkbookError` for a _config.yml or _toc.yml that is missing or broken."""
    for name, needed in (("_config.yml", None), ("_toc.yml", "root")):
        path = root / name
        with reading(path, "Put it right, or take it from the repository again."):
            found = yaml.safe_load(path.read_text(encoding="utf-8"))
        if found is not None and not isinstance(found, dict):
            raise SinkbookError(f"{path} is no table: write `name: value` on its lines.")
        if needed and needed not in (found or {}):
            raise SinkbookError(f"{path} names no {needed!r}: the page that the book begins with.")


def stage(executions: Iterable[Execution], place: Workplace) -> None:
    """Fill a fresh tree that mirrors the repository with all that the renderer reads."""
    shutil.rmtree(place.staged, ignore_errors=True)
    ours = shutil.ignore_patterns("*.ipynb", ".*", "records")
    shutil.copytree(place.root / "book", place.staged / "book", ignore=ours)
    for name in ("_config.yml", "_toc.yml"):
        shutil.copy(place.root / name, place.staged)
    if (place.root / "pyproject.toml").is_file():  # the addresses of the published book
        shutil.copy(place.root / "pyproject.toml", place.staged)
    if (place.root / "_static").is_dir():
        static = place.root / "_static"
        shutil.copytree(static, place.staged / "_static", ignore=_parts_of_scripts)
    for execution in executions:
        (place.staged / "book" / execution.path.name).write_text(execution.page(), encoding="utf-8")
        for files in execution.outputs("sinkbook.files"):
            for name, encoded in files.items():
                path = place.staged / "extra" / "book" / Path(name).name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(b64decode(encoded))
    vendor.copy(place.root, place.staged / "extra" / "vendor")
    for folder, scripts in zip(FOLDERS, (lab_scripts, question_scripts), strict=True):
        if (place.root / STATIC / folder).is_dir():
            for name, script in scripts(place.root).items():
                (place.staged / "extra" / "vendor" / name).write_text(script, encoding="utf-8")


def _parts_of_scripts(folder: str, names: list[str]) -> list[str]:
    """Sources of scripts: the renderer would load every script that is there on every page."""
    return [name for name in names if Path(folder).name in FOLDERS and name.endswith(".js")]


def render(place: Workplace) -> Path:
    """Let jupyter-book render the staged tree; the old pages stay until all of it succeeded.

    Every warning is an error. Raises `SinkbookError` with the renderer's own words.
    """
    log = place.logs / "render.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with _scratch(place) as folder, lifeline(folder) as tied:
        start = "from jupyter_book.cli.main import main; main()"
        command = [sys.executable, "-c", start, "build", str(place.staged)]
        command += ["--path-output", str(folder), "--all", "-W", "-n", "--keep-going"]
        with log.open("w", encoding="utf-8") as file:
            outcome = subprocess.run(
                tied(command), stdin=subprocess.DEVNULL, stdout=file, stderr=file, check=False
            )
        finished = folder / "_build" / "html"
        if outcome.returncode or not (finished / "index.html").is_file():
            raise SinkbookError(_renderers_words(log, place))
        replace_folder(finished, place.pages)
    return place.pages / "index.html"


def _renderers_words(log: Path, place: Workplace) -> str:
    """What stopped the renderer, without its colours and the staging folder's name."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", log.read_text(encoding="utf-8"))
    text = text.replace(f"{place.staged}{os.sep}", "")
    text = re.sub(r"\.ipynb:(\d{5,})", _cell_and_line, text)
    lines = [line for line in text.splitlines() if "WARNING" in line or "ERROR" in line]
    lines = [line for line in lines if "IPKernelApp" not in line] or text.splitlines()[-15:]
    return "the pages could not be rendered:\n  " + "\n  ".join(lines) + f"\nAll of it: {log}"


def _cell_and_line(match: re.Match) -> str:
    """myst-nb counts 10,000 lines a cell, from cell 1, and puts the first line at 2."""
    cell, line = divmod(int(match[1]) - 1, 10_000)
    return f".ipynb, cell {cell}, line {line}"


def install_scripts(root: Path) -> None:
    """Let npm install what the pages and the checks need, unless it is there already.

    Raises `SinkbookError` with npm's own words if that fails.
    """
    with _writing_to(root / "build"):
        vendor.install(root)


@contextmanager
def _scratch(place: Workplace) -> Iterator[Path]:
    """A fresh folder for what is made, on the disk that it is moved to from there."""
    with TemporaryDirectory(dir=place.output, prefix=SCRATCH, ignore_cleanup_errors=True) as folder:
        yield Path(folder)


def _sweep(output: Path) -> None:
    """Remove what a killed build has left in its folder, and put back the pages that it took."""
    for leftover in [*output.glob(f"{SCRATCH}*"), *output.glob(".render-*")]:
        shutil.rmtree(leftover, ignore_errors=True)
    shutil.rmtree(temporary_folder(output), ignore_errors=True)
    for profile in PROFILES:
        recover_folder(_pages(output, profile))


@contextmanager
def _writing_to(folder: Path) -> Iterator[None]:
    """One process at a time writes to a build folder; one that cannot be written is an error."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(folder / ".lock")
        try:
            lock.acquire(timeout=0.1)
        except filelock.Timeout:
            print(f"Another process is writing to {folder}: waiting for it.", flush=True)
            lock.acquire()
        try:
            _sweep(folder)
            yield
        finally:
            lock.release()
    except OSError as error:
        where = Path(error.filename or folder)
        if not (where.is_relative_to(folder) or folder.is_relative_to(where)):
            raise
        raise SinkbookError(
            f"cannot write to {where}: {error.strerror}. Make {folder} writable, or name another "
            "folder with `output`."
        ) from error
