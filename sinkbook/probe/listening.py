"""Reaching a model's attention while it runs, in one of three ways.

Models of transformers look their attention function up by name in `AttentionInterface`, where ours
is registered. The few architectures that do not, and layers whose attention has been replaced, are
overheard: `_Overhearing` watches for the softmax, or the fused attention, inside one layer after
the other. All other models call the function that they carry as `attention_function`
(`models/layout.py`), or that a user has registered; the weights that it returns are read, or the
fused attention inside it is overheard. Each way hands what it finds to the active
`recorder.Recorder`, and puts back what the model had, also after an exception.
"""

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sinkbook.errors import SinkbookError
from sinkbook.models.attention_interface import (
    attending_by,
    attention_beneath,
    own_function,
    registered,
    unknown,
    with_selection,
)
from sinkbook.probe import explicit
from sinkbook.probe.masks import shown

NAME = "sinkbook"  # of our attention function in transformers' registries

active: ContextVar = ContextVar("active recorder", default=None)


@contextlib.contextmanager
def named_attention(recorder) -> Iterator[None]:
    """Listen to each layer's `attention_function`. What it returns goes on downstream."""
    carriers = {layer.attention for layer in recorder.layers if layer.attention is not None}
    with contextlib.ExitStack() as undo:
        for module in carriers:
            undo.callback(_restore_function, module, vars(module).get("attention_function"))
            # Past `nn.Module`, which lets only modules take the place of a module.
            vars(module)["attention_function"] = partial(_listen, module.attention_function)
        yield


def _restore_function(module: nn.Module, own: Callable | None) -> None:
    """Put back the function that the module itself carried; `None` if it lay elsewhere."""
    del vars(module)["attention_function"]
    if own is not None:
        vars(module)["attention_function"] = own


def _listen(
    original, module, query, key, value, attention_mask=None, scaling=None, **keywords
) -> tuple[Float[Tensor, "batch position head value_width"], Tensor | None]:
    """Call an attention function, and read the weights that it returns or the fused call in it."""
    call = partial(original, module, query, key, value, attention_mask, scaling=scaling, **keywords)
    recorder = active.get()
    if recorder is None or recorder.layer is None:
        return call()
    with _Overhearing(recorder, whole_layer=False) as heard:
        output, weights = call()
    if weights is None:
        if heard.fused_calls != 1:
            raise SinkbookError(
                f"the attention function of layer {recorder.layer} returns no weights and calls "
                f"scaled_dot_product_attention {heard.fused_calls} times. Return the outputs and "
                "the weights, (batch, head, query, key), or call it once."
            )
        return output, weights
    scope = recorder.scope.to(query.device)
    length = scope.real.shape[1]
    if weights.shape != (*query.shape[:2], length, length):
        raise SinkbookError(
            f"the attention function of layer {recorder.layer} returns weights of the shape "
            f"{tuple(weights.shape)}. Return them as (batch, head, query, key), without slots "
            "that are no key."
        )
    # What is no mask over pairs is of a kind that only the function itself knows.
    pairwise = torch.is_tensor(attention_mask) and attention_mask.ndim == 4
    visible, bias = recorder.visibility(attention_mask if pairwise else None, True, scope)
    made_by_softmax = heard.weights is not None and heard.weights.shape == weights.shape
    if made_by_softmax and torch.allclose(heard.weights.to(weights), weights):
        logits = heard.scores
    else:
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        every = torch.arange(query.shape[2])
        with without_autocast(query.device):
            logits = explicit.logits_of(query, key, every.to(query.device), scaling, bias)
    recorder.read_weights(logits, visible, weights, value, route="chunked", normalised=False)
    return output, weights


def _interface_attention(
    module, query, key, value, attention_mask, scaling=None, is_causal=None, **keywords
):
    """What `AttentionInterface` calls: for threads that do not measure, what was there before."""
    recorder = active.get()
    attention_mask = with_selection(module, attention_mask, keywords)
    if others := unknown(keywords, ("softcap", "position_bias", "s_aux")):
        raise SinkbookError(
            f"{type(module).__name__} hands its attention function {', '.join(others)}, which "
            "sinkbook does not know and would leave out. Give a model of another architecture."
        )
    if recorder is None or recorder.layer is None:
        config = getattr(module, "config", None)
        attend = attention_beneath(config, _interface_attention) or _plain_attention
        how = {"scaling": scaling, "is_causal": is_causal, **keywords}
        return attend(module, query, key, value, attention_mask, **how)
    output = recorder.attend(
        query,
        key,
        value,
        attention_mask,
        scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
        causal=getattr(module, "is_causal", True) if is_causal is None else is_causal,
        softcap=keywords.get("softcap"),
        bias=keywords.get("position_bias"),
        learned_sink=keywords.get("s_aux"),
    )
    return output.transpose(1, 2).contiguous(), None


def _plain_attention(module, query, key, value, attention_mask, **keywords):
    """Attention as the model's own: fused, or formed where it has what no fused kernel knows."""
    bias, softcap, sink = (keywords.get(name) for name in ("position_bias", "softcap", "s_aux"))
    if bias is None and softcap is None and sink is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(module, query, key, value, attention_mask, **keywords)
    asked, keys = query.shape[2], key.shape[2]
    if attention_mask is None:
        visible = torch.ones(asked, keys, dtype=torch.bool, device=query.device)
        attention_mask = visible.tril(keys - asked)[None, None]
    visible = attention_mask
    if attention_mask.dtype != torch.bool:
        visible = shown(attention_mask)
        bias = attention_mask if bias is None else bias + attention_mask
    scaling = keywords.get("scaling")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    with without_autocast(query.device):
        visible = visible.expand(len(query), -1, -1, -1)
        rows = explicit.softmax_rows(query, key, scaling, visible, bias, softcap, sink)
        output = explicit.outputs_of(rows, value)
    return output.transpose(1, 2).contiguous(), None


@contextlib.contextmanager
def without_autocast(device: torch.device) -> Iterator[None]:
    """The probe's arithmetic is its own, whatever the model computes in."""
    if not torch.is_autocast_enabled(device.type):
        yield
        return
    with torch.autocast(device.type, enabled=False):
        yield


@contextlib.contextmanager
def transformers_attention(model: nn.Module, recorder) -> Iterator[None]:
    """Have a model of transformers call `_interface_attention`, or listen to its own attention."""
    if not model._can_set_attn_implementation():
        with overhearing(recorder):
            yield
        return
    name, own = own_function(model, [layer.attention for layer in recorder.layers])
    if own in (None, _interface_attention):  # ours: another model of this configuration's
        with attending_by(model, NAME, _interface_attention):
            yield
        return
    with registered(name, partial(_listen, own)):
        yield


def overhearing(recorder) -> contextlib.AbstractContextManager:
    """Overhear the attention of layers that no attention function is called by."""
    return _Overhearing(recorder)


class _Overhearing(TorchFunctionMode):
    """Reads attention off the torch functions that a layer calls.

    A softmax over (..., query, key) is taken for the weights, and the next product of such a shape
    for that with the values, if it is the `whole_layer` that is heard and not an attention
    function, which returns its weights. What goes into the product counts, since weights may be
    changed on the way. A call of the fused attention is answered by the recorder.
    """

    SOFTMAX = (torch.softmax, F.softmax, Tensor.softmax)
    PRODUCTS = (torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm)

    def __init__(self, recorder, whole_layer: bool = True):
        super().__init__()
        self.recorder = recorder
        self.whole_layer = whole_layer
        self.fused_calls = 0
        self.scores: Tensor | None = None
        self.weights: Tensor | None = None

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        recorder = self.recorder
        if recorder.layer is None or active.get() is not recorder:
            return function(*args, **kwargs)
        if function is F.scaled_dot_product_attention:
            self.fused_calls += 1
            return self._fused_attention(*args, **kwargs)
        result = function(*args, **kwargs)
        batch, length = recorder.scope.real.shape
        if function in self.SOFTMAX and result.ndim >= 3 and result.shape[-2:] == (length, length):
            self.scores, self.weights = args[0], result
        elif (
            self.whole_layer
            and function in self.PRODUCTS
            and self.weights is not None
            and args[0].numel() == self.weights.numel()
            and args[0].shape[-2:] == (length, length)
        ):
            value = args[1].reshape(batch, -1, length, args[1].shape[-1])
            scores, formed, weights = (
                states.reshape(batch, -1, length, length)
                for states in (self.scores, self.weights, args[0])
            )
            same = torch.equal(formed, weights)
            self.scores = self.weights = None
            real = recorder.scope.real.to(weights.device)
            visible = shown(scores).tril() & real[:, None, None]
            recorder.read_weights(scores, visible, weights, value, route="eager", normalised=same)
        return result

    def _fused_attention(
        self, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, **_
    ):
        return self.recorder.attend(
            query,
            key,
            value,
            attn_mask,
            scaling=query.shape[-1] ** -0.5 if scale is None else scale,
            causal=is_causal,
        )
