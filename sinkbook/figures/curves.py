"""Figures of curves: over training steps, over time, over a parameter. See `basic.py`."""

import matplotlib.pyplot as plt
import numpy as np
import xarray as xr
from jaxtyping import Float, Shaped
from matplotlib.axes import Axes

from sinkbook.figures.basic import axes_or_new
from sinkbook.figures.style import OTHER, SEEDS, SINK
from sinkbook.fits import Fit

# By the names of `experiments.optimizer_sweep`.
OPTIMIZER_COLOURS = {
    "AdamW": "#009E73",
    "AdamW, ε = 1e-4": "#56B4E9",
    "RMSprop": "#0072B2",
    "signSGD": "#CC79A7",
    "Muon": "#E69F00",
    "SGD, momentum": "#777777",
    "SGD": "#222222",
}


def over_training(
    series: dict[str, tuple[Float[xr.DataArray, "seed step"], str]],
    ax: Axes | None = None,
    *,
    ylabel: str,
    title: str = "",
    logx: bool = True,
) -> Axes:
    """Curves over training steps: the mean over seeds, the band from the lowest to the highest."""
    ax = axes_or_new(ax)
    for label, (values, colour) in series.items():
        values = values.transpose("seed", "step")
        band = values.min("seed"), values.max("seed")
        ax.fill_between(values.step, *band, color=colour, alpha=0.2, lw=0)
        ax.plot(values.step, values.mean("seed"), color=colour, label=label)
    if logx:
        ax.set_xscale("symlog", linthresh=10, linscale=0.3)
    ax.set(xlabel="training step", ylabel=ylabel, title=title)
    ax.set_xlim(0, None)
    if len(series) > 1:
        ax.legend()
    return ax


def by_optimizer(table: xr.Dataset, labels: dict[str, str]) -> list[Axes]:
    """Variables of a `optimizer_dynamics.optimizer_table` over training steps, with their labels.

    A panel for each variable, a colour for each optimizer: AdamW and SGD with momentum seed by
    seed, thick, and the means over seeds of the others.
    """
    _, axes = plt.subplots(1, len(labels), figsize=(7.4, 3.4))
    for ax, (name, label) in zip(axes, labels.items(), strict=True):
        for optimizer in table.optimizer.values.tolist():
            values = table[name].sel(optimizer=optimizer).transpose("seed", "step")
            alone = optimizer in ("AdamW", "SGD, momentum")
            look = {"lw": 1.6, "zorder": 3} if alone else {"lw": 0.9, "alpha": 0.8}
            if optimizer == "SGD":  # grey as well, beside the other one
                look["ls"] = "--"
            for number, line in enumerate(values if alone else [values.mean("seed")]):
                drawn = ax.plot(line.step, line, color=OPTIMIZER_COLOURS[optimizer], **look)
                drawn[0].set_label(None if number else optimizer)
        ax.set(xlabel="training step", ylabel=label, xscale="log", xlim=(1, None))
    handles, names = axes[0].get_legend_handles_labels()
    axes[0].figure.legend(handles, names, ncols=4, fontsize=8, loc="outside upper center")
    return list(axes)


def height_by_distance(ends: xr.Dataset) -> list[Axes]:
    """How high the peak ends against how far the first layer's attention has moved, seed by seed.

    `ends` is an `optimizer_dynamics.optimizer_table` at its last step: a panel for each seed, a dot
    for each optimizer.
    """
    _, axes = plt.subplots(1, ends.sizes["seed"], figsize=(7.8, 3.2), layout="constrained")
    for ax, seed in zip(axes, ends.seed.values, strict=True):
        for name in ends.optimizer.values.tolist():
            one = ends.sel(seed=seed, optimizer=name)
            dot = one.distance_moved, one.residual_peak_height
            ax.plot(*dot, "o", color=OPTIMIZER_COLOURS[name], label=name, alpha=0.85)
        ax.axhline(0, color=OTHER, lw=0.8)
        ax.set(xlabel="distance moved", title=f"seed {seed}")
    axes[0].set_ylabel("peak height at the end")
    handles, names = axes[0].get_legend_handles_labels()
    axes[0].figure.legend(handles, names, ncols=4, fontsize=8, loc="outside upper center")
    return list(axes)


def fan(
    x: Float[np.ndarray, " point"],
    lines: Float[np.ndarray, "point line"],
    ax: Axes | None = None,
    *,
    reference: Float[np.ndarray, "point line"] | None = None,
    labels: tuple[str, str] = ("", ""),
    colour: str = SINK,
    xlabel: str,
    ylabel: str,
    title: str = "",
) -> Axes:
    """Many thin lines over a logarithmic axis; `reference` lays dashed ones over three of them.

    Those that end lowest, in the middle and highest. `labels` names the lines and the reference.
    """
    ax = axes_or_new(ax)
    drawn = ax.plot(x, lines, color=colour, lw=0.9, alpha=0.6)
    if reference is not None:
        order = np.argsort(lines[-1])[[0, lines.shape[1] // 2, -1]]
        expected = ax.plot(x, reference[:, order], color="black", lw=1.2, ls=(0, (4, 4)))
        ax.legend([drawn[0], expected[0]], labels)
    ax.set(xlabel=xlabel, ylabel=ylabel, title=title, xscale="log")
    return ax


def curves(
    series: dict[str, tuple[Shaped[np.ndarray, " point"], Shaped[np.ndarray, " point"], str]],
    ax: Axes | None = None,
    *,
    xlabel: str,
    ylabel: str,
    title: str = "",
    log: str = "x",
    legend: bool = True,
) -> Axes:
    """A line for each label, given as x, y and a colour. A colour that ends in "--" is dashed.

    `log` names the logarithmic axes: "x", "y", "xy" or none.
    """
    ax = axes_or_new(ax)
    for label, (x, y, colour) in series.items():
        style = "--" if colour.endswith("--") else "-"
        ax.plot(x, y, style, color=colour.removesuffix("--"), label=label)
    ax.set(xlabel=xlabel, ylabel=ylabel, title=title)
    ax.set(xscale="log" if "x" in log else "linear", yscale="log" if "y" in log else "linear")
    if legend:
        ax.legend()
    return ax


def panels(*each: dict, sharey: bool = False, **shared) -> list[Axes]:
    """Panels side by side, each given as arguments of `curves`; `shared` goes to all of them.

    With `sharey` they have one vertical axis, which the first panel labels, and one legend.
    """
    _, axes = plt.subplots(1, len(each), figsize=(7, 3), sharey=sharey)
    for ax, arguments in zip(axes, each, strict=True):
        curves(ax=ax, **{"ylabel": ""} | shared | arguments)
        if sharey and ax is not axes[0]:
            ax.set_ylabel("")
            ax.get_legend().remove()
    return list(axes)


def quantile_band(
    values: Float[xr.DataArray, "seed step token"],
    ax: Axes,
    *,
    colour: str,
    quantiles: tuple[float, float] = (0.1, 0.9),
) -> Axes:
    """A light band between two quantiles over tokens, all seeds together."""
    low, high = values.quantile(quantiles, dim=("seed", "token"))
    ax.fill_between(values.step, low, high, color=colour, alpha=0.12, lw=0)
    return ax


def event_strip(
    events: dict[str, Float[xr.DataArray, " seed"]],
    ax: Axes | None = None,
    *,
    reference: dict[str, float],
    xlabel: str,
) -> Axes:
    """When things happened: one row an event, one dot a seed, a cross for the paper's run."""
    ax = axes_or_new(ax, figsize=(7, 0.8 + 0.35 * len(events)))
    for row, (name, steps) in enumerate(events.items()):
        dots = ax.plot(steps, np.full(steps.shape, row), "o", color=SINK, alpha=0.6, ms=6, mew=0)
        if name in reference:
            crosses = ax.plot(reference[name], row, "x", color="black", ms=7, mew=2)
    ax.set_yticks(range(len(events)), events)
    ax.set(xlabel=xlabel, xscale="log", ylim=(len(events) - 0.5, -0.5))
    ax.grid(axis="y", alpha=0.3)
    if set(reference) & set(events):
        names = {"ncols": 2, "loc": "lower right", "bbox_to_anchor": (1, 1)}
        ax.legend([dots[0], crosses[0]], ["a seed of ours", "paper"], **names)
    return ax


def trajectories(
    x: Float[xr.DataArray, "seed step"],
    y: Float[xr.DataArray, "seed step"],
    ax: Axes | None = None,
    *,
    xlabel: str,
    ylabel: str,
) -> Axes:
    """Two quantities against each other along training, one line a seed."""
    ax = axes_or_new(ax, figsize=(5.4, 3.8))
    ax.set_prop_cycle(color=SEEDS)
    for across, up in zip(x.transpose("seed", "step"), y.transpose("seed", "step"), strict=True):
        ax.plot(across, up, ".-", lw=0.8, ms=6, label=f"seed {int(across.seed)}")
    ax.set(xlabel=xlabel, ylabel=ylabel)
    ax.legend(fontsize=8)
    return ax


def fitted(
    values: Float[xr.DataArray, "seed step"],
    fits: list[Fit],
    ax: Axes | None = None,
    *,
    ylabel: str,
    log: bool = False,
) -> Axes:
    """Curves of every seed as dots, each with its fitted line; `log`: straight in log(step)."""
    ax = axes_or_new(ax)
    for i, (seed, fit) in enumerate(zip(values.transpose("seed", "step"), fits, strict=True)):
        across = np.log(seed.step) if log else seed.step
        colour = SEEDS[i % len(SEEDS)]
        ax.plot(seed.step, seed, ".", color=colour, ms=5, label=f"seed {int(seed.seed)}")
        ax.plot(seed.step, fit.intercept + fit.slope * across, color=colour, lw=1.2)
    ax.set(xlabel="training step", ylabel=ylabel, xscale="log" if log else "linear")
    ax.legend(fontsize=8)
    return ax


def against(
    ours: dict[str, Float[xr.DataArray, " step"]],
    theirs: Float[xr.DataArray, " step"],
    ax: Axes | None = None,
    *,
    ylabel: str,
    colour: str,
) -> Axes:
    """Curves of ours by label, as a full, a dashed and a dotted line, and the paper's as dots."""
    ax = axes_or_new(ax)
    for (label, curve), style in zip(ours.items(), ("-", "--", ":"), strict=False):
        ax.plot(curve.step, curve, style, color=colour, label=label)
    ax.plot(theirs.step, theirs, "o", color="black", ms=4.5, mfc="white", label="paper")
    ax.set(xlabel="training step", ylabel=ylabel)
    ax.legend()
    return ax


def over_parameter(
    x: Shaped[np.ndarray, " point"],
    series: dict[str, tuple[Float[np.ndarray, "seed point"], str]],
    ax: Axes | None = None,
    *,
    xlabel: str,
    ylabel: str,
    span: tuple[float, float, str] | None = None,
) -> Axes:
    """Curves over a parameter of the task: mean and range over seeds, and a dot for every seed.

    `span` hatches a stretch of the axis and says why.
    """
    ax = axes_or_new(ax)
    if span is not None:
        ax.axvspan(*span[:2], fc="none", ec=OTHER, hatch="///", alpha=0.5, lw=0, label=span[2])
    for label, (values, colour) in series.items():
        values = np.asarray(values)
        ax.fill_between(x, values.min(0), values.max(0), color=colour, alpha=0.2, lw=0)
        ax.plot(x, values.mean(0), color=colour, label=label)
        ax.plot(x, values.T, ".", color=colour, ms=5)
    ax.set(xlabel=xlabel, ylabel=ylabel)
    ax.legend()
    return ax
