"""Figures of a sink that was cut out: four quantities along fine-tuning, and the peak by layer.

Both take what `peak_recovery.record` gives. See `basic.py`.
"""

import matplotlib.pyplot as plt
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullFormatter

from sinkbook.figures.basic import OTHER, SINK, axes_or_new
from sinkbook.figures.curves import OPTIMIZER_COLOURS
from sinkbook.llm.peak_recovery import CUT, WHOLE, above_the_cut, runs_of

COLOURS = {
    "cut, AdamW": OPTIMIZER_COLOURS["AdamW"],
    "cut, SGD": "#D55E00",
    "whole, AdamW": SINK,
}


def phases(record: xr.Dataset, axes: list[Axes] | None = None) -> list[Axes]:
    """Four panels along fine-tuning, a line a run: loss, sink attention, drain and peak.

    Dashed: the whole model before fine-tuning.
    """
    if axes is None:
        axes = list(plt.subplots(2, 2, figsize=(7.4, 5.2), sharex=True)[1].flat)
    means = above_the_cut(record)
    whole = runs_of(means, WHOLE).isel(run=0, step=0)
    panels = {
        "loss": {"ylabel": "held-out loss (nats)"},
        "sink_attention": {"ylabel": "attention on the first token", "ylim": (0, 1)},
        "value_ratio": {"ylabel": "value norm, first / others", "ylim": (0, None)},
        "residual_ratio": {"ylabel": "residual norm, first / others", "yscale": "log"},
    }
    for ax, (name, style) in zip(axes, panels.items(), strict=True):
        ax.axhline(whole[name], color=OTHER, ls="--", lw=1.2, label="whole, before")
        _lines(means[name], ax)
        ax.set_xscale("symlog", linthresh=1, linscale=0.4)
        ax.set(xlim=(0, means.step.max()), **style)
        ax.xaxis.set_major_formatter(lambda step, _: f"{step:g}")
    for ax in axes[2:]:
        ax.set_xlabel("training step")
    axes[3].yaxis.set_minor_formatter(NullFormatter())
    axes[0].legend(fontsize=8)
    return list(axes)


def peak_by_layer(record: xr.Dataset, ax: Axes | None = None) -> Axes:
    """Residual norm of the first token over the median by layer: before, cut, and at the end.

    A line a run; dashed: the whole model before fine-tuning; dotted: right after the cut.
    """
    ax = axes_or_new(ax, figsize=(7.4, 3.2))
    ratio = record.residual_ratio
    starts = (([WHOLE], "--", "whole, before"), (CUT, ":", "right after the cut"))
    for conditions, line, label in starts:
        start = runs_of(ratio, *conditions).isel(run=0, step=0)
        ax.plot(ratio.residual_layer, start, ls=line, color=OTHER, label=label)
    _lines(ratio.isel(step=-1), ax)
    ax.set(xlabel="residual state (0 is the embedding)", yscale="log")
    ax.set_ylabel("residual norm, first / others")
    ax.yaxis.set_major_locator(LogLocator())
    ax.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return ax


def _lines(values: xr.DataArray, ax: Axes) -> None:
    """A line a run along the dimension that is left, coloured by its condition."""
    (along,) = set(values.dims) - {"run"}
    labelled = set()
    for condition, of_run in zip(
        values.condition.values, values.transpose("run", along), strict=True
    ):
        label = None if condition in labelled else condition
        labelled.add(condition)
        ax.plot(of_run[along], of_run, color=COLOURS[condition], lw=1.5, alpha=0.85, label=label)
