"""Attention kernels, one function each, under the signature of transformers' attention functions.

A kernel turns query, key and value states into head outputs. Because the signature is the one
that `transformers.AttentionInterface` expects, the same kernel runs in the toy transformer and
in a pretrained model. `KERNELS` is the registry: adding a kernel is one function and one line.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

Queries = Float[Tensor, "batch head query width"]
Keys = Float[Tensor, "batch key_head key width"]
Outputs = Float[Tensor, "batch query head width"]
Weights = Float[Tensor, "*batch query key"]


def softmax_attention(
    module, query: Queries, key: Keys, value: Keys, attention_mask=None, scaling=None, **_
) -> tuple[Outputs, None]:
    """Softmax attention by the fused kernel, which never forms the matrix of weights.

    `attention_mask` is additive, (batch, 1, query, key); without one, attention is causal.
    Returns the outputs and `None` in the place of the weights. Source: arXiv 2410.13835, eq. of
    section 2 (`softmax(S)`), one key head per group of query heads.
    """
    output = F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=attention_mask,
        is_causal=attention_mask is None and query.shape[-2] > 1,
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return output.transpose(1, 2), None


def relu_weights(scores: Weights) -> Weights:
    """ReLU attention: `A[n, i] = relu(S[n, i]) / (n + 1)`, with no renormalisation.

    A query whose logits are all negative attends to nothing, so no sink is needed. Masked keys
    carry `-inf`; `n + 1` counts the keys that query `n` can see. Source: arXiv 2410.13835,
    section 2.
    """
    visible = torch.isfinite(scores).sum(dim=-1, keepdim=True)
    return scores.relu() / visible


def scores_and_mask(query: Queries, key: Keys, attention_mask, scaling) -> Weights:
    """Attention logits `S = scaling * q k^T`, with `-inf` where a key is hidden from a query.

    Shapes: (batch, head, query, key). `attention_mask` is additive or, if absent, causal.
    """
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    scores = query @ key.transpose(-2, -1) * scaling
    if attention_mask is None:
        length = scores.shape[-1]
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device)
        hidden = hidden.triu(diagonal=1 + length - scores.shape[-2])
    else:
        # A padded mask holds the dtype's lowest number instead of -inf.
        hidden = attention_mask <= torch.finfo(attention_mask.dtype).min
        scores = scores + attention_mask.masked_fill(hidden, 0.0)
    return scores.masked_fill(hidden, float("-inf"))


def explicit(weights_of: Callable[[Weights], Weights]) -> Callable:
    """The attention function of a kernel that is given by its weights as a function of scores."""

    def attention(
        module, query: Queries, key: Keys, value: Keys, attention_mask=None, scaling=None, **_
    ) -> tuple[Outputs, Weights]:
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        weights = weights_of(scores_and_mask(query, key, attention_mask, scaling))
        value = value.repeat_interleave(query.shape[1] // value.shape[1], dim=1)
        return (weights @ value).transpose(1, 2), weights

    attention.__doc__ = weights_of.__doc__
    return attention


KERNELS: dict[str, Callable] = {
    "softmax": softmax_attention,
    "relu": explicit(relu_weights),
}
