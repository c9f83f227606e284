"""Where a layer's attention heads and their values can be taken hold of, found by trial.

Names and sizes do not tell: a Mamba mixer projects its output as attention does, one matrix may
hold W_Q, W_K and W_V, and layers may share their values. So each layer's attention is made to give
known outputs, of which another choice of heads is zero in every text; what reaches W_O must be zero
for these heads, side by side. The same with the values on their way from W_V to the attention.
"""

from contextlib import ExitStack
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from jaxtyping import Bool
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sinkbook.models.attention_interface import attending_by
from sinkbook.models.layout import Layer, layers, of_transformers
from sinkbook.models.trials.writers import Inside, known_input, on_trial, tried_once
from sinkbook.models.wrappers import unwrapped

NAME = "sinkbook-heads"  # of the attention function of the trial
TEXTS, LENGTH = 10, 7  # by which of the texts it is in, one of 1,023 heads is told
SOFTMAX = (torch.softmax, F.softmax, Tensor.softmax)
PRODUCTS = (torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm)


@dataclass
class Heads:
    """The heads of one layer, by their numbers, or why there are none to take hold of."""

    count: int | None = None  # whose outputs stand side by side in what W_O reads
    values: int | None = None  # whose values stand side by side at the end of what W_V gives
    start: float = 0.0  # where these begin there, as a fraction of it
    forms_softmax: bool = False  # by itself, past the attention function of transformers
    no_heads: str = ""
    no_values: str = ""


_known: WeakKeyDictionary = WeakKeyDictionary()


def heads(model: nn.Module) -> list[Heads]:
    """The heads of each layer of a model; tried once, and again when modules have changed.

    A model that is not of transformers is taken at its word (`layout.Attention`). Raises
    `SinkbookError` if the model cannot be run on a short text.
    """
    model = unwrapped(model)
    if not of_transformers(model):
        return [
            Heads(layer.heads, layer.value_heads, layer.value_start)
            if layer.attention is not None
            else Heads(no_heads="no attention", no_values="no attention")
            for layer in layers(model)
        ]
    return tried_once(_known, model, _tried)


def _codes(count: int, device: torch.device) -> Bool[Tensor, "text head"]:
    """In which texts each head is not zero: in some, and no two heads in the same ones."""
    texts = torch.arange(TEXTS, device=device)[:, None]
    return ((torch.arange(count, device=device) + 1) >> texts & 1).bool()


@dataclass
class _Seen:
    """What was seen of one layer in the trial."""

    calls: int = 0  # of softmax attention
    heads: int = 0
    value: Tensor | None = None  # (text, head, position, width), as the attention got it
    others: list[Tensor] = field(default_factory=list)  # queries and keys, or the weights
    read: list[Tensor] = field(default_factory=list)  # by W_O
    projected: int = 0  # times that W_V ran
    forms_softmax: bool = False


class _Trial(TorchFunctionMode):
    """Answers for the attention of the layer that runs, wherever it is computed."""

    def __init__(self, count: int):
        super().__init__()
        self.seen = [_Seen() for _ in range(count)]
        self.layer: int | None = None
        self._weights: Tensor | None = None

    def attend(self, module, query, key, value, attention_mask, **_):
        """As `AttentionInterface` calls it."""
        answer = self._answer(value, query.shape[1], query, key)
        return answer.transpose(1, 2).contiguous(), None

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self.layer is None:
            return function(*args, **kwargs)
        if function is F.scaled_dot_product_attention and args[0].shape[-2] == LENGTH:
            named = ("query", "key", "value")
            query, key, value = (*args[:3], *(kwargs[n] for n in named[len(args) :] if n in kwargs))
            self.seen[self.layer].forms_softmax = True
            return self._answer(value, query.shape[1], query, key)
        result = function(*args, **kwargs)
        if function in SOFTMAX and result.shape[-2:] == (LENGTH, LENGTH):
            self._weights = result
            self.seen[self.layer].forms_softmax = True
        elif (
            function in PRODUCTS
            and self._weights is not None
            and args[0].shape[-2:] == (LENGTH, LENGTH)
            and args[0].numel() == self._weights.numel()
        ):
            weights = self._weights.reshape(TEXTS, -1, LENGTH, LENGTH)
            value = args[1].reshape(TEXTS, -1, LENGTH, args[1].shape[-1])
            self._weights = None
            return self._answer(value, weights.shape[1], weights).reshape(result.shape)
        return result

    def _answer(self, value: Tensor, count: int, *others: Tensor) -> Tensor:
        if self.layer is None:
            return value
        seen = self.seen[self.layer]
        seen.calls, seen.heads, seen.value = seen.calls + 1, count, value
        seen.others = [states.reshape(TEXTS, -1) for states in others]
        code = _codes(count, value.device)[:, :, None, None]
        return code.expand(-1, -1, LENGTH, value.shape[-1]).to(value.dtype).contiguous()


def _tried(model: nn.Module) -> list[Heads]:
    found = layers(model)
    trial = _Trial(len(found))
    with on_trial(model, TEXTS, LENGTH) as run, ExitStack() as hooks:
        for number, layer in enumerate(found):
            _watch(number, layer, trial, hooks)
        if model._can_set_attn_implementation():
            hooks.enter_context(attending_by(model, NAME, trial.attend))
        with trial:
            run()
    return [_judged(layer, seen) for layer, seen in zip(found, trial.seen, strict=True)]


def _watch(number: int, layer: Layer, trial: _Trial, hooks: ExitStack) -> None:
    seen = trial.seen[number]

    def enter(_block, arguments, keywords):
        trial.layer = number
        return known_input(arguments, keywords, number, alike=True)[0]

    def leave(_block, _arguments, _output):
        trial.layer = None

    def read(states: Tensor) -> Tensor:
        seen.read.append(states)
        return states

    def code(states: Tensor) -> Tensor:
        seen.projected += 1
        states = states.clone()
        own = states[..., round(layer.value_start * states.shape[-1]) :]
        whole = layer.value_heads and own.shape[-1] % layer.value_heads == 0
        if whole and states.shape[:2] == (TEXTS, LENGTH):
            kept = _codes(layer.value_heads, states.device)[:, None, :, None]
            own.copy_((own.unflatten(-1, (layer.value_heads, -1)) * kept).flatten(-2))
        return states

    hooks.callback(layer.block.register_forward_pre_hook(enter, with_kwargs=True).remove)
    inside = Inside(layer.block, hooks, own_shape=True)
    hooks.callback(layer.block.register_forward_hook(leave).remove)
    if layer.output is not None:
        inside.change_input(layer.output, read, hooks)
    if layer.value is not None:
        inside.change_output(layer.value, code, hooks)


def _judged(layer: Layer, seen: _Seen) -> Heads:
    if seen.calls != 1:
        mixer = "" if layer.attention is None else f": {type(layer.attention).__name__}"
        times = f"{seen.calls} softmax attentions" if seen.calls else "no softmax attention"
        return Heads(
            no_heads=times + mixer, no_values=times + mixer, forms_softmax=seen.forms_softmax
        )
    found = Heads(seen.heads, layer.value_heads, layer.value_start, seen.forms_softmax)
    if len(seen.read) != 1 or seen.read[0].shape[:2] != (TEXTS, LENGTH):
        found.no_heads = "no projection of the heads' outputs that sinkbook finds"
    elif not _is_coded(seen.read[0].transpose(1, 2), seen.heads, side_by_side=True):
        found.no_heads = "heads whose outputs do not stand side by side before W_O"
    if seen.projected != 1:
        found.no_values = "no projection that sinkbook finds to give values and nothing else"
    elif not _is_coded(seen.value, layer.value_heads):
        found.no_values = "values that are not those of its heads side by side"
    elif any((states != states[:1]).any() for states in seen.others):
        found.no_values = "a projection that gives queries or keys where values were looked for"
    return found


def _is_coded(states: Tensor, count: int | None, side_by_side: bool = False) -> bool:
    """Whether of `count` heads just those are zero that are so by the code of their text.

    States are (text, head, position, width), where neighbouring heads may share a value; or
    (text, head and width, position), `side_by_side`.
    """
    if not count or states.shape[1] % count:
        return False
    groups = states.reshape(TEXTS, count, -1) if side_by_side else None
    if groups is None:
        shared = states.shape[1] // count
        groups = states.reshape(TEXTS, count, shared, -1)
        if not ((groups != 0).any(-1) == (groups != 0).any(-1)[:, :, :1]).all():
            return False
        groups = groups.flatten(2)
    return bool(((groups != 0).any(-1) == _codes(count, states.device)).all())
