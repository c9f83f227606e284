"""Figures of a sink that was cut out: four quantities along fine-tuning, and the peak by layer.

See `basic.py`.
"""

import matplotlib.pyplot as plt
import xarray as xr
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullFormatter

from sinkbook.figures.basic import axes_or_new
from sinkbook.figures.curves import OPTIMIZER_COLOURS
from sinkbook.figures.style import OTHER, SINK

COLOURS = {
    "cut, AdamW": OPTIMIZER_COLOURS["AdamW"],
    "cut, SGD": "#D55E00",
    "whole, AdamW": SINK,
}


def phases(means: xr.Dataset, whole: xr.Dataset, axes: list[Axes] | None = None) -> list[Axes]:
    """Four panels along fine-tuning, a line a run: loss, sink attention, drain and peak.

    `means` is what `peak_recovery.above_the_cut` gives. Dashed: the `whole` model before
    fine-tuning.
    """
    if axes is None:
        axes = list(plt.subplots(2, 2, figsize=(7.4, 5.2), sharex=True)[1].flat)
    panels = {
        "loss": {"ylabel": "held-out loss (nats)"},
        "sink_attention": {"ylabel": "attention on the first token", "ylim": (0, 1)},
        "value_drain_ratio": {"ylabel": "value norm, first / others", "ylim": (0, None)},
        "residual_peak_ratio": {"ylabel": "residual norm, first / others", "yscale": "log"},
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


def peak_by_layer(
    ends: Float[xr.DataArray, "run residual_layer"],
    whole: Float[xr.DataArray, " residual_layer"],
    cut: Float[xr.DataArray, " residual_layer"],
    ax: Axes | None = None,
) -> Axes:
    """Residual norm of the first token over the median by layer: before, cut, and at the end.

    A line a run; dashed: the whole model before fine-tuning; dotted: right after the cut.
    """
    ax = axes_or_new(ax, figsize=(7.4, 3.2))
    for start, line, label in ((whole, "--", "whole, before"), (cut, ":", "right after the cut")):
        ax.plot(start.residual_layer, start, ls=line, color=OTHER, label=label)
    _lines(ends, ax)
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
