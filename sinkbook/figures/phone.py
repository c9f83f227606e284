"""A figure rearranged for a phone: as wide as it is, letters to be read, panels below each other.

What a figure function draws for a page of 1,280 pixels keeps its axes; only their places change,
the size of letters, and how much is written along an axis.
"""

import textwrap
from itertools import product

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.text import Text
from matplotlib.ticker import FixedLocator, LogFormatter, LogLocator, NullFormatter
from matplotlib.transforms import Bbox

WIDTH = 4.7  # inches, 338 points: shown at a point a pixel on a phone of 390
LEAST = 10.0  # points: the smallest letters on a phone
_ROW_HEIGHT = 2.3  # inches of a panel, at least
_MAP_HEIGHT = 3.6  # of one that keeps its shape
_LONGEST = 18  # letters of a name beside an axis, before it is broken
_SHORT, _ROWS = 3, 3  # letters of one that has room in rows of names, and how many rows
_PAD, _MARK = 3.5, 3.0  # points between an axis and its names, and of what marks a place on it
_MANY = 40  # names of an axis that need not all be written
FREE = "free"  # the gid of annotations that may stand anywhere near their points
NUMBER = "number"  # and of those that say how high a bar is
_BESIDE = 4.0  # points that a legend keeps away from what is drawn
_CROWD = 10  # free annotations that need a panel of more height than others


def legible(figure: Figure, least: float) -> None:
    """No letters smaller than `least` points, none over others along an axis, no legend twice.

    Axes of powers have numbers in place of small print.
    """
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            _plain_numbers(axis)
            for which in ("major", "minor"):
                if axis.get_tick_params(which).get("labelsize", least) < least:
                    axis.set_tick_params(which, labelsize=least)
    for text in figure.findobj(Text):
        if text.get_fontsize() < least:
            text.set_fontsize(least)
    _one_legend(figure)
    figure.canvas.draw()
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            names = _named(axis)
            if not names or len(axis.get_ticklabels()) > _MANY:
                _thin(axis, horizontal=axis is axes.xaxis)
    _free_legends(figure)
    for axes in figure.axes:
        set_apart(axes)


def set_apart(axes: Axes) -> None:
    """Put each `FREE` annotation near its point, where no other one is, and no point.

    Where there is no such place it is put where it covers least. A line leads to those further off.
    """
    notes = [text for text in axes.texts if text.get_gid() == FREE]
    if not notes:
        return
    axes.figure.canvas.draw()
    pixels = axes.figure.dpi / 72
    points = axes.transData.transform([note.xy for note in notes])
    taken = [Bbox.from_bounds(x - 3 * pixels, y - 3 * pixels, *[6 * pixels] * 2) for x, y in points]
    angles = np.linspace(0, 2 * np.pi, 12, endpoint=False)
    places = [d * np.array([np.cos(a), np.sin(a)]) for d, a in product((9, 18, 28, 40, 55), angles)]
    for note, point in zip(notes, points, strict=True):
        size = Text.get_window_extent(note).size
        choices = []
        for place in places:
            # The nearer end of the words is at the place, their middle where it is above or below.
            side = np.sign(place[0]) * (abs(place[0]) > 1)
            middle = point + pixels * place + (side * size[0] / 2, 0)
            box = Bbox.from_bounds(*(middle - size / 2), *size)
            inside = axes.bbox.contains(box.x0, box.y0) and axes.bbox.contains(box.x1, box.y1)
            choices.append((sum(map(box.overlaps, taken)) + 5 * (not inside), box, place))
            if choices[-1][0] == 0:
                break
        _, box, place = min(choices, key=lambda choice: choice[0])
        taken.append(box)
        note.set_position((box.min + box.max - 2 * point) / (2 * pixels))
        note.arrow_patch.set_visible(bool(np.hypot(*place) > 10))


def _free_legends(figure: Figure) -> None:
    """Move legends off what they would cover: above the panel, or the figure if it is the one."""
    legends = [axes.get_legend() for axes in figure.axes if axes.get_legend()]
    for legend in legends:
        if legend.get_bbox_to_anchor().width == 0 or not _covers(legend):
            continue
        again = _said_by(legend)
        again |= {"fontsize": legend.get_texts()[0].get_fontsize(), "ncols": len(again["labels"])}
        above = {"loc": "lower left", "bbox_to_anchor": (0, 1)}
        alone = len(legends) == 1 and not figure.legends
        parent = figure if alone else legend.axes
        legend.remove()
        parent.legend(**again, **({"loc": "outside upper center"} if alone else above))


def _said_by(legend: Legend) -> dict:
    """What a legend shows, for another one in its place."""
    labels = [text.get_text() for text in legend.get_texts()]
    title = legend.get_title().get_text() or None
    return {"handles": legend.legend_handles, "labels": labels, "title": title}


def _covers(legend: Legend) -> bool:
    """Whether a legend lies over lines, bars, bands or dots of its panel."""
    axes, box = legend.axes, legend.get_window_extent()
    lines = [line for line in axes.lines if len(line.get_path().vertices)]
    paths = [line.get_transform().transform_path(line.get_path()) for line in lines]
    if any(path.intersects_bbox(box, filled=False) for path in paths):
        return True
    # Dots without lines must not stand so near that its own marks are taken for some of them.
    around = box.padded(_BESIDE * axes.figure.dpi / 72)
    dots = [p for line, p in zip(lines, paths, strict=True) if line.get_linestyle() == "None"]
    if any(around.contains(x, y) for path in dots for x, y in path.vertices):
        return True
    if any(patch.get_window_extent().overlaps(box) for patch in axes.patches):
        return True
    for drawn in axes.collections:
        if len(offsets := drawn.get_offset_transform().transform(drawn.get_offsets())) > 1:
            if any(box.contains(x, y) for x, y in offsets):
                return True
        elif any(
            drawn.get_transform().transform_path(p).intersects_bbox(box, filled=True)
            for p in drawn.get_paths()
        ):
            return True
    return False


def _plain_numbers(axis: Axis) -> None:
    """Numbers as one says them on a logarithmic axis, and more of them where it is short."""
    if not isinstance(axis.get_major_formatter(), LogFormatter):
        return
    low, high = axis.get_view_interval()
    if axis.get_scale() == "log" and high < 60 * low:
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(plain)
    axis.set_minor_formatter(NullFormatter())


def _one_legend(figure: Figure) -> None:
    """Panels whose legends say the same words share the first one."""
    said = set()
    for axes in figure.axes:
        if legend := axes.get_legend():
            words = tuple(text.get_text() for text in legend.get_texts())
            if words in said:
                legend.remove()
            said.add(words)


def plain(value: float | int, _position: int = 0) -> str:
    """A number as one says it; far powers of ten with raised digits.

    >>> plain(0.01), plain(1000.0), plain(1e-7), plain(2e6)
    ('0.01', '1,000', '10⁻⁷', '2·10⁶')
    """
    if value == 0:
        return "0"
    power = int(np.floor(np.log10(abs(value)) + 1e-9))
    if -3 <= power <= 4:
        return f"{value:,.10g}".replace("-", "−")
    factor = value / 10.0**power
    raised = str(power).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return f"{'' if np.isclose(factor, 1) else f'{factor:.3g}·'}10{raised}"


def rearrange(figure: Figure) -> None:
    """Make the figure one for a phone."""
    height = _stack(figure)
    figure.set_size_inches(WIDTH, height)
    for axes in figure.axes:
        _names(axes)
    legible(figure, LEAST)
    for legend in [*figure.legends, *(axes.get_legend() for axes in figure.axes)]:
        if legend is not None:
            _narrow_legend(legend)
    figure.set_size_inches(WIDTH, max(height, _needed(figure)))
    for _ in range(2):  # what is left out changes what there is room for
        figure.canvas.draw()
        for axes in figure.axes:
            _thin(axes.xaxis, horizontal=True)
            _thin(axes.yaxis, horizontal=False)
            _shorten(axes)
            _turn_numbers(axes)
    _free_legends(figure)
    for legend in figure.legends:
        _narrow_legend(legend)
    for axes in figure.axes:
        set_apart(axes)


def _grid(figure: Figure) -> tuple[int, int]:
    """Rows and columns of the figure's panels; (1, 1) without a grid."""
    specs = [axes.get_subplotspec() for axes in figure.axes]
    grids = [spec.get_gridspec() for spec in specs if spec is not None]
    return (grids[0].nrows, grids[0].ncols) if grids else (1, 1)


def _stack(figure: Figure) -> float:
    """Put panels that stand side by side below each other, in reading order; the height then."""
    rows, columns = _grid(figure)
    height = figure.get_size_inches()[1]
    panels = [axes for axes in figure.axes if axes.get_subplotspec() is not None]
    panels.sort(key=lambda axes: axes.get_subplotspec().num1)
    small = all(_square(axes) for axes in panels)
    across = min(columns, (2 if len(panels) == 4 else 3) if small else 1 + (len(panels) > 3))
    if across < columns:
        count = -(-len(panels) // across)
        usual = WIDTH / across + 0.4 if small else max(_ROW_HEIGHT, min(height / rows, 3.0))
        inches = [
            _MAP_HEIGHT
            if not small and (_square(panels[row * across]) or _crowded(panels[row * across]))
            else usual
            for row in range(count)
        ]
        grid = figure.add_gridspec(count, across, height_ratios=inches)
        for number, axes in enumerate(panels):
            axes.set_subplotspec(grid[number // across, number % across])
            _label_alone(panels, number, columns, small=small)
            if number % across == 0:
                axes.tick_params(labelleft=True)
            elif len(axes.get_shared_y_axes().get_siblings(axes)) > 1:
                axes.tick_params(labelleft=False)
        height = sum(inches)
    elif small and columns > 1:
        height = rows * (WIDTH / columns + 0.4)
    return height


def _label_alone(panels: list[Axes], number: int, columns: int, *, small: bool) -> None:
    """Give a panel the labels that it shared with those beside and below it."""
    axes, first = panels[number], panels[number - number % columns]
    axes.tick_params(labelbottom=True)
    if first.get_shared_y_axes().joined(first, axes) and not axes.get_ylabel():
        axes.set_ylabel(first.get_ylabel())
    lowest = panels[(len(panels) - 1) // columns * columns :]
    if not axes.get_xlabel() and not small and number % columns < len(lowest):
        axes.set_xlabel(lowest[number % columns].get_xlabel())


def _crowded(axes: Axes) -> bool:
    """Whether a panel has so many names in it that it needs more height."""
    return sum(text.get_gid() == FREE for text in axes.texts) > _CROWD


def _square(axes: Axes) -> bool:
    """Whether a panel is a map that keeps its shape, and so may be half as wide as a phone."""
    return axes.get_aspect() != "auto"


def _named(axis: Axis) -> bool:
    """Whether words, not numbers, stand along an axis."""
    words = "".join(label.get_text() for label in axis.get_ticklabels())
    return isinstance(axis.get_major_locator(), FixedLocator) and any(map(str.isalpha, words))


def _names(axes: Axes) -> None:
    """Break long names beside an axis, long titles and long labels."""
    if _named(axes.yaxis):
        names = [label.get_text() for label in axes.get_yticklabels()]
        broken = [textwrap.fill(name, _LONGEST, break_long_words=False) for name in names]
        axes.yaxis.set_ticklabels(broken)
    spec = axes.get_subplotspec()
    room = 46 // (spec.get_gridspec().ncols if spec else 1)
    title = axes.get_title(loc="left")
    if (broken := textwrap.fill(title, room)) != title:  # another one loses its distance
        axes.set_title(broken, loc="left")
    axes.set_xlabel(textwrap.fill(axes.get_xlabel(), room))
    axes.set_ylabel(textwrap.fill(axes.get_ylabel(), 32))


def _needed(figure: Figure) -> float:
    """Inches of height that the names beside the figure's axes need."""
    tallest = 0.0
    for axes in figure.axes:
        names = [label.get_text() for label in axes.get_yticklabels()]
        if _named(axes.yaxis) and len(names) <= _MANY:
            lines = sum(1.3 * (name.count("\n") + 1) + 0.15 for name in names)
            tallest = max(tallest, lines * LEAST / 72)
    rows = _grid(figure)[0]
    return rows * (tallest + 0.6) if tallest else 0.0


def _narrow_legend(legend: Legend) -> None:
    """A legend no wider than a phone; above its axes where it stood beside them."""
    again = _said_by(legend)
    labels = again["labels"]
    column = 0.55 * LEAST * max(map(len, labels), default=1) + 3.2 * LEAST  # points
    parent = legend.axes or legend.get_figure()
    room = WIDTH * 72 - (40 if legend.axes else 10)  # beside the axes stand its numbers
    columns = int(np.clip(room // column, 1, len(labels)))
    again |= {"fontsize": LEAST, "ncols": columns}
    anchor = legend.get_bbox_to_anchor()
    if legend.axes is None:
        legend.remove()
        narrow = parent.legend(**again, loc="outside upper center")
        while again["ncols"] > 1 and narrow.get_window_extent().width > room * parent.dpi / 72:
            narrow.remove()
            again["ncols"] -= 1
            narrow = parent.legend(**again, loc="outside upper center")
    elif anchor.width == 0 and _speaks_for_all(legend):
        legend.remove()
        again["ncols"] = int(np.clip((WIDTH * 72 - 10) // column, 1, len(labels)))
        parent.figure.legend(**again, loc="outside upper center")
    elif anchor.width == 0:  # a point, not the axes
        below = parent.transAxes.inverted().transform((anchor.x0, anchor.y0))[1] <= 0
        place = {"loc": "upper left" if below else "lower left"}
        title = 0.12 * bool(parent.get_title(loc="left"))
        parent.legend(**again, **place, bbox_to_anchor=(0, 0 if below else 1 + title))


def _speaks_for_all(legend: Legend) -> bool:
    """Whether a legend of the last of several panels is the only one: on a phone it goes first."""
    figure = legend.get_figure()
    panels = [axes for axes in figure.axes if axes.get_subplotspec() is not None]
    alone = sum(axes.get_legend() is not None for axes in panels) == 1 and not figure.legends
    return alone and len(panels) > 1 and panels[-1] is legend.axes


def _thin(axis: Axis, *, horizontal: bool) -> None:
    """Leave out names or numbers along an axis until none touches the next."""
    low, high = sorted(axis.get_view_interval())
    places = [place for place in axis.get_majorticklocs() if low <= place <= high]
    labels = [label for label in axis.get_ticklabels() if label.get_text()]
    if len(labels) < 2 or not _touch(labels, horizontal=horizontal):
        return
    if not _named(axis):
        axis.set_ticks(places[:: _every(labels, horizontal=horizontal)])
        return
    names = [label.get_text() for label in axis.get_ticklabels()]
    few, upright = len(names) <= _MANY, labels[0].get_rotation() == 0
    longest = max(map(len, names))
    if horizontal and few and upright and longest > _SHORT:
        for label in axis.get_ticklabels():
            label.set(rotation=45, ha="right", va="top", rotation_mode="anchor")
        return
    if not horizontal and few and not _square(axis.axes):
        return  # the figure is as high as they need
    every = _every(labels, horizontal=horizontal)
    written = [i for i, name in enumerate(names) if name]
    rows = every if every <= _ROWS and len(written) == len(names) and longest <= _SHORT else 1
    if rows == 1:
        names = [name if i in written[::every] else "" for i, name in enumerate(names)]
        axis.set_ticklabels(names)
    pad, letters = axis.get_tick_params().get("pad", _PAD), labels[0].get_fontsize()
    for number, (tick, name) in enumerate(zip(axis.get_major_ticks(), names, strict=True)):
        # Names stand in rows; where some are left out, marks say whose the rest are.
        tick.set_pad(pad + (1.15 * letters * (number % rows) if rows > 1 else _MARK))
        tick.tick1line.set(markersize=_MARK, visible=bool(name) and rows == 1)


def _shorten(axes: Axes) -> None:
    """In cells that are too narrow for a number and its range, the number alone."""
    texts = [text for text in axes.texts if "–" in text.get_text().partition("\n")[2]]
    boxes = [text.get_window_extent() for text in texts]
    if any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i]):
        for text in texts:
            text.set_text(text.get_text().partition("\n")[0])


def _turn_numbers(axes: Axes) -> None:
    """Numbers over bars that are too narrow for them stand upright, all of a panel alike."""
    texts = [text for text in axes.texts if text.get_gid() == NUMBER]
    boxes = [Text.get_window_extent(text) for text in texts]
    if any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i]):
        for text in texts:
            text.set_rotation(90)
        axes.margins(y=0.3)


def _touch(labels: list[Text], *, horizontal: bool) -> bool:
    if labels[0].get_rotation() not in (0.0, 90.0) and horizontal:
        return False
    boxes = [label.get_window_extent() for label in labels]
    ends = [(b.x0, b.x1) if horizontal else (b.y0, b.y1) for b in boxes]
    ends.sort()
    pairs = zip(ends, ends[1:], strict=False)
    return any(before[1] + 2 * horizontal > after[0] for before, after in pairs)


def _every(labels: list[Text], *, horizontal: bool) -> int:
    """The smallest step at which labels do not touch."""
    steps = range(2, len(labels) + 1)
    return next((s for s in steps if not _touch(labels[::s], horizontal=horizontal)), len(labels))
