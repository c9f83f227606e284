"""Where a head looks that has no `<s>` to rest on."""

import numpy as np
import torch
import xarray as xr

from sinkbook.corpora import SYMBOLS
from sinkbook.maps import attention_weights
from sinkbook.pretraining import Characters, Pretraining, induction_head


def attention_by_character(run: Pretraining) -> xr.Dataset:
    """What a run's induction head looks at in plain held-out texts, over (character).

    `attention` is the mean attention that queries of the second half give all keys of that
    character together; `share` is the character's share of the tokens. `<s>`, if the texts begin
    with it, is a character as well. They add up to 1.
    """
    layer, head = induction_head(run)
    characters = Characters(run.config)
    tokens = characters.held_out()["plain"][:, :-1]
    weights = attention_weights(run.model, tokens, layer=layer)[:, head, characters.half + 1 :]
    kinds = torch.nn.functional.one_hot(tokens, len(SYMBOLS) + 1).float()
    names = [*SYMBOLS.replace("\n", "⏎").replace(" ", "␣"), "<s>"]
    found = {
        "attention": ("character", (weights.mean(1, keepdim=True) @ kinds).mean((0, 1)).numpy()),
        "share": ("character", kinds.mean((0, 1)).numpy()),
    }
    return xr.Dataset(found, coords={"character": np.array(names)})
