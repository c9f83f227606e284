"""Whole attention maps, for pictures of short texts. `measure.py` needs none."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sinkbook.annotations import check_arguments
from sinkbook.arguments import check_whole_number
from sinkbook.errors import SinkbookError
from sinkbook.models.layout import layers
from sinkbook.models.wrappers import AnyModel, computing_device, taking, unwrapped
from sinkbook.probe.masks import Scope, TokenTable, integers
from sinkbook.probe.recorder import Recorder

LONGEST = 1024


class AttentionMap(NamedTuple):
    """What some queries of one layer attend to, and by which logits."""

    logits: Float[Tensor, "batch head query key"]  # as they enter the softmax; -inf if hidden
    weights: Float[Tensor, "batch head query key"]


@check_arguments
def attention_weights(
    model: AnyModel,
    input_ids: TokenTable,
    *,
    layer: int,
) -> Float[Tensor, "batch head query key"]:
    """The attention weights of one layer, all queries against all keys.

    `model` is any that `measure` takes; `layer` counts all layers, from 0.
    Raises `SinkbookError` for a layer that is not there or has no attention that can be read, and
    for texts of more than 1,024 tokens, whose maps nobody can look at: `sinkbook.measure` has what
    they show.
    """
    return _map_of(model, input_ids, layer).weights


@check_arguments
def attention_logits(
    model: AnyModel,
    input_ids: TokenTable,
    *,
    layer: int,
) -> Float[Tensor, "batch head query key"]:
    """The attention logits of one layer, after scaling, soft cap and biases; as the weights are.

    `-inf` where a key is hidden from a query.
    """
    return _map_of(model, input_ids, layer).logits


@check_arguments
@torch.no_grad()
def attention_maps(
    model: AnyModel,
    input_ids: TokenTable,
    *,
    queries: Int[Tensor, " asked"] | None = None,
    layer: int | None = None,
) -> list[AttentionMap | None]:
    """The attention of every layer, or of one; `None` where there is none or none was asked for.

    `queries` are the positions of the queries, all by default. The texts are whole: no padding.
    """
    model = unwrapped(model)
    found: list[AttentionMap | None] = [None] * len(layers(model))

    def look(number, rows_of) -> None:
        if layer in (None, number):
            rows = list(rows_of(queries))
            hidden = [r.logits.masked_fill(~r.visible, float("-inf")) for r in rows]
            weights = [r.weights.masked_fill(~r.visible, 0.0) for r in rows]
            found[number] = AttentionMap(torch.cat(hidden, dim=2), torch.cat(weights, dim=2))

    input_ids = integers("input_ids", input_ids).to(computing_device(model))
    real = torch.ones_like(input_ids, dtype=torch.bool)
    scope = Scope(torch.zeros_like(input_ids[:, 0]), real, real, frozenset())
    with taking(model, input_ids):
        Recorder(model, scope, look).run({"input_ids": input_ids}, with_logits=False)
    return found


def _map_of(model: AnyModel, input_ids: TokenTable, layer: int) -> AttentionMap:
    model, input_ids = unwrapped(model), integers("input_ids", input_ids)
    if input_ids.shape[1] > LONGEST:
        raise SinkbookError(
            f"a map of {input_ids.shape[1]} tokens cannot be looked at. Give at most {LONGEST}, or "
            "use sinkbook.measure."
        )
    count = len(layers(model))
    check_whole_number("layer", layer, -count)
    if not 0 <= layer < count:
        raise SinkbookError(f"layer {layer} is not there; 0 to {count - 1} are.")
    found = attention_maps(model, input_ids, layer=layer)[layer]
    if found is None:
        every = attention_maps(model, input_ids[:1, :2])
        attend = [str(number) for number, of_layer in enumerate(every) if of_layer is not None]
        raise SinkbookError(
            f"there is no softmax attention in layer {layer} of {type(model).__name__}. "
            f"Layers that attend: {', '.join(attend) or 'none'}."
        )
    return found
