"""Figures of heads that sleep in one domain and work in another. See `basic.py`."""

from collections.abc import Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import xarray as xr
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from sinkbook.figures.basic import axes_or_new
from sinkbook.figures.style import BY_LAYER, OTHER, SINK, TRIGGER
from sinkbook.llm.dormant_head_tests import DETECTORS, LEAST_RISE, MOST_RISE, at

SLEEPS, WORKS = SINK, TRIGGER


def domain_against(
    attention: Float[xr.DataArray, "domain layer head"], first: str, others: Sequence[str]
) -> list[Axes]:
    """Sink attention in one domain against some others: a panel for each, one dot a head."""
    fig, axes = plt.subplots(1, len(others), figsize=(7.4, 2.9), sharey=True)
    layer = xr.broadcast(attention.layer, attention.isel(domain=0, drop=True))[0]
    for ax, other in zip(axes, others, strict=True):
        ax.plot([0, 1], [0, 1], color=OTHER, lw=1, ls="--")
        x, y = (attention.sel(domain=domain).values.ravel() for domain in (first, other))
        dots = ax.scatter(x, y, c=layer.values.ravel(), cmap=BY_LAYER, s=9)
        ax.set(title=other, xlabel=f"in {first}", xlim=(0, 1), ylim=(0, 1))
        ax.set_xticks([0, 0.5, 1], ["0", "0.5", "1"])
    axes[0].set_ylabel("sink attention")
    fig.colorbar(dots, ax=axes, label="layer")
    return list(axes)


def domain_profiles(
    candidates: pd.DataFrame, attention: xr.DataArray, changes: xr.DataArray
) -> list[Axes]:
    """Heads through all domains: a row of panels each, sink attention beside change of loss.

    A bar is the mean over texts, a dot one text.
    """
    size = (7.4, 0.5 + 2.3 * len(candidates))
    _, axes = plt.subplots(len(candidates), 2, figsize=size, sharey=True, squeeze=False)
    domains = changes.domain.values
    places = np.arange(len(domains))
    for row, (number, head) in zip(axes, candidates.iterrows(), strict=True):
        looks = attention.sel(layer=head.layer, head=head["head"])
        found = (looks, SLEEPS), (changes.sel(candidate=number), WORKS)
        for ax, (values, colour) in zip(row, found, strict=True):
            values = values.transpose("domain", "text").values
            ax.barh(places, values.mean(axis=1), color=colour, alpha=0.5, height=0.7)
            ax.plot(values, places, ".", color="black", ms=3.5, alpha=0.6)
            ax.set_title(head["name"])
        row[0].set(xlim=(0, 1), ylim=(len(domains) - 0.5, -0.5))
        row[0].set_yticks(places, domains)
        row[1].axvline(0, color=OTHER, lw=0.8)
    axes[-1, 0].set_xlabel("sink attention")
    axes[-1, 1].set_xlabel("rise of the loss without the head (nats)")
    return list(axes.flat)


def effects(found: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """The rows of `evidence`: how the loss rises without each head, in both of its domains.

    Dots are means with 95 % intervals, selected heads above random ones. The axis is linear near
    zero, where the grey band marks the changes that count as none, and logarithmic beyond.
    """
    ax = axes_or_new(ax, figsize=(7, 0.9 + 0.28 * len(found)))
    labels = [f"{row.name_}: {row.active} / {row.dormant}" for row in _renamed(found)]
    _draw_changes(found, labels, ax)
    ax.set_xlabel("rise of the loss without the head (nats)")
    boundary = (found.chosen_by == "random").to_numpy().argmax() - 0.5
    ax.axhline(boundary, color=OTHER, lw=0.8)
    return ax


IN_ITS_PLACE = {"zero": "nothing", "mean": "its mean", "shuffled": "another text's"}


def effects_by_way(found: dict[str, pd.DataFrame], ax: Axes | None = None) -> Axes:
    """`effects` of the same heads by what stands in their place, the ways of each head together.

    `found` has the rows of `evidence` for each way in `interventions.WAYS`.
    """
    ways, heads = len(found), next(iter(found.values())).index
    together = pd.concat([table.assign(way=way) for way, table in found.items()])
    rows = pd.concat([together.loc[[head]] for head in heads], ignore_index=True)
    ax = axes_or_new(ax, figsize=(7, 0.9 + 0.28 * len(rows)))
    labels = [
        f"{row.name_}: {IN_ITS_PLACE[row.way]}" if number % ways == 0 else IN_ITS_PLACE[row.way]
        for number, row in enumerate(_renamed(rows))
    ]
    _draw_changes(rows, labels, ax)
    ax.set_xlabel("rise of the loss with that in the head's place (nats)")
    for boundary in range(ways, len(rows), ways):
        ax.axhline(boundary - 0.5, color=OTHER, lw=0.8)
    return ax


def _draw_changes(found: pd.DataFrame, labels: Sequence[str], ax: Axes) -> None:
    """A row for each of `evidence`: changes of loss in both domains, with 95 % intervals."""
    ax.axvspan(-MOST_RISE, MOST_RISE, color=OTHER, alpha=0.15, lw=0)
    ax.axvline(LEAST_RISE, color=OTHER, lw=1, ls="--")
    places = np.arange(len(found))
    for side, colour, shift in (("active", WORKS, -0.14), ("dormant", SLEEPS, 0.14)):
        mean = found[f"{side}_change"]
        bars = np.abs([mean - found[f"{side}_low"], found[f"{side}_high"] - mean])
        ax.errorbar(mean, places + shift, xerr=bars, fmt="o", ms=4, lw=1.2, color=colour)
    handles = [plt.Line2D([], [], color=c, marker="o", ms=4, lw=1.2) for c in (WORKS, SLEEPS)]
    named = ["in its active kind of text", "in its dormant kind"]
    ax.legend(handles, named, ncols=2, loc="lower left", bbox_to_anchor=(0, 1))
    ax.set_yticks(places, labels, fontsize=8)
    ax.set_xscale("symlog", linthresh=MOST_RISE, linscale=0.9)
    ticks = [-1, -0.1, -0.01, 0, 0.01, 0.1, 1]
    limits = ax.get_xlim()
    ax.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    ax.set(xlim=limits, ylim=(len(found) - 0.5, -0.5))


def _renamed(found: pd.DataFrame):
    return found.rename(columns={"name": "name_"}).itertuples()


def dot_a_text(
    candidates: pd.DataFrame, attention: xr.DataArray, changes: xr.DataArray
) -> list[Axes]:
    """Sink attention against change of loss, one dot a text, a panel a head: Figure 8b."""
    _, axes = plt.subplots(1, len(candidates), figsize=(7.4, 2.9), squeeze=False)
    for ax, row in zip(axes.flat, _renamed(candidates), strict=True):
        one = candidates.loc[[row.Index]]
        for side, colour in (("dormant", SLEEPS), ("active", WORKS)):
            x, y = at(attention, one, side)[0], at(changes, one, side)[0]
            ax.plot(x, y, "o", color=colour, ms=5, alpha=0.7, mew=0, label=getattr(row, side))
        ax.axhline(0, color=OTHER, lw=0.8)
        ax.set(title=row.name_, xlabel="sink attention", xlim=(0, 1))
        low, high = ax.get_ylim()
        ax.set_ylim(low, high + 0.3 * (high - low))  # room for the legend
        ax.legend(fontsize=8, loc="upper center", handletextpad=0.2)
    axes[0, 0].set_ylabel("rise of the loss (nats)")
    return list(axes.flat)


def chance(
    largest: dict[str, tuple[Float[np.ndarray, " shuffle"], pd.Series]],
) -> list[Axes]:
    """The largest gap among all heads by chance, and the gaps of named heads as lines.

    A panel for each label, given as gaps by chance and those of heads by their name. Dashed: 95 %
    of the shuffles lie to the left.
    """
    _, axes = plt.subplots(1, len(largest), figsize=(7.4, 2.6), sharey=True, squeeze=False)
    for ax, (title, (by_chance, heads)) in zip(axes.flat, largest.items(), strict=True):
        ax.hist(by_chance, bins=np.arange(0, 1.01, 0.02), color=OTHER, alpha=0.6)
        ax.axvline(np.quantile(by_chance, 0.95), color=OTHER, lw=1, ls="--")
        for name, gap in heads.items():
            ax.axvline(gap, color=WORKS, lw=1.5)
            along = {"xycoords": ("data", "axes fraction"), "rotation": 90, "fontsize": 9}
            ax.annotate(name, (gap + 0.01, 0.97), ha="left", va="top", **along)
        ax.set(xlim=(0, 1), title=title, xlabel="gap of sink attention")
    axes[0, 0].set_ylabel("shuffles")
    return list(axes.flat)


def wake_up(trace: xr.Dataset, parts: Sequence[str]) -> list[Axes]:
    """Heads along running texts: sink attention above, change of loss below, a column a head.

    Lines are means over texts, the band holds the middle half of them; `parts` names the stretches.
    """
    shape = (2, trace.sizes["candidate"])
    _, axes = plt.subplots(*shape, figsize=(7.4, 4.2), sharex=True, sharey="row", squeeze=False)
    drawn = {"sink attention": (trace.sink_attention, SLEEPS)}
    drawn["rise of the loss (nats)"] = (trace.change, WORKS)
    starts = [int(trace.position[trace.part == number].min()) for number in range(len(parts))]
    for row, (label, (values, colour)) in zip(axes, drawn.items(), strict=True):
        for ax, one in zip(row, values.transpose("candidate", ...), strict=True):
            low, high = one.quantile([0.25, 0.75], dim="text")
            ax.fill_between(one.position, low, high, color=colour, alpha=0.2, lw=0)
            ax.plot(one.position, one.mean("text"), color=colour, lw=1.1)
            for start in starts:
                ax.axvline(start, color=OTHER, lw=0.8, ls="--")
        row[0].set_ylabel(label)
    for (above, below), name in zip(axes.T, trace.candidate.values, strict=True):
        above.set_title(str(name), pad=22)
        for start, part in zip(starts, parts, strict=True):
            place = (start + 1, 1.02)
            above.annotate(part, place, xycoords=("data", "axes fraction"), fontsize=7.5)
        above.set(ylim=(0, 1))
        below.axhline(0, color=OTHER, lw=0.8)
        below.set(xlabel="position", xlim=(0, int(trace.position.max())))
    return list(axes.flat)


def detectors(found: pd.DataFrame, draws: Float[xr.DataArray, "detector draw"]) -> list[Axes]:
    """Each detector against the change of loss, one dot a head and domain, with its agreement.

    `found` and `draws` are what `dormant_head_tests.cases` and `agreement` give.
    """
    _, axes = plt.subplots(1, len(DETECTORS), figsize=(7.4, 2.9), sharey=True)
    for ax, (name, detector) in zip(axes, DETECTORS.items(), strict=True):
        for side, colour in (("active", WORKS), ("dormant", SLEEPS)):
            rows = found[found.side == side]
            ax.plot(detector(rows), rows.effect, "o", color=colour, ms=4.5, alpha=0.7, mew=0)
        low, high = draws.sel(detector=name).quantile([0.025, 0.975])
        rho = float(draws.sel(detector=name, draw=0))
        ax.set(xlabel=name, title=f"ρ = {rho:.2f} ({low:.2f} to {high:.2f})", yscale="log")
        ax.xaxis.set_major_locator(MaxNLocator(4))
    axes[0].set_ylabel("change of the loss (nats)")
    return list(axes)
