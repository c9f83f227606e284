"""Whole attention maps, for pictures of short texts. `measure.py` needs none."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sinkbook.errors import SinkbookError
from sinkbook.models.attention_interface import attending_by
from sinkbook.models.layout import layers
from sinkbook.toy.attention import scores_and_mask
from sinkbook.toy.transformer import SelfAttention, Transformer

LONGEST = 1024


@torch.no_grad()
def attention_weights(
    model: nn.Module, input_ids: Int[Tensor, "batch position"], *, layer: int
) -> Float[Tensor, "batch head query key"]:
    """The attention weights of one layer, all queries against all keys.

    `model` is a toy transformer or a causal LM of transformers; `layer` counts from 0.
    Raises `SinkbookError` for a layer that is not there, and for texts of more than 1,024 tokens,
    whose maps nobody can look at: `sinkbook.measure` has what they show.
    """
    found = layers(model)
    if not 0 <= layer < len(found) or found[layer].attention is None:
        raise SinkbookError(f"there is no attention in layer {layer}; 0 to {len(found) - 1} exist.")
    if input_ids.shape[1] > LONGEST:
        raise SinkbookError(
            f"a map of {input_ids.shape[1]} tokens cannot be looked at. Give at most {LONGEST}, or "
            "use sinkbook.measure."
        )
    if hasattr(model, "set_attn_implementation"):
        with attending_by(model, "eager"):
            output = model(input_ids, output_attentions=True, use_cache=False)
        return output.attentions[layer]
    scores, weights = _listen(model, input_ids, found[layer].attention)
    return scores.softmax(dim=-1) if weights is None else weights


@torch.no_grad()
def attention_logits(
    model: Transformer, input_ids: Int[Tensor, "batch position"], *, layer: int
) -> Float[Tensor, "batch head query key"]:
    """The attention logits `S` of one layer of a toy transformer; `-inf` where a key is hidden."""
    return _listen(model, input_ids, model.layers[layer].attention)[0]


def _listen(model: Transformer, input_ids: Tensor, attention: SelfAttention):
    """The logits of one attention while the model runs, and its weights if it makes them."""
    original, kept = attention.attention_function, []

    def keeping(module, query, key, value, attention_mask, scaling, **keywords):
        output, weights = original(
            module, query, key, value, attention_mask, scaling=scaling, **keywords
        )
        kept.append((scores_and_mask(query, key, attention_mask, scaling), weights))
        return output, weights

    attention.attention_function = keeping
    try:
        model(input_ids)
    finally:
        attention.attention_function = original
    return kept[0]
