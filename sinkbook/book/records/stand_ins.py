"""The record of what stands in for one token's state in a pretrained model, and what that costs.

Zero, the mean over other texts, noise of the same mean and spread, and another text's state: the
four of arXiv 2604.14433, which compares them at the registers of vision transformers. Here it is
the first token of a language model, and an ordinary one as the control.
"""

import time

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from sinkbook.data.corpora import texts
from sinkbook.models import load
from sinkbook.models.interventions import replace, stand_in
from sinkbook.models.losses import next_token_losses
from sinkbook.models.token_windows import of_texts
from sinkbook.provenance import of_record, provenance

WAYS = ("zero", "mean", "noise", "shuffled")
PLACES = {"first token": 0, "ordinary token": 24}
SIZES = {"model": "smollm2-135m", "texts": 24, "length": 48, "after": 16, "seed": 0}
LAYERS = (0, 3, 6, 9, 12, 15, 18, 21, 24, 27)


def record() -> xr.Dataset:
    """Loss added, in nats a token, over (place, layer, way, text).

    The state after a layer is replaced at one position; the loss is that of the `after` tokens
    behind it. `moved` is the norm of the change over that of the state, and `cost` the loss added.
    The texts begin with a first token of their own.
    """
    start = time.monotonic()
    reader = load(SIZES["model"])
    articles = texts("prose-en", 4 * SIZES["texts"])
    whole = of_texts(reader, articles, count=SIZES["texts"], length=SIZES["length"] + 1)
    tokens = whole[:, 1:]
    with torch.no_grad():
        found = reader.model(tokens, output_hidden_states=True)
    states, before = found.hidden_states, next_token_losses(found.logits, tokens)
    cost = np.full((len(PLACES), len(LAYERS), len(WAYS), len(tokens)), np.nan)
    moved = cost.copy()
    for i, position in enumerate(PLACES.values()):
        behind = slice(position, position + SIZES["after"])  # losses begin with token 1
        for j, layer in enumerate(LAYERS):
            own = states[layer + 1][:, [position]]  # before the first layer is one more
            for k, way in enumerate(WAYS):
                new = noise_like(own) if way == "noise" else stand_in(own, way, seed=SIZES["seed"])
                cut = replace(reader.model, "residual", new, layer=layer, position=position)
                with cut, torch.no_grad():
                    after = next_token_losses(reader.model(tokens).logits, tokens)
                cost[i, j, k] = (after - before)[:, behind].mean(-1)
                moved[i, j, k] = ((new - own).norm(dim=-1) / own.norm(dim=-1))[:, 0]
    names = ("place", "layer", "way", "text")
    return xr.Dataset(
        {"cost": (names, cost), "moved": (names, moved)},
        coords={"place": list(PLACES), "layer": list(LAYERS), "way": list(WAYS)},
        attrs=of_record(SIZES, provenance(), time.monotonic() - start),
    )


def noise_like(states: Float[Tensor, "text 1 width"]) -> Float[Tensor, "text 1 width"]:
    """Independent normal numbers with the mean and the spread of each dimension over the texts."""
    generator = torch.Generator().manual_seed(SIZES["seed"])
    drawn = torch.randn(states.shape, generator=generator).to(states)
    return states.mean(0) + states.std(0) * drawn
