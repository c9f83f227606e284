"""Figures of the records that decide who writes a peak, and where."""

import matplotlib.pyplot as plt
import numpy as np
import xarray as xr
from jaxtyping import Float
from matplotlib.axes import Axes

from sinkbook.figures.basic import axes_or_new
from sinkbook.figures.style import OTHER, PEAK


def heights_of_seeds(
    heights: Float[xr.DataArray, "seed step residual_layer"], colours: tuple[str, ...]
) -> list[Axes]:
    """Height of the peak over training, a panel for each seed and a line for each layer."""
    seeds = heights.seed.values
    _, panels = plt.subplots(1, len(seeds), figsize=(7.8, 3), sharey=True, layout="constrained")
    for panel, seed in zip(panels, seeds, strict=True):
        of_seed = heights.sel(seed=seed)
        for layer, colour in enumerate(colours):
            panel.plot(
                heights.step,
                of_seed.sel(residual_layer=layer + 1),
                color=colour,
                label=f"after layer {layer}",
            )
        panel.axhline(0, color=OTHER, lw=0.8)
        panel.set(title=f"seed {seed}", xlabel="training step")
    panels[0].set_ylabel("height of the peak")
    panels[0].legend(fontsize=8)
    return list(panels)


def written_by_self_logit(
    logits: Float[np.ndarray, "seed layer"],
    writes: Float[np.ndarray, "seed layer"],
    ax: Axes | None = None,
) -> Axes:
    """What each layer's attention adds at the first token, against that token's logit on itself.

    A dot for every seed and layer; the vertical axis is linear up to 10 and logarithmic above.
    """
    ax = axes_or_new(ax, figsize=(5.6, 3.6))
    for layer, marker in enumerate("os^"):
        ax.plot(
            logits[:, layer],
            writes[:, layer],
            marker,
            color=PEAK,
            alpha=0.8,
            label=f"layer {layer}",
        )
    ax.axvline(0, color=OTHER, lw=0.8)
    ax.set_yscale("symlog", linthresh=10)
    ax.set_ylim(-1, 2 * np.max(writes))
    ax.set(
        xlabel="logit of <s> on itself",
        ylabel="norm of what the attention adds at <s>",
    )
    ax.legend()
    return ax
