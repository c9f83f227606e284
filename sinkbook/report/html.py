"""The page of a report: one HTML file without scripts that asks for nothing from anywhere.

Its figures are those that are written as files, as SVG in the page, so they follow its colours, and
every head says its numbers under the pointer.
"""

from collections.abc import Iterable
from html import escape
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import xarray as xr

from sinkbook.annotations import check_arguments
from sinkbook.figures import style
from sinkbook.figures.svg import embedded
from sinkbook.report import figures, headroom, summary

LEFT_ALIGNED = ' class="left"'
ROUTES = "fused and chunked: in the forward pass itself; eager: one layer at a time"
STYLE = Path(__file__).with_name("report.css")


@check_arguments
@style.applied()
def html_page(result: xr.Dataset) -> str:
    """The report of what `report.probe` returns, as a page that opens offline."""
    attrs = result.attrs
    count, length = result.sizes["batch"], result.sizes["position"]
    parts = [
        f"<h1>{escape(attrs['model'])}</h1>",
        f'<p class="texts">Attention sinks, value drains and residual peaks on {count} '
        f"text{'s' * (count > 1)} of {length} tokens: {escape(attrs['texts'])}.</p>",
        f'<p class="verdict">{escape(summary.verdict(result))}</p>',
        *section("Which heads have a sink", *head_map(result)),
        *section("Where the residual state peaks", *residual_trace(result)),
        *section("Whose value is drained", *value_scatter(result)),
        *section("What is left in float16 and int8", *headroom_table(result)),
        *section("Which tokens are sinks", *token_table(result)),
        *section("Layer by layer", *layer_table(result)),
        *section("How this was measured", provenance(result)),
    ]
    return page(f"Sinks, drains and peaks of {attrs['model']}", parts)


def page(title: str, parts: Iterable[str]) -> str:
    """A whole page of these parts, which are HTML, where the title is plain text."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        # Nothing is fetched, and nothing runs, whatever a model's tokens spell.
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; style-src 'unsafe-inline'; img-src data:\">\n"
        f"<title>{escape(title)}</title>\n"
        f"<style>\n{STYLE.read_text('utf-8')}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(parts)
        + "\n</main>\n</body>\n</html>\n"
    )


def section(title: str, *parts: str) -> Iterable[str]:
    """Parts under a heading; nothing where there are none."""
    return (f"<section>\n<h2>{title}</h2>", *parts, "</section>") if any(parts) else ()


# --- Figures ---------------------------------------------------------------------------------


def head_map(result: xr.Dataset) -> tuple[str, ...]:
    """A cell for each head: its mean attention on the first token, on the book's map of blues."""
    table = summary.head_table(result)
    titles = {(row.head, row.layer): _about_head(row) for row in table.itertuples()}
    layers, heads = result.sizes["layer"], result.sizes["head"]
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
    cells = [titles.get(place) for place in product(range(heads), range(layers))]
    drawn = embedded(
        figures.heads(result), "heads", described, marks="cell", titles={figures.HEADS: cells}
    )
    return (captioned(drawn, caption),)


def residual_trace(result: xr.Dataset) -> tuple[str, ...]:
    """Norms of the residual states by layer: the first token, the largest other, the median."""
    if result.residual_norm.isnull().all():
        return ()
    ratio = summary.median_peak_ratio(result).values
    described = (
        "Curves over layers. The first token's norm is at most "
        f"{np.nanmax(ratio):.1f} times the median of the others, after "
        f"{int(np.nanargmax(ratio))} layers, and {ratio[-1]:.1f} times at the end."
    )
    caption = (
        "The length of the residual state, from the embedding (0 layers passed) to the end. Lines "
        "are medians over texts, bands their range."
    )
    return (captioned(embedded(figures.residual(result), "residual", described), caption),)


def value_scatter(result: xr.Dataset) -> tuple[str, ...]:
    """A dot for each head: its attention on the first token, and that token's value ratio."""
    table = summary.drained(result)
    if not len(table):
        return ()
    sinks = table[table.sink_attention > summary.THRESHOLD]
    of_all, of_sinks = (f"{rows.value_drain_ratio.median():.2f}" for rows in (table, sinks))
    described = (
        f"Scatter of {len(table)} heads. {len(sinks)} attend to the first token with more than "
        f"{summary.THRESHOLD}; "
        + (f"their median value ratio is {of_sinks}, " if len(sinks) else "")
        + f"over all heads it is {of_all}."
    )
    caption = (
        "One dot a head. Below the dashed line, the value state that the head would write for the "
        "first token is smaller than that of the mean other token."
    )
    dots = [_about_head(row) for row in table.itertuples()]
    drawn = embedded(
        figures.values(result), "values", described, marks="dot", titles={figures.HEADS: dots}
    )
    return (captioned(drawn, caption),)


def _about_head(row) -> str:
    """A row of `summary.head_table` in words."""
    ratio = "" if np.isnan(row.value_drain_ratio) else f", value ratio {row.value_drain_ratio:.2f}"
    return f"layer {row.layer}, head {row.head}: attention {row.sink_attention:.2f}{ratio}"


def captioned(drawn: str, caption: str) -> str:
    """A drawing, as `svg.embedded` gives it, and what to see in it."""
    return f"<figure>\n{drawn}\n<figcaption>{caption}</figcaption>\n</figure>"


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
            _number(row.residual_peak_ratio, 1),
        )
        for row in table.itertuples()
    ]
    titles = ("token", "positions", "texts", "heads", "strongest head", "residual ratio")
    note = (
        f"A head has a sink at a token that gets more than {summary.THRESHOLD} of its attention, "
        "averaged over the tokens that can see it. Heads: how many, on average, in the texts where "
        "there is one. Residual ratio: the token's largest norm over the median of its layer."
    )
    return html_table(titles, rows, left=(0, 1, 4)), f'<p class="note">{note}</p>'


def headroom_table(result: xr.Dataset) -> tuple[str, ...]:
    """The largest residual entry, what it leaves, and what to do about it."""
    room = headroom.headroom(result)
    advice = headroom.advice(room, summary.has_sinks(result))
    words = (f"<p>{escape(headroom.sentence(room))}</p>", f"<p>{escape(advice)}</p>")
    if room is None:
        return words
    rows = [tuple(map(escape, row)) for row in headroom.rows(room)]
    note = f'<p class="note">{headroom.NOTE}</p>'
    return *words, html_table(headroom.COLUMNS, rows, left=(0, 2)), note


def layer_table(result: xr.Dataset) -> tuple[str, ...]:
    """What the terminal shows: a row for each layer."""
    rows = [
        (
            str(layer),
            _number(row.sink_rate, 2),
            _number(row.above_null, 2),
            summary.strongest_heads(row, ", ") or "–",
            _number(row.value_drain_ratio, 2),
            _number(row.residual_peak_ratio, 2),
            headroom.magnitude(row.residual_max_abs),
        )
        for layer, row in summary.layer_table(result).iterrows()
    ]
    note = (
        "Sink rate: share of heads whose attention on the first token exceeds "
        f"{summary.THRESHOLD}. Above null: {summary.ABOVE_NULL}. Value ratio: the first token's "
        "value norm over the mean of the others', median over heads. Residual ratio: its residual "
        "norm after the layer over the median of the others'. Largest entry: the largest magnitude "
        "in any token's residual state after the layer. "
        "<code>summary.csv</code> has every head, <code>result.nc</code> every token."
    )
    return html_table(summary.LAYER_COLUMNS, rows, left=(3,)), f'<p class="note">{note}</p>'


def html_table(titles: Iterable[str], rows: list[tuple[str, ...]], left: tuple[int, ...]) -> str:
    """Rows of cells, which are HTML, under titles; the columns in `left` are words."""

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
