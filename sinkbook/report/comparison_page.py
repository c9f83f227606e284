"""The page of a comparison: one HTML file, made as that of a report is, that opens offline."""

from html import escape
from itertools import product
from pathlib import Path

import numpy as np
import xarray as xr
from matplotlib.figure import Figure

from sinkbook import files
from sinkbook.figures import basic, style
from sinkbook.figures.svg import embedded
from sinkbook.report import comparison as compared
from sinkbook.report.comparison import Comparison
from sinkbook.report.figures import HEADS, WIDTH
from sinkbook.report.html import captioned, html_table, page, provenance, section
from sinkbook.report.report import describe_texts

ANOTHER = "name another file"


@style.applied()
def comparison_page(comparison: Comparison) -> str:
    """What differs between two models, with a map of their heads for each of `CHANGES`."""
    a, b = comparison.a, comparison.b
    meant = "; ".join(": ".join(words) for words in compared.QUANTITIES.values())
    note = f'<p class="note">{compared.NOTE} {escape(meant.capitalize())}.</p>'
    rows = [tuple(map(escape, row)) for row in compared.rows(comparison)]
    parts = [
        "<h1>B against A</h1>",
        *(f"<p>{escape(title)}</p>" for title in compared.titles(comparison)),
        f'<p class="texts">Attention sinks, value drains and residual peaks on the same '
        f"{escape(describe_texts(a))}.</p>",
        f'<p class="verdict">{escape(compared.about_heads(comparison))}</p>',
        *section("What differs", html_table(compared.COLUMNS, rows, left=(0,)), note),
        *section("Which heads differ", *head_maps(comparison)),
        *section("How A was measured", provenance(a)),
        *section("How B was measured", provenance(b)),
    ]
    return page(f"{b.attrs['model']} against {a.attrs['model']}", parts)


def head_maps(comparison: Comparison) -> tuple[str, ...]:
    """A map for each of `CHANGES` that is known; every head says its own under the pointer."""
    changes = compared.head_changes(comparison)
    if changes is None:
        return ()
    drawn = []
    for name, (words, label) in compared.CHANGES.items():
        values = changes[name].transpose("layer", "head")
        if values.isnull().all():
            continue
        most = compared.most_changed(changes, name)
        sizes = f"{values.sizes['layer']} layers and {values.sizes['head']} heads"
        described = f"Map of {sizes}: {words}."
        if most is not None:
            described += f" The largest change is {most[2]:+.2g}, layer {most[0]}, head {most[1]}."
        caption = f"One cell a head: {words}. Blue is more, red less."
        titles = {HEADS: _about(values)}
        svg = embedded(_map(values, label), name, described, marks="cell", titles=titles)
        drawn.append(captioned(svg, caption))
    return tuple(drawn)


def _map(values: xr.DataArray, label: str) -> Figure:
    drawn = Figure(figsize=(WIDTH, 1.2 + min(0.18 * values.sizes["head"], 6)))
    axes = basic.head_differences(values, drawn.subplots(), label=label)
    axes.collections[0].set_gid(HEADS)
    return drawn


def _about(values: xr.DataArray) -> list[str | None]:
    """What each cell says, in the order in which they are drawn; nothing for heads without."""
    return [
        None
        if np.isnan(change := float(values.sel(layer=layer, head=head)))
        else f"layer {layer}, head {head}: {change:+.3g}"
        for head, layer in product(range(values.sizes["head"]), range(values.sizes["layer"]))
    ]


def check_file(path: Path, *, force: bool) -> None:
    """Refuse a folder, unless `force` a file that is there already, and what cannot be written."""
    files.check_output(path, "the page", force=force, otherwise=ANOTHER.capitalize())


def write(comparison: Comparison, path: Path, *, force: bool = False) -> None:
    """Write the page. Raises SinkbookError as `check_file` does, and if the file system refuses."""
    check_file(path, force=force)
    text = comparison_page(comparison)
    files.write(path, lambda part: part.write_text(text, encoding="utf-8"), otherwise=ANOTHER)
