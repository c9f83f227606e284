"""Slow references, in the model's own eager attention and by the definitions, for any architecture.

Nothing here is computed as the package does: weights are those that the model forms itself, a
stream is each token read afresh, eight-bit numbers are made one linear map after the other.
"""

import sys
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import eager_mask

from sinkbook.models import partial_forward
from sinkbook.models.layout import blocks, layers
from sinkbook.models.partial_forward import state_into, state_of


@dataclass
class Layer:
    """What a layer's eager attention made, and what its W_O was given."""

    weights: torch.Tensor  # (batch, head, query, key)
    value: torch.Tensor  # (batch, head, position, value width)
    entering: torch.Tensor | None  # (batch, head, position, value width)


def eager(model: PreTrainedModel, **inputs) -> tuple[dict[int, Layer], torch.Tensor]:
    """Each layer of the model's own eager attention, and the residual states but the last.

    In float64 where its attention can be watched, else in single precision.
    """
    weights, values, entering = {}, {}, {}
    blocks = [layer.block for layer in layers(model)]

    def watching(module, query, key, value, attention_mask, **keywords):
        if attention_mask is not None and attention_mask.is_floating_point():
            attention_mask = attention_mask.clamp(min=-1e30)  # the softmax is in float32
        if (chosen := keywords.pop("indices", None)) is not None:  # by the layer's indexer
            hidden = torch.ones_like(attention_mask, dtype=torch.bool)
            hidden = hidden.scatter(-1, chosen[:, None].long(), False)
            attention_mask = attention_mask.masked_fill(hidden, -1e30)
        function = sys.modules[type(module).__module__].eager_attention_forward
        output, formed = function(module, query, key, value, attention_mask, **keywords)
        if keywords.get("s_aux") is not None:  # some take a learned sink's share off the output
            formed = formed * share_of(output, formed, value)
        number = next(n for n, block in enumerate(blocks) if module in block.modules())
        weights[number], values[number] = formed.double(), value.double()
        return output, formed

    AttentionInterface.register("watching", watching)
    AttentionMaskInterface.register("watching", eager_mask)
    routes = model._can_set_attn_implementation()
    before, dtype = model.config._attn_implementation, model.dtype
    hooks = [
        layer.output.register_forward_pre_hook(
            lambda _, states, number=number: entering.__setitem__(number, states[0].double())
        )
        for number, layer in enumerate(layers(model))
        if layer.output is not None
    ]
    try:
        model.config._attn_implementation = "watching" if routes else "eager"
        model = model.double() if routes else model
        with torch.no_grad():
            output = model(
                **inputs, output_hidden_states=True, output_attentions=not routes, use_cache=False
            )
    finally:
        model.to(dtype)
        model.config._attn_implementation = before
        for hook in hooks:
            hook.remove()
    if not routes:
        weights = {number: formed.double() for number, formed in enumerate(output.attentions)}
    found = {}
    for number, formed in weights.items():
        states = entering[number].reshape(*inputs["input_ids"].shape, formed.shape[1], -1)
        states = states.transpose(1, 2)
        # Values that were not watched are found by undoing the weights, which are causal.
        undone = torch.linalg.solve_triangular(formed, states, upper=False) if not routes else None
        value = values.get(number, undone)
        value = value.repeat_interleave(formed.shape[1] // value.shape[1], dim=1)
        found[number] = Layer(formed, value, states)
    return found, torch.stack(output.hidden_states[:-1], 1)


def share_of(output: torch.Tensor, weights: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """What each row of weights was multiplied by before it came to the output."""
    value = value.repeat_interleave(weights.shape[1] // value.shape[1], dim=1)
    whole = weights @ value
    return (output.transpose(1, 2) * whole).sum(-1, True) / whole.square().sum(-1, True)


def definitions(
    layer: Layer,
    projection: nn.Module | None,
    real: torch.Tensor,
    queries: torch.Tensor | None = None,
    sink: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    """The probe's variables, straight from the matrix of weights."""
    weights = layer.weights
    rows, positions = torch.arange(len(real)), torch.arange(real.shape[1])
    sink = real.to(torch.uint8).argmax(1) if sink is None else sink
    visible = (weights > 0) & real[:, None, None] & (positions <= positions[:, None])
    counted = real if queries is None else real & queries
    queries = counted[:, None].expand(weights.shape[:3])
    asked = queries & (positions > sink[:, None])[:, None] & visible[rows, :, :, sink]
    others = visible.clone()
    others[rows, :, :, sink] = False
    logits = weights.log()  # up to a constant of each query
    contrast = logits[rows, :, :, sink] - mean(logits, others)
    weights = weights.masked_fill(~visible, 0.0)
    seen = visible & queries[..., None]
    padding = torch.where(real, 0.0, float("nan"))[:, None]
    found = {
        "sink_attention": mean(weights[rows, :, :, sink], asked),
        "sink_logit": mean(contrast, asked & others.any(-1)),
        "attention_entropy": mean(torch.special.entr(weights).sum(-1), queries),
        "attention_row_sum": mean(weights.sum(-1), queries),
        "key_importance": mean(weights.mT, seen.mT) + padding,
        "even_importance": mean((visible / visible.sum(-1, keepdim=True)).mT, seen.mT),
        "raw_value_norm": layer.value.norm(dim=-1) + padding,
    }
    if projection is not None:
        write = columns(projection, layer.entering).unflatten(0, (weights.shape[1], -1))
        found["value_norm"] = (layer.value @ write).norm(dim=-1) + padding
        found["head_output_norm"] = mean((layer.entering @ write).norm(dim=-1), queries)
    return found


def mean(values: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    return values.masked_fill(~kept, 0.0).sum(-1) / kept.sum(-1)


def columns(projection: nn.Module, entering: torch.Tensor) -> torch.Tensor:
    """What W_O makes of each unit vector, (input, width)."""
    parameter = next(projection.parameters())
    units = torch.eye(entering.shape[1] * entering.shape[3]).to(parameter)
    with torch.no_grad():
        return (projection(units) - projection(torch.zeros_like(units))).double()


# Where a weight that has become 0 would be taken for that of a key that is not seen.
UNSEEN = ("sink_logit", "sink_attention", "key_importance", "even_importance")


def agree(
    result, reference, model: nn.Module, real: torch.Tensor, tolerance: float, **scope
) -> None:
    """Measured and defined values, relative to the size of what exceeds 1."""
    seen = result.get("attention_entropy", result.sink_attention).notnull()
    attention, states = reference
    assert scope or sorted(attention) == seen.any(("batch", "head")).values.nonzero()[0].tolist()
    for number, layer in attention.items():
        projection = layers(model)[number].output
        for name, expected in definitions(layer, projection, real, **scope).items():
            underflows = ((layer.weights > 0) & (layer.weights < 1e-30)).any()
            if name not in result or (name in UNSEEN and underflows):
                continue
            measured = result[name].isel(layer=number, head=slice(layer.weights.shape[1]))
            np.testing.assert_allclose(
                measured, expected, rtol=tolerance, atol=tolerance, err_msg=f"{name}, {number}"
            )
    np.testing.assert_allclose(
        result.residual_norm.isel(residual_layer=slice(-1)).transpose("batch", ...),
        states.norm(dim=-1).masked_fill(~real[:, None], float("nan")),
        rtol=tolerance,
        atol=tolerance,
    )


def around(
    model: nn.Module, number: int, tokens: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """What a layer takes and what it gives."""
    block, found = layers(model)[number].block, []
    with ExitStack() as hooks, torch.no_grad():
        enter = block.register_forward_pre_hook(
            lambda _, *call: found.append(state_into(*call).clone()), with_kwargs=True
        )
        leave = block.register_forward_hook(lambda *call: found.append(state_of(call[2]).clone()))
        hooks.callback(enter.remove)
        hooks.callback(leave.remove)
        partial_forward.logits_of(model, tokens)
    return found[0], found[1]


def close(one: torch.Tensor, other: torch.Tensor) -> None:
    """The same, within what single precision knows of numbers of that size."""
    tolerance = 1e-5 * (1 + float(other.abs().max()))
    torch.testing.assert_close(one, other, rtol=0, atol=tolerance)


def afresh(
    model: PreTrainedModel, tokens: torch.Tensor, *, sinks: int, window: int
) -> torch.Tensor:
    """Streaming by definition: each token is read at the end of a text of just those that it sees.

    In every layer these have the states that they had when they were read themselves.
    """
    known: list[dict] = [{} for _ in blocks(model)]
    logits = []
    for last in range(tokens.shape[1]):
        seen = [n for n in range(last + 1) if n < sinks or last - n < window]

        def give(before: dict, seen: list[int], _block, arguments, keywords):
            states = state_into(arguments, keywords).clone()
            for place, token in enumerate(seen[:-1]):
                states[..., place, :] = before[token]
            before[seen[-1]] = states[..., -1, :]
            if "hidden_states" in keywords:
                return arguments, keywords | {"hidden_states": states}
            return (states, *arguments[1:]), keywords

        with ExitStack() as hooks:
            for block, before in zip(blocks(model), known, strict=True):
                hook = partial(give, before, seen)
                handle = block.register_forward_pre_hook(hook, with_kwargs=True)
                hooks.callback(handle.remove)
            logits.append(model(tokens[:, seen], use_cache=False).logits[:, -1:])
    return torch.cat(logits, dim=1)


PRODUCTS = (torch.matmul, torch.bmm, torch.mm, torch.Tensor.matmul, torch.Tensor.__matmul__)


class EightBits(TorchFunctionMode):
    """Has every product with a matrix of a layer computed in eight bits, one text at a time.

    A matrix is that of a linear map, or one of the experts in a parameter of three dimensions.
    Inputs get one range for the text, or one for each token.
    """

    def __init__(self, model: nn.Module, ranges: str):
        super().__init__()
        self.ranges = ranges
        self.matrices = {}
        for block in blocks(model):
            for module in block.modules():
                linear = isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
                for name, matrix in module.named_parameters(recurse=False):
                    if "bias" not in name and (linear or name.endswith("_proj")):
                        self.matrices[matrix.data_ptr()] = matrix

    def matrix(self, weight) -> nn.Parameter | None:
        """The parameter that a factor is, or is a part of."""
        base = weight if isinstance(weight, nn.Parameter) else getattr(weight, "_base", None)
        return None if base is None else self.matrices.get(base.data_ptr())

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is F.linear:
            states, weight, *rest = args if len(args) > 1 else (args[0], kwargs.pop("weight"))
            if self.matrix(weight) is not None:
                args = (self.states(states), self.weight(weight), *rest)
        elif function is torch.addmm and self.matrix(args[2]) is not None:
            args = (args[0], self.states(args[1]), self.weight(args[2]))
        elif function in PRODUCTS and self.matrix(args[1]) is not None:
            args = (self.states(args[0]), self.weight(args[1]))
        elif function in PRODUCTS and self.matrix(args[0]) is not None:  # Mamba's steps
            args = (self.weight(args[0]), self.states(args[1].mT).mT)
        return function(*args, **kwargs)

    def weight(self, weight: torch.Tensor) -> torch.Tensor:
        return slow_int8(weight, weight.abs().amax((-2, -1), keepdim=True))

    def states(self, states: torch.Tensor) -> torch.Tensor:
        if self.ranges == "token":
            return slow_int8(states, states.abs().amax(-1, keepdim=True))
        return slow_int8(states, states.abs().max()) if states.numel() else states


def slow_int8(states: torch.Tensor, largest: torch.Tensor) -> torch.Tensor:
    """The nearest of 255 values, in float64."""
    step = (largest.double() / 127).clamp(min=1e-300)
    return ((states.double() / step).round() * step).to(states.dtype)


def in_eight_bits(model: nn.Module, tokens: torch.Tensor, ranges: str) -> torch.Tensor:
    """The logits of each text by itself, with every linear map of the layers in eight bits."""
    logits = []
    for text in tokens.split(1):
        with torch.no_grad(), EightBits(model, ranges):
            logits.append(partial_forward.logits_of(model, text))
    return torch.cat(logits)
