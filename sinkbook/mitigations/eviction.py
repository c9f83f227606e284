"""Dropping keys of a prompt once it has been read: which ones does the rest of the text miss?

The probe gives the attention that every key receives, exactly and without the matrix of weights.
So each head can keep its own most important keys (H2O, Zhang et al., arXiv 2306.14048), beside the
same number of recent ones, or of random ones.
"""

from collections.abc import Sequence
from copy import deepcopy
from inspect import signature

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float, Int
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from sinkbook.annotations import check_arguments
from sinkbook.arguments import check_token_ids, whole_number
from sinkbook.errors import SinkbookError
from sinkbook.models.losses import next_token_losses
from sinkbook.models.wrappers import AnyModel, computing_device, evaluating, unwrapped
from sinkbook.probe.measure import measure
from sinkbook.progress import progress

Tokens = Int[Tensor, "text position"]


@check_arguments
def eviction_losses(
    model: AnyModel,
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
    positions. Raises `SinkbookError` if they would not: for models that take a key's position from
    its place in the cache (ALiBi), hide keys far away (windows shorter than the text), or keep
    something else than keys. That is tried out. Over (policy, budget, text):

    - "all": nothing is dropped, whatever the budget;
    - "window": the most recent keys;
    - "sinks + window": the `sinks` first and the most recent keys;
    - "importance": the keys that received most attention from the prompt, per query that can see
      them, averaged over the query heads that share them (measured exactly, by the probe);
    - "importance, no first": the same with the first key dropped in any case;
    - "random": keys drawn at random, for each head anew.
    """
    check_token_ids("input_ids", input_ids)
    prompt, sinks, budgets = _checked(input_ids.shape[1], prompt, sinks, budgets)
    model = _of_transformers(model)
    input_ids = input_ids.to(computing_device(model))
    beginning, rest = input_ids[:, :prompt], input_ids[:, prompt:]
    with evaluating(model):
        return _losses_by_policy(model, beginning, rest, budgets, sinks, seed)


def _losses_by_policy(
    model: PreTrainedModel,
    beginning: Tokens,
    rest: Int[Tensor, "text following"],
    budgets: list[int],
    sinks: int,
    seed: int,
) -> xr.DataArray:
    prompt, read = beginning.shape[1], _read(model, beginning)
    importance = _importance(model, beginning, read)
    whole = _continued(model, deepcopy(read), rest, prompt)
    _check_movable(model, read, rest, prompt, whole)
    _check_steady(model, read, torch.cat([beginning, rest], 1))
    recency = torch.arange(prompt).expand_as(importance).float()
    generator = torch.Generator().manual_seed(seed)
    order = {  # what is highest is kept
        "window": recency,
        "sinks + window": recency + prompt * (recency < sinks),
        "importance": importance,
        "importance, no first": importance.masked_fill(recency == 0, -1.0),
        "random": torch.rand(importance.shape, generator=generator),
    }
    losses = {"all": [whole] * len(budgets)}
    with progress("evicting", len(order) * len(budgets)) as show:
        for policy, rank in order.items():
            losses[policy] = []
            for budget in budgets:
                kept = rank.topk(budget, dim=-1).indices.sort(-1).values
                cut = keep_keys(read, kept)
                losses[policy].append(_continued(model, cut, rest, prompt))
                show(sum(map(len, losses.values())) - len(budgets))
    return xr.DataArray(
        np.array(list(losses.values())).mean(-1),
        dims=("policy", "budget", "text"),
        coords={"policy": list(losses), "budget": list(budgets)},
    )


def _of_transformers(model: AnyModel) -> PreTrainedModel:
    """The model of transformers that a module is or wraps."""
    model = unwrapped(model)
    if not isinstance(model, PreTrainedModel):
        raise SinkbookError(
            f"{type(model).__name__} is no model of transformers, and has no cache to evict from. "
            "Give a causal language model of transformers."
        )
    return model


def _checked(
    length: int, prompt: int, sinks: int, budgets: Sequence[int]
) -> tuple[int, int, list[int]]:
    """The sizes as whole numbers that fit each other."""
    prompt, sinks = whole_number("prompt", prompt, 1), whole_number("sinks", sinks, 1)
    if not np.iterable(budgets) or isinstance(budgets, str):
        raise SinkbookError(f"`budgets={budgets!r}` is no list. Give a list of whole numbers.")
    budgets = [whole_number("budgets", budget, 1) for budget in budgets]
    fits = bool(budgets) and sinks < min(budgets) and max(budgets) < prompt < length - 1
    if not fits:
        raise SinkbookError(
            f"budgets {budgets} for a prompt of {prompt} of {length} tokens. "
            f"Give budgets from {sinks + 1} to {prompt - 1}, and texts longer than the prompt."
        )
    return prompt, sinks, budgets


@torch.no_grad()
def _read(model: PreTrainedModel, beginning: Tokens) -> Cache:
    """The keys and values of a text."""
    takes = signature(model.forward).parameters.values()
    given = any(p.name == "position_ids" or p.kind == p.VAR_KEYWORD for p in takes)
    read = model(beginning, use_cache=True).past_key_values if given else None
    if not isinstance(read, Cache):
        raise SinkbookError(
            f"{type(model).__name__} keeps no keys in a cache of transformers, or takes no "
            "positions with them. Give a causal language model of transformers that does both."
        )
    return read


def _importance(
    model: PreTrainedModel, beginning: Tokens, read: Cache
) -> Float[Tensor, "text layer key_head key"]:
    """The attention that each head's keys receive from a prompt, and whether they are all there."""
    received = measure(model, beginning, ("key_importance",)).key_importance.values
    layers, heads, prompt = received.shape[1:]
    plain = all(type(x) in (DynamicLayer, DynamicSlidingWindowLayer) for x in read.layers)
    shapes = {x.keys.shape[1:3] for x in read.layers} if plain else set()
    key_heads, held = next(iter(shapes)) if len(shapes) == 1 else (1, 0)
    whole = len(read.layers) == layers and held == prompt and heads % key_heads == 0
    if not whole or not np.isfinite(received).all():
        raise SinkbookError(
            f"{type(model).__name__} does not keep the keys of all {prompt} tokens in each of its "
            f"{layers} layers: it mixes kinds of layers, shares keys, or has a window shorter than "
            "the prompt. Give a shorter prompt, or a model whose layers attend to the whole text."
        )
    return torch.from_numpy(received).unflatten(2, (key_heads, -1)).mean(3)


def _check_movable(
    model: PreTrainedModel,
    read: Cache,
    rest: Tokens,
    prompt: int,
    whole: Float[np.ndarray, "text scored"],
) -> None:
    """Whether a key is the same wherever it lies in the cache, and positions are those given.

    If so, the cache may be turned round and nothing changes. The losses of models that hide far
    keys, or count distance in the cache, do change; and those of models that do not take positions
    from the caller stay as they are under wrong ones.
    """
    backwards = torch.arange(prompt - 1, -1, -1)
    layer = read.layers[0].keys
    kept = backwards.expand(len(rest), len(read.layers), layer.shape[1], prompt)
    turned = _continued(model, keep_keys(read, kept), rest, prompt)
    shifted = _continued(model, deepcopy(read), rest, prompt - 1)
    windows = [getattr(x, "sliding_window", None) or np.inf for x in read.layers]
    change = np.abs(turned - whole)
    if layer.dtype in (torch.float32, torch.float64):
        same = change.max() <= 2e-4 * (1 + np.abs(whole).max())
    else:  # a token's own loss is known to a tenth of a nat
        same = change.mean() <= 0.02 * (1 + np.abs(whole).mean())
    if min(windows) < prompt + rest.shape[1] or not same or (shifted == whole).all():
        raise SinkbookError(
            f"{type(model).__name__} does not take the position of a key from the key alone: it "
            "counts distances in the cache (ALiBi), or hides keys that are far away (a window "
            "shorter than the text). Without some keys it would see the others elsewhere. Give "
            "shorter texts, or a model with rotary or learned positions and no window."
        )


def _check_steady(model: PreTrainedModel, read: Cache, text: Tokens) -> None:
    """Whether the keys of a prompt are those that it has at the beginning of the whole text.

    Under dynamic scaling they are turned by how long the text was when they were read.
    """
    whole = _read(model, text[:, :-1])  # a window as long as the text keeps no more
    for number, (one, longer) in enumerate(zip(read.layers, whole.layers, strict=True)):
        own = one.keys.float()
        change = longer.keys[:, :, : own.shape[2]].float() - own
        tolerance = 1e-3 if one.keys.dtype in (torch.float32, torch.float64) else 0.05
        if not change.norm() <= tolerance * own.norm():
            raise SinkbookError(
                f"{type(model).__name__} gives the prompt other keys in layer {number} where more "
                "text follows, as with dynamic or longrope scaling, so keys that are kept are out "
                "of place. Give shorter texts, or load it without that scaling."
            )


def keep_keys(cache: Cache, kept: Int[Tensor, "text layer key_head key"]) -> DynamicCache:
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
    model: PreTrainedModel, cache: Cache, rest: Tokens, prompt: int
) -> Float[np.ndarray, "text scored"]:
    """Losses of the tokens `rest` but the first, read from position `prompt` on into a cache."""
    positions = torch.arange(prompt, prompt + rest.shape[1], device=rest.device)
    logits = model(rest, past_key_values=cache, position_ids=positions[None]).logits
    return next_token_losses(logits, rest).cpu().numpy()
