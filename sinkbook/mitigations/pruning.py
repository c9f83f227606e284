"""Cutting heads by what they do: how many can go, and which of them are missed.

A head is named by its number, layer by layer: head 3 of layer 2 is `2 * heads + 3`.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import numpy as np
import xarray as xr
from jaxtyping import Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from sinkbook.annotations import check_arguments
from sinkbook.arguments import (
    check_all,
    check_number,
    check_some,
    check_token_ids,
    check_whole_number,
)
from sinkbook.errors import SinkbookError
from sinkbook.models.interventions import zero
from sinkbook.models.losses import token_losses
from sinkbook.models.trials.heads import heads as heads_of
from sinkbook.probe.measure import measure
from sinkbook.probe.metrics import sink_rate
from sinkbook.progress import progress

Tokens = Int[Tensor, "text position"]


@check_arguments
def head_orders(model: nn.Module, input_ids: Tokens) -> dict[str, Int[np.ndarray, " head"]]:
    """In which order to cut a model's heads, by what they do on some texts; heads layer by layer.

    "first-token mass": those that look most at the first token first; "output norm": those whose
    write is smallest beside the mean of their layer's heads, since deeper layers write more
    ("AHON-LN" in arXiv 2504.03889). Layers without attention have no heads to cut.
    """
    seen = measure(model, input_ids, ("sink_attention", "head_output_norm")).mean("batch")
    mass = seen.sink_attention.values.ravel()
    norm = (seen.head_output_norm / seen.head_output_norm.mean("head")).values.ravel()
    measured = np.flatnonzero(np.isfinite(mass))
    return {
        "first-token mass": measured[np.argsort(-mass[measured], kind="stable")],
        "output norm": measured[np.argsort(norm[measured], kind="stable")],
    }


def _all_heads(model: nn.Module) -> tuple[Int[np.ndarray, " head"], int]:
    """The numbers of all heads that can be cut, and how many are counted in each layer."""
    found = heads_of(model)
    per_layer = max(layer.count or 0 for layer in found)
    there = [
        number * per_layer + np.arange(0 if layer.no_heads else layer.count)
        for number, layer in enumerate(found)
    ]
    return np.concatenate(there), per_layer


@check_arguments
@contextmanager
def without_heads(
    model: nn.Module, heads: Int[np.ndarray, " head"], per_layer: int
) -> Iterator[None]:
    """Cut heads, which are counted layer by layer, `per_layer` in each."""
    check_whole_number("per_layer", per_layer, 1)
    most = len(heads_of(model)) * per_layer - 1
    for number in heads.tolist():
        check_whole_number("heads", number, 0, most)
    with ExitStack() as cuts:
        for layer in np.unique(heads // per_layer).tolist():
            own = heads[heads // per_layer == layer] % per_layer
            cuts.enter_context(zero(model, "head", layer=layer, head=own.tolist()))
        yield


@check_arguments
def pruning_losses(
    model: PreTrainedModel,
    input_ids: Tokens,
    orders: dict[str, Int[np.ndarray, " head"]],
    shares: Sequence[float],
    *,
    draws: int = 3,
    seed: int = 0,
) -> xr.DataArray:
    """Mean loss of texts without the first heads of each order: over (order, removed, text).

    `shares` says how many, as shares of all heads; `removed` has 0 as well. One order more is
    "random", the mean over `draws` random ones. Layers without attention have no heads.
    """
    check_all("shares", shares, float)
    check_some("shares", shares)
    for share in shares:
        check_number("shares", share, 0, 1)
    check_whole_number("draws", draws, 1)
    generator, (there, per_layer) = np.random.default_rng(seed), _all_heads(model)
    count = len(there)
    drawn = {f"draw {number}": there[generator.permutation(count)] for number in range(draws)}
    whole = token_losses(model, input_ids).mean(1)
    losses = {}
    with progress("pruning", (len(orders) + draws) * len(shares)) as show:
        for name, order in (orders | drawn).items():
            rows = [whole]
            for share in shares:
                with without_heads(model, order[: round(share * count)], per_layer):
                    rows.append(token_losses(model, input_ids).mean(1))
                show(len(losses) * len(shares) + len(rows) - 1)
            losses[name] = np.stack(rows)
    losses["random"] = np.mean([losses.pop(name) for name in drawn], axis=0)
    return xr.DataArray(
        np.stack(list(losses.values())),
        dims=("order", "removed", "text"),
        coords={"order": list(losses), "removed": [0.0, *shares]},
    )


@check_arguments
def pruning_across_domains(
    model: PreTrainedModel,
    texts: dict[str, Tokens],
    orders: dict[str, dict[str, Int[np.ndarray, " head"]]],
    shares: Sequence[float],
    *,
    draws: int = 3,
    seed: int = 0,
) -> xr.Dataset:
    """`pruning_losses` of the texts of two domains, of which there are equally many, by domain.

    `orders` are those of `head_orders` on other texts of each domain. One order more is
    "same, other domain": the first one of the domain that the texts are not from.
    """
    for tokens in texts.values():
        check_token_ids("texts", tokens)
    check_all("orders", [orders.get(domain) for domain in texts], dict)
    if len({len(tokens) for tokens in texts.values()}) > 1:
        counts = ", ".join(f"{len(tokens)} in {domain!r}" for domain, tokens in texts.items())
        raise SinkbookError(f"{counts}. Give equally many texts of both domains.")
    losses = {}
    for (domain, tokens), stranger in zip(texts.items(), reversed(texts), strict=True):
        first = next(iter(orders[stranger].values()))
        chosen = orders[domain] | {"same, other domain": first}
        losses[domain] = pruning_losses(model, tokens, chosen, shares, draws=draws, seed=seed)
    return xr.Dataset(losses)


@check_arguments
def without_early_or_late(
    model: PreTrainedModel,
    input_ids: Tokens,
    heads: Int[np.ndarray, " head"],
    *,
    below: int = 2,
) -> xr.Dataset:
    """Which of some heads are missed, and what becomes of the sink: over (cut, text).

    `cut` is "none", "all" of the heads, the "early" ones, in the first `below` layers, or the
    "late" ones, in the others; the attributes say how many are `cut`, and how many of these are
    `early`. Variables, the last two from the layer where the first token's state is longest:

    - `loss`, in nats, and `sink_rate`;
    - `first_norm`: the residual norm of the first token;
    - `other_peaks`: the share of other tokens whose norm exceeds ten times their median.
    """
    _, per_layer = _all_heads(model)
    early = heads < below * per_layer
    cuts = {"none": heads[:0], "all": heads, "early": heads[early], "late": heads[~early]}
    found = []
    for cut in cuts.values():
        with without_heads(model, cut, per_layer):
            seen = measure(model, input_ids, ("loss", "sink_attention", "residual_norm"))
        highest = seen.residual_norm.isel(position=0).mean("batch").argmax("residual_layer").item()
        norm = seen.residual_norm.isel(residual_layer=highest)
        others = norm.isel(position=slice(1, None))
        measured = {
            "loss": seen.loss,
            "sink_rate": sink_rate(seen).mean("layer"),
            "first_norm": norm.isel(position=0),
            "other_peaks": (others > 10 * others.median("position")).mean("position"),
        }
        found.append(
            xr.Dataset(measured).drop_vars(["residual_layer", "position"], errors="ignore")
        )
    together = xr.concat(found, dim=xr.Variable("cut", list(cuts)))
    return together.rename(batch="text").assign_attrs(cut=len(heads), early=int(early.sum()))
