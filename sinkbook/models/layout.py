"""Where a model keeps its parts: what the probe measures, the interventions cut, the maps show.

Models of transformers are read by structure, whatever their architecture. Any other `nn.Module`
says where its parts are, by the names of `Model`, `Block` and `Attention` below. The toy does, and
so can a model of your own:

>>> import torch
>>> from torch import nn
>>> def softmax_attention(module, query, key, value, attention_mask, scaling, **_):
...     causal = {"attn_mask": attention_mask, "is_causal": attention_mask is None}
...     attend = nn.functional.scaled_dot_product_attention
...     return attend(query, key, value, **causal, scale=scaling).transpose(1, 2), None
>>> class OwnAttention(nn.Module):
...     def __init__(self):
...         super().__init__()
...         self.heads, self.head_dim, self.attention_function = 2, 4, softmax_attention
...         self.wq, self.wk, self.wv, self.wo = (nn.Linear(8, 8) for _ in range(4))
...     def forward(self, x):
...         states = (w(x).unflatten(-1, (2, 4)) for w in (self.wq, self.wk, self.wv))
...         query, key, value = (heads.transpose(1, 2) for heads in states)
...         output, _ = self.attention_function(self, query, key, value, None, scaling=0.5)
...         return self.wo(output.flatten(-2))
>>> class OwnBlock(nn.Module):
...     def __init__(self):
...         super().__init__()
...         self.attention = OwnAttention()
...         self.mlp = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8))
...     def forward(self, x):
...         x = x + self.attention(x)
...         return x + self.mlp(x)
>>> class OwnModel(nn.Module):
...     def __init__(self):
...         super().__init__()
...         self.embedding, self.head = nn.Embedding(9, 8), nn.Linear(8, 9)
...         self.layers = nn.Sequential(OwnBlock(), OwnBlock())
...     def forward(self, tokens):
...         return self.head(self.layers(self.embedding(tokens)))
>>> from sinkbook.probe import measure
>>> measure(OwnModel(), torch.zeros(1, 7, dtype=torch.long)).sink_attention.dims
('batch', 'layer', 'head')
"""

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol, get_type_hints

from torch import nn

from sinkbook.errors import SinkbookError
from sinkbook.models.wrappers import unwrapped


class Model(Protocol):
    """A model of your own: `model(tokens)` gives the logits, (batch, position, vocab).

    Or an object with `logits`, or a tuple that begins with them. It takes whole texts, and padding
    after them only.
    """

    layers: Iterable  # of `Block`, each once, in the order in which they run


class Block(Protocol):
    """One layer: called with the residual state first, (batch, position, width), it gives the next.

    What it gives may be a tuple that begins with the state.
    """

    attention: nn.Module | None  # an `Attention`; None in a layer without
    mlp: nn.Module | None  # gives what is added to the residual state; None in a layer without


class Attention(Protocol):
    """Causal self-attention; called by the block, it gives what is added to the residual state.

    `attention_function` has the signature of transformers' attention functions,
    `attention_function(module, query, key, value, attention_mask, scaling=scaling)`, with states
    in the shape (batch, head, position, width); key and value may have fewer heads. A mask is
    added to the logits; without one, attention is causal. The function returns the outputs,
    (batch, position, head, width), and the weights, (batch, head, query, key), or `None` where it
    forms none and calls `torch.nn.functional.scaled_dot_product_attention` once.
    Logits are the input of the softmax that makes the weights, else `scaling * query @ key.mT`.
    """

    attention_function: Callable  # looked up on the module at every call: others put theirs there
    heads: int  # whose outputs stand side by side before W_O
    head_dim: int  # width of one head's value
    wv: nn.Module  # W_V, from what the module reads to the values, head by head
    wo: nn.Module  # W_O, from the heads' outputs to the residual stream


# Names under which transformers' layers keep their MLP, or its last linear map.
_MLPS = ("mlp", "feed_forward", "ffn", "moe", "block_sparse_moe", "fc2")
# Names of W_O in transformers' attention modules.
_OUTPUTS = ("o_proj", "out_proj", "c_proj", "dense", "wo", "Wo", "linear_out", "attention_out")
# Names of W_V; `c_attn` holds W_Q, W_K and W_V one after the other.
_VALUES = ("v_proj", "wv", "c_attn")
# Names of a head's width, of its values first.
_WIDTHS = ("v_head_dim", "head_dim")


@dataclass(frozen=True)
class Layer:
    """One layer of a model. A part that the layer does not have is `None`."""

    block: nn.Module  # what the residual state passes through
    attention: nn.Module | None
    value: nn.Module | None  # W_V, alone or at the end of a projection
    output: nn.Module | None  # W_O, from the heads' outputs to the residual stream
    mlp: nn.Module | None
    heads: int | None  # whose outputs stand side by side before W_O
    value_heads: int | None  # whose values stand side by side after W_V: fewer if heads share them
    value_start: float = 0.0  # where they begin, as a fraction of what `value` gives


def of_transformers(model: nn.Module) -> bool:
    """Whether a model is one of transformers, or wraps one: read by structure, not by names."""
    return hasattr(unwrapped(model), "set_attn_implementation")


def has_own_forward(module: nn.Module, model: nn.Module) -> bool:
    """Whether a module computes by a forward function that did not come with its model."""
    own = vars(module).get("forward")
    if own is not None and not hasattr(module, "_old_forward"):  # accelerate's calls the old one
        return True
    kind = type(module)
    homes = {of.__module__.partition(".")[0] for of in kind.__mro__ if "forward" in vars(of)}
    home = (getattr(inspect.unwrap(kind.forward), "__module__", None) or "").partition(".")[0]
    came = {"transformers", "transformers_modules", type(model).__module__.partition(".")[0]}
    return home not in homes & came


def layers(model: nn.Module) -> list[Layer]:
    """The layers of a model, first to last.

    Raises `SinkbookError` for a model of transformers that has no list of layers, and for any
    other that lacks one of the names in this module; all that are missing are named.
    """
    model = unwrapped(model)
    if of_transformers(model):
        config = model.config.get_text_config()
        return [
            _found_layer(block, _of_layer(config, number))
            for number, block in enumerate(blocks(model))
        ]
    return [_named_layer(block) for block in blocks(model)]


def blocks(model: nn.Module) -> list[nn.Module]:
    """The modules that the residual state passes through one after the other."""
    model = unwrapped(model)
    if not of_transformers(model):
        return _named_blocks(model)
    depth = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    found = _lists_of_text(model, depth)
    if len(found) != 1:
        several = ", ".join(found) or "none"
        raise SinkbookError(
            f"{type(model).__name__} should have one list of {depth} layers that attend to text; "
            f"found: {several}. sinkbook reads decoder-only language models: give the one inside."
        )
    return list(*found.values())


# --- Models that name their parts ------------------------------------------------------------


def _named_blocks(model: nn.Module) -> list[nn.Module]:
    missing = _missing(model, Model, "")
    found = [] if missing else list(model.layers)
    for number, block in enumerate(found):
        here = f"layers[{number}]"
        if not isinstance(block, nn.Module):
            missing.append(f"{here} (an nn.Module, not {type(block).__name__})")
            continue
        missing += _missing(block, Block, f"{here}.")
        if isinstance(getattr(block, "attention", None), nn.Module):
            missing += _missing(block.attention, Attention, f"{here}.attention.")
    if missing or not found:
        raise SinkbookError(
            f"{type(model).__name__} does not say where its parts are. "
            f"Missing: {', '.join(missing) or 'any layer in layers'}. Models that are not of "
            "transformers carry the names that help(sinkbook.models.layout) shows in an example."
        )
    return found


# What the members of the protocol are, in words.
_KINDS = {
    int: "a number",
    Callable: "a function",
    Iterable: "a list of modules",
    nn.Module: "an nn.Module",
    nn.Module | None: "an nn.Module or None",
}


def _missing(holder: nn.Module, protocol: type, path: str) -> list[str]:
    """What a module lacks of a protocol, or has in another type, each with what it should be."""
    missing = []
    for name, kind in get_type_hints(protocol).items():
        if not hasattr(holder, name):
            missing.append(f"{path}{name} ({_KINDS[kind]})")
        elif not isinstance(getattr(holder, name), kind):
            held = type(getattr(holder, name)).__name__
            missing.append(f"{path}{name} ({_KINDS[kind]}, not {held})")
    return missing


def _named_layer(block: nn.Module) -> Layer:
    attention = block.attention
    if attention is None:
        return Layer(block, None, None, None, block.mlp, None, None)
    written = getattr(attention.wv, "weight", None)
    own = attention.heads if written is None else len(written) // attention.head_dim
    return Layer(
        block, attention, attention.wv, attention.wo, block.mlp, attention.heads, value_heads=own
    )


# --- Models of transformers, by structure ----------------------------------------------------


def _lists_of_text(model: nn.Module, depth: int | None) -> dict[str, nn.ModuleList]:
    """Lists of as many modules as the text model has layers, by name: there should be one.

    Those that attend count before those that do not, and those in a part with the configuration of
    the text before others: a tower for images or sound may be as deep.
    """
    of_text, configs = type(model.config.get_text_config()), {"": type(model.config)}
    found: dict[str, nn.ModuleList] = {}
    for name, module in model.named_modules():
        above = configs[name.rpartition(".")[0]]
        own = getattr(module, "config", None)
        configs[name] = type(own) if hasattr(own, "get_text_config") else above
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            found[name] = module
    names = [name for name in found if any(_attention(b) for b in found[name])] or list(found)
    names = [name for name in names if configs[name] is of_text] or names
    return {name: found[name] for name in names}


def _of_layer(config, number: int):
    """The configuration of one layer, where it is not one for all: of all, it can't be asked."""
    return config.per_layer_config[number] if getattr(config, "is_heterogeneous", False) else config


def _found_layer(block: nn.Module, config) -> Layer:
    attention, mlp = _attention(block), _named_child(block, _MLPS)
    if attention is None:
        return Layer(block, None, None, None, mlp, None, None)
    value, output = (_named_child(attention, names) for names in (_VALUES, _OUTPUTS))
    heads, value_heads = _head_counts(attention, value, output, config)
    start = 0.0
    if value is not None and value is getattr(attention, "c_attn", None):
        if type(value).__name__ == "Conv1D":  # GPT-2's: three of one size
            value_heads = heads
        elif value_heads != heads + 2:  # GPTBigCode's, but for one shared head: head by head
            value = None
        else:
            value_heads = 1
        start = 1 - value_heads / (heads + 2 * value_heads)
    return Layer(block, attention, value, output, mlp, heads, value_heads, start)


def _head_counts(attention, value, output, config) -> tuple[int | None, int | None]:
    """Heads before W_O and after W_V: of the layer by its widths, else of the configuration."""
    widths = (getattr(attention, name, None) for name in _WIDTHS)
    width = next((width for width in widths if isinstance(width, int)), None)
    heads = getattr(config, "num_attention_heads", None)
    value_heads = getattr(config, "num_key_value_heads", None) or heads
    if width:
        heads = _whole(getattr(output, "in_features", None), width) or heads
        value_heads = _whole(getattr(value, "out_features", None), width) or value_heads
    return heads, value_heads


def _whole(states: int | None, width: int) -> int | None:
    """How many heads of a width make the states, if it is a whole number."""
    return states // width if states and states % width == 0 else None


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
