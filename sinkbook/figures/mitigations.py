"""Figures that compare mitigations: by layer, along the loss, as points, as families."""

import textwrap
from collections.abc import Collection

import matplotlib.pyplot as plt
import numpy as np
import xarray as xr
from jaxtyping import Bool, Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator

from sinkbook.figures.basic import attention_map, axes_or_new
from sinkbook.figures.phone import FREE, set_apart
from sinkbook.figures.style import OTHER, SINK

FAMILY_COLOURS = {
    "control": "#222222",
    "no normalisation": "#CC79A7",
    "null slot": "#0072B2",
    "gate": "#E69F00",
    "norm": "#009E73",
    "optimizer": "#D55E00",
}


def methods_by_layer(
    values: dict[str, Float[xr.DataArray, "seed any_layer"]],
    ax: Axes | None = None,
    *,
    colours: dict[str, str],
    ylabel: str,
    xlabel: str = "layer",
    scale: str = "linear",
    legend: bool = True,
) -> Axes:
    """A quantity in every layer: for each method a mean and a dot for every seed, side by side."""
    ax = axes_or_new(ax)
    offsets = np.linspace(-0.2, 0.2, len(values))
    for offset, (label, of_method) in zip(offsets, values.items(), strict=True):
        dim = next(d for d in of_method.dims if d != "seed")
        seeds = of_method.transpose("seed", dim)
        places = seeds[dim].values + offset
        ax.plot(places, seeds.mean("seed"), "_", color=colours[label], ms=14, mew=2.5, label=label)
        ax.plot(places, seeds.values.T, ".", color=colours[label], ms=5, alpha=0.8)
        ax.set_xticks(seeds[dim].values)
    ax.set(xlabel=xlabel, ylabel=ylabel)
    if scale == "symlog":
        ax.set_yscale("symlog", linthresh=10)
        widen(ax)
    ax.grid(axis="y", alpha=0.3)
    if legend:
        ax.legend(fontsize=8)
    return ax


def widen(ax: Axes) -> None:
    """Room above and below what is drawn on an axis that is linear up to 10 and logarithmic above.

    What lies at its limits would be cut in half.
    """
    low, high = ax.dataLim.intervaly
    ax.set_ylim(low - max(1, 0.7 * abs(low)), high + max(1, 0.7 * abs(high)))


def mitigation_points(
    x: Float[xr.DataArray, "mitigation seed"],
    y: Float[xr.DataArray, "mitigation seed"],
    ax: Axes | None = None,
    *,
    xlabel: str,
    ylabel: str,
    log: str = "",
    named: Collection[str] | None = None,
) -> Axes:
    """A point for each mitigation at the means over seeds, a thin line to each seed.

    `x` and `y` carry the coordinates `label` and `family`; the control "softmax" is a star. Those
    that are `named`, by default all, have their label beside them.
    """
    ax = axes_or_new(ax, figsize=(7.6, 5.4))
    for name in x.mitigation.values:
        across, up = x.sel(mitigation=name), y.sel(mitigation=name)
        colour = FAMILY_COLOURS[across.family.item()]
        centre = across.mean().item(), up.mean().item()
        for seed in zip(across.values, up.values, strict=True):
            ax.plot(*zip(centre, seed, strict=True), color=colour, lw=0.6, alpha=0.6)
        ax.plot(*centre, "*" if name == "softmax" else "o", color=colour, ms=6)
        if named is not None and name not in named:
            continue
        line = {"arrowstyle": "-", "lw": 0.4, "color": colour}
        words = {"textcoords": "offset points", "ha": "center", "va": "center", "fontsize": 7}
        ax.annotate(across.label.item(), centre, (0, 9), color=colour, arrowprops=line,
                    gid=FREE, **words)  # fmt: skip
    ax.set(xlabel=xlabel, ylabel=ylabel)
    ax.set(xscale="log" if "x" in log else "linear", yscale="log" if "y" in log else "linear")
    ax.margins(x=0.12, y=0.08)
    family_legend(ax.figure)
    set_apart(ax)
    return ax


def mitigation_rows(
    values: Float[xr.DataArray, "mitigation seed"],
    ax: Axes | None = None,
    *,
    xlabel: str,
    names: bool = True,
    log: bool = False,
    over: Float[xr.DataArray, "other_mitigation other_seed"] | None = None,
) -> Axes:
    """One row a mitigation in the order of `values`: a dot for every seed, a line at the control.

    `values` carries the coordinates `label` and `family`. The mean of `over`, of other trainings of
    some of these mitigations, is laid over the dots as a hollow diamond.
    """
    ax = axes_or_new(ax, figsize=(5, 6))
    for row, name in enumerate(values.mitigation.values):
        seeds = values.sel(mitigation=name)
        colour = FAMILY_COLOURS[seeds.family.item()]
        ax.plot(seeds, np.full(seeds.size, row), "o", color=colour, ms=4, alpha=0.8)
        if over is not None and name in over.mitigation:
            other = over.sel(mitigation=name).mean().item()
            ax.plot(other, row, "D", color="black", mfc="none", mew=0.9, ms=5.5)
    if "softmax" in values.mitigation:
        control = values.sel(mitigation="softmax").mean().item()
        ax.axvline(control, color=OTHER, lw=0.9, ls="--")
    count = values.sizes["mitigation"]
    ax.set_yticks(range(count), values.label.values)
    ax.set(xlabel=xlabel, ylim=(count - 0.4, -0.6))
    if log:
        low, high = values.min().item(), values.max().item()
        ax.set_xscale("log")
        within_a_decade = high < 20 * low
        ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if within_a_decade else (1,)))
        ax.xaxis.set_major_formatter("{x:g}")
        ax.xaxis.set_minor_formatter("")
    ax.tick_params(axis="y", length=0, labelsize=7.5, labelleft=names)
    ax.grid(axis="y", alpha=0.25)
    return ax


def league_board(
    criteria: xr.Dataset, *, order: list[str], over: xr.Dataset | None = None
) -> list[Axes]:
    """The criteria of the league table side by side, a row for each mitigation in `order`.

    `criteria` is what `league.criteria` gives; `order` holds labels, the best first. A dashed line
    marks softmax. The means of another table, of some of the mitigations, are laid `over` it; steps
    are then left out, since two tables have two common losses.
    """
    names = criteria.swap_dims(mitigation="label").mitigation.sel(label=order).values
    columns = [c for c in criteria.data_vars if over is None or c != "steps_to_loss"]
    _, panels = plt.subplots(1, len(columns), figsize=(9, 5.2), squeeze=False)
    for panel, column in zip(panels[0], columns, strict=True):
        mitigation_rows(
            criteria[column].sel(mitigation=names),
            panel,
            xlabel=criteria[column].long_name.replace(" ", "\n", 1),
            names=panel is panels[0, 0],
            log=column
            in ("value_drain_ratio", "residual_peak_ratio", "kurtosis_text", "int8_error"),
            over=None if over is None else over[column],
        )
        panel.tick_params(axis="x", labelsize=7)
    family_legend(panels[0, 0].figure)
    return list(panels[0])


def family_legend(figure: Figure) -> None:
    """Above a figure, which colour is which family of mitigations."""
    dots = [Line2D([], [], color=c, marker="o", ls="", ms=6) for c in FAMILY_COLOURS.values()]
    figure.legend(dots, FAMILY_COLOURS, ncols=6, fontsize=7.5, loc="outside upper center")


def maps_of_methods(
    maps: dict[str, tuple[Float[np.ndarray, "query key"], list[str], Bool[np.ndarray, " query"]]],
) -> list[Axes]:
    """Attention maps side by side, by their titles: weights, labels, and which are triggers."""
    size = (2.1 * len(maps), 2.6)
    _, panels = plt.subplots(1, len(maps), figsize=size, squeeze=False)
    for panel, (title, (weights, labels, triggers)) in zip(panels[0], maps.items(), strict=True):
        attention_map(weights, labels, panel, title=title, highlight=triggers, colorbar=False)
        panel.label_outer()
        panel.tick_params(labelsize=6)
    return list(panels[0])


def destination_bars(shares: xr.DataArray, ax: Axes | None = None) -> Axes:
    """Where attention goes, stacked: a group for each control, a bar for each mitigation.

    `shares` is what `league.destinations` gives; bars are means over seeds, and a dot is what a
    seed gives to the first of the destinations.
    """
    ax = axes_or_new(ax, figsize=(7.4, 3.6))
    colours = dict(zip(shares.destination.values, (SINK, "#BBBBBB", "#E69F00"), strict=True))
    count = shares.sizes["mitigation"]
    ticks, names = [], []
    for group, control in enumerate(shares.control.values):
        for number, mitigation in enumerate(shares.mitigation.values):
            means = shares.sel(control=control, mitigation=mitigation).mean("seed")
            if means.isnull().any():
                continue
            place, bottom = group * (count + 1) + number, 0.0
            for destination, colour in colours.items():
                height = means.sel(destination=destination).item()
                known = destination if not ticks else None
                ax.bar(place, height, bottom=bottom, color=colour, width=0.85, label=known)
                bottom += height
            seeds = shares.sel(control=control, mitigation=mitigation).isel(destination=0)
            across = place + np.linspace(-0.25, 0.25, seeds.size)
            ax.plot(across, seeds, "o", color="black", ms=2.5)
            ticks.append(place)
            names.append(shares.label.sel(mitigation=mitigation).item())
        middle = group * (count + 1) + (count - 1) / 2
        ax.text(middle, 1.03, textwrap.fill(control, 11), ha="center", fontsize=9)
    ax.set_xticks(ticks, names, rotation=40, ha="right", fontsize=8)
    ax.set(ylabel="attention of tokens that are no triggers", ylim=(0, 1.2))
    ax.set_yticks(np.linspace(0, 1, 6))
    ax.legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize=8)
    return ax


def marks_by_layer(ends: dict[str, xr.Dataset], *, colours: dict[str, str]) -> list[Axes]:
    """Sink, drain and peak of several methods in every layer, a panel each.

    `ends` are the last measurements of each method's runs, along `seed` (`training.together`).
    Residual states count from the embedding, 0.
    """
    _, panels = plt.subplots(1, 3, figsize=(7.8, 3.3))
    quantities = {
        "attention on <s>": lambda end: end.sink_attention.isel(head=0),
        "value norm of <s>, relative": lambda end: (end.value_norm / end.other_value_norm).isel(
            head=0
        ),
        "height of the peak": lambda end: end.residual_peak_height,
    }
    for panel, (label, of) in zip(panels, quantities.items(), strict=True):
        values = {name: of(end) for name, end in ends.items()}
        high = panel is panels[2] and max(abs(found).max() for found in values.values()) > 100
        methods_by_layer(
            values,
            panel,
            colours=colours,
            ylabel=f"{label}\n(logarithmic above 10)" if high else label,
            xlabel="residual state" if panel is panels[2] else "layer",
            scale="symlog" if high else "linear",
            legend=False,
        )
    handles, labels = panels[0].get_legend_handles_labels()
    panels[0].figure.legend(handles, labels, ncols=len(labels), loc="outside upper center")
    return list(panels)
