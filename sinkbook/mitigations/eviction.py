"""Dropping keys of a prompt once it has been read: which ones does the rest of the text miss?

The probe gives the attention that every key receives, exactly and without the matrix of weights.
So each head can keep its own most important keys (H2O, Zhang et al., arXiv 2306.14048), beside the
same number of recent ones, or of random ones.
"""

from collections.abc import Sequence
from copy import deepcopy

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from sinkbook.errors import SinkbookError
from sinkbook.models.losses import next_token_losses
from sinkbook.probe.measure import measure
from sinkbook.progress import progress

Tokens = Int[Tensor, "text position"]


def eviction_losses(
    model: PreTrainedModel,
    input_ids: Tokens,
    *,
    prompt: int,
    budgets: Sequence[int],
    sinks: int = 4,
    seed: int = 0,
) -> xr.DataArray:
    """Mean loss of what follows a prompt when each head keeps only some of the prompt's keys.

    The first `prompt` tokens are read whole; then every key-value head of every layer keeps as many
    keys as the budget allows, and the other tokens are read on top of these. Keys stay at their
    positions. Over (policy, budget, text):

    - "all": nothing is dropped, whatever the budget;
    - "window": the most recent keys;
    - "sinks + window": the `sinks` first and the most recent keys;
    - "importance": the keys that received most attention from the prompt, per query that can see
      them, averaged over the query heads that share them (measured exactly, by the probe);
    - "importance, no first": the same with the first key dropped in any case;
    - "random": keys drawn at random, for each head anew.
    """
    if not 0 < sinks < min(budgets) or max(budgets) >= prompt or prompt + 1 >= input_ids.shape[1]:
        raise SinkbookError(
            f"budgets {list(budgets)} for a prompt of {prompt} of {input_ids.shape[1]} tokens. "
            f"Give budgets from {sinks + 1} to {prompt - 1}, and texts longer than the prompt."
        )
    input_ids = input_ids.to(model.device)
    beginning, rest = input_ids[:, :prompt], input_ids[:, prompt:]
    with torch.no_grad():
        read = model(beginning, use_cache=True, logits_to_keep=1).past_key_values
    received = measure(model, beginning, ("key_importance",)).key_importance.values
    key_heads = read.layers[0].keys.shape[1]
    importance = torch.from_numpy(received).unflatten(2, (key_heads, -1)).mean(3)
    recency = torch.arange(prompt).expand_as(importance).float()
    generator = torch.Generator().manual_seed(seed)
    order = {  # what is highest is kept
        "window": recency,
        "sinks + window": recency + prompt * (recency < sinks),
        "importance": importance,
        "importance, no first": importance.masked_fill(recency == 0, -1.0),
        "random": torch.rand(importance.shape, generator=generator),
    }
    whole = _continued(model, deepcopy(read), rest, prompt)
    losses = {"all": [whole] * len(budgets)}
    with progress("evicting", len(order) * len(budgets)) as show:
        for policy, rank in order.items():
            losses[policy] = []
            for budget in budgets:
                kept = rank.topk(budget, dim=-1).indices.sort(-1).values
                losses[policy].append(_continued(model, keep_keys(read, kept), rest, prompt))
                show(sum(map(len, losses.values())) - len(budgets))
    return xr.DataArray(
        np.array(list(losses.values())),
        dims=("policy", "budget", "text"),
        coords={"policy": list(losses), "budget": list(budgets)},
    )


def keep_keys(cache: DynamicCache, kept: Int[Tensor, "text layer key_head key"]) -> DynamicCache:
    """A copy of a cache that holds only the `kept` keys, and their values, of every head."""
    cut = DynamicCache()
    for number, layer in enumerate(cache.layers):
        index = kept[:, number, :, :, None].to(layer.keys.device)
        keys, values = (
            states.gather(2, index.expand(-1, -1, -1, states.shape[-1]))
            for states in (layer.keys, layer.values)
        )
        cut.update(keys, values, number)
    return cut


@torch.no_grad()
def _continued(
    model: PreTrainedModel, cache: DynamicCache, rest: Tokens, prompt: int
) -> Float[np.ndarray, " text"]:
    """Mean loss of the tokens `rest` but the first, read from position `prompt` on into a cache."""
    positions = torch.arange(prompt, prompt + rest.shape[1], device=rest.device)
    logits = model(rest, past_key_values=cache, position_ids=positions[None]).logits
    losses = next_token_losses(logits, rest)
    return losses.mean(1).cpu().numpy()
