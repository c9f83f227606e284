"""Notebooks as plain data: cells, parameters, and what went wrong in an executed one."""

import ast
import json
from collections.abc import Collection
from pathlib import Path

from sinkbook.errors import SinkbookError


def tags(cell: dict) -> list[str]:
    """A cell's tags."""
    return cell["metadata"].get("tags", [])


def is_code(cell: dict) -> bool:
    """Whether a cell is run."""
    return cell["cell_type"] == "code"


def assigned(source: str) -> dict[str, object]:
    """Names that a parameters cell assigns, with their literal values (None: not a literal).

    >>> assigned('profile = "quick"  # or "paper"\\nseed = 0')
    {'profile': 'quick', 'seed': 0}
    """
    found: dict[str, object] = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            value = node.value.value if isinstance(node.value, ast.Constant) else None
            found.update({target.id: value for target in targets if isinstance(target, ast.Name)})
    return found


def read_notebook(path: Path) -> dict:
    """A notebook as plain data. One that is no notebook raises `SinkbookError`."""
    try:
        notebook = json.loads(path.read_text(encoding="utf-8"))
        notebook["cells"][0]["source"]
    except (ValueError, KeyError, IndexError) as error:
        raise SinkbookError(f"{path} is not a notebook that can be read: {error}.") from error
    for cell in notebook["cells"]:
        cell["source"] = "".join(cell["source"])
    return notebook


def check_parameters(path: Path, names: Collection[str]) -> None:
    """Raise `SinkbookError` unless the notebook declares these parameters.

    Papermill itself only warns about an unknown name, and without a `parameters` cell it injects
    above the defaults, which then win: a run at another profile would silently be a quick one.
    """
    cells = [cell for cell in read_notebook(path)["cells"] if "parameters" in tags(cell)]
    declared = assigned(cells[0]["source"]) if cells else {}
    if missing := [name for name in names if name not in declared]:
        what = "has no cell tagged 'parameters'" if not cells else f"declares no {missing[0]!r}"
        raise SinkbookError(
            f"{path.stem} {what}. Its first code cell carries the tag 'parameters' and assigns "
            f"{' and '.join(names)}, or it cannot be run at another profile."
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


def place_of(number: int, cell: dict) -> str:
    first_line = next(iter(cell["source"].strip().splitlines()), "")
    return f"code cell {number} ({first_line})"
