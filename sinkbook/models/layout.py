"""Where a model keeps its parts: the same answers for the toy transformer and for transformers'.

What the probe measures and the interventions cut is found here, by structure rather than by the
name of the architecture.
"""

from dataclasses import dataclass

from torch import nn

from sinkbook.errors import SinkbookError
from sinkbook.toy.transformer import Transformer

# Names under which transformers' layers keep their MLP, or its last linear map.
_MLPS = ("mlp", "feed_forward", "ffn", "moe", "block_sparse_moe", "fc2")
# Names of W_O in transformers' attention modules; `wo` is the toy's.
_OUTPUTS = ("o_proj", "out_proj", "c_proj", "dense", "wo", "Wo", "linear_out", "attention_out")
# Names of W_V; GPT-2's `c_attn` holds W_Q, W_K and W_V one after the other.
_VALUES = ("v_proj", "wv", "c_attn")


@dataclass(frozen=True)
class Layer:
    """One layer of a model. A part that the layer does not have is `None`."""

    block: nn.Module  # what the residual state passes through
    attention: nn.Module | None
    value: nn.Module | None  # W_V, alone or as the last third of a projection
    output: nn.Module | None  # W_O, from the heads' outputs to the residual stream
    mlp: nn.Module | None


def layers(model: nn.Module) -> list[Layer]:
    """The layers of a toy or of a transformers causal LM, first to last.

    Raises `SinkbookError` for a model that has no list of layers.
    """
    return [_layer(block) for block in blocks(model)]


def blocks(model: nn.Module) -> list[nn.Module]:
    """The modules that the residual state passes through one after the other."""
    if isinstance(model, Transformer):
        return list(model.layers)
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m)]
    depth = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    of_depth = [m for m in lists if len(m) == depth]
    found = [m for m in of_depth if any(_attention(block) for block in m)] or of_depth
    if not found:
        raise SinkbookError(
            f"{type(model).__name__} has no list of {depth} layers. "
            "sinkbook reads decoder-only language models."
        )
    return list(found[0])


def _layer(block: nn.Module) -> Layer:
    attention = _attention(block)
    value = output = None
    if attention is not None:
        value, output = (_named_child(attention, names) for names in (_VALUES, _OUTPUTS))
    return Layer(block, attention, value, output, _named_child(block, _MLPS))


def _attention(block: nn.Module) -> nn.Module | None:
    """The module that holds W_O; where another mixer stands beside it, the one that attends."""
    holders = [
        (f"{name} {type(module).__name__}".lower(), module)
        for name, module in block.named_modules()
        if name and _named_child(module, _OUTPUTS) is not None and "mlp" not in name
    ]
    attending = [module for name, module in holders if "att" in name]
    return next(iter(attending or [module for _, module in holders]), None)


def _named_child(module: nn.Module, names: tuple[str, ...]) -> nn.Module | None:
    for name in names:
        child = getattr(module, name, None)
        if isinstance(child, nn.Module):
            return child
    return None
