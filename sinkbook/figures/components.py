"""Figures of a dissected model: what each part writes, and what is missing without it.

As in `basic.py`, one function per figure type takes data and an axes and returns the axes.
"""

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import xarray as xr
from jaxtyping import Float, Int
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.patches import PathPatch
from matplotlib.path import Path as Outline
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import Affine2D

from sinkbook.figures.basic import axes_or_new, by_layer, share_map
from sinkbook.figures.style import DRAIN, MAP, OTHER, PEAK, SINK, TRIGGER

PART_COLOURS = {"attention": SINK, "mlp": PEAK}
PART_NAMES = {"attention": "attention", "mlp": "MLP"}

CELL = Outline.unit_rectangle().transformed(Affine2D().translate(-0.5, -0.5))  # of a map, at 0, 0


def log_map(
    values: Float[xr.DataArray, "row column"],
    ax: Axes | None = None,
    *,
    label: str,
    limits: tuple[float, float],
    rows: Sequence[str] = (),
    columns: Sequence[str] = (),
    xlabel: str = "",
    ylabel: str = "",
    title: str = "",
) -> Axes:
    """A table of positive numbers as a map on a logarithmic scale, darker for more.

    `rows` and `columns` are labels for each; without them they are counted from 0.
    """
    height, width = values.shape
    ax = axes_or_new(ax, figsize=(7.2, 1.4 + 0.11 * max(height, 22)))
    image = ax.imshow(
        values, norm=LogNorm(*limits), cmap=MAP, aspect="auto", origin="upper" if rows else "lower"
    )
    for axis, labels in ((ax.xaxis, columns), (ax.yaxis, rows)):
        if labels:
            axis.set_ticks(range(len(labels)), labels, fontfamily="monospace", fontsize=7)
        else:
            axis.set_major_locator(MaxNLocator(10, integer=True))
    if columns:
        ax.tick_params(axis="x", rotation=90)
    ax.set(xlabel=xlabel, ylabel=ylabel, title=title)
    ax.tick_params(length=0)
    ax.figure.colorbar(image, ax=ax, label=label, pad=0.02)
    return ax


def write_bars(
    along: Float[xr.DataArray, "batch part layer"],
    ax: Axes | None = None,
    *,
    ylabel: str = "written along the peak",
    linear: float = 100.0,
) -> Axes:
    """What the two parts of every layer add along one direction: bars up, and down where it erases.

    The mean over texts, on an axis that is linear up to `linear` and logarithmic beyond.
    """
    ax = axes_or_new(ax, figsize=(7, 3))
    for shift, (part, colour) in zip((-0.2, 0.2), PART_COLOURS.items(), strict=True):
        heights = along.sel(part=part).mean("batch")
        ax.bar(along.layer + shift, heights, 0.4, color=colour, label=PART_NAMES[part])
    ax.axhline(0, color=OTHER, lw=0.8)
    ax.set_yscale("symlog", linthresh=linear, linscale=0.5)
    ax.set(xlabel="layer", ylabel=ylabel)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.legend()
    return ax


def part_dots(
    panels: dict[str, tuple[Float[xr.DataArray, "part cut batch"], bool]],
) -> list[Axes]:
    """A panel for each quantity, with a dot for each silenced part, at the part's layer.

    Values come with whether their axis is logarithmic. Dots are means over texts, and the bars
    behind them reach from the smallest text to the largest.
    """
    figure, axes = plt.subplots(len(panels), 1, figsize=(7, 1.9 * len(panels)), sharex=True)
    for ax, (label, (values, log)) in zip(np.atleast_1d(axes), panels.items(), strict=True):
        for shift, (part, colour) in zip((-0.15, 0.15), PART_COLOURS.items(), strict=True):
            of_part = values.sel(part=part)
            at = of_part.cut + shift
            ax.vlines(at, of_part.min("batch"), of_part.max("batch"), color=colour, alpha=0.5)
            ax.plot(at, of_part.mean("batch"), "o", color=colour, ms=4, label=PART_NAMES[part])
        ax.set(ylabel=label, yscale="log" if log else "linear")
        ax.axhline(1 if log else 0, color=OTHER, lw=0.8, zorder=0)
    axes[0].legend(ncols=2, title="silenced")
    axes[-1].set(xlabel="layer of the silenced part")
    axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.align_ylabels(axes)
    return list(axes)


def way_dots(
    panels: dict[str, tuple[Float[xr.DataArray, "way batch"], bool]], labels: dict[str, str]
) -> list[Axes]:
    """A panel for each quantity: what stands in a part's place by rows, one dot a text.

    Values come with whether their axis is logarithmic. `labels` says each way in words, top first.
    """
    _, axes = plt.subplots(1, len(panels), figsize=(7.4, 0.8 + 0.36 * len(labels)), sharey=True)
    axes = np.atleast_1d(axes)
    for ax, (label, (values, log)) in zip(axes, panels.items(), strict=True):
        for place, way in enumerate(labels):
            texts = values.sel(way=way).values
            ax.plot(texts, np.full(len(texts), place), "o", color=PEAK, ms=4, alpha=0.6, mew=0)
        ax.axvline(1 if log else 0, color=OTHER, lw=0.8, zorder=0)
        ax.set(xlabel=label, xscale="log" if log else "linear")
    axes[0].set_yticks(range(len(labels)), labels.values())
    axes[0].set_ylim(len(labels) - 0.5, -0.5)
    return list(axes)


def symptom_panels(whole: xr.Dataset, cut: xr.Dataset) -> list[Axes]:
    """Peak, drain and sinks by layer, whole and cut, as `components.symptoms` has them.

    Lines are medians over texts, bands their range.
    """
    panels = {
        "residual_peak_ratio": ("residual ratio", PEAK, True, "center right"),
        "value_drain_ratio": ("value ratio", DRAIN, True, "lower left"),
        "sink_attention": ("sink attention", SINK, False, "upper left"),
    }
    _, axes = plt.subplots(1, len(panels), figsize=(8.4, 2.9), layout="constrained")
    for ax, (name, (ylabel, colour, log, place)) in zip(axes, panels.items(), strict=True):
        series = {"whole": (whole[name], colour), "cut": (cut[name], "black")}
        by_layer(series, ax, ylabel=ylabel, log=log)
        if "residual_layer" in whole[name].dims:
            ax.set_xlabel("residual layer")
        if log:
            ax.axhline(1, color=OTHER, lw=0.8, zorder=0)
        ax.legend(loc=place)
    return list(axes)


def sorted_magnitudes(
    states: dict[str, tuple[Float[np.ndarray, " dimension"], str]],
    ax: Axes | None = None,
    *,
    named: int = 3,
) -> Axes:
    """The magnitudes of residual states from the largest to the smallest, on logarithmic axes.

    The `named` largest dimensions of the first state carry their numbers.
    """
    ax = axes_or_new(ax)
    for number, (label, (state, colour)) in enumerate(states.items()):
        size = np.abs(np.asarray(state))
        order = np.argsort(-size, kind="stable")
        ax.plot(np.arange(1, len(size) + 1), size[order], ".-", color=colour, ms=4, label=label)
        for rank in range(named if number == 0 else 0):
            place = (rank + 1, size[order[rank]])
            ax.annotate(
                str(order[rank]), place, xytext=(7, 2), textcoords="offset points", fontsize=9
            )
    ax.set(xscale="log", yscale="log", xlabel="rank of the dimension", ylabel="magnitude")
    ax.legend()
    return ax


def unit_dots(
    left: Float[xr.DataArray, "chosen count batch"], ax: Axes | None = None, *, ylabel: str
) -> Axes:
    """What is left without some units of an MLP, by their number: those that carry it, and others.

    Lines are means over texts and draws, bands reach from the smallest to the largest.
    """
    ax = axes_or_new(ax)
    random = left.sel(chosen=[name for name in left.chosen.values if name != "largest"])
    for label, values, colour in (
        ("the units that carry most", left.sel(chosen=["largest"]), PEAK),
        ("as many others", random, OTHER),
    ):
        over = ("chosen", "batch")
        ax.fill_between(left["count"], values.min(over), values.max(over), color=colour, alpha=0.2)
        ax.plot(left["count"], values.mean(over), "o-", color=colour, label=label)
    ax.set(xscale="log", yscale="log", xlabel="number of units silenced", ylabel=ylabel)
    ax.set_xticks(left["count"].values, [str(count) for count in left["count"].values])
    ax.minorticks_off()
    ax.legend()
    return ax


def valley(
    entropy: Float[xr.DataArray, "batch layer"], compressed: xr.Dataset
) -> tuple[Axes, Axes]:
    """Attention entropy by layer, and beside it how much of a text lies along one direction.

    `compressed` is what `components.compression` returns.
    """
    _, (left, right) = plt.subplots(1, 2, figsize=(8, 3))
    by_layer({"entropy": (entropy, SINK)}, left, ylabel="entropy of attention (nats)", log=False)
    left.get_legend().remove()
    left.set_ylim(0, None)
    shares = {
        "with the first token": (compressed.with_sink, PEAK),
        "without it": (compressed.without_sink, OTHER),
    }
    by_layer(shares, right, ylabel="share of the first direction", log=False)
    right.set(xlabel="residual layer", ylim=(0, 1.02))
    return left, right


def condition_map(
    found: Float[xr.DataArray, "condition column batch"],
    ax: Axes | None = None,
    *,
    xlabel: str,
    label: str,
) -> Axes:
    """A number between 0 and 1 for every condition and column: mean and range over texts.

    Cells without a number stay empty.
    """
    rows = {
        str(row.condition.values): {
            str(cell.column.values): cell.values for cell in row if cell.notnull().all()
        }
        for row in found.transpose("condition", "column", "batch")
    }
    columns = tuple(found.column.values.tolist())
    ax = axes_or_new(ax, figsize=(2.6 + 1.6 * len(columns), 0.9 + 0.45 * len(rows)))
    return share_map(rows, ax, columns=columns, xlabel=xlabel, label=label)


def kind_map(
    kinds: Int[xr.DataArray, "layer head"], names: Sequence[str], ax: Axes | None = None
) -> Axes:
    """What each head is there for: one column a layer, one row a head, a colour for each kind."""
    layers, heads = kinds.sizes["layer"], kinds.sizes["head"]
    ax = axes_or_new(ax, figsize=(7, 1.6 + 0.18 * heads))
    colours = ["#EEEEEE", SINK, DRAIN, TRIGGER, PEAK]
    for kind, colour in enumerate(colours, start=-1):
        # An outline of its own, since a map of colours would be turned round in the dark, and the
        # legend not; one for all heads of a kind, which keeps the page light.
        heads_of = np.argwhere((kinds == kind).transpose("layer", "head").values)
        if len(heads_of):
            squares = [CELL.transformed(Affine2D().translate(*at)) for at in heads_of]
            outline = Outline.make_compound_path(*squares)
            ax.add_patch(PathPatch(outline, fc=colour, ec=colour, lw=0.4))
    ax.set(xlim=(-0.5, layers - 0.5), ylim=(-0.5, heads - 0.5))
    labels = ["none of these", *names]
    handles = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in colours]
    ax.legend(handles, labels, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0), fontsize=9)
    ax.set(xlabel="layer", ylabel="head")
    ax.xaxis.set_major_locator(MaxNLocator(min(layers, 15), integer=True))
    ax.yaxis.set_major_locator(MaxNLocator(min(heads, 9), integer=True))
    return ax


def sinks_by_beginning(
    rate: Float[xr.DataArray, "model beginning text layer"], labels: dict[str, str]
) -> list[Axes]:
    """A panel a model: which share of a layer's heads have a sink, a curve for each beginning.

    `labels` says each beginning in words. Layers that a model has not are NaN. Lines are medians
    over texts, bands their range.
    """
    colours = dict(zip(labels, (SINK, "black", TRIGGER), strict=True))
    models = rate.model.values
    size = (2.8 * len(models), 2.9)
    _, axes = plt.subplots(1, len(models), figsize=size, sharey=True, layout="constrained")
    for ax, model in zip(axes, models, strict=True):
        of_model = rate.sel(model=model).dropna("layer", how="all")
        of_model = of_model.transpose("beginning", "text", "layer")
        series = {
            label: (of_model.sel(beginning=beginning).values, colours[beginning])
            for beginning, label in labels.items()
        }
        by_layer(series, ax, ylabel="", title=str(model), log=False)
        ax.get_legend().remove()
        ax.set_ylim(-0.03, 1.03)
    axes[0].set_ylabel("share of heads with a sink")
    axes[-1].legend(loc="upper left", bbox_to_anchor=(1, 1))
    return list(axes)
