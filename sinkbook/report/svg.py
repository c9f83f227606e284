"""A matplotlib figure as SVG for a page: in the page's own colours, with words under the pointer.

The page's style sheet sets letters and colours, so a figure follows it into the dark. Every element
name, attribute and text comes out of an XML writer: whatever a token spells, it is only shown.
"""

import io
import re
from collections.abc import Mapping, Sequence
from xml.etree import ElementTree

import matplotlib
from matplotlib.figure import Figure

from sinkbook.figures.style import DRAIN, OTHER, PEAK, SINK
from sinkbook.report.figures import LARGEST

SVG, XLINK = "{http://www.w3.org/2000/svg}", "{http://www.w3.org/1999/xlink}"
# What a colour of the figures is called in the page's style sheet.
COLOURS = {
    SINK: "sink",
    DRAIN: "drain",
    PEAK: "peak",
    LARGEST: "largest",
    OTHER: "other",
    "#555555": "muted",
    "#000000": "ink",
}
_COLOUR = re.compile("|".join(COLOURS), re.IGNORECASE)
_VARIABLES = {colour.lower(): f"var(--{name})" for colour, name in COLOURS.items()}
_KEPT_OF_TEXT = ("text-anchor",)  # its letters are the page's


def embedded(
    figure: Figure,
    name: str,
    described: str,
    *,
    marks: str = "",
    titles: Mapping[str, Sequence[str | None]] | None = None,
) -> str:
    """The figure as an `svg` element of HTML, without an address or a script.

    `name` sets its ids apart from those of the other figures on the page; `described` is for those
    who do not see it. `titles` gives, by gid, a title to each mark of a collection, in the order in
    which they are drawn, and takes away those whose title is None; `marks` is their class.
    """
    file = io.BytesIO()
    # The salt makes the same ids each time.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    root = ElementTree.fromstring(file.getvalue())  # nosec B314: drawn one line above
    for element in list(root):
        if element.tag == f"{SVG}metadata":
            root.remove(element)
    for gid, words in (titles or {}).items():
        _entitle(root.find(f".//*[@id='{gid}']"), marks, words)
    _for_the_page(root, name)
    size = root.get("viewBox")
    root.attrib = {"viewBox": size, "role": "img", "aria-label": described}
    return ElementTree.tostring(root, encoding="unicode")


def _entitle(group: ElementTree.Element, marks: str, titles: Sequence[str | None]) -> None:
    """Give each mark in a group its title and class; those without a title go."""
    parents = {
        mark: parent
        for parent in group.iter()
        if parent.tag != f"{SVG}defs"
        for mark in parent
        if mark.tag in (f"{SVG}path", f"{SVG}use")
    }
    for (mark, parent), words in zip(parents.items(), titles, strict=True):
        if words is None:
            parent.remove(mark)
        else:
            mark.set("class", marks)
            ElementTree.SubElement(mark, f"{SVG}title").text = words


def _for_the_page(root: ElementTree.Element, name: str) -> None:
    """Names without namespaces, ids that no other figure has, the page's colours and letters."""
    for element in root.iter():
        element.tag = element.tag.removeprefix(SVG)
        element.attrib = {
            key.removeprefix(XLINK): re.sub("(?<=#)(?=[a-zA-Z])", f"{name}-", value)
            if key == f"{XLINK}href" or value.startswith("url(#")
            else value
            for key, value in element.attrib.items()
        }
        if "id" in element.attrib:
            element.set("id", f"{name}-{element.get('id')}")
        if style := element.get("style"):
            if element.tag == "text":
                rules = [rule.strip() for rule in style.split(";")]
                style = "; ".join(rule for rule in rules if rule.startswith(_KEPT_OF_TEXT))
            element.set("style", _COLOUR.sub(lambda found: _VARIABLES[found[0].lower()], style))
