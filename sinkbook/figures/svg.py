"""A matplotlib figure as SVG for a page: in the page's own colours, with words under the pointer.

The page's style sheet sets letters and colours, so a figure follows it into the dark; where there
is none, as in Jupyter, it has the colours of the style. Every element name, attribute and text
comes out of an XML writer: whatever a token spells, it is only shown.
"""

import colorsys
import hashlib
import io
import re
from collections.abc import Mapping, Sequence
from xml.etree import ElementTree

import matplotlib
import numpy as np
from jaxtyping import Float
from matplotlib.collections import QuadMesh
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure

from sinkbook.figures import phone
from sinkbook.figures.style import BACKCOPY, BIGRAM, DRAIN, LARGEST, ON_MAP, OTHER, PEAK, SINK

SVG, XLINK = "{http://www.w3.org/2000/svg}", "{http://www.w3.org/1999/xlink}"
# What a colour of the figures is called in the page's style sheet.
COLOURS = {
    SINK: "sink",
    DRAIN: "drain",
    PEAK: "peak",
    BACKCOPY: "trigger",
    BIGRAM: "bigram",
    LARGEST: "largest",
    OTHER: "other",
    "#555555": "muted",
    "#000000": "ink",
    "#ffffff": "paper",
    ON_MAP: "on-map",
}
_NAMES = {colour.lower(): name for colour, name in COLOURS.items()}
_OTHERWISE = {"ink": "currentColor", "muted": "currentColor", "paper": "#ffffff"}
# On white, letters need more ink than lines do.
_LETTERS = {"drain": "#B34F00", "peak": "#007355", "trigger": "#A8437F", "bigram": "#855B00"}
_LETTERS |= {"largest": "#1F6F9F", "other": "#666666"}
_COLOUR = re.compile(r"(?<=: )#[0-9a-f]{6}", re.IGNORECASE)
_URL = re.compile(r"url\(#([^)]+)\)")
_NUMBER = re.compile(r"-?\d+\.\d{2,}")
_PIXELS = 4 / 3  # of the page in a point
_COLUMN, _LEAST = 672, 10.5  # pixels: a wide page's column, and its smallest letters
_DPI = 220  # of what is drawn in pixels: maps of very many cells
_OFF = 0.12  # points that a line may pass beside one of its own
_MANY_CELLS = 1500
# Luminances: of ink on white at a contrast of 3 to 1, and on a dark page at 5 to 1.
_INK_ON_WHITE, _INK_ON_BLACK = 0.3, 0.25
MAPPED = "mapped"  # the class of what has a colour map: a page turns it round in the dark


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
    root = _drawn(figure)
    for gid, words in (titles or {}).items():
        _entitle(root.find(f".//*[@id='{gid}']"), marks, words)
    return _element(root, name, described)


def for_pages(figure: Figure) -> str:
    """The figure as HTML of two drawings, the second one for phones; a page shows one of them.

    A page says in their `aria-label` what they show. The figure stays arranged for phones.
    """
    for axes in figure.axes:
        for mesh in axes.collections:
            mesh.set_rasterized(isinstance(mesh, QuadMesh))  # nobody asks for one of its cells
    points_a_pixel = max(figure.get_size_inches()[0] * 72 / _COLUMN, 1 / _PIXELS)
    phone.legible(figure, _LEAST * points_a_pixel)
    wide = _drawn(figure)
    phone.rearrange(figure)
    return (
        f'<div class="sinkbook-figure">{_arrangement(wide, "wide", "")}'
        f"{_arrangement(_drawn(figure), 'narrow', 'display: none; ')}</div>"
    )


def show_in_notebooks() -> None:
    """From here on a notebook shows figures as `for_pages` makes them, and in no other form.

    Outside of IPython nothing changes.
    """
    from IPython import get_ipython

    if (shell := get_ipython()) is None:
        return
    # Its formats are registered when it is imported: ours come afterwards.
    import matplotlib_inline.backend_inline  # noqa: F401

    formatters = shell.display_formatter.formatters
    for kind in ("image/png", "image/jpeg", "image/svg+xml", "application/pdf"):
        formatters[kind].pop(Figure, None)
    formatters["text/html"].for_type(Figure, for_pages)


def _arrangement(root: ElementTree.Element, kind: str, style: str) -> str:
    """One of the two drawings, under a name made of its own content."""
    content = ElementTree.tostring(root)
    width = float(root.get("viewBox").split()[2])
    style += f"max-width: {width * _PIXELS:.0f}px"
    name = f"f{hashlib.sha256(content).hexdigest()[:8]}"
    return _element(root, name, "", {"class": kind, "style": style})


def _drawn(figure: Figure) -> ElementTree.Element:
    """The figure as matplotlib writes it, with ids that depend on nothing else."""
    mapped = set()
    for axes in figure.axes:
        for number, collection in enumerate(axes.collections):
            if collection.get_array() is not None:
                collection.set_gid(collection.get_gid() or f"{MAPPED}-{number}")
                mapped.add(collection.get_gid())
                if isinstance(collection, QuadMesh) and collection.get_array().size > _MANY_CELLS:
                    collection.set_rasterized(True)
        for image in axes.images:
            image.set_interpolation("none")  # its own pixels, however large they are shown
    file = io.BytesIO()
    # The salt makes the same ids each time.
    written = {"svg.fonttype": "none", "svg.hashsalt": "sinkbook", "path.simplify_threshold": 0.3}
    with matplotlib.rc_context(written):
        figure.savefig(file, format="svg", transparent=True, dpi=_DPI, metadata={"Date": None})
    root = ElementTree.fromstring(file.getvalue())  # nosec B314: drawn two lines above
    for element in list(root):
        if element.tag == f"{SVG}metadata":
            root.remove(element)
    for element in root.iter():
        if element.tag == f"{SVG}image" or element.get("id") in mapped:
            element.set("class", MAPPED)
    return root


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


def _element(
    root: ElementTree.Element,
    name: str,
    described: str,
    attributes: Mapping[str, str] | None = None,
) -> str:
    """The drawing for a page: ids that no other figure has, the page's colours and letters."""
    _rename(root, name)
    _for_the_page(root, mapped=False)
    size = root.get("viewBox")
    root.attrib = {"viewBox": size, "role": "img", "aria-label": described}
    root.attrib |= {"fill": "currentColor"} | dict(attributes or {})
    return ElementTree.tostring(root, encoding="unicode")


def _rename(root: ElementTree.Element, name: str) -> None:
    """Short ids that begin with `name` for what is referred to, and none for the rest."""
    values = [value for element in root.iter() for value in element.attrib.values()]
    used = [found for value in values for found in re.findall(r"^#(.+)|url\(#([^)]+)\)", value)]
    named = dict.fromkeys(href or url for href, url in used)
    short = {before: f"{name}-{number}" for number, before in enumerate(named)}
    for element in root.iter():
        renamed = {}
        for key, value in element.attrib.items():
            if key == "id":
                value = short.get(value)
            elif key == f"{XLINK}href" and value.startswith("#"):
                value = f"#{short[value[1:]]}"
            else:
                value = _URL.sub(lambda found: f"url(#{short[found[1]]})", value)
            if value:
                renamed[key.removeprefix(XLINK)] = value
        element.attrib = renamed


def _for_the_page(element: ElementTree.Element, *, mapped: bool) -> None:
    """An element and all below it; `mapped` is what a colour map has coloured."""
    element.tag = element.tag.removeprefix(SVG)
    mapped = mapped or element.get("class") == MAPPED
    _clip_once(element)
    if "d" in element.attrib:
        element.set("d", _shorter(element.get("d")))
    for place in ("x", "y"):
        if place in element.attrib and element.tag != "image":
            element.set(place, _rounded(element.get(place)))
    if element.get("transform", "").startswith("rotate(-0 "):
        element.attrib.pop("transform")
    if element.tag in ("text", "tspan"):
        _letters(element)
    elif (style := element.get("style")) and not mapped:
        element.set("style", _COLOUR.sub(lambda found: _colour(found[0]), style))
    for child in element:
        _for_the_page(child, mapped=mapped)
    if element.tag not in ("text", "tspan", "title"):
        element.text = (element.text or "").strip()
        for child in element:
            child.tail = None


def _clip_once(element: ElementTree.Element) -> None:
    """Dots that are all cut off in the same place, each in a group of its own, in one group."""
    groups = [child for child in element if child.tag.removeprefix(SVG) == "g"]
    cuts = {tuple(group.attrib.items()) for group in groups}
    if len(groups) > 1 and len(cuts) == 1 and all(set(g.attrib) == {"clip-path"} for g in groups):
        element.set("clip-path", groups[0].get("clip-path"))
        for group in groups:
            element.remove(group)
            element.extend(group)


def _rounded(numbers: str) -> str:
    """Lengths to a tenth of a point."""
    return _NUMBER.sub(lambda number: f"{float(number[0]):.1f}", numbers)


def _shorter(path: str) -> str:
    """A path to a tenth of a point, without the points of a line that lie on their way."""
    rounded = _rounded(path).split()
    if "".join(rounded[::3]) != "M" + "L" * (len(rounded) // 3 - 1):
        return " ".join(rounded)
    points = np.array([rounded[1::3], rounded[2::3]], dtype=float).T
    kept = _bends(points)
    return " ".join(word for number in kept for word in rounded[3 * number : 3 * number + 3])


def _bends(points: Float[np.ndarray, "point 2"]) -> list[int]:
    """Which points a line has to go through, to stay within `_OFF` of all others."""
    kept, open_ends = {0, len(points) - 1}, [(0, len(points) - 1)]
    while open_ends:
        start, end = open_ends.pop()
        if end - start < 2:
            continue
        (x, y), between = points[end] - points[start], points[start + 1 : end] - points[start]
        length = np.hypot(x, y)
        # Where a line comes back to where it began, distances are those to that point.
        off = np.abs(between @ [-y, x]) / length if length else np.hypot(*between.T)
        furthest = start + 1 + int(off.argmax())
        if off.max() > _OFF or np.hypot(*between.T).max() > length + _OFF:
            kept.add(furthest)
            open_ends += [(start, furthest), (furthest, end)]
    return sorted(kept)


def _letters(element: ElementTree.Element) -> None:
    """Size, weight and width of letters as attributes, which a style sheet may overrule."""
    rules = dict(rule.split(": ", 1) for rule in element.get("style", "").split("; ") if rule)
    kept = {"text-anchor": rules.get("text-anchor"), "opacity": rules.get("opacity")}
    fill = rules.get("fill", "#000000").lower()
    if fill != "#000000":
        kept["fill"] = _colour(fill, letters=True)
    style = "; ".join(f"{key}: {value}" for key, value in kept.items() if value)
    element.attrib.pop("style", None)
    if style:
        element.set("style", style)
    if size := rules.get("font-size"):
        element.set("font-size", size.removesuffix("px"))
    if weight := rules.get("font-weight"):
        element.set("font-weight", weight)
    if "monospace" in rules.get("font-family", ""):
        element.set("font-family", "ui-monospace, Menlo, Consolas, monospace")


def _colour(colour: str, *, letters: bool = False) -> str:
    """A role's colour by its name in the style sheet; any other one with its like in the dark."""
    name = _NAMES.get(colour.lower())
    if name is None:
        return f"light-dark({colour}, {in_the_dark(colour)})"
    if letters and name in _LETTERS:
        return f"var(--{name}-letters, {_LETTERS[name]})"
    return f"var(--{name}, {_OTHERWISE.get(name, colour)})"


def in_the_dark(colour: str) -> str:
    """A colour as light as the given one is dark, of the same hue.

    What can be told from white can be told from black: colours of middle lightness become lighter.

    >>> in_the_dark("#222222"), in_the_dark("#eeeeee"), in_the_dark("#7a5bc7")
    ('#dddddd', '#292929', '#947bd2')
    """
    hue, lightness, saturation = colorsys.rgb_to_hls(*to_rgb(colour))
    ink = _luminance(colour) <= _INK_ON_WHITE
    for lighter in np.linspace(max(1 - lightness, 0.16), 1):
        found = to_hex(colorsys.hls_to_rgb(hue, lighter, saturation))
        if not ink or _luminance(found) >= _INK_ON_BLACK:
            break
    return found


def _luminance(colour: str) -> float:
    """The relative luminance that WCAG 2 reckons contrasts by, from 0 to 1."""
    channels = np.array(to_rgb(colour))
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    return float(linear @ [0.2126, 0.7152, 0.0722])
