"""Figures as pages show them: two arrangements, in the page's colours, with letters to be read."""

import re
from functools import cache
from xml.etree import ElementTree

import matplotlib.pyplot as plt
import numpy as np
import pytest
import xarray as xr
from matplotlib.text import Text

from sinkbook.figures import basic, curves, mitigations, phone, style, svg


@pytest.fixture(autouse=True)
def _in_the_style_of_the_book():
    with style.applied():
        yield
    plt.close("all")


def bars():
    groups = {
        "no attention": {"backcopy": np.array([1.0, 2.0])},
        "<s> & none": {"backcopy": np.array([3.0])},
    }
    basic.grouped_bars(groups, ylabel="risk", colours={"backcopy": style.BACKCOPY})


def two_panels():
    x = np.geomspace(1e-9, 1e3, 50)
    series = {"series": {"a": (x, x, style.SINK), "b": (x, 2 * x, "#123456")}, "xlabel": "time"}
    curves.panels(series, series, ylabel="α", sharey=True)


def map_of_heads():
    rng = np.random.default_rng(0)
    basic.head_map(xr.DataArray(rng.random((30, 9)), dims=("layer", "head")))


def many_letters():
    rng = np.random.default_rng(0)
    basic.transition_map(rng.dirichlet(np.ones(67), 67), [chr(60 + i) for i in range(67)])


def table():
    names = tuple(f"kind {i}" for i in range(6))
    rows = {f"row {i}": {n: np.array([0.1, 0.2]) for n in names} for i in range(4)}
    basic.share_map(rows, columns=names, xlabel="kind of key", label="attention")


def six_panels():
    _, axes = plt.subplots(2, 3, figsize=(8.4, 5), sharex=True)
    for number, ax in enumerate(axes.flat):
        ax.plot(np.arange(5000), np.arange(5000) * 10**number, label="the same")
        ax.set(ylabel=f"quantity {number}")
        ax.legend()
    for ax in axes[1]:
        ax.set_xlabel("training step")


DRAWINGS = (bars, two_panels, map_of_heads, many_letters, table, six_panels)


def drawn(draw) -> str:
    draw()
    html = svg.for_pages(plt.gcf())
    plt.close("all")
    return html


drawn_once = cache(drawn)  # in seconds


def pages_of(draw) -> tuple[str, list[ElementTree.Element]]:
    html = drawn_once(draw)
    return html, list(ElementTree.fromstring(html))


@pytest.mark.parametrize("draw", DRAWINGS)
def test_the_same_figure_is_drawn_the_same_way_each_time(draw):
    assert drawn(draw) == drawn_once(draw)


def test_no_two_drawings_of_a_page_share_a_name():
    drawings = [drawing for draw in DRAWINGS for drawing in pages_of(draw)[1]]
    names = [{element.get("id") for element in drawing.iter()} - {None} for drawing in drawings]
    assert sum(map(len, names)) == len(set.union(*names))
    for drawing, own in zip(drawings, names, strict=True):
        text = ElementTree.tostring(drawing, encoding="unicode")
        used = re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', text)
        assert {a or b for a, b in used} <= own


@pytest.mark.parametrize("draw", DRAWINGS)
def test_every_colour_follows_the_page_into_the_dark(draw):
    for drawing in pages_of(draw)[1]:
        for mapped in drawing.iter():  # what a map has coloured is turned round as a whole
            if mapped.get("class") == svg.MAPPED:
                mapped.clear()
        text = ElementTree.tostring(drawing, encoding="unicode")
        following = re.sub(r"var\(--\w[\w-]*, [^)]*\)|light-dark\([^)]*\)", "", text)
        assert not re.search(r": #[0-9a-f]{6}", following)
        assert drawing.get("fill") == "currentColor"


@pytest.mark.parametrize("draw", DRAWINGS)
def test_letters_can_be_read_on_a_phone_and_on_a_wide_page(draw):
    for drawing, column, least in zip(pages_of(draw)[1], (672, 338), (10.4, 10), strict=True):
        width = float(drawing.get("viewBox").split()[2])
        shown = min(column, float(re.search(r"max-width: (\d+)px", drawing.get("style"))[1]))
        sizes = [float(text.get("font-size")) for text in drawing.iter("text")]
        assert min(sizes) * shown / width >= least - 0.05


@pytest.mark.parametrize("draw", DRAWINGS)
def test_on_a_phone_no_words_along_an_axis_touch(draw):
    draw()
    figure = plt.gcf()
    phone.rearrange(figure)
    assert figure.get_size_inches()[0] == phone.WIDTH
    figure.canvas.draw()
    for axes in figure.axes:
        for across, labels in ((0, axes.get_xticklabels()), (1, axes.get_yticklabels())):
            shown = [label for label in labels if label.get_text() and label.get_visible()]
            if across == 0 and shown and shown[0].get_rotation() == 45:
                continue
            rows = {}  # by the end next to the axis
            for label in shown:
                box = label.get_window_extent().get_points()
                rows.setdefault(round(box[1, 1 - across]), []).append(tuple(box[:, across]))
            for ends in map(sorted, rows.values()):
                assert all(a[1] <= b[0] + 0.5 for a, b in zip(ends, ends[1:], strict=False)), axes


def test_every_letter_of_a_large_map_is_written_and_where_some_are_not_the_rest_have_marks():
    many_letters()
    figure = plt.gcf()
    phone.legible(figure, 6.0)
    axes = figure.axes[0]
    for axis in (axes.xaxis, axes.yaxis):
        assert [label.get_text() for label in axis.get_ticklabels()] == [
            chr(60 + i) for i in range(67)
        ]
    phone.rearrange(figure)
    figure.canvas.draw()
    written = [label.get_text() for label in axes.get_yticklabels()]
    marked = [tick.tick1line.get_visible() for tick in axes.yaxis.get_major_ticks()]
    assert 10 < sum(map(bool, written)) < 67 and marked == list(map(bool, written))


def test_panels_that_stood_side_by_side_keep_what_they_shared():
    two_panels()
    figure = plt.gcf()
    phone.rearrange(figure)
    upper, lower = figure.axes
    assert upper.get_position().y0 > lower.get_position().y1
    assert upper.get_ylabel() == lower.get_ylabel() == "α"
    assert upper.get_xlabel() == lower.get_xlabel() == "time"
    six_panels()
    figure = plt.gcf()
    phone.rearrange(figure)
    assert {axes.get_xlabel() for axes in figure.axes} == {"training step"}
    assert [axes.get_ylabel()[-1] for axes in figure.axes] == list("012345")
    assert sum(axes.get_legend() is not None for axes in figure.axes) == 1


def test_rows_that_one_panel_named_for_all_are_named_by_each_first_one_on_a_phone():
    dims = {"mitigation": ["softmax", "gate"], "seed": [0]}
    values = xr.DataArray([[0.5], [0.1]], dims)
    values = values.assign_coords(
        label=("mitigation", ["softmax", "value gate"]), family=("mitigation", ["control", "gate"])
    )
    figure, panels = plt.subplots(1, 2)
    for number, panel in enumerate(panels):
        mitigations.mitigation_rows(values, panel, xlabel="sink", names=number == 0)
    phone.rearrange(figure)
    figure.canvas.draw()
    for panel in panels:
        shown = [label.get_text() for label in panel.get_yticklabels() if label.get_visible()]
        assert shown == ["softmax", "value gate"]


def test_a_cell_too_narrow_for_a_range_keeps_its_number():
    table()
    figure = plt.gcf()
    texts = figure.axes[0].texts
    before = [text.get_text() for text in texts]
    phone.rearrange(figure)
    assert [text.get_text() for text in texts] == [text.partition("\n")[0] for text in before]


def test_what_a_name_spells_is_only_shown():
    html, _ = pages_of(bars)
    assert "&lt;s&gt; &amp; none" in html.replace("\n", " ")


def test_a_line_loses_only_points_that_lie_on_its_way():
    rng = np.random.default_rng(0)
    t = np.linspace(0, 6, 400)
    for x, y in ((t, np.sin(t)), (np.cos(t), np.sin(t)), (t, rng.random(400)), (t, 0 * t)):
        points = 100 * np.column_stack([x, y])
        kept = svg._bends(points)
        assert kept[0] == 0 and kept[-1] == len(points) - 1
        for start, end in zip(kept, kept[1:], strict=False):
            step = points[end] - points[start]
            for point in points[start + 1 : end] - points[start]:
                along = np.clip(point @ step / max(step @ step, 1e-12), 0, 1)
                assert np.hypot(*(point - along * step)) < 0.3
    assert svg._bends(np.column_stack([t, 2 * t])) == [0, 399]
    assert len(svg._bends(100 * np.column_stack([t, rng.random(400)]))) > 300


def test_a_notebook_shows_a_figure_in_this_form_alone():
    from IPython.core.interactiveshell import InteractiveShell

    shell = InteractiveShell.instance()
    try:
        svg.show_in_notebooks()
        bars()
        shown, _ = shell.display_formatter.format(plt.gcf())
        assert set(shown) == {"text/html", "text/plain"}
        assert shown["text/html"].startswith('<div class="sinkbook-figure">')
    finally:
        InteractiveShell.clear_instance()


def test_a_legend_that_would_cover_what_is_drawn_stands_above_the_figure():
    _, axes = plt.subplots()
    steps = np.linspace(0, 1, 400)
    for number in range(40):  # every corner
        axes.plot(steps, (number + np.sin(50 * steps)) / 40, label="a long name" * (number < 2))
    axes.legend()
    phone.legible(axes.figure, phone.LEAST)
    assert axes.get_legend() is None
    (legend,) = axes.figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["a long name"] * 2
    axes.figure.canvas.draw()
    assert legend.get_window_extent().y0 >= axes.get_window_extent().y1


def test_a_legend_above_the_figure_is_no_wider_than_a_phone():
    figure, axes = plt.subplots(layout="constrained")
    for name in ("softmax, AdamW", "ReLU, AdamW", "softmax, SGD"):
        axes.plot([0, 1], [0, 1], label=name)
    figure.legend(*axes.get_legend_handles_labels(), ncols=3, loc="outside upper center")
    phone.rearrange(figure)
    figure.canvas.draw()
    box = figure.legends[0].get_window_extent()
    assert len(figure.legends) == 1 and box.x0 >= 0 and box.x1 <= figure.bbox.width


def test_a_legend_that_covers_nothing_stays():
    _, axes = plt.subplots()
    axes.plot([0, 1], [0, 1], label="a")
    axes.legend()
    phone.legible(axes.figure, phone.LEAST)
    assert axes.get_legend() is not None and not axes.figure.legends


@pytest.mark.parametrize("arrange", [lambda figure: phone.legible(figure, 10.5), phone.rearrange])
def test_the_names_of_points_that_lie_together_lie_apart(arrange):
    values = xr.DataArray(
        0.5 + 0.02 * np.random.default_rng(0).random((8, 2)),
        dims=("mitigation", "seed"),
        coords={
            "mitigation": [f"m{i}" for i in range(8)],
            "label": ("mitigation", [f"mitigation {i}" for i in range(8)]),
            "family": ("mitigation", ["gate"] * 8),
        },
    )
    axes = mitigations.mitigation_points(values, values, xlabel="mass", ylabel="loudness")
    arrange(axes.figure)
    axes.figure.canvas.draw()
    boxes = [Text.get_window_extent(t) for t in axes.texts if t.get_gid() == phone.FREE]
    assert len(boxes) == 8
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])


def test_every_colour_of_seeds_and_layers_can_be_told_from_a_dark_page():
    dark = svg._luminance("#121212") + 0.05
    for colour in (*style.SEEDS, *style.layer_colours(4), *svg.COLOURS):
        if svg._luminance(colour) <= svg._INK_ON_WHITE:
            assert (svg._luminance(svg.in_the_dark(colour)) + 0.05) / dark >= 4.5, colour


def test_a_legend_does_not_stand_where_its_marks_look_like_data():
    _, axes = plt.subplots()
    axes.plot([0, 1], [0, 1], "o", mfc="none", label="a")
    legend = axes.legend(loc="lower left", bbox_to_anchor=(0, 0, 1, 1))
    axes.figure.canvas.draw()
    box = legend.get_window_extent()
    axes.lines[0].set_data(*axes.transData.inverted().transform([box.max + 3] * 2).T)
    axes.set(xlim=axes.get_xlim(), ylim=axes.get_ylim())
    phone.legible(axes.figure, phone.LEAST)
    assert axes.get_legend() is None and axes.figure.legends


def test_numbers_over_bars_stand_upright_on_a_phone_where_they_would_touch():
    groups = {f"group {i}": {s: np.array([1.0, 0.9]) for s in "abc"} for i in range(4)}
    axes = basic.grouped_bars(groups, ylabel="share", colours=dict.fromkeys("abc", style.SINK))
    phone.rearrange(axes.figure)
    axes.figure.canvas.draw()
    boxes = [Text.get_window_extent(t) for t in axes.texts]
    assert len(boxes) == 12
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    assert all(axes.bbox.contains(b.x1, b.y1) for b in boxes)
