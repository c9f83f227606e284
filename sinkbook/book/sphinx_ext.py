"""What pages have beyond Markdown: what is made from the package, chapters by number, formulas.

This module is a Sphinx extension. It fills in what pages mark; a chapter is called by its number
with the role `{chapter}`; an exercise asks for a formula with `{formula}`. A drawing in SVG stands
in the page itself and takes its colours. Pages get the scripts of what is on them.
"""

import ast
import json
import re
from functools import cache
from html import escape
from pathlib import Path

import yaml
from docutils import nodes
from sphinx import addnodes
from sphinx.transforms import SphinxTransform
from sphinx.util.docutils import SphinxDirective, SphinxRole

from sinkbook.book.exercises import FORMULAS
from sinkbook.pages.scripts import LAB_SCRIPTS, QUESTION_SCRIPTS

PACKAGE = Path(__file__).parent.parent
# Packages in the order of book/api.md: what the probe is made of, then what the book shows with it.
PACKAGES = (
    *("probe", "models", "data", "report", "figures"),
    *("toy", "theory", "mitigations", "llm", "pages"),
)
# The line of book/api.md that the packages take the place of.
MARKER = "<!-- packages -->"
# A row of the table of public names in book/api.md.
NAME = re.compile(r"^\| `(\w+)`", re.MULTILINE)
# Markers of book/architectures.md, each with a key of book/architectures.json.
ARCHITECTURES = re.compile(r"<!-- architectures: (\w+) -->")
# Where a page that is no notebook has a lab: the training of a toy, in its compact form.
LAB = "<!-- lab: training -->"
# Scripts by the parts of a page that need them, which are classes of ours.
SCRIPTS = {("lab",): LAB_SCRIPTS, ("formula", "choices"): QUESTION_SCRIPTS}
# What the theme and its extensions write that a screen reader stumbles over, or a phone waits for,
# and what mends it.
FAULTS = (
    # A name that is not the text of the button, "Search Ctrl+K".
    (re.compile(r'(<button class="btn search-button-field [^>]*?) aria-label="Search"'), r"\1"),
    # Titles of three icons, of which one is shown, in a button with a name of its own.
    (re.compile(r'(<i class="theme-switch [^>]*?) title="[^"]*"'), r"\1"),
    # The same for what unfolds code, which says "Show the code".
    (re.compile(r'<summary aria-label="Toggle hidden content">'), "<summary>"),
    # A span for each word of a signature, inside of one for its colour: a tenth of the reference.
    (re.compile(r'(?<=<span class="[nop]">)<span class="pre">([^<]*)</span>(?=</span>)'), r"\1"),
    # A list whose children are no items.
    (re.compile(r'<div role="list" class="citation-list">'), '<div class="citation-list">'),
    # Cells that run on somebody's server, which the renderer prepares twice over: no page has them.
    (re.compile(r"<link [^>]*sphinx-thebe\.css[^>]*>\s*"), ""),
    (re.compile(r"<script>const THEBE_JS_URL = [^<]*</script>\s*"), ""),
    (re.compile(r'<script [^>]*src="[^"]*sphinx-thebe\.js[^"]*"></script>\s*'), ""),
    (re.compile(r'<script type="text/x-thebe-config">[^<]*</script>\s*'), ""),
    (re.compile(r"<script>kernelName = '[^']*'</script>\s*"), ""),
    # The same name for every exercise and every solution of a page.
    (re.compile(r'<section id="(?:exercise|solution)-content">'), "<section>"),
)


def public() -> dict[str, str]:
    """The names that `sinkbook` offers, and the module that each comes from, as `probe.measure`."""
    stub = ast.parse((PACKAGE / "__init__.pyi").read_text(encoding="utf-8"))
    return {
        alias.name: node.module
        for node in stub.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }


def modules(package: str) -> list[str]:
    """Names of the modules of a package, as `toy.training`, in the order of the alphabet."""
    paths = sorted((PACKAGE / package).glob("*.py"))
    return [f"{package}.{path.stem}" for path in paths if path.stem != "__init__"]


def setup(app) -> dict:
    """What Sphinx calls: fill in what pages mark, docstrings as they are written, and mend."""
    app.connect("source-read", _list_packages)
    app.connect("source-read", _list_architectures)
    app.connect("source-read", _place_lab)
    app.connect("html-page-context", _load_scripts)
    app.connect("autodoc-process-docstring", _as_written)
    app.connect("build-finished", _mend_pages)
    app.add_role("chapter", _Chapter())
    app.add_directive("formula", _Formula)
    app.add_transform(_CapitalChapters)
    app.add_transform(_EmbedDrawings)
    app.setup_extension("sinkbook.pages.guesses")
    return {"parallel_read_safe": True}


@cache
def chapter_numbers(toc: str) -> dict[str, int]:
    """The numbers that jupyter-book gives the chapters of a table of contents, by file name.

    >>> chapter_numbers("parts: [{numbered: true, chapters: [{file: book/01_a}]}]")
    {'01_a': 1}
    """
    parts = yaml.safe_load(toc)["parts"]
    numbered = [part["chapters"] for part in parts if part.get("numbered")]
    files = [Path(chapter["file"]).name for part in numbered for chapter in part]
    return {name: number for number, name in enumerate(files, start=1)}


class _Chapter(SphinxRole):
    """`{chapter}` with the name of a chapter: "chapter 5", as a link.

    The number is that of the table of contents; a name that is not in it is a warning.
    """

    def run(self) -> tuple[list[nodes.Node], list[nodes.system_message]]:
        toc = Path(self.env.app.srcdir) / "_toc.yml"
        numbers = chapter_numbers(toc.read_text(encoding="utf-8"))
        if self.text not in numbers:
            problem = f"no chapter {self.text!r} in _toc.yml. There are {', '.join(numbers)}."
            message = self.inliner.reporter.warning(problem, line=self.lineno)
            return [self.inliner.problematic(self.rawtext, self.rawtext, message)], [message]
        link = addnodes.pending_xref(
            refdomain="std",
            reftype="doc",
            reftarget=f"/book/{self.text}",
            refdoc=self.env.docname,
            refexplicit=True,
            refwarn=True,
        )
        link += nodes.inline("", f"chapter {numbers[self.text]}", classes=["sinkbook-number"])
        return [link], []


class _CapitalChapters(SphinxTransform):
    """Let a sentence that begins with a chapter's number begin with a capital."""

    default_priority = 860

    def apply(self) -> None:
        for name in list(self.document.findall(_is_chapter)):
            link = name.parent
            before = "".join(node.astext() for node in link.parent[: link.parent.index(link)])
            if not before or re.search(r"[.?!]\s+$", before):
                name.replace(name[0], nodes.Text(name.astext().capitalize()))


def _is_chapter(node: nodes.Node) -> bool:
    return isinstance(node, nodes.inline) and "sinkbook-number" in node["classes"]


class _EmbedDrawings(SphinxTransform):
    """Put the drawings that figures name into the page: an image would know nothing of its colours.

    A drawing names colours by role, as `var(--sink)`, and its figure says what it shows.
    """

    default_priority = 860

    def apply(self) -> None:
        for image in list(self.document.findall(_is_drawing)):
            name, path = self.env.relfn2path(image["uri"])
            self.env.note_dependency(name)
            html = embedded_drawing(Path(path).read_text(encoding="utf-8"), image.get("alt", ""))
            image.replace_self(nodes.raw("", html, format="html"))


def _is_drawing(node: nodes.Node) -> bool:
    return isinstance(node, nodes.image) and node["uri"].endswith(".svg")


def embedded_drawing(svg: str, described: str) -> str:
    """A drawing as a page shows it, in the colours and letters of the book's other figures.

    >>> embedded_drawing('<svg id="a"/>', "<s>")
    '<div class="sinkbook-figure drawn"><svg role="img" aria-label="&lt;s&gt;" id="a"/></div>'
    """
    named = svg.strip().replace("<svg ", f'<svg role="img" aria-label="{escape(described)}" ', 1)
    return f'<div class="sinkbook-figure drawn">{named}</div>'


class _Formula(SphinxDirective):
    """A line to type the formula into that an exercise asks for, by its name in `FORMULAS`."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        name = self.arguments[0]
        if name not in FORMULAS:
            raise self.error(f"no formula {name!r}. There are {', '.join(FORMULAS)}.")
        return [nodes.raw("", FORMULAS[name].html(name), format="html")]


def _mend_pages(app, exception: Exception | None) -> None:
    """Mend the theme's faults in every page."""
    if exception is None:
        for path in Path(app.outdir).rglob("*.html"):
            path.write_text(mended(path.read_text(encoding="utf-8")), encoding="utf-8")


def mended(html: str) -> str:
    """A page without the theme's faults.

    >>> mended('<i class="theme-switch fa-sun" data-mode="light" title="Light"></i>')
    '<i class="theme-switch fa-sun" data-mode="light"></i>'
    """
    for fault, cure in FAULTS:
        html = fault.sub(cure, html)
    return html


def _list_packages(app, page: str, source: list[str]) -> None:
    """Link the public names to where they are described, and put the packages at the marker."""
    if MARKER in source[0]:
        text = NAME.sub(lambda row: f"| {_link(row[1])}", source[0])
        source[0] = text.replace(MARKER, "\n".join(map(_package, PACKAGES)))


def _link(name: str) -> str:
    """A public name, with a link to where the page describes it, if it does."""
    module = public().get(name, "")
    described = module.partition(".")[0] in PACKAGES
    return f"{{py:obj}}`{name} <sinkbook.{module}.{name}>`" if described else f"`{name}`"


def _list_architectures(app, page: str, source: list[str]) -> None:
    """Put what the tests found in the place of each marker."""
    if ARCHITECTURES.search(source[0]):
        path = Path(app.srcdir) / "book" / "architectures.json"
        found = json.loads(path.read_text(encoding="utf-8"))
        source[0] = ARCHITECTURES.sub(lambda marker: architectures(found[marker[1]]), source[0])


def _place_lab(app, page: str, source: list[str]) -> None:
    """Put the lab at its marker. Its picture shows the run that chapters have trained as well."""
    if LAB in source[0]:
        from sinkbook.book.experiments import in_the_page
        from sinkbook.pages.lab import training
        from sinkbook.toy.training import train

        made = training(train(in_the_page()["softmax"]), compact=True, starts=True)
        source[0] = source[0].replace(LAB, made._repr_html_())


def _load_scripts(app, page: str, template: str, context: dict, doctree) -> None:
    """Give pages the scripts of what they have: a lab, a line for a formula, choices."""
    for part, names in SCRIPTS.items():
        if any(f'class="sinkbook-{each}"' in context.get("body", "") for each in part):
            for name in names:
                app.add_js_file(f"../vendor/{name}", loading_method="defer")


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


def _package(name: str) -> str:
    sections = "\n".join(map(_module, modules(name)))
    return f"## sinkbook.{name}\n\n{_about(name, '__init__')}\n\n{sections}"


def _module(name: str) -> str:
    """What a module is, and a fold with its functions and classes."""
    return f"""### sinkbook.{name}

{_about(*name.split("."))}

````{{dropdown}} Functions and classes
```{{eval-rst}}
.. automodule:: sinkbook.{name}
   :members:
```
````
"""


def _about(package: str, module: str) -> str:
    """A module's docstring as Markdown, its examples as code."""
    text = (PACKAGE / package / f"{module}.py").read_text(encoding="utf-8")
    blocks = re.split(r"\n\s*\n", ast.get_docstring(ast.parse(text)) or "")
    return "\n\n".join(
        f"```pycon\n{block}\n```" if block.startswith(">>>") else block for block in blocks
    )


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
