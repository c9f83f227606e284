"""Notebooks as plain data: cells, parameters, what went wrong in an executed one, its page."""

import ast
import copy
import hashlib
import json
import logging
import os
import re
import warnings
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from html import escape
from importlib.util import find_spec
from pathlib import Path

from sinkbook.errors import SinkbookError
from sinkbook.files import check_is_file


def tags(cell: dict) -> list[str]:
    """A cell's tags."""
    return cell["metadata"].get("tags", [])


def is_code(cell: dict) -> bool:
    """Whether a cell is run."""
    return cell["cell_type"] == "code"


def assigned(source: str) -> dict[str, object]:
    """Names that a parameters cell assigns, with their literal values (None: not a literal).

    Raises `SyntaxError` for what is no Python.

    >>> assigned('profile = "quick"  # or "paper"\\nseed = 0')
    {'profile': 'quick', 'seed': 0}
    """
    found: dict[str, object] = {}
    for node in parsed(source).body:
        if isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            value = node.value.value if isinstance(node.value, ast.Constant) else None
            found.update({target.id: value for target in targets if isinstance(target, ast.Name)})
    return found


def parsed(source: str) -> ast.Module:
    """Python, parsed; whatever cannot be parsed raises `SyntaxError`."""
    try:
        return ast.parse(source)
    except (ValueError, RecursionError, MemoryError) as error:  # null bytes, a thousand brackets
        raise SyntaxError(str(error)) from error


def read_notebook(path: Path) -> dict:
    """A notebook as plain data, the source of each cell one string.

    A file that cannot be read, or is no notebook of format 4, raises `SinkbookError`.
    """
    return read_content(path)[1]


def read_content(path: Path) -> tuple[bytes, dict]:
    """What a file holds, as it is and as `read_notebook` has it."""
    try:
        check_is_file(path)
        content = path.read_bytes()
    except OSError as error:
        raise SinkbookError(f"{path} cannot be read: {error.strerror or error}.") from error
    return content, parse_notebook(content, path)


def parse_notebook(content: bytes, path: Path) -> dict:
    """The notebook that a file at `path` holds, as `read_notebook`."""
    try:
        notebook = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise _no_notebook(path, f"{error}") from error
    if not isinstance(notebook, dict) or not isinstance(notebook.get("cells"), list):
        raise _no_notebook(path, "it has no list of cells")
    if not notebook["cells"]:
        raise _no_notebook(path, "it has no cell")
    if not isinstance(notebook.setdefault("metadata", {}), dict):
        raise _no_notebook(path, "its metadata are no table")
    for number, cell in enumerate(notebook["cells"], start=1):
        if lacks := _what_a_cell_lacks(cell):
            raise _no_notebook(path, f"cell {number} {lacks}")
        cell["source"] = "".join(cell["source"])
    return notebook


def _what_a_cell_lacks(cell: object) -> str | None:
    if not isinstance(cell, dict):
        return "is no table"
    if cell.get("cell_type") not in ("code", "markdown", "raw"):
        return "is neither code, markdown nor raw"
    source = cell.get("source")
    if not isinstance(source, str | list) or not all(isinstance(line, str) for line in source):
        return "has no source"
    named = cell.get("metadata")
    if not isinstance(named, dict) or not isinstance(named.get("tags", []), list):
        return "has no metadata, or tags that are no list"
    outputs = cell.get("outputs", [] if cell["cell_type"] != "code" else None)
    if not isinstance(outputs, list) or not all(isinstance(output, dict) for output in outputs):
        return "has no list of outputs"
    return None


def _no_notebook(path: Path, why: str) -> SinkbookError:
    return SinkbookError(
        f"{path} is not a notebook that can be read: {why}. Open it in an editor of notebooks and "
        "save it there, or take it from the repository again."
    )


def check_parameters(name: str, notebook: dict, wanted: Collection[str]) -> None:
    """Raise `SinkbookError` unless the notebook of this name declares these parameters.

    Papermill itself only warns about an unknown name, and without a `parameters` cell it injects
    above the defaults, which then win: a run at another profile would silently be a quick one.
    """
    cells = [cell for cell in notebook["cells"] if is_code(cell) and "parameters" in tags(cell)]
    try:
        declared = assigned(cells[0]["source"]) if cells else {}
    except SyntaxError as error:
        raise SinkbookError(
            f"{name}, cell tagged 'parameters': {error}. It assigns "
            f"{' and '.join(wanted)}, and does nothing else."
        ) from error
    if missing := [each for each in wanted if each not in declared]:
        what = "has no cell tagged 'parameters'" if not cells else f"declares no {missing[0]!r}"
        raise SinkbookError(
            f"{name} {what}. Its first code cell carries the tag 'parameters' and assigns "
            f"{' and '.join(wanted)}, or it cannot be run at another profile."
        )


def first_complaint(notebook: dict) -> str | None:
    """Where and why an executed notebook failed, in words; None if it did not.

    Cells are counted as in the source: code cells only, papermill's own left out. A warning or
    anything else on stderr counts as a failure, since it would stand on the page.
    """
    for number, cell in enumerate(sources(notebook), start=1):
        where = place_of(number, cell)
        for output in cell["outputs"]:
            if output["output_type"] == "error":
                return f"{where}: {output['ename']}: {output['evalue']}"
            if output.get("name") == "stderr":
                return f"{where}, which wrote to stderr: {''.join(output['text']).strip()}"
    return None


def sources(notebook: dict) -> list[dict]:
    """An executed notebook's code cells, but for those that papermill has put in."""
    return [
        cell
        for cell in notebook["cells"]
        if is_code(cell) and "injected-parameters" not in tags(cell)
    ]


def titles(folder: Path) -> dict[str, str]:
    """The heading of each notebook of a folder by its name, without marks of emphasis or code.

    One that cannot be read, or has no heading, is left out: running it tells what is wrong.
    """
    found = {}
    for path in sorted(folder.glob("*.ipynb")):
        with suppress(SinkbookError):
            texts = ["".join(c["source"]) for c in read_notebook(path)["cells"] if not is_code(c)]
            if heading := re.search(r"^# +(.+)$", "\n".join(texts), re.MULTILINE):
                found[path.stem] = re.sub(r"[`*]", "", heading[1]).strip()
    return found


def place_of(number: int, cell: dict) -> str:
    first_line = next(iter(cell["source"].strip().splitlines()), "")
    return f"code cell {number} ({first_line})"


def what_differs(executed: dict, asked: dict, parameters: Mapping[str, object]) -> str | None:
    """What in an executed notebook is not as it was asked for, in words; None: all is.

    Every code cell of `asked` has run, as it is there, with these parameters.
    """
    injected = [cell for cell in executed["cells"] if "injected-parameters" in tags(cell)]
    if [assigned(cell["source"]) for cell in injected] != [dict(parameters)]:
        return f"it was not run with {parameters}"
    ran, wanted = sources(executed), sources(asked)
    if [cell["source"] for cell in ran] != [cell["source"] for cell in wanted]:
        return "its cells are not those of the source"
    for number, cell in enumerate(ran, start=1):
        if cell["source"].strip() and cell.get("execution_count") is None:
            return f"{place_of(number, cell)} has not run"
    return None


@dataclass(frozen=True)
class Source:
    """A chapter as it was read, once: what is run, hashed and kept is this, whatever is edited."""

    path: Path
    content: bytes
    hash: str  # of all that decides what its executed copy says
    stamps: dict[Path, tuple[int, ...] | None]  # of the other files that do

    @property
    def name(self) -> str:
        return self.path.stem

    @cached_property
    def notebook(self) -> dict:
        return parse_notebook(self.content, self.path)

    def edited(self) -> list[str]:
        """The files beside the notebook that were written since, put back or not."""
        return [path.name for path, before in self.stamps.items() if stamp(path) != before]


def stamp(path: Path) -> tuple[int, ...] | None:
    """What tells whether a file was written since; None where there is none."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


# ---------------------------------------------------------------------------------------------
# Executed copies
# ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Execution:
    """A chapter's executed copy, how long it took, and whether it was taken from the cache."""

    path: Path
    seconds: float
    from_cache: bool = False

    @classmethod
    def kept(cls, path: Path, content_hash: str) -> "Execution | None":
        """The copy at `path` if it was executed from sources with this hash, else None.

        A copy that is not as `sealed` made it counts as not there.
        """
        try:
            notebook = read_notebook(path)
            about = notebook["metadata"].pop("sinkbook")
            digest = _digest(notebook, about["hash"], about["seconds"])
            if about["hash"] == content_hash and about["sha256"] == digest:
                return cls(path, float(about["seconds"]), from_cache=True)
        except (SinkbookError, KeyError, TypeError, ValueError):
            pass
        return None

    @property
    def chapter(self) -> str:
        return self.path.stem

    @cached_property
    def notebook(self) -> dict:
        return read_notebook(self.path)

    def outputs(self, key: str) -> list[dict]:
        """What the chapter's outputs carry in their metadata under `key`, in order."""
        return [
            output["metadata"][key]
            for cell in self.notebook["cells"]
            for output in cell.get("outputs", [])
            if key in output.get("metadata", {})
        ]

    def page(self) -> str:
        """The notebook to render: its headline first, the parameters as they were run, no traces.

        Papermill's injected cell is folded into the parameters cell, and what it notes down
        (this machine's paths, times) is left out.
        """
        notebook = copy.deepcopy(self.notebook)
        cells = notebook["cells"]
        injected = next((cell for cell in cells if "injected-parameters" in tags(cell)), None)
        if injected:
            cells.remove(injected)
            declared = next(cell for cell in cells if "parameters" in tags(cell))
            values = assigned(injected["source"])
            if values.items() - assigned(declared["source"]).items():
                declared["source"] = "\n".join(f"{k} = {v!r}" for k, v in values.items())
        headline_first(notebook)
        for cell in cells:
            cell["metadata"].pop("papermill", None)
            cell["metadata"].pop("execution", None)
            describe_figures(cell)
        # Of the machine; and of widgets, which no kernel answers on a page.
        for noted in ("papermill", "sinkbook", "widgets"):
            notebook["metadata"].pop(noted, None)
        if self.outputs("sinkbook.facts"):
            text = f'<p class="sinkbook-facts">Computed in {self.seconds:.0f} seconds.</p>'
            cells.append({"cell_type": "markdown", "id": "seconds", "metadata": {}, "source": text})
        return json.dumps(notebook)


def headline_first(notebook: dict) -> None:
    """Show the figure of the cell tagged `headline` right behind the first cell, the question.

    The code stays where it is, since cells run in their order; only what it shows moves.
    """
    cells = notebook["cells"]
    headline = next((cell for cell in cells if "headline" in tags(cell)), None)
    if headline is None:
        return
    figure = headline["metadata"].pop("mystnb", {})
    metadata = {"tags": ["remove-input"], "mystnb": figure}
    source = "# Shown by the cell tagged 'headline', further down."  # no page shows an empty cell
    shown = {**headline, "id": f"{headline['id']}-headline", "source": source, "metadata": metadata}
    headline["outputs"] = []
    cells.insert(1, shown)


def describe_figures(cell: dict) -> None:
    """Say in a cell's figures, which `figures.svg` has drawn, what its metadata say of them."""
    described = escape(cell["metadata"].get("mystnb", {}).get("image", {}).get("alt", ""))
    for output in cell.get("outputs", []):
        html = "".join(output.get("data", {}).get("text/html", ""))
        if html.startswith('<div class="sinkbook-figure"'):
            said = html.replace('aria-label=""', f'aria-label="{described}"')
            output["data"]["text/html"] = said


def sealed(notebook: dict, content_hash: str | None, seconds: float) -> str:
    """An executed notebook as it is kept: with the hash of its sources, its seconds, a checksum."""
    digest = _digest(notebook, content_hash, seconds)
    about = {"hash": content_hash, "seconds": seconds, "sha256": digest}
    return json.dumps(notebook | {"metadata": notebook["metadata"] | {"sinkbook": about}})


def _digest(*what: object) -> str:
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()


# ---------------------------------------------------------------------------------------------
# In the kernel
# ---------------------------------------------------------------------------------------------

# The variable that names the log of the chapter that a kernel runs.
LOG = "SINKBOOK_LOG"
# What warns of the machine (a folder that cannot be written, a disk without locks), not of numbers.
ABOUT_THE_MACHINE = ("filelock", "matplotlib")
# matplotlib says so where it took longer than a second, in the name of whoever draws.
ABOUT_ITS_SPEED = 'Creating legend with loc="best" can be slow'


def load_ipython_extension(shell: object) -> None:
    """Let what libraries log go to the chapter's log: it is no part of the page.

    The kernel of a chapter that is run loads this module as an extension of IPython. Warnings still
    stand on the page, where they stop the chapter, but for those of the machine.
    """
    logging.basicConfig(filename=os.environ[LOG], encoding="utf-8", format="%(name)s: %(message)s")
    specs = [find_spec(name) for name in ABOUT_THE_MACHINE]
    folders = [place for spec in specs if spec for place in spec.submodule_search_locations or ()]
    show = warnings.showwarning

    def show_or_log(message, category, filename, lineno, file=None, line=None):
        of_machine = str(message).startswith(ABOUT_ITS_SPEED) or any(
            Path(filename).is_relative_to(folder) for folder in folders
        )
        if file is None and of_machine:
            logging.getLogger("py.warnings").warning("%s: %s", category.__name__, message)
        else:
            show(message, category, filename, lineno, file, line)

    warnings.showwarning = show_or_log
