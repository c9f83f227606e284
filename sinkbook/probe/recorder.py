"""Keeping what one forward pass shows: what attention gets and gives, and the residual states.

`listening.py` reaches the attention of each layer and brings it here.
"""

import contextlib
import inspect
from collections.abc import Callable, Iterator
from functools import partial, wraps

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from sinkbook.errors import NotFiniteError, SinkbookError
from sinkbook.models.layout import has_own_forward, layers, of_transformers
from sinkbook.models.partial_forward import (
    alone_with,
    logits_in,
    logits_of,
    state_into,
    state_of,
)
from sinkbook.models.trials.heads import heads
from sinkbook.models.trials.writers import writers
from sinkbook.models.wrappers import evaluating, uncompiled, unwrapped
from sinkbook.probe import explicit, fused
from sinkbook.probe.finite import States
from sinkbook.probe.listening import (
    active,
    named_attention,
    overhearing,
    transformers_attention,
    without_autocast,
)
from sinkbook.probe.masks import (
    Heads,
    KeyHeads,
    Outputs,
    Scope,
    Spans,
    Values,
    causal_spans,
    find_spans,
    shown,
)
from sinkbook.probe.written import is_replaced, write_factor

# Called with a layer, and a function from positions of queries to their rows.
Look = Callable[[int, Callable[[Tensor | None], Iterator[explicit.Rows]]], None]


def _exactly(method: Callable) -> Callable:
    """A method that computes in float32 or wider, also in a body where the model does not."""

    @wraps(method)
    def exactly(self, *arguments, **keywords):
        with without_autocast(self.scope.real.device):
            return method(self, *arguments, **keywords)

    return exactly


class Recorder:
    """Collects, layer by layer, what one forward pass of `model` shows of a `Scope`.

    `readings` holds a dictionary of variables for each layer, empty where there is no attention;
    `residuals` one for each residual state, the embedding first. Who gives a `look` is shown every
    layer's attention, from which it can form whole rows of logits and weights.
    """

    def __init__(self, model: nn.Module, scope: Scope, look: Look | None = None):
        model = unwrapped(model)
        if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
            raise SinkbookError(
                f"{type(model).__name__} has an encoder and a decoder. The probe measures causal "
                "language models, whose classes end in ForCausalLM."
            )
        self.model = model
        self.layers = layers(model)
        self.scope = scope
        self._look = look
        self.layer: int | None = None  # the one that runs now
        self.readings: list[dict[str, Tensor]] = [{} for _ in self.layers]
        self.residuals: list[dict[str, Tensor]] = [{} for _ in range(len(self.layers) + 1)]
        self.routes: set[str] = set()
        self._ran: set[int] = set()
        self._attended: set[int] = set()  # layers whose attention, or other mixer, has run
        self._heard: set[int] = set()  # layers whose attention has been read
        self._only: set[int] | None = None  # layers that are listened to; all by default
        self._factors: dict[int, Tensor | None] = {}
        self._masks = WeakTensorKeyDictionary()
        self._states = States(type(model).__name__, scope.real)
        self._odd_state: str | None = None  # why positions cannot be told from texts

    def run(self, inputs: dict[str, Tensor], with_logits: bool) -> Tensor | None:
        """One forward pass; returns the logits if they are wanted, else leaves out the head.

        Raises `NotFiniteError` if a state of a token that is no padding is NaN or infinite.
        """
        try:
            logits = self._run(inputs, with_logits)
        except SinkbookError:
            raise
        except Exception as error:  # it may be of a NaN that routers and samplers stumble
            self._states.check(error)
            raise
        self._states.check()
        return logits

    def _run(self, inputs: dict[str, Tensor], with_logits: bool) -> Tensor | None:
        batch, length = self.scope.real.shape
        if batch == length > 1 and of_transformers(self.model):
            self._odd_state = writers(self.model)[0].odd_state  # XLNet's: (position, batch, width)
        with contextlib.ExitStack() as undo:
            undo.enter_context(alone_with(self.model))
            undo.enter_context(uncompiled())
            undo.enter_context(evaluating(self.model))
            undo.enter_context(self._listening())
            token = active.set(self)
            undo.callback(active.reset, token)
            if of_transformers(self.model):
                whole = with_logits or is_replaced(self.model)
                forward = self.model if whole else self.model.base_model
                accepted = inspect.signature(forward.forward).parameters
                if "use_cache" in accepted:
                    inputs = {**inputs, "use_cache": False}
                with transformers_attention(self.model, self):
                    output = forward(**inputs)
                if not self._ran:
                    raise SinkbookError(
                        f"the layers of {type(self.model).__name__} that sinkbook finds, "
                        f"{type(self.layers[0].block).__name__}, do not run for a text. It reads "
                        "decoder-only language models."
                    )
                if self._reads_attention():
                    self._hear_silent(partial(forward, **inputs))
                return logits_in(self.model, output) if with_logits else None
            self._check_named(inputs)
            undo.enter_context(named_attention(self))
            for layer in self.layers:
                if layer.attention is not None:
                    hook = layer.attention.register_forward_hook(self._check_heard)
                    undo.callback(hook.remove)
            return logits_of(self.model, inputs["input_ids"])

    def _reads_attention(self) -> bool:
        others = {"residual_norm", "residual_max_abs", "loss"}
        return self._look is not None or not self.scope.variables <= others

    def _hear_silent(self, again: Callable[[], object]) -> None:
        """Overhear layers that attend, but did not call the attention function they were given.

        Their modules, or their forward functions, have been replaced. What cannot be read is
        refused; layers of another kind, such as Mamba's, have nothing to be read.
        """
        silent = self._attended - self._heard
        if not silent or not self.model._can_set_attn_implementation():
            return
        known = heads(self.model)
        self._only = {n for n in silent if known[n].forms_softmax}
        if self._only:
            with overhearing(self):
                again()
        heard = {type(self.layers[n].attention) for n in self._heard - self._only}
        for number in sorted(silent - self._heard):
            attention = self.layers[number].attention
            own = has_own_forward(attention, self.model)
            if number in self._only or own or type(attention) in heard:
                raise SinkbookError(
                    f"layer {number} of {type(self.model).__name__} attends past the attention "
                    f"functions of transformers, {'in a forward function put on' if own else 'in'} "
                    f"its {type(attention).__name__}, and not by a softmax whose weights could be "
                    "overheard. Register it as an attention function (transformers' "
                    "AttentionInterface) that returns its weights."
                )

    def _check_named(self, inputs: dict[str, Tensor]) -> None:
        """A model that is not of transformers takes tokens alone; what it would ignore is told."""
        name = type(self.model).__name__
        if "position_ids" in inputs or inputs.get("attention_mask", self.scope.real).ndim != 2:
            raise SinkbookError(
                f"{name} takes whole texts: no position_ids, and no attention_mask over pairs. "
                "Only models of transformers do."
            )
        if (self.scope.real[:, 1:] & ~self.scope.real[:, :-1]).any():
            raise SinkbookError(f"{name} takes padding after the text only.")

    def _check_heard(self, attention: nn.Module, _arguments, _output) -> None:
        """After an attention has run: has its function been called?"""
        if active.get() is self and self.layer is not None and self.layer not in self._heard:
            raise SinkbookError(
                f"{type(attention).__name__} never called the attention_function of layer "
                f"{self.layer}. Call it as self.attention_function(self, query, key, value, mask, "
                "scaling=scaling), or set the layer's attention to None."
            )

    @contextlib.contextmanager
    def _listening(self) -> Iterator[None]:
        with contextlib.ExitStack() as hooks:
            for number, layer in enumerate(self.layers):
                enter, leave, write = (
                    partial(listener, number)
                    for listener in (self._enter, self._leave, self._write)
                )
                block = layer.block
                hooks.callback(block.register_forward_pre_hook(enter, with_kwargs=True).remove)
                hooks.callback(block.register_forward_hook(leave).remove)
                if layer.attention is not None:
                    attended = partial(self._attend, number)
                    hooks.callback(layer.attention.register_forward_pre_hook(attended).remove)
                if layer.output is not None and "head_output_norm" in self.scope.variables:
                    hooks.callback(layer.output.register_forward_pre_hook(write).remove)
            yield

    def _enter(self, number: int, _block, arguments, keywords) -> None:
        if active.get() is self and (self._only is None or number in self._only):
            self.layer = number
            self._ran.add(number)
            if number == 0:
                state = state_into(arguments, keywords)
                self._check_positions(state)
                self._keep_residual(0, state)

    def _leave(self, number: int, _block, _arguments, output) -> None:
        if active.get() is self and (self._only is None or number in self._only):
            self.layer = None
            self._keep_residual(number + 1, state_of(output))

    def _attend(self, number: int, _attention, _arguments) -> None:
        if active.get() is self:
            self._attended.add(number)

    def _check_positions(self, state: Tensor) -> None:
        """States are those of the text's tokens, in their order, or of several streams of them."""
        batch, length = self.scope.real.shape
        taken = state.ndim == 3 and state.shape[:2] == (batch, length) and not self._odd_state
        if state.ndim == 3 and not taken:
            raise SinkbookError(
                f"the layers of {type(self.model).__name__} take states of the shape "
                f"{tuple(state.shape)} where {batch} texts of {length} tokens are read, not "
                "(batch, position, width): it adds positions of its own, or orders them otherwise. "
                "The probe measures models whose states are those of the tokens."
            )

    @_exactly
    def _keep_residual(self, number: int, state: Tensor) -> None:
        of = "the embeddings" if number == 0 else f"the residual state after layer {number - 1}"
        norm = self._states.watch(of, state)
        if state.shape[:-1] != self.scope.real.shape:
            return  # several streams side by side have no one norm
        kept = self.residuals[number]
        if "residual_norm" in self.scope.variables:
            kept["residual_norm"] = norm
        if "residual_max_abs" in self.scope.variables:
            kept["residual_max_abs"] = torch.linalg.vector_norm(state, float("inf"), dim=-1)

    @_exactly
    def _write(self, number: int, _projection, arguments) -> None:
        factor = self._factors.get(number)
        if active.get() is self and factor is not None:
            batch, length = self.scope.real.shape
            states = arguments[0].reshape(batch, length, len(factor), -1).transpose(1, 2)
            norms = torch.linalg.vector_norm(states.to(factor.dtype) @ factor.mT, dim=-1)
            counted = self.scope.counted[:, None].to(norms.device)
            mean = norms.masked_fill(~counted, float("nan")).nanmean(-1)
            self.readings[number]["head_output_norm"] = mean

    @_exactly
    def attend(
        self,
        query: Heads,
        key: KeyHeads,
        value: Values,
        mask: Tensor | None,
        *,
        scaling: float,
        causal: bool = True,
        softcap: float | None = None,
        bias: Tensor | None = None,
        learned_sink: Tensor | None = None,
    ) -> Outputs:
        """The head outputs of softmax attention; what the scope asks for is kept on the way."""
        if query.shape[2:3] != self.scope.real.shape[1:] or key.shape[2] != query.shape[2]:
            raise SinkbookError(
                f"layer {self.layer} attends from {query.shape[2]} positions to {key.shape[2]}, "
                f"where the text has {self.scope.real.shape[1]}. The probe measures "
                "self-attention of whole texts only."
            )
        scope = self.scope.to(query.device)
        given = value.dtype  # of attention's outputs; autocast leaves queries and keys in another
        common = torch.promote_types(torch.promote_types(query.dtype, key.dtype), given)
        query, key, value = query.to(common), key.to(common), value.to(common)
        for name, states in {"query": query, "key": key, "value": value}.items():
            self._states.watch(f"a {name} of layer {self.layer}", states, axis=2)
        visible, mask_bias = self.visibility(mask, causal, scope)
        if mask_bias is not None:
            bias = mask_bias if bias is None else bias + mask_bias
        extras = (bias, softcap, learned_sink)
        of_queries = partial(explicit.softmax_rows, query, key, scaling, visible, *extras)
        self.look(of_queries)
        plain = isinstance(visible, Spans) and softcap is None and bias is None
        if plain and fused.can_be_fused(query):
            output, reading = fused.read_fused(
                query, key, value, scaling, visible, scope, learned_sink
            )
            self.routes.add("fused")
        else:
            output, reading = explicit.read_formed(of_queries(), value, scope)
            self.routes.add("chunked")
        self.keep(reading, value, query.shape[1])
        return output.to(given)

    @_exactly
    def read_weights(
        self,
        logits: Float[Tensor, "batch head query key"],
        visible: Spans | Tensor,
        weights: Float[Tensor, "batch head query key"],
        value: Values,
        *,
        route: str,
        normalised: bool,
    ) -> None:
        """File what weights that the model has formed itself show."""
        scope = self.scope.to(weights.device)
        later = weights.triu(1)
        if ((later.ne(0) & ~later.isnan()).any(-1) & scope.real[:, None]).any():
            raise self.not_causal()
        self._states.watch(f"a value of layer {self.layer}", value, axis=2)
        self._states.watch(f"an attention weight of layer {self.layer}", weights, axis=2)
        of_queries = partial(explicit.formed_rows, logits, visible, weights)
        self.look(of_queries)
        reading = explicit.read_rows(of_queries(), scope, normalised=normalised)
        self.routes.add(route)
        self.keep(reading, value, weights.shape[1])

    def look(self, of_queries: Callable[..., Iterator[explicit.Rows]]) -> None:
        if self._look is not None and self.layer not in self._heard:
            self._look(self.layer, lambda queries: of_queries(queries=queries))

    def keep(self, reading: dict[str, Tensor], value: Values, heads: int) -> None:
        """File the reading of the layer that runs now, with the norms of its values."""
        kept = self.readings[self.layer]
        if self.layer in self._heard:  # differential attention: once for each half of the values
            for name in ("value_norm", "raw_value_norm"):
                kept.pop(name, None)
            return
        self._heard.add(self.layer)
        wanted = self.scope.variables
        for name in ("sink_attention", "sink_logit"):
            if name in wanted:
                reading[name] = reading[f"{name}_by_query"].nanmean(-1)
        kept.update({name: values for name, values in reading.items() if name in wanted})
        groups = heads // value.shape[1]
        exact = torch.promote_types(value.dtype, torch.float32)
        if "raw_value_norm" in wanted:
            norms = torch.linalg.vector_norm(value, dim=-1, dtype=exact)
            kept["raw_value_norm"] = norms.repeat_interleave(groups, dim=1)
        projection = self.layers[self.layer].output
        if projection is None or not self.scope.asks_for("value_norm", "head_output_norm"):
            return
        factor = write_factor(projection, heads, value)
        if factor is not None and "value_norm" in wanted:
            written = value[:, :, None].to(exact) @ factor.unflatten(0, (-1, groups)).mT
            kept["value_norm"] = torch.linalg.vector_norm(written, dim=-1).flatten(1, 2)
        self._factors[self.layer] = factor

    def visibility(
        self, mask: Tensor | None, causal: bool, scope: Scope
    ) -> tuple[Spans | Tensor, Tensor | None]:
        """Spans if the keys that a mask shows have that form, else pairs; and its biases."""
        if mask is None:
            if not causal and scope.real.shape[1] > 1:
                raise self.not_causal("asks for attention without a mask and not as causal, which ")
            return causal_spans(scope.real), None
        if mask not in self._masks:  # the layers share it
            visible, bias = mask, None
            if mask.dtype != torch.bool:
                if (mask.isnan() | mask.isposinf()).any():
                    raise NotFiniteError(f"the mask of layer {self.layer} is NaN or infinite.")
                visible = shown(mask)
                bias = mask if (mask.masked_fill(~visible, 0.0) != 0).any() else None
            visible = visible.expand(len(scope.real), -1, -1, -1)
            if (visible.triu(1).any(-1) & scope.real[:, None]).any():
                raise self.not_causal()
            spans = find_spans(visible, scope.real) if visible.shape[1] == 1 else None
            self._masks[mask] = visible if spans is None else spans, bias
        return self._masks[mask]

    def not_causal(self, how: str = "") -> SinkbookError:
        return SinkbookError(
            f"{type(self.model).__name__} {how}lets tokens attend to later ones. The "
            "probe measures causal language models: decoders, or encoders configured with "
            "is_decoder=True."
        )
