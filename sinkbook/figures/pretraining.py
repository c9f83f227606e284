"""Figures of pretrainings: heads along training, both kinds of text, keys and their logits.

See `basic.py` and `curves.py`.
"""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import xarray as xr
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullLocator

from sinkbook.figures.basic import axes_or_new
from sinkbook.figures.curves import over_training
from sinkbook.figures.style import DRAIN, OTHER, PEAK, SEEDS, SINK, TRIGGER, layer_colours
from sinkbook.fits import Plateau
from sinkbook.models.token_labels import token_label

COPYING = TRIGGER


def every_head(measured: xr.Dataset, *, kind: str = "plain") -> list[Axes]:
    """Attention on the sink of each head along training: a panel a seed, a colour a layer.

    `measured` is what `shakespeare_pretraining.together` gives.
    """
    attention = measured.sink_attention.sel(kind=kind).transpose("seed", "layer", "step", "head")
    count, layers = attention.sizes["seed"], attention.sizes["layer"]
    _, axes = plt.subplots(1, count, figsize=(2.5 * count, 2.7), sharey=True, squeeze=False)
    for ax, of_seed in zip(axes[0], attention, strict=True):
        for layer, colour in enumerate(layer_colours(layers)):
            drawn = ax.plot(of_seed.step, of_seed.isel(layer=layer), color=colour, lw=1.3)
            drawn[0].set_label(f"layer {layer}")
        ax.set(title=f"seed {int(of_seed.seed)}", ylim=(0, 1), xlabel="training step")
    axes[0, 0].set_ylabel("attention on <s>")
    axes[0, -1].legend(fontsize=8)
    return list(axes[0])


def life_of_a_head(head: xr.Dataset) -> list[Axes]:
    """Six panels along training of what `shakespeare_pretraining.follow_copying_head` found.

    Means over seeds, and bands from the lowest seed to the highest.
    """
    plain, repeated = head.sel(kind="plain"), head.sel(kind="repeated")
    panels = [
        (
            "next-token loss (nats)",
            {
                "plain": (plain.second_half_loss, OTHER),
                "repeated": (repeated.second_half_loss, COPYING),
            },
        ),
        ("copying score", {"copying": (head.copying, COPYING)}),
        (
            "attention on <s>",
            {
                "plain": (plain.sink_attention, SINK),
                "repeated": (repeated.sink_attention, COPYING),
            },
        ),
        ("sink logit", {"plain": (plain.sink_logit, SINK)}),
        ("value norm, <s> / others", {"plain": (plain.value_drain_ratio, DRAIN)}),
        ("residual norm, <s> / others", {"plain": (plain.residual_peak_ratio, PEAK)}),
    ]
    _, axes = plt.subplots(2, 3, figsize=(8.4, 5.0))
    for ax, (label, series) in zip(axes.flat, panels, strict=True):
        over_training(series, ax, ylabel=label, logx=False)
        if label in ("copying score", "attention on <s>"):
            ax.set_ylim(0, 1)
    return list(axes.flat)


CONTROLS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#777777")


def controls(heads: dict[str, xr.Dataset]) -> list[Axes]:
    """Two panels along training, a line a run: the copying head's score, and its sink.

    A group of runs is given as what `shakespeare_pretraining.follow_copying_head` found of it. The
    first one is drawn bold; the colours are those of the groups' order.
    """
    _, (left, right) = plt.subplots(1, 2, figsize=(7.6, 3.1), sharex=True, sharey=True)
    for (name, head), colour in zip(heads.items(), CONTROLS, strict=False):
        bold = {"lw": 2.2 if colour == CONTROLS[0] else 1.3, "color": colour, "alpha": 0.85}
        for number in range(head.sizes["seed"]):
            one = head.isel(seed=number)
            label = name if number == 0 else None
            left.plot(one.step, one.copying, label=label, **bold)
            right.plot(one.step, one.sink_attention.sel(kind="plain"), **bold)
    left.set(xlabel="training step", ylabel="copying score", ylim=(0, 1))
    right.set(xlabel="training step", ylabel="attention on position 0, plain text")
    right.yaxis.set_tick_params(labelleft=True)
    left.legend(fontsize=8)
    return [left, right]


def plateaus(
    curves: list[Float[xr.DataArray, " step"]],
    fits: list[Plateau],
    ax: Axes | None = None,
    *,
    title: str = "",
) -> Axes:
    """Sink logits as dots with their fits over a logarithmic axis; a band where growth may end."""
    ax = axes_or_new(ax)
    for number, (values, fit) in enumerate(zip(curves, fits, strict=True)):
        colour = SEEDS[number % len(SEEDS)]
        label = f"seed {int(values.seed)}" if "seed" in values.coords else None
        times = np.geomspace(values.step.min(), values.step.max(), 200)
        ax.axvspan(fit.end_low, fit.end_high, color=colour, alpha=0.1, lw=0)
        ax.plot(values.step, values, "o", color=colour, ms=4, label=label)
        ax.plot(times, fit.at(times), color=colour, lw=1.2)
    ax.set(xlabel="training step", ylabel="sink logit", xscale="log", title=title)
    ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.xaxis.set_major_formatter(
        lambda step, _: f"{step:g}" if step < 1000 else f"{step / 1000:g}k"
    )
    ax.xaxis.set_minor_locator(NullLocator())
    if len(curves) > 1:
        ax.legend(fontsize=8)
    return ax


def _short(step: float, _position: int) -> str:
    return f"{step:g}" if step < 1000 else f"{step / 1000:g}k"


def key_logits(
    logits: Float[xr.DataArray, "query key"],
    labels: list[str],
    ax: Axes | None = None,
    *,
    title: str = "",
) -> Axes:
    """A box for each key: the logits that random queries have towards it. The first is the sink."""
    ax = axes_or_new(ax)
    boxes = ax.boxplot(
        logits.transpose("query", "key").values,
        patch_artist=True,
        showfliers=False,
        whis=(1, 99),
        medianprops={"color": "black"},
    )
    for number, box in enumerate(boxes["boxes"]):
        box.set(facecolor=SINK if number == 0 else OTHER, alpha=0.6, lw=0.8)
    # The sign for a blank lies so low that it looks cut off under an axis.
    shown = [token_label(label.strip(" ") or "space") for label in labels]
    ax.set_xticks(range(1, len(labels) + 1), shown, fontfamily="monospace")
    ax.set(xlabel="key", ylabel="attention logit", title=title)
    return ax


def beside_olmo(head: xr.Dataset, olmo: xr.Dataset) -> list[Axes]:
    """Four quantities along training: on the left our head, on the right the paper's OLMo-7B.

    `head` is what `shakespeare_pretraining.follow_copying_head` found, `olmo` what
    `records.paper_olmo` is.
    """
    plain = head.sel(kind="plain")
    rows = [
        ("attention", plain.sink_attention, "sink_attention", SINK),
        ("sink logit", plain.sink_logit, "sink_logit", SINK),
        ("value norm", plain.value_norm, "value_norm", DRAIN),
        ("residual norm", plain.residual_norm, "residual_norm", PEAK),
    ]
    _, axes = plt.subplots(2, len(rows), figsize=(9.2, 4.6))
    for column, (label, ours, name, colour) in enumerate(rows):
        over_training({label: (ours, colour)}, axes[0, column], ylabel="", logx=False)
        theirs = olmo[name].dropna("step")
        axes[1, column].plot(theirs.step / 1000, theirs, "o-", color="black", mfc="white", ms=4.5)
        axes[1, column].set(xlabel="step (thousands)", xlim=(0, None))
        for row, whose in enumerate(("ours", "OLMo-7B")):  # on a phone a panel may stand alone
            axes[row, column].set_title(f"{label}, {whose}", fontsize=9)
            axes[row, column].set_ylim(min(0, axes[row, column].get_ylim()[0]), None)
    return list(axes.flat)


def levers(curves: Float[xr.DataArray, "run step"], *, even: float, counted: float) -> list[Axes]:
    """The strongest sink along training, a panel for each lever and a line for each seed.

    `curves` has the coordinates `lever` and `seed`; the first lever is the one that no other is
    moved from, and is drawn in every panel, dashed. Two more lines are what looking `even`ly gives,
    and from where on a head is `counted`.
    """
    names = list(dict.fromkeys(curves.lever.values.tolist()))
    columns = min(len(names), 4)
    rows = -(-len(names) // columns)
    size = 2.1 * columns + 0.4, 2.3 * rows + 0.3
    _, axes = plt.subplots(rows, columns, figsize=size, sharex=True, sharey=True, squeeze=False)
    (reference, *_) = curves.isel(run=curves.lever.values == names[0])
    for ax, name in zip(axes.flat, names, strict=False):
        for level, look in ((even, ":"), (counted, "-.")):
            ax.axhline(level, color=OTHER, lw=0.8, ls=look)
        ax.plot(reference.step, reference, "--", color=OTHER, lw=1.2, label=names[0])
        of_lever = curves.isel(run=curves.lever.values == name)
        for of_seed in of_lever:
            seed = int(of_seed.seed)
            colour = (SINK, *SEEDS[1:])[seed % len(SEEDS)]
            ax.plot(of_seed.step, of_seed, color=colour, lw=1.6, label=f"seed {seed}")
        ax.set(title=name, xlim=(0, None), ylim=(0, 1 if curves.max() > 0.6 else 0.6))
        ax.xaxis.set_major_formatter(_short)
        if of_lever.sizes["run"] > 1:
            ax.legend(fontsize=7)
    for ax in axes.flat[len(names) :]:
        ax.set_axis_off()
    axes[-1, 0].set(xlabel="training step", ylabel="attention, strongest head")
    return list(axes.flat[: len(names)])


def life_of_a_llama(head: xr.Dataset) -> list[Axes]:
    """Six panels along training of what `small_llama.follow_strongest_head` found, by domain."""
    quantities = {
        "next-token loss (nats)": (head.loss, OTHER),
        "attention on <s>": (head.sink_attention, SINK),
        "sink logit": (head.sink_logit, SINK),
        "value norm, <s> / others": (head.value_drain_ratio, DRAIN),
        "residual norm, <s> / others": (head.residual_peak_ratio, PEAK),
        "spread of sink logits, relative": (head.concentration, SINK),
    }
    _, axes = plt.subplots(2, 3, figsize=(8.4, 5.0))
    for ax, (label, (values, colour)) in zip(axes.flat, quantities.items(), strict=True):
        for domain, style in zip(head.domain.values, ("-", "--"), strict=True):
            ax.plot(head.step, values.sel(domain=domain), style, color=colour, label=domain)
        ax.set(xlabel="training step", ylabel=label, xlim=(0, None))
        ax.xaxis.set_major_formatter(_short)
    axes[0, 0].legend(fontsize=8)
    axes[0, 1].set_ylim(0, 1)
    return list(axes.flat)


def watched(log: pd.DataFrame) -> list[Axes]:
    """Six panels along training of a trainer's log: its loss, and the keys of `SinkCallback`."""
    quantities = {
        "loss": ("next-token loss (nats)", OTHER),
        "sink/rate": ("share of sinks among heads", SINK),
        "sink/strongest_attention": ("attention, strongest head", SINK),
        "sink/value_drain_ratio": ("value norm, <s> / others", DRAIN),
        "sink/residual_peak_ratio": ("residual norm, <s> / others", PEAK),
        "sink/largest_magnitude": ("largest residual entry", PEAK),
    }
    _, axes = plt.subplots(2, 3, figsize=(8.4, 5.0))
    for ax, (key, (label, colour)) in zip(axes.flat, quantities.items(), strict=True):
        known = log[key].dropna()
        ax.plot(known.index, known, "o-", color=colour, ms=3, lw=1.3)
        ax.set(xlabel="training step", ylabel=label, xlim=(0, None))
        if key in ("sink/rate", "sink/strongest_attention"):
            ax.set_ylim(0, 1)
        elif key != "loss":
            ax.set_ylim(0, None)
    return list(axes.flat)
