"""Attention kernels, one function each, under the signature of transformers' attention functions.

A kernel turns query, key and value states into head outputs. Because the signature is the one
that `transformers.AttentionInterface` expects, the same kernel runs in the toy transformer and
in a pretrained model. `KERNELS` is the registry, and a kernel is one function that a decorator
enters there: `@kernel` an attention function, `@kernel_of_weights` a function from logits to
weights, in terms of one query's row of logits `S` that carries `-inf` where a key is hidden, and
`@kernel_of_null_logit` one that gives the row a null slot, a logit whose weight goes to no key.
Kernels that learn something find it in the module that calls them, under the names that
`PARAMETERS` gives.
"""

import math
from collections.abc import Callable
from typing import TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

Queries = Float[Tensor, "batch head query width"]
Keys = Float[Tensor, "batch key_head key width"]
Outputs = Float[Tensor, "batch query head width"]
Weights = Float[Tensor, "*batch query key"]
NullLogits = float | Float[Tensor, "*#batch #query 1"]
Function = TypeVar("Function", bound=Callable)

KERNELS: dict[str, Callable] = {}


def kernel(name: str) -> Callable[[Function], Function]:
    """Enter the attention function that follows in `KERNELS`."""

    def enter(attention: Function) -> Function:
        KERNELS[name] = attention
        return attention

    return enter


def kernel_of_weights(name: str) -> Callable[[Function], Function]:
    """Enter the kernel whose weights are the function that follows, `weights(scores)`."""

    def enter(weights_of: Function) -> Function:
        KERNELS[name] = _explicit(weights_of)
        return weights_of

    return enter


def kernel_of_null_logit(name: str) -> Callable[[Function], Function]:
    """Enter softmax with a null slot whose logit is the function that follows.

    It is called as `null_logit(module, query, scaling)`.
    """

    def enter(null_logit: Function) -> Function:
        KERNELS[name] = _explicit(null_slot_weights, null_logit)
        return null_logit

    return enter


def _explicit(weights_of: Callable[..., Weights], null_logit: Callable | None = None) -> Callable:
    """The attention function of a kernel that is given by its weights as a function of scores.

    `null_logit(module, query, scaling)` gives the second argument of `weights_of` if it takes one.
    """

    def attention(
        module, query: Queries, key: Keys, value: Keys, attention_mask=None, scaling=None, **_
    ) -> tuple[Outputs, Weights]:
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        more = () if null_logit is None else (null_logit(module, query, scaling),)
        weights = weights_of(scores_and_mask(query, key, attention_mask, scaling), *more)
        return _attend(weights, value), weights

    attention.__doc__ = (null_logit or weights_of).__doc__
    return attention


@kernel("softmax")
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


@kernel_of_weights("relu")
def relu_weights(scores: Weights) -> Weights:
    """ReLU attention: `A[n, i] = relu(S[n, i]) / (n + 1)`, with no renormalisation.

    A query whose logits are all negative attends to nothing, so no sink is needed. Masked keys
    carry `-inf`; `n + 1` counts the keys that query `n` can see. Source: arXiv 2410.13835,
    section 2.
    """
    return scores.relu() / _visible_keys(scores)


@kernel_of_weights("sigmoid")
def sigmoid_weights(scores: Weights) -> Weights:
    """Sigmoid attention: `A[n, i] = sigmoid(S[n, i] - log(n + 1))`, with no renormalisation.

    The bias makes a row of logits around 0 sum to about 1, as under softmax. Sources: Ramapuram
    et al. (arXiv 2409.04431), with the visible keys in the place of the text's length; sinks
    under it, Gu et al. (arXiv 2410.10781).
    """
    return torch.sigmoid(scores - _visible_keys(scores).log())


@kernel_of_weights("capped-softmax")
def capped_softmax_weights(scores: Weights, cap: float = 0.1) -> Weights:
    """Softmax whose weight on the first key is at most `cap`; the other keys share what is over.

    A control: can values drain where nobody may look at the first token for long? The first key is
    the first that a query sees; a query that sees no other is left alone.
    """
    visible = ~scores.isneginf()
    first = visible & (visible.cumsum(dim=-1) == 1)
    on_first = (softmax_weights(scores) * first).sum(dim=-1, keepdim=True)
    on_first = torch.where(_visible_keys(scores) == 1, on_first, on_first.clamp(max=cap))
    others = softmax_weights(scores.masked_fill(first, float("-inf")))
    return torch.where(first, on_first, (1 - on_first) * others)


@kernel_of_weights("softpick")
def softpick_weights(scores: Weights) -> Weights:
    """Softpick: `A = relu(e^S - 1) / (sum |e^S - 1| + 1e-6 e^m)`.

    Keys with a logit below 0 get nothing, and still count in the sum, so that a row may add up to
    less than 1. Evaluated with `e^-m` drawn out, m the larger of 0 and the row's largest logit,
    as in the source: Zuhri et al. (arXiv 2504.20966), where 1e-6 is added after that.
    """
    largest = scores.amax(dim=-1, keepdim=True).clamp(min=0.0)
    excess = ((scores - largest).exp() - (-largest).exp()).masked_fill(scores.isneginf(), 0.0)
    return excess.relu() / (excess.abs().sum(dim=-1, keepdim=True) + 1e-6)


@kernel_of_weights("clipped-softmax")
def clipped_softmax_weights(scores: Weights, alpha: float = 4.0) -> Weights:
    """Clipped softmax: `A = clip((1 - g) softmax(S) + g, 0, 1)`, `g = -alpha / T`.

    Weights below `alpha / (T + alpha)` become exactly 0, at finite logits. `T` is the number of
    keys that the longest row sees. Source: Bondarenko et al. (arXiv 2306.12929), with their 4.
    """
    gamma = -alpha / _visible_keys(scores).amax(dim=-2, keepdim=True)
    return ((1 - gamma) * softmax_weights(scores) + gamma).clamp(0.0, 1.0)


@kernel_of_weights("softmax-1")
def null_slot_weights(scores: Weights, null_logit: NullLogits = 0.0) -> Weights:
    """Softmax over the keys and a null slot: `A[n, i] = e^S[n, i] / (e^b + sum_j e^S[n, j])`.

    What the slot takes is written nowhere, so that a row may add up to less than 1. `b` is
    `null_logit`: 0 for softmax-1 (Miller, "Attention is off by one"; Kaul et al., arXiv
    2410.17174), the learned logit of each head (gpt-oss), or that of an extra key.
    """
    slot = torch.as_tensor(null_logit).to(scores).expand(*scores.shape[:-1], 1)
    return torch.cat([scores, slot], dim=-1).softmax(dim=-1)[..., :-1]


@kernel_of_null_logit("sink-logit")
def learned_sink_logit(module, query: Queries, scaling: float) -> Float[Tensor, "head 1 1"]:
    """The learned sink logit: `b_h`, one number for each head. Source: OpenAI's gpt-oss."""
    return module.null_slot_speed * module.null_logit[:, None, None]


@kernel_of_null_logit("key-bias")
def key_bias_logit(module, query: Queries, scaling: float) -> Float[Tensor, "batch head query 1"]:
    """The logit of a learned key whose value is zero: `scaling * q . k*_h`.

    Source: the key bias with value 0 of Gu et al. (arXiv 2410.10781), after Sun et al. (arXiv
    2402.17762).
    """
    return module.null_slot_speed * scaling * query @ module.null_key[:, :, None]


@kernel("differential")
def differential_attention(
    module, query: Queries, key: Keys, value: Keys, attention_mask=None, scaling=None, **_
) -> tuple[Outputs, Weights]:
    """Differential attention: `A = softmax(S_1) - lambda_h softmax(S_2)`.

    The halves of queries and keys make the two maps; what both attend to cancels. The weights may
    be negative. Source: Ye et al. (arXiv 2410.05258); the lambda of a head is learned directly
    and not as a difference of exponentials, and their norm of the heads is the switch
    `head_norm` of the toy.
    """
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    first, second = (
        softmax_weights(scores_and_mask(q, k, attention_mask, scaling * 2**0.5))
        for q, k in zip(query.chunk(2, dim=-1), key.chunk(2, dim=-1), strict=True)
    )
    weights = first - module.cancelled[:, None, None] * second
    return _attend(weights, value), weights


def softmax_weights(scores: Weights) -> Weights:
    """Softmax attention, formed outright. A row that sees no key is uniform, not NaN."""
    return scores.clamp(min=torch.finfo(scores.dtype).min).softmax(dim=-1)


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


def _attend(weights: Weights, value: Keys) -> Outputs:
    value = value.repeat_interleave(weights.shape[1] // value.shape[1], dim=1)
    return (weights @ value).transpose(1, 2)


def _visible_keys(scores: Weights) -> Int[Tensor, "*batch query 1"]:
    # At least 1: a row of padding may see none, and has to stay finite.
    return (~scores.isneginf()).sum(dim=-1, keepdim=True).clamp(min=1)


# What a kernel learns besides W_Q, W_K, W_V and W_O, by name, with its first values: a function
# of the number of heads, their width, and the layer.
PARAMETERS: dict[str, Callable[[int, int, int], dict[str, Tensor]]] = {
    "sink-logit": lambda heads, width, layer: {"null_logit": torch.zeros(heads)},
    "key-bias": lambda heads, width, layer: {"null_key": torch.zeros(heads, width)},
    # The start of arXiv 2410.05258: 0.2 in the first layer, towards 0.8 in deep ones.
    "differential": lambda heads, width, layer: {
        "cancelled": torch.full((heads,), 0.8 - 0.6 * math.exp(-0.3 * layer))
    },
}
