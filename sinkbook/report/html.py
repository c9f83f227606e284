"""The page of a report: one HTML file without scripts that asks for nothing from anywhere.

Its drawings are SVG in the page, so they follow its colours, and every head says its numbers
under the pointer.
"""

from collections.abc import Iterable
from html import escape
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
import xarray as xr
from matplotlib.colors import to_hex
from matplotlib.ticker import LogLocator, MaxNLocator

from sinkbook.report import summary

WIDTH, LEFT, RIGHT, TOP = 520.0, 72.0, 14.0, 10.0  # a drawing and its margins, in its units
PLOT = WIDTH - LEFT - RIGHT
SEAM = 0.5  # by which cells reach under their neighbours, so that no gap shines through
LEFT_ALIGNED = ' class="left"'
ROUTES = "fused and chunked: in the forward pass itself; eager: one layer at a time"
STYLE = Path(__file__).with_name("report.css")


def html_page(result: xr.Dataset) -> str:
    """The report of what `report.probe` returns, as a page that opens offline."""
    attrs = result.attrs
    count, length = result.sizes["batch"], result.sizes["position"]
    parts = [
        f"<h1>{escape(attrs['model'])}</h1>",
        f'<p class="texts">Attention sinks, value drains and residual peaks on {count} '
        f"text{'s' * (count > 1)} of {length} tokens: {escape(attrs['texts'])}.</p>",
        f'<p class="verdict">{escape(summary.verdict(result))}</p>',
        *_section("Which heads have a sink", *head_map(result)),
        *_section("Where the residual state peaks", *residual_trace(result)),
        *_section("Whose value is drained", *value_scatter(result)),
        *_section("Which tokens are sinks", *token_table(result)),
        *_section("Layer by layer", *layer_table(result)),
        *_section("How this was measured", provenance(result)),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        # Nothing is fetched, and nothing runs, whatever a model's tokens spell.
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; style-src 'unsafe-inline'; img-src data:\">\n"
        f"<title>Sinks, drains and peaks of {escape(attrs['model'])}</title>\n"
        f"<style>\n{STYLE.read_text('utf-8')}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(parts)
        + "\n</main>\n</body>\n</html>\n"
    )


def _section(title: str, *parts: str) -> Iterable[str]:
    return (f"<section>\n<h2>{title}</h2>", *parts, "</section>") if any(parts) else ()


# --- Drawings --------------------------------------------------------------------------------


def head_map(result: xr.Dataset) -> tuple[str, ...]:
    """A cell for each head: its mean attention on the first token, on the book's map of blues."""
    table = summary.head_table(result)
    layers, heads = result.sizes["layer"], result.sizes["head"]
    wide, high = PLOT / layers, float(np.clip(320 / heads, 4, 20))
    colour = matplotlib.colormaps["Blues"]
    base = TOP + high * heads
    drawn = []
    for row in table.itertuples():
        x, y = LEFT + wide * row.layer, base - high * (row.head + 1)
        value = "" if np.isnan(row.value_ratio) else f", value ratio {row.value_ratio:.2f}"
        drawn.append(
            f'<rect class="cell" x="{x:.1f}" y="{y:.1f}" width="{wide + SEAM:.2f}" '
            f'height="{high + SEAM:.2f}" '
            f'fill="{to_hex(colour(row.sink_attention))}"><title>layer {row.layer}, head '
            f"{row.head}: attention {row.sink_attention:.2f}{value}</title></rect>"
        )
    for layer in _whole(layers, 12):
        drawn.append(_text(LEFT + wide * (layer + 0.5), base + 16, str(layer), "middle"))
    for head in _whole(heads, 9):
        drawn.append(_text(LEFT - 6, base - high * (head + 0.5) + 4, str(head), "end"))
    scale = LEFT + PLOT - 165
    for step in range(50):
        drawn.append(
            f'<rect x="{scale + 3 * step}" y="{base + 48}" width="3.2" height="10" '
            f'fill="{to_hex(colour(step / 49))}"/>'
        )
    drawn += [
        _text(LEFT + PLOT / 2, base + 34, "layer", "middle"),
        _turned("head", base / 2),
        _text(scale - 6, base + 57, "attention on the first token: 0", "end"),
        _text(scale + 156, base + 57, "1"),
    ]
    strongest = table.loc[table.sink_attention.idxmax()]
    described = (
        f"Map of {layers} layers and {heads} heads. The strongest sink is head "
        f"{strongest['head']:.0f} of layer {strongest.layer:.0f} with attention "
        f"{strongest.sink_attention:.2f}."
    )
    caption = (
        "One cell a head: the mean attention that later tokens give the first one. Point at a cell "
        "for its numbers."
    )
    return (_figure("".join(drawn), base + 66, described, caption),)


def residual_trace(result: xr.Dataset) -> tuple[str, ...]:
    """Norms of the residual states by layer: the first token, the largest other, the median."""
    traces = summary.residual_trace(result)
    known = np.concatenate([trace.values.ravel() for trace in traces.values()]).astype(float)
    known = known[np.isfinite(known) & (known > 0)]
    if not known.size:
        return ()
    height = 260
    low, high = known.min() / 1.3, known.max() * 1.3
    states = result.sizes["residual_layer"]

    def across(state):
        return LEFT + PLOT * state / (states - 1)

    def up(norm):
        return TOP + height * (1 - np.log(norm / low) / np.log(high / low))

    drawn = _log_axis(low, high, up)
    for state in _whole(states, 12):
        drawn.append(_text(across(state), TOP + height + 16, str(state), "middle"))
    drawn.append(_text(LEFT + PLOT / 2, TOP + height + 34, "layers passed", "middle"))
    drawn.append(_turned("norm of the residual state", TOP + height / 2))
    colours = ("peak", "largest", "other")
    entries = []
    for (name, trace), colour in zip(traces.items(), colours, strict=True):
        norms = np.clip(trace.transpose("batch", "residual_layer").values, low, None)
        points = [across(state) for state in range(states)]
        edge = [*zip(points, up(norms.max(0)), strict=True)]
        edge += [*zip(points, up(norms.min(0)), strict=True)][::-1]
        drawn.append(f'<polygon class="band" fill="var(--{colour})" points="{_points(edge)}"/>')
        line = zip(points, up(np.median(norms, axis=0)), strict=True)
        drawn.append(f'<polyline class="curve" stroke="var(--{colour})" points="{_points(line)}"/>')
        entries.append((name, f"var(--{colour})"))
    drawn += _key(entries, TOP + height + 58)
    ratio = summary.residual_ratio(result).values
    described = (
        "Curves over layers. The first token's norm is at most "
        f"{np.nanmax(ratio):.1f} times the median of the others, after "
        f"{int(np.nanargmax(ratio))} layers, and {ratio[-1]:.1f} times at the end."
    )
    caption = (
        "The length of the residual state, from the embedding (0 layers passed) to the end. Lines "
        "are medians over texts, bands their range."
    )
    return (_figure("".join(drawn), TOP + height + 66, described, caption),)


def value_scatter(result: xr.Dataset) -> tuple[str, ...]:
    """A dot for each head: its attention on the first token, and that token's value ratio."""
    table = summary.head_table(result).dropna(subset="value_ratio")
    table = table[table.value_ratio > 0]
    if not len(table):
        return ()
    height = 280
    low = min(table.value_ratio.min() / 1.3, 0.5)
    high = max(table.value_ratio.max() * 1.3, 2.0)

    def across(attention):
        return LEFT + PLOT * attention

    def up(ratio):
        return TOP + height * (1 - np.log(ratio / low) / np.log(high / low))

    drawn = _log_axis(low, high, up)
    for attention in np.linspace(0, 1, 6):
        x = across(attention)
        drawn.append(_text(x, TOP + height + 16, f"{attention:.1f}", "middle"))
    drawn += [
        _text(LEFT + PLOT / 2, TOP + height + 34, "attention on the first token", "middle"),
        _turned("value norm, first token / others", TOP + height / 2),
        f'<line class="axis" stroke-dasharray="5 4" x1="{LEFT}" x2="{LEFT + PLOT}" '
        f'y1="{up(1):.1f}" y2="{up(1):.1f}"/>',
    ]
    for row in table.itertuples():
        colour = "sink" if row.sink_attention > summary.THRESHOLD else "other"
        drawn.append(
            f'<circle class="dot" cx="{across(row.sink_attention):.1f}" '
            f'cy="{up(row.value_ratio):.1f}" r="4" fill="var(--{colour})"><title>layer {row.layer},'
            f" head {row.head}: attention {row.sink_attention:.2f}, value ratio "
            f"{row.value_ratio:.2f}</title></circle>"
        )
    names = [(f"attention above {summary.THRESHOLD}", "var(--sink)"), ("below", "var(--other)")]
    drawn += _key(names, TOP + height + 58)
    sinks = table[table.sink_attention > summary.THRESHOLD]
    described = (
        f"Scatter of {len(table)} heads. {len(sinks)} attend to the first token with more than "
        f"{summary.THRESHOLD}; "
        + (f"their median value ratio is {sinks.value_ratio.median():.2f}, " if len(sinks) else "")
        + f"over all heads it is {table.value_ratio.median():.2f}."
    )
    caption = (
        "One dot a head. Below the dashed line, the value state that the head would write for the "
        "first token is smaller than that of the mean other token."
    )
    return (_figure("".join(drawn), TOP + height + 66, described, caption),)


def _figure(drawn: str, height: float, described: str, caption: str) -> str:
    return (
        f'<figure>\n<svg viewBox="0 0 {WIDTH:.0f} {height:.0f}" role="img" '
        f'aria-label="{escape(described)}">{drawn}</svg>\n'
        f"<figcaption>{caption}</figcaption>\n</figure>"
    )


def _text(x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _turned(text: str, y: float) -> str:
    return (
        f'<text transform="translate(13 {y:.1f}) rotate(-90)" text-anchor="middle">'
        f"{escape(text)}</text>"
    )


def _whole(count: int, most: int) -> list[int]:
    """Whole numbers below `count` to mark on an axis, about `most` of them."""
    ticks = MaxNLocator(most, integer=True).tick_values(0, count - 1)
    return [int(tick) for tick in ticks if 0 <= tick < count and tick == int(tick)]


def _log_axis(low: float, high: float, up) -> list[str]:
    steps = (1.0,) if high / low > 300 else (1.0, 2.0, 5.0)
    ticks = [t for t in LogLocator(subs=steps).tick_values(low, high) if low <= t <= high]
    drawn = []
    for tick in ticks:
        y = up(tick)
        drawn.append(
            f'<line class="grid" x1="{LEFT}" x2="{LEFT + PLOT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        )
        drawn.append(_text(LEFT - 6, y + 4, f"{tick:,.6g}", "end"))
    return drawn


def _key(entries: list[tuple[str, str]], y: float) -> list[str]:
    """What each colour stands for, in one row."""
    drawn, x = [], LEFT
    for name, colour in entries:
        drawn.append(f'<rect x="{x:.1f}" y="{y - 9:.1f}" width="12" height="10" fill="{colour}"/>')
        drawn.append(_text(x + 18, y, name))
        x += 32 + 7.6 * len(name)  # wide enough for a phone's larger letters
    return drawn


def _points(pairs: Iterable[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in pairs)


# --- Tables ----------------------------------------------------------------------------------


def token_table(result: xr.Dataset) -> tuple[str, ...]:
    """The tokens that are sinks of some head, the first one and others."""
    table = summary.sink_positions(result)
    if not len(table):
        return (f"<p>No token gets more than {summary.THRESHOLD} of any head's attention.</p>",)
    rows = [
        (
            f"<code>{escape(row.token)}</code>",
            row.positions,
            f"{row.texts} of {result.sizes['batch']}",
            f"{row.heads:.0f}",
            f"layer {row.layer}, head {row.head}: {row.importance:.2f}",
            _number(row.residual_ratio, 1),
        )
        for row in table.itertuples()
    ]
    titles = ("token", "positions", "texts", "heads", "strongest head", "residual ratio")
    note = (
        f"A head has a sink at a token that gets more than {summary.THRESHOLD} of its attention, "
        "averaged over the tokens that can see it. Heads: how many, on average, in the texts where "
        "there is one. Residual ratio: the token's largest norm over the median of its layer."
    )
    return _table(titles, rows, left=(0, 1, 4)), f'<p class="note">{note}</p>'


def layer_table(result: xr.Dataset) -> tuple[str, ...]:
    """What the terminal shows: a row for each layer."""
    rows = [
        (
            str(layer),
            _number(row.sink_rate, 2),
            ", ".join(f"{head} ({attention:.2f})" for head, attention in row.strongest) or "–",
            _number(row.value_ratio, 2),
            _number(row.residual_ratio, 2),
        )
        for layer, row in summary.layer_table(result).iterrows()
    ]
    titles = ("layer", "sink rate", "strongest heads", "value ratio", "residual ratio")
    note = (
        "Sink rate: share of heads whose attention on the first token exceeds "
        f"{summary.THRESHOLD}. Value ratio: the first token's value norm over the mean of the "
        "others', median over heads. Residual ratio: its residual norm after the layer over the "
        "median of the others'. "
        "<code>summary.csv</code> has every head, <code>result.nc</code> every token."
    )
    return _table(titles, rows, left=(2,)), f'<p class="note">{note}</p>'


def _table(titles: Iterable[str], rows: list[tuple[str, ...]], left: tuple[int, ...]) -> str:
    def line(tag: str, cells: Iterable[str]) -> str:
        marked = [
            f"<{tag}{LEFT_ALIGNED if number in left else ''}>{cell}</{tag}>"
            for number, cell in enumerate(cells)
        ]
        return f"<tr>{''.join(marked)}</tr>"

    body = "\n".join(line("td", row) for row in rows)
    return (
        f'<div class="scroll">\n<table>\n<thead>{line("th", titles)}</thead>\n'
        f"<tbody>\n{body}\n</tbody>\n</table>\n</div>"
    )


def _number(value: float, digits: int) -> str:
    return "–" if pd.isna(value) else f"{value:.{digits}f}"


def provenance(result: xr.Dataset) -> str:
    """Model, texts, machine and versions, and the command that gives this page again."""
    attrs = result.attrs
    facts = {
        "model": escape(attrs["weights"]),
        "texts": f"{result.sizes['batch']} of {result.sizes['position']} tokens, "
        f"{escape(attrs['texts'])}",
        "first token": f"<code>{escape(summary.first_token(result))}</code>",
        "attention read": f"{attrs['route']} ({ROUTES})",
        "precision": attrs["dtype"],
        "device": f"{attrs['device']}; {attrs['seconds']:.1f} s",
        "versions": f"sinkbook {attrs['sinkbook']}, torch {attrs['torch']}, transformers "
        f"{attrs['transformers']}",
        "date": attrs["date"],
        "again": f"<code>{escape(attrs['command'])}</code>",
        "method": "arXiv 2410.13835 (sinks, drains and peaks); arXiv 2410.10781 (sink rate)",
    }
    return "<dl>\n" + "\n".join(f"<dt>{k}</dt><dd>{v}</dd>" for k, v in facts.items()) + "\n</dl>"
