"""The pages of the book that are made from the package, or from what its tests found.

This module is a Sphinx extension.
"""

import ast
import json
import re
from graphlib import TopologicalSorter
from pathlib import Path

PACKAGE = Path(__file__).parent.parent
# The line of book/api.md that the modules take the place of.
MARKER = "<!-- modules -->"
# Markers of book/architectures.md, each with a key of book/architectures.json.
ARCHITECTURES = re.compile(r"<!-- architectures: (\w+) -->")


def modules() -> list[str]:
    """Names of the package's modules, as `toy.training`, each after all those that it imports.

    Raises `graphlib.CycleError` if some import each other in a circle.
    """
    files = {_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}
    imports = {name: _imports(path, set(files)) for name, path in files.items()}
    order = TopologicalSorter(imports).static_order()
    return [name for name in order if files[name].stem != "__init__"]


def _name(path: Path) -> str:
    """The name of a module or package, from the top package on; that one's own is empty."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if path.stem == "__init__" else parts)


def _imports(path: Path, names: set[str]) -> list[str]:
    """Modules and packages of this package that a module imports when it is loaded."""
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom) and node.module:
            package, _, module = node.module.partition(".")
            if package == "sinkbook":
                below = {f"{module}.{alias.name}".lstrip(".") for alias in node.names}
                found |= below & names or {module}
    return sorted(found)


def setup(app) -> dict:
    """What Sphinx calls: fill in what pages mark, and show docstrings as they are written."""
    app.connect("source-read", _list_modules)
    app.connect("source-read", _list_architectures)
    app.connect("autodoc-process-docstring", _as_written)
    return {"parallel_read_safe": True}


def _list_modules(app, page: str, source: list[str]) -> None:
    """Put a section for each module in the place of the marker: what it is, and a fold."""
    if MARKER in source[0]:
        source[0] = source[0].replace(MARKER, "\n".join(map(_section, modules())))


def _list_architectures(app, page: str, source: list[str]) -> None:
    """Put what the tests found in the place of each marker."""
    if ARCHITECTURES.search(source[0]):
        path = Path(app.srcdir) / "book" / "architectures.json"
        found = json.loads(path.read_text(encoding="utf-8"))
        source[0] = ARCHITECTURES.sub(lambda marker: architectures(found[marker[1]]), source[0])


def architectures(found: str | list[str] | dict[str, str]) -> str:
    """A version as it is; architectures as a list of names, or of names and what they answer.

    >>> architectures(["gpt2", "llama"])
    '`gpt2`, `llama`'
    >>> architectures({"mamba": "no attention"})
    '`mamba`\\n: no attention\\n'
    """
    if isinstance(found, str):
        return found
    if isinstance(found, list):
        return ", ".join(f"`{name}`" for name in found)
    return "\n".join(f"`{name}`\n: {says}\n" for name, says in found.items())


def _section(name: str) -> str:
    path = PACKAGE / f"{name.replace('.', '/')}.py"
    about = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    return f"""## sinkbook.{name}

{about}

````{{dropdown}} Functions and classes
```{{eval-rst}}
.. automodule:: sinkbook.{name}
   :members:
```
````
"""


def _as_written(app, what, name, obj, options, lines: list[str]) -> None:
    """Paragraphs as prose with `code` in it; examples and whatever is indented word for word.

    Docstrings here are plain text with backticks; reStructuredText would stumble over `*batch`.
    A module's own stands above the fold already.
    """
    if what == "module":
        lines[:] = []
        return
    written = []
    for block in re.split(r"\n\s*\n", "\n".join(lines).strip("\n")):
        if block.startswith((" ", ">>>", "-", "*")):
            language = "pycon" if block.startswith(">>>") else "text"
            written += [f".. code-block:: {language}", ""]
            written += [f"    {line}" for line in block.split("\n")]
        else:
            written.append(_prose(block))
        written.append("")
    lines[:] = written


def _prose(paragraph: str) -> str:
    """A paragraph as reStructuredText: `code` stays code, every other character is itself."""
    pieces = re.split(r"(`[^`]+`)", paragraph.replace("\n", " "))
    return "".join(
        f"\\ ``{piece[1:-1].strip()}``\\ "
        if piece.startswith("`")
        else re.sub(r"([\\*_|:`])", r"\\\1", piece)
        for piece in pieces
    )
