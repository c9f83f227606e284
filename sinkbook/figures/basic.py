"""One function per figure type: each takes data and an axes, draws one thing, returns the axes.

Without an axes a figure is made. Colours go by role through the whole book, attention is always
drawn from 0 to 1 on one map, and bands are the range over seeds or texts unless a label says
otherwise. Nothing is measured here: what is drawn comes from the packages below.
"""

from itertools import product

import matplotlib.pyplot as plt
import numpy as np
import xarray as xr
from jaxtyping import Bool, Float, Shaped
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from sinkbook.figures.phone import NUMBER
from sinkbook.figures.style import BY_LAYER, DIFFERENCES, MAP, OTHER, PEAK, SINK, TRIGGER, on_map


def axes_or_new(ax: Axes | None, **size) -> Axes:
    """The axes that were given, or those of a new figure."""
    return ax if ax is not None else plt.subplots(**size)[1]


def attention_map(
    weights: Float[np.ndarray, "query key"],
    labels: list[str],
    ax: Axes | None = None,
    *,
    title: str = "",
    highlight: Bool[np.ndarray, " query"] | None = None,
    colorbar: bool = True,
) -> Axes:
    """One head's attention on one text: rows are queries, columns are keys, darker is more.

    `highlight` marks tokens, usually the triggers, by colour.
    """
    ax = axes_or_new(ax, figsize=(5, 4.6))
    hidden = np.triu(np.ones_like(weights, dtype=bool), k=1)
    image = ax.imshow(np.ma.masked_array(weights, hidden), vmin=0, vmax=1, cmap=MAP)
    positions = np.arange(len(labels))
    ax.set_xticks(positions, labels, fontfamily="monospace")
    ax.set_yticks(positions, labels, fontfamily="monospace")
    ax.set(xlabel="key", ylabel="query", title=title)
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0)
    if highlight is not None:
        for ticks in (ax.get_xticklabels(), ax.get_yticklabels()):
            for tick in np.array(ticks, dtype=object)[np.asarray(highlight)]:
                tick.set(color=TRIGGER, fontweight="bold")
    if colorbar:
        ax.figure.colorbar(image, ax=ax, label="attention", shrink=0.8)
    return ax


def head_map(
    values: Float[xr.DataArray, "layer head"],
    ax: Axes | None = None,
    *,
    label: str = "attention on the first token",
    title: str = "",
    mark: float | None = None,
) -> Axes:
    """A number between 0 and 1 for every head: one column a layer, one row a head.

    `mark` is a number to show on the colour bar: from where on a head counts as a sink.
    """
    layers, heads = values.sizes["layer"], values.sizes["head"]
    ax = axes_or_new(ax, figsize=(7, 1.2 + 0.18 * heads))
    # Cells of their own, which a page can name one by one; an image of them could not be asked.
    cells = ax.pcolormesh(
        np.arange(layers),
        np.arange(heads),
        values.transpose("head", "layer"),
        vmin=0,
        vmax=1,
        cmap=MAP,
    )
    ax.set(xlabel="layer", ylabel="head", title=title)
    ax.xaxis.set_major_locator(MaxNLocator(min(layers, 15), integer=True))
    ax.yaxis.set_major_locator(MaxNLocator(min(heads, 9), integer=True))
    bar = ax.figure.colorbar(cells, ax=ax, label=label)
    if mark is not None:
        bar.ax.axhline(mark, color="black", lw=1.5)
    return ax


def head_differences(
    values: Float[xr.DataArray, "layer head"], ax: Axes | None = None, *, label: str
) -> Axes:
    """How much more or less every head has in one model than in another: blue is more, red less."""
    layers, heads = values.sizes["layer"], values.sizes["head"]
    ax = axes_or_new(ax, figsize=(7, 1.2 + 0.18 * heads))
    limit = float(np.abs(values).max()) or 1.0  # of models that do not differ
    cells = ax.pcolormesh(
        np.arange(layers),
        np.arange(heads),
        values.transpose("head", "layer"),
        vmin=-limit,
        vmax=limit,
        cmap=DIFFERENCES,
    )
    ax.set(xlabel="layer", ylabel="head")
    ax.xaxis.set_major_locator(MaxNLocator(min(layers, 15), integer=True))
    ax.yaxis.set_major_locator(MaxNLocator(min(heads, 9), integer=True))
    ax.figure.colorbar(cells, ax=ax, label=label)
    return ax


def by_layer(
    series: dict[str, tuple[Float[np.ndarray, "text layer"], str]],
    ax: Axes | None = None,
    *,
    ylabel: str,
    title: str = "",
    log: bool = True,
) -> Axes:
    """Curves over layers: for each label, values for every text and a colour.

    The line is the median over texts, the band runs from the smallest to the largest text.
    """
    ax = axes_or_new(ax)
    for label, (values, colour) in series.items():
        values = np.asarray(values)
        layers = np.arange(values.shape[1])
        ax.fill_between(layers, values.min(0), values.max(0), color=colour, alpha=0.2, lw=0)
        ax.plot(layers, np.median(values, axis=0), color=colour, label=label)
    ax.set(xlabel="layer", ylabel=ylabel, title=title, yscale="log" if log else "linear")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.legend()
    return ax


def token_bars(
    values: Float[np.ndarray, "seed position"],
    labels: list[str],
    ax: Axes | None = None,
    *,
    ylabel: str,
    title: str = "",
    colours: list[str] | None = None,
) -> Axes:
    """One bar a token: the mean over seeds, a dot for every seed."""
    values = np.atleast_2d(values)
    ax = axes_or_new(ax)
    positions = np.arange(len(labels))
    ax.bar(positions, values.mean(0), color=colours or OTHER, alpha=0.75, width=0.7)
    for seed in values:
        ax.plot(positions, seed, ".", color="black", ms=4, alpha=0.7)
    ax.set_xticks(positions, labels, fontfamily="monospace")
    ax.set(ylabel=ylabel, title=title)
    ax.tick_params(axis="x", length=0)
    return ax


def grouped_bars(
    groups: dict[str, dict[str, Float[np.ndarray, " seed"]]],
    ax: Axes | None = None,
    *,
    ylabel: str,
    colours: dict[str, str],
    reference: tuple[float, str] | None = None,
    title: str = "",
) -> Axes:
    """Bars side by side: for each group the values of every seed of each series.

    `reference` is a height and its label, drawn as a dashed line.
    """
    ax = axes_or_new(ax)
    width = 0.8 / len(colours)
    largest = max(abs(np.mean(v)) for group in groups.values() for v in group.values()) or 1.0
    decimals = int(np.clip((largest >= 1) + 1 - np.floor(np.log10(largest)), 0, 4))
    for i, (series, colour) in enumerate(colours.items()):
        places = np.arange(len(groups)) + (i - (len(colours) - 1) / 2) * width
        means = [np.mean(group[series]) for group in groups.values()]
        ax.bar(places, means, width * 0.92, color=colour, label=series, alpha=0.8)
        for place, mean, group in zip(places, means, groups.values(), strict=True):
            seeds = group[series]
            ax.plot(np.full(len(seeds), place), seeds, ".", color="black", ms=4)
            beyond = {"xytext": (0, 4), "va": "bottom"} if mean >= 0 else {"va": "top"}
            beyond = {"xytext": (0, -4), "textcoords": "offset points", "ha": "center"} | beyond
            beyond["bbox"] = {"fc": "white", "ec": "none", "pad": 0.5}  # over the reference
            end = max(seeds) if mean >= 0 else min(seeds)
            ax.annotate(f"{mean:z,.{decimals}f}", (place, end), fontsize=9, gid=NUMBER, **beyond)
    if reference is not None:
        ax.axhline(reference[0], color=OTHER, ls="--", lw=1.2, label=reference[1])
    ax.set_xticks(np.arange(len(groups)), groups)
    ax.set(ylabel=ylabel, title=title)
    ax.margins(y=0.15)
    ax.tick_params(axis="x", length=0)
    ax.legend()
    return ax


def transition_map(
    probabilities: Float[np.ndarray, "token next"],
    labels: list[str],
    ax: Axes | None = None,
    *,
    title: str = "",
) -> Axes:
    """The bigram rows: how probable each next token (column) is after each token (row)."""
    ax = axes_or_new(ax, figsize=(6, 5.2))
    image = ax.imshow(np.sqrt(probabilities), vmin=0, vmax=1, cmap=MAP)
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_ticks(np.arange(len(labels)), labels, fontfamily="monospace", fontsize=5)
    ax.tick_params(length=0, pad=1)
    ax.set(xlabel="next token", ylabel="token", title=title)
    bar = ax.figure.colorbar(image, ax=ax, label="probability of the next token", shrink=0.8)
    shown = np.array([0, 0.05, 0.2, 0.5, 1])
    bar.set_ticks(np.sqrt(shown), labels=[f"{p:g}" for p in shown])
    return ax


def token_strip(
    rows: list[list[str]],
    colours: list[list[str]],
    ax: Axes | None = None,
    *,
    key: dict[str, str],
    title: str = "",
) -> Axes:
    """Texts as rows of tokens on coloured tiles; `key` says what each colour means."""
    longest = max(len(row) for row in rows)
    ax = axes_or_new(ax, figsize=(7, 0.55 + 0.42 * len(rows)))
    for y, (row, tiles) in enumerate(zip(rows, colours, strict=True)):
        for x, (symbol, colour) in enumerate(zip(row, tiles, strict=True)):
            tile = plt.Rectangle((x - 0.46, y - 0.42), 0.92, 0.84, color=colour, alpha=0.35, lw=0)
            ax.add_patch(tile)
            single = len(symbol) < 2
            place = {"x": x, "ha": "center"} if single else {"x": x + 0.4, "ha": "right"}
            ax.text(y=y, s=symbol, va="center", family="monospace", fontsize=9, **place)
    ax.set(xlim=(-0.6, longest - 0.4), ylim=(len(rows) - 0.4, -0.6), title=title)
    ax.axis("off")
    handles = [plt.Rectangle((0, 0), 1, 1, color=c, alpha=0.35, lw=0) for c in key.values()]
    ax.legend(handles, key, ncols=len(key), loc="upper left", bbox_to_anchor=(0, 0), fontsize=9)
    return ax


def head_scatter(
    x: Float[xr.DataArray, "layer head"],
    y: Float[xr.DataArray, "layer head"],
    ax: Axes | None = None,
    *,
    xlabel: str,
    ylabel: str,
    title: str = "",
    diagonal: bool = False,
) -> Axes:
    """One dot a head, darker for later layers; `diagonal` marks where both are equal."""
    ax = axes_or_new(ax, figsize=(5.2, 4.2))
    if diagonal:
        ax.plot([0, 1], [0, 1], color=OTHER, lw=1, ls="--")
    layer = xr.broadcast(x.layer, x)[0].transpose(*x.dims)
    dots = ax.scatter(np.ravel(x), np.ravel(y), c=np.ravel(layer), cmap=BY_LAYER, s=14)
    ax.set(xlabel=xlabel, ylabel=ylabel, title=title)
    ax.figure.colorbar(dots, ax=ax, label="layer")
    return ax


def key_bars(
    attention: Float[xr.DataArray, "seed key"],
    ax: Axes | None = None,
    *,
    colours: dict[str, str],
    count: int = 6,
    title: str = "",
) -> Axes:
    """The kinds of key that get most attention: the mean over seeds, a dot for every seed.

    The first kind is always among them. `colours` go by kind, other kinds are grey.
    """
    largest = np.argsort(-attention.mean("seed").values[1:], kind="stable")[: count - 1] + 1
    shown = attention.isel(key=[0, *largest])
    labels = shown.key.values.tolist()
    ax = token_bars(
        shown.transpose("seed", "key").values,
        labels,
        ax,
        ylabel="attention",
        title=title,
        colours=[colours.get(label, OTHER) for label in labels],
    )
    pink = any(colours.get(label) == TRIGGER for label in labels)
    ax.set(xlabel="kind of key" + " (pink: triggers)" * pink, ylim=(0, 1.02))
    return ax


def map_beside_keys(
    weights: Float[np.ndarray, "query key"],
    labels: list[str],
    highlight: Bool[np.ndarray, " query"],
    attention: Float[xr.DataArray, "seed key"],
    *,
    triggers: list[str],
) -> tuple[Axes, Axes]:
    """One head's attention on one text, and beside it where it looks on all texts and seeds."""
    _, (left, right) = plt.subplots(1, 2, figsize=(7.4, 3.5), width_ratios=(5, 4))
    attention_map(weights, labels, left, highlight=highlight, colorbar=False)
    for tick in left.get_xticklabels():
        tick.set_fontsize(10 if len(tick.get_text()) == 1 else 6.5)
    specials = dict.fromkeys(("first", "<s>", "<s2>", "<d>"), SINK)
    key_bars(attention, right, colours=specials | dict.fromkeys(triggers, TRIGGER))
    return left, right


def share_map(
    shares: dict[str, dict[str, Float[np.ndarray, " seed"]]],
    ax: Axes | None = None,
    *,
    columns: tuple[str, ...],
    xlabel: str,
    label: str,
) -> Axes:
    """A table of numbers between 0 and 1 as a map: a row for each group, a column for each series.

    A cell shows the mean over seeds and the range of several; what a group lacks stays empty.
    """
    ax = axes_or_new(ax, figsize=(1.6 + 0.95 * len(columns), 0.9 + 0.5 * len(shares)))
    means = np.full((len(shares), len(columns)), np.nan)
    for (y, row), (x, name) in product(enumerate(shares.values()), enumerate(columns)):
        if name in row:
            seeds = np.asarray(row[name])
            means[y, x] = mean = seeds.mean()
            text = f"{mean:.2f}"
            if len(seeds) > 1:
                text += f"\n{seeds.min():.2f}–{seeds.max():.2f}"
            ax.text(x, y, text, ha="center", va="center", fontsize=7.5, color=on_map(mean))
    image = ax.imshow(means, vmin=0, vmax=1, cmap=MAP, aspect="auto")
    ax.set_xticks(range(len(columns)), columns)
    ax.set_yticks(range(len(shares)), shares)
    ax.set(xlabel=xlabel)
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0)
    ax.figure.colorbar(image, ax=ax, label=label)
    return ax


def dot_rows(
    rows: dict[str, Float[np.ndarray, " seed"]],
    ax: Axes | None = None,
    *,
    reference: dict[str, float],
    xlabel: str,
    colour: str = PEAK,
) -> Axes:
    """One row a group, one dot a seed, and a cross for the paper's value where it has one."""
    ax = axes_or_new(ax, figsize=(7, 0.9 + 0.36 * len(rows)))
    for y, values in enumerate(rows.values()):
        dots = ax.plot(values, np.full(len(values), y), "o", color=colour, alpha=0.75, ms=7, mew=0)
    known = [(reference[name], y) for y, name in enumerate(rows) if name in reference]
    cross = ax.plot(*np.transpose(known), "x", color="black", ms=7, mew=2)
    ax.axvline(0, color=OTHER, lw=0.8)
    ax.set_yticks(range(len(rows)), rows)
    ax.set(xlabel=xlabel, ylim=(len(rows) - 0.5, -0.5))
    ax.grid(axis="y", alpha=0.3)
    handles = [dots[0], cross[0]]
    ax.legend(handles, ["ours", "paper"], ncols=2, loc="lower right", bbox_to_anchor=(1, 1))
    return ax


def layer_maps(
    weights: Float[np.ndarray, "seed layer query key"],
    labels: list[str],
    *,
    highlight: Bool[np.ndarray, " query"],
    seeds: list[int],
) -> Shaped[np.ndarray, "seed layer"]:
    """Attention maps of one text: one row a seed, one column a layer."""
    rows, columns = weights.shape[:2]
    size = (2.4 * columns, 2.3 * rows)
    _, axes = plt.subplots(rows, columns, figsize=size, squeeze=False)
    for row, layer in np.ndindex(axes.shape):
        ax = axes[row, layer]
        title = f"seed {seeds[row]}, layer {layer}"
        attention_map(
            weights[row, layer], labels, ax, title=title, highlight=highlight, colorbar=False
        )
        ax.label_outer()
        ax.tick_params(labelsize=7)
    return axes


def paired(
    panels: dict[str, tuple[list[Float[xr.DataArray, " seed"]], str]], *, names: tuple[str, ...]
) -> list[Axes]:
    """A panel for each quantity, given as its values in every state and a colour.

    A line joins the values of each seed; `names` says what the states are.
    """
    _, axes = plt.subplots(1, len(panels), figsize=(2.5 * len(panels), 2.8))
    places = np.arange(len(names))
    for ax, (label, (states, colour)) in zip(axes, panels.items(), strict=True):
        ax.plot(places, states, "o-", color=colour, alpha=0.75, lw=1.2)
        ax.axhline(0, color=OTHER, lw=0.8)
        ax.set_xticks(places, names)
        ax.set(title=label, xlim=(-0.4, len(names) - 0.6))
    return list(axes)
