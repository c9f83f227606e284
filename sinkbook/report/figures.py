"""The figures of a report: they are written as files, and the page shows the same ones.

What has a gid can be named under the pointer on the page (`svg.py`).
"""

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from sinkbook.figures import basic
from sinkbook.figures.style import LARGEST, OTHER, PEAK, SINK
from sinkbook.report import summary

WIDTH = 5.4  # inches: about a phone's width at the size of letters on the page
HEADS = "heads"  # the gid of what has a cell or a dot for each head


def overview(result: xr.Dataset) -> Figure:
    """The attention of every head on the first token, and the residual norms by layer."""
    figure = Figure(figsize=(9.4, 3.5))
    left, right = figure.subplots(1, 2, width_ratios=(1.15, 1))
    basic.head_map(result.sink_attention.mean("batch"), left, title="Attention sinks")
    _draw_residual(result, right)
    right.set_title("Residual-state peak")
    return figure


def heads(result: xr.Dataset) -> Figure:
    """The attention of every head on the first token."""
    figure = Figure(figsize=(WIDTH, 1.2 + min(0.18 * result.sizes["head"], 6)))
    axes = basic.head_map(result.sink_attention.mean("batch"), figure.subplots())
    axes.collections[0].set_gid(HEADS)
    return figure


def residual(result: xr.Dataset) -> Figure:
    """The residual norms by layer: the first token, the largest other, the median."""
    figure = Figure(figsize=(WIDTH, 3.2))
    _draw_residual(result, figure.subplots())
    return figure


def values(result: xr.Dataset) -> Figure:
    """Sink attention against value ratio, one dot a head, in the order of `summary.drained`."""
    figure = Figure(figsize=(WIDTH, 4))
    axes = figure.subplots()
    table = summary.drained(result)
    if not len(table):
        return _unmeasured(axes, "value norms")
    sinks = table.sink_attention > summary.THRESHOLD
    colours = np.where(sinks, SINK, OTHER)
    axes.scatter(
        table.sink_attention, table.value_drain_ratio, c=colours, s=18, alpha=0.7, gid=HEADS
    )
    for colour, words in ((SINK, "above"), (OTHER, "below")):
        axes.scatter([], [], c=colour, s=18, label=f"attention {words} {summary.THRESHOLD}")
    axes.axhline(1, color=OTHER, lw=1, ls="--")
    axes.set(xlabel="attention on the first token", ylabel="value norm, first token / others")
    axes.set(xlim=(-0.03, 1.03), yscale="log")
    _label_decades(axes)
    axes.legend()
    return figure


def _draw_residual(result: xr.Dataset, axes: Axes) -> None:
    if result.residual_norm.isnull().all():
        _unmeasured(axes, "residual norms")
        return
    colours = (PEAK, LARGEST, OTHER)
    curves = summary.residual_trace(result).items()
    series = {
        name: (norm.transpose("batch", "residual_layer").values, colour)
        for (name, norm), colour in zip(curves, colours, strict=True)
    }
    basic.by_layer(series, axes, ylabel="norm of the residual state")
    axes.set_xlabel("layers passed")
    _label_decades(axes)


def _label_decades(axes: Axes) -> None:
    """Plain numbers on a logarithmic axis, and more of them where it is short."""
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 300 else (1,)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())


def _unmeasured(axes: Axes, what: str) -> Figure:
    axes.text(0.5, 0.5, f"{what} cannot be measured in this model", ha="center", va="center")
    axes.axis("off")
    return axes.figure


FIGURES = {drawn.__name__: drawn for drawn in (overview, heads, residual, values)}
