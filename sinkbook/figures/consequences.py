"""Figures of what sinks cost and buy. See `basic.py`."""

import matplotlib.pyplot as plt
import numpy as np
import xarray as xr
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from sinkbook.figures.basic import axes_or_new
from sinkbook.figures.curves import over_parameter
from sinkbook.figures.phone import plain
from sinkbook.figures.style import OTHER


def along_text(
    rises: dict[str, tuple[Float[xr.DataArray, "text position"], str]],
    ax: Axes | None = None,
    *,
    window: int,
    block: int = 8,
) -> Axes:
    """Rise of the loss along a text, in blocks of `block` tokens: mean and range over texts.

    Given by label, with a colour. A dashed line marks the last token whose window reaches back to
    the beginning.
    """
    ax = axes_or_new(ax)
    for label, (values, colour) in rises.items():
        blocks = values.coarsen(position=block, boundary="trim").mean()
        ends = blocks.position, blocks.min("text"), blocks.max("text")
        ax.fill_between(*ends, color=colour, alpha=0.12, lw=0)
        ax.plot(blocks.position, blocks.mean("text"), ".-", color=colour, label=label, ms=5)
    ax.axvline(window, color="black", lw=0.8, ls="--")
    place = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points"}
    ax.annotate("window full", (window, 1), (-4, -10), ha="right", fontsize=9, **place)
    ax.axhline(0, color="black", lw=0.8)
    ax.set(xlabel="position in the text", ylabel="rise of the loss (nats)")
    ax.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return ax


def log_rows(
    rows: dict[str, tuple[Float[np.ndarray, " text"], str]],
    ax: Axes | None = None,
    *,
    xlabel: str,
) -> Axes:
    """One row a condition on a logarithmic axis: a dot for every text, a bar at their mean.

    The bar is the geometric mean. Given by label, with a colour.
    """
    ax = axes_or_new(ax, figsize=(7, 0.9 + 0.4 * len(rows)))
    for y, (values, colour) in enumerate(rows.values()):
        ax.plot(values, np.full(len(values), y), "o", color=colour, alpha=0.5, ms=6, mew=0)
        mean = float(np.exp(np.log(values).mean()))
        ax.plot([mean, mean], [y - 0.25, y + 0.25], color=colour, lw=2.5)
        mean_in_words = plain(float(f"{mean:.3g}"))
        ax.annotate(mean_in_words, (mean, y - 0.25), (0, 2), textcoords="offset points",
                    fontsize=9, ha="center")  # fmt: skip
    ax.set_yticks(range(len(rows)), rows)
    ax.set(xlabel=xlabel, xscale="log", ylim=(len(rows) - 0.5, -0.8))
    all_values = np.concatenate([values for values, _ in rows.values()])
    wide = all_values.max() > 30 * all_values.min()
    ax.xaxis.set_major_locator(LogLocator(subs=(1, 3) if wide else (1, 2, 3, 5)))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(plain)
    ax.grid(axis="y", alpha=0.3)
    ax.tick_params(axis="y", length=0)
    return ax


def shares_by_layer(
    parts: dict[str, tuple[Float[xr.DataArray, "text layer"], str]],
    ax: Axes | None = None,
    *,
    ylabel: str,
) -> Axes:
    """What the parts of a quantity add up to in every layer: stacked bars, the mean over texts."""
    ax = axes_or_new(ax)
    height = 0.0
    for label, (values, colour) in parts.items():
        mean = values.mean("text")
        ax.bar(mean.layer, mean, 0.85, bottom=height, color=colour, label=label, alpha=0.85)
        height = height + mean.values
    ax.set(xlabel="layer", ylabel=ylabel, ylim=(0, None))
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.axhline(0, color=OTHER, lw=0.8)
    ax.legend(ncols=len(parts), loc="lower center", bbox_to_anchor=(0.5, 1))
    return ax


def pruning_panels(
    rises: dict[str, Float[xr.DataArray, "order removed text"]], colours: dict[str, str]
) -> list[Axes]:
    """Rise of the loss against the share of heads cut: a panel for each domain, a line an order.

    Mean and range over texts. The vertical axis is linear up to 0.1 and logarithmic above.
    """
    _, axes = plt.subplots(1, len(rises), figsize=(7.4, 3.2), sharey=True)
    for ax, (domain, rise) in zip(axes, rises.items(), strict=True):
        rise = rise.transpose("order", "text", "removed")
        series = {order: (rise.sel(order=order).values, c) for order, c in colours.items()}
        ylabel = "rise of the loss (nats)" if ax is axes[0] else ""
        over_parameter(100 * rise.removed.values, series, ax, xlabel="heads cut (%)", ylabel=ylabel)
        ax.set_title(domain)
        ax.set_yscale("symlog", linthresh=0.1)
        if ax is not axes[0]:
            ax.get_legend().remove()
    return list(axes)
