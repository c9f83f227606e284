"""Toys of a page's size from more seeds than it trains: what a chapter keeps of them."""

from collections.abc import Sequence

import xarray as xr

from sinkbook.toy.measurements import measure_without
from sinkbook.toy.training import TrainingConfig, together, train_all


def trained_seeds(configs: Sequence[TrainingConfig]) -> xr.Dataset:
    """Trainings that differ in their seed, along `seed`. Nothing of them is drawn but their seeds.

    - `sink_attention`, over (seed, step, layer): mean attention on `<s>` from non-trigger tokens.
    - `height` and `height_without_mlp`, over (seed): at the end, the height of the peak after layer
      0, and the same with the MLP of that layer silenced at the first token.
    """
    runs = train_all(list(configs))
    heights = {
        name: measure_without(runs, *parts, position=0).residual_peak_height.isel(residual_layer=1)
        for name, parts in {"height": (), "height_without_mlp": ("mlp",)}.items()
    }
    found = together(runs).sink_attention.isel(head=0)
    ends = {name: of_seeds.drop_vars("residual_layer") for name, of_seeds in heights.items()}
    return xr.Dataset({"sink_attention": found} | ends)
