"""Endless texts in little memory: a cache of the first tokens and the most recent ones.

A token stays visible if it is kept for good or is one of the last `window`. Positions are counted
inside the cache, as in StreamingLLM (Xiao et al., arXiv 2309.17453): there the kept tokens stand
right before the window, however long ago they were read. Rotary attention depends on differences
of positions only, so it is enough to turn the few kept keys along with the window.

The same computation comes in two forms. `SinkCache` is what `generate` uses, one token after the
other. `streaming` is its twin for measuring: one forward pass over a whole text, in which every
query sees what it would have seen in the cache.
"""

import weakref
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from inspect import signature

import numpy as np
import torch
import xarray as xr
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicLayer

from sinkbook.annotations import check_arguments
from sinkbook.arguments import check_token_ids, check_whole_number, whole_number
from sinkbook.errors import SinkbookError
from sinkbook.mitigations.rotation import (
    Rotation,
    check_streamed,
    check_text,
    check_unheard,
    rotations,
    seen_tokens,
    streamable,
)
from sinkbook.models.attention_interface import attending_by, unknown
from sinkbook.models.losses import token_losses
from sinkbook.models.partial_forward import alone_with, run_on, state_of
from sinkbook.models.trials.writers import on_trial
from sinkbook.models.wrappers import AnyModel, computing_device, uncompiled, unwrapped
from sinkbook.progress import progress
from sinkbook.toy.attention import KERNELS
from sinkbook.toy.transformer import Transformer

Tokens = Int[Tensor, "text position"]
States = Float[Tensor, "batch head position width"]
KeyStates = Float[Tensor, "batch key_head position width"]
ValueStates = Float[Tensor, "batch key_head position value_width"]
Held = Float[Tensor, "batch key_head held width"]
HeldValues = Float[Tensor, "batch key_head held value_width"]

NAME = "sinkbook-streaming"  # of the twin's attention function in transformers' registries
SHORT = 6  # tokens of the text on which a model's attention is tried


class SinkLayer(DynamicLayer):
    """One layer's keys and values of the first `sinks` tokens and the most recent ones."""

    is_croppable = False

    def __init__(self, rotation: Rotation, sinks: int, window: int):
        super().__init__()
        self.rotation, self.sinks, self.window = rotation, sinks, window
        self.cumulative_length = 0  # tokens read so far

    def lazy_initialization(self, key_states: KeyStates, value_states: ValueStates) -> None:
        super().lazy_initialization(key_states, value_states)
        self.keys, self.values = key_states[..., :0, :], value_states[..., :0, :]

    def update(
        self, key_states: KeyStates, value_states: ValueStates, *_, **__
    ) -> tuple[Held, HeldValues]:
        """Take in new tokens; returns the keys and values that these attend to."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        _, dropped = self.get_mask_sizes(0)
        keys = torch.cat([self.keys, key_states], dim=-2)
        values = torch.cat([self.values, value_states], dim=-2)
        self.cumulative_length += key_states.shape[-2]
        self.keys, self.values = self._cut(keys), self._cut(values)
        if dropped:  # the kept keys go where the dropped ones were: right before the window
            first, recent = keys[..., : self.sinks, :], keys[..., self.sinks :, :]
            keys = torch.cat([self.rotation(first, dropped), recent], dim=-2)
        return keys, values

    def _cut(self, states: KeyStates) -> Held:
        """What the next token will find: it takes the window's last place itself."""
        excess = states.shape[-2] - (self.sinks + self.window - 1)
        if excess <= 0:
            return states
        return torch.cat(
            [states[..., : self.sinks, :], states[..., self.sinks + excess :, :]], dim=-2
        )

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Keys that the next `query_length` tokens find, and the tokens dropped before."""
        held = self.keys.shape[-2] if self.is_initialized else 0
        return held + query_length, self.cumulative_length - held

    def get_seq_length(self) -> int:
        return self.cumulative_length

    def crop(self, tokens_to_remove: int) -> None:
        raise SinkbookError(
            "a sink cache cannot go back: what it dropped is gone. Start a new one, or generate "
            "without an assistant model."
        )


class SinkCache(Cache):
    """A cache for transformers' `generate` that keeps the first tokens and the most recent ones.

    Every token sees the first `sinks` tokens and the last `window`, itself included, so memory does
    not grow with the text. A prompt given in one piece is read whole, each token seeing all before
    it; then the cache is cut. Texts of a batch must have one length, since the first tokens of a
    padded one are padding. `model` is a causal LM of transformers with rotary positions.
    Raises `SinkbookError` for other models, and if `sinks` or `window` is too small; in use, for
    padding and for `position_ids` that are not those of the text.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> config = LlamaConfig(vocab_size=50, hidden_size=16, intermediate_size=32,
    ...     num_hidden_layers=2, num_attention_heads=2, pad_token_id=None, eos_token_id=None)
    >>> model, prompt = LlamaForCausalLM(config), torch.tensor([[1, 2, 3]])
    >>> cache = SinkCache(model, sinks=2, window=4)
    >>> model.generate(prompt, past_key_values=cache, max_new_tokens=20, do_sample=False).shape
    torch.Size([1, 23])
    >>> cache.layers[0].keys.shape[-2]  # the next token will be the sixth
    5
    """

    def __init__(self, model: AnyModel, *, sinks: int = 4, window: int):
        window, sinks = whole_number("window", window, 1), whole_number("sinks", sinks)
        model = streamable(model)
        turns = rotations(model)
        seen = seen_tokens(model, len(turns), sinks + window)
        if seen < sinks + window:
            raise SinkbookError(
                f"the model itself sees {seen} tokens back, so {sinks} first ones and a window of "
                f"{window} cannot all be seen. Give {seen} at most, together."
            )
        super().__init__(layers=[SinkLayer(turn, sinks, window) for turn in turns.values()])
        handle = model.base_model.register_forward_pre_hook(_check_call, with_kwargs=True)
        weakref.finalize(self, handle.remove)


def _check_call(model: nn.Module, arguments: tuple, keywords: dict) -> None:
    """Before a model runs with a sink cache: are its tokens those that the cache takes them for?"""
    call = signature(model.forward).bind_partial(*arguments, **keywords).arguments
    call |= call.pop("kwargs", {})
    cache = call.get("past_key_values")
    if isinstance(cache, SinkCache):
        read = cache.get_seq_length()
        check_text(read, call.get("attention_mask"), call.get("position_ids"))


def _checked(window: int, kept: int | Sequence[int]) -> tuple[int, list[int]]:
    """The window, and the positions that are kept: those given, or as many first ones."""
    window = whole_number("window", window, 1)
    if np.iterable(kept) and not isinstance(kept, str | bytes):
        return window, sorted({whole_number("kept", position) for position in kept})
    return window, list(range(whole_number("kept", kept)))


@contextmanager
def streaming(model: AnyModel, *, window: int, kept: int | Sequence[int] = 4) -> Iterator[None]:
    """Have every query see the last `window` tokens, itself included, and those kept for good.

    `kept` is a number of first tokens or the positions of other ones. One forward pass then gives
    what `SinkCache` gives token by token; with toy transformers, whose positions are added to the
    embeddings, keys stay where they are. Whole texts without padding only, and no cache
    (`use_cache=False`). Of bodies inside each other the innermost decides. The model is left as it
    was found, also after an exception. Losses can be taken in the body (`losses.token_losses`),
    measurements of attention cannot, but for toys under softmax.
    Takes the toys of `sinkbook.toy.transformer` and models of transformers. Raises `SinkbookError`
    for any other module, for models whose attention cannot be replaced or is no plain softmax, and
    for those whose keys cannot be moved, which is tried out: see `rotations`.
    """
    model, (window, chosen) = unwrapped(model), _checked(window, kept)
    with uncompiled(), _streaming(model, window, chosen, tried(model)):
        yield


def tried(model: AnyModel) -> dict[nn.Module, Rotation]:
    """How the keys of a model's layers turn, for `streaming`; none for a toy.

    Raises `SinkbookError` if the model cannot be streamed. Each of its attention modules is run
    twice on a short text, as it is and with everything within the window, and must give the same.
    """
    if isinstance(unwrapped(model), Transformer):
        return {}
    model = streamable(model)
    calls = {}

    def keep(module, *call) -> None:
        calls.setdefault(module, call)

    with on_trial(model), torch.no_grad(), ExitStack() as hooks:  # as it is, without others' cuts
        turns = rotations(model)
        for module in turns:
            hooks.callback(module.register_forward_hook(keep, with_kwargs=True).remove)
        text = torch.arange(1, SHORT + 1) * (model.get_input_embeddings().num_embeddings - 1)
        run_on(model, text[None].to(computing_device(model)) // SHORT)
    with on_trial(model), torch.no_grad(), _streaming(model, SHORT, [], turns):
        for module, (arguments, keywords, output) in calls.items():
            uncached = {"past_key_values": None} if "past_key_values" in keywords else {}
            again = state_of(module(*arguments, **keywords | uncached))
            own = state_of(output)
            tolerance = 1e-3 if own.dtype in (torch.float32, torch.float64) else 0.2
            if not (own - again).float().norm() <= tolerance * own.float().norm():
                raise SinkbookError(
                    f"{type(module).__name__} computes something else than softmax attention of "
                    "its queries, keys and values. Stream a model with plain softmax attention."
                )
    return turns


@contextmanager
def _streaming(
    model: nn.Module, window: int, kept: list[int], turns: dict[nn.Module, Rotation]
) -> Iterator[None]:
    """`streaming` of a model that has been `tried`."""
    positions = torch.tensor(kept, dtype=torch.long)
    with alone_with(model), ExitStack() as undo:
        if isinstance(model, Transformer):
            for module in model.modules():
                if hasattr(module, "attention_function"):
                    own = module.attention_function
                    undo.callback(setattr, module, "attention_function", own)
                    outer = getattr(own, "func", None) is _attend_masked
                    plain = own.args[0] if outer else own
                    module.attention_function = partial(_attend_masked, plain, window, positions)
        else:
            how = {"window": window, "kept": positions, "turns": turns}
            undo.enter_context(attending_by(model, NAME, partial(_attend_streaming, **how)))
        yield


def visible_keys(length: int, window: int, kept: Int[Tensor, " kept"]) -> Bool[Tensor, "query key"]:
    """Which keys each query sees: those kept for good, and the last `window`, itself included."""
    positions = torch.arange(length)
    age = positions[:, None] - positions
    return (age >= 0) & ((age < window) | torch.isin(positions, kept))


def _attend_masked(
    own, window, kept, module, query, key, value, attention_mask, scaling, **keywords
):
    """A toy's own kernel with the keys hidden that a cache would have dropped."""
    if own is not KERNELS["softmax"]:  # whose fused kernel shows the probe which keys are hidden
        check_unheard(module)
    visible = visible_keys(query.shape[2], window, kept).to(query.device)
    mask = torch.zeros_like(visible, dtype=query.dtype).masked_fill(~visible, float("-inf"))
    return own(module, query, key, value, mask[None, None], scaling=scaling, **keywords)


def _attend_streaming(
    module,
    query: States,
    key: KeyStates,
    value: ValueStates,
    attention_mask,
    scaling: float | None = None,
    *,
    window: int,
    kept: Int[Tensor, " kept"],
    turns: dict[nn.Module, Rotation],
    **keywords,
) -> tuple[Float[Tensor, "batch position head value_width"], None]:
    """Attention as from a sink cache, `window` queries at a time, in memory linear in the text.

    A kept token that has left the window stands before it, at its rank among those that have. So
    a query meets it not from its own position `n` but from `window - 1` after the last of them.
    """
    check_unheard(module)
    if others := unknown(keywords):
        raise SinkbookError(
            f"{type(module).__name__} has a {others[0]}, which streaming would leave out. "
            "Stream a model with plain softmax attention."
        )
    groups = query.shape[1] // key.shape[1]
    check_streamed(module in turns, query, key, attention_mask)
    wide = torch.promote_types(query.dtype, torch.float32)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    with torch.autocast(query.device.type, enabled=False):
        key, value = (s.to(wide).repeat_interleave(groups, dim=1) for s in (key, value))
        output = _streamed(
            query.to(wide) * scaling, key, value, window, kept.to(query.device), turns[module]
        )
    return output.transpose(1, 2).to(query.dtype).contiguous(), None


def _streamed(
    query: States,
    key: States,
    value: Float[Tensor, "batch head position value_width"],
    window: int,
    kept: Int[Tensor, " kept"],
    rotation: Rotation,
) -> Float[Tensor, "batch head position value_width"]:
    length, outputs = query.shape[2], []
    kept = kept[kept < length]
    kept_key = rotation(key[:, :, kept], torch.arange(len(kept), device=kept.device) - kept)
    for rows in torch.arange(length, device=query.device).split(window):
        recent = torch.arange(max(0, int(rows[0]) - window + 1), int(rows[-1]) + 1).to(rows)
        age = rows[:, None] - recent
        has_left = kept <= rows[:, None] - window
        from_position = has_left.sum(1) + window - 1
        own = query[:, :, rows]
        to_kept = rotation(own, from_position - rows) @ kept_key.mT
        to_recent = own @ key[:, :, recent].mT
        logits = torch.cat([to_kept, to_recent], dim=-1)
        seen = torch.cat([has_left, (age >= 0) & (age < window)], dim=-1)
        weights = logits.masked_fill(~seen, float("-inf")).softmax(-1)
        outputs.append(weights @ torch.cat([value[:, :, kept], value[:, :, recent]], dim=2))
    return torch.cat(outputs, dim=2)


@check_arguments
def streaming_losses(
    model: AnyModel,
    input_ids: Tokens,
    *,
    window: int,
    sinks: Sequence[int] = (0, 1, 2, 4, 8),
    random: int = 4,
    stride: int = 16,
    seed: int = 0,
) -> xr.DataArray:
    """Loss of each token when a text is read with a window of `window` tokens, and ways around it.

    Over (layout, text, position):

    - "dense": every token sees all before it;
    - "recompute": it sees the last `window` tokens, read afresh as if the text began there; the
      window moves in steps of `stride`, so that some tokens see up to `stride - 1` fewer. Only from
      position `window` on;
    - "0", "1", ...: it sees the window and that many first tokens, from a cache;
    - "random": the window and `random` early tokens, drawn for each text from those that no number
      of first tokens includes and that the first window does.
    """
    check_token_ids("input_ids", input_ids)
    model, (window, _) = unwrapped(model), _checked(window, sinks)
    check_whole_number("stride", stride, 1)
    length, most = input_ids.shape[1], max(sinks, default=0)
    if window - most < random or length <= window + most:
        raise SinkbookError(
            f"a window of {window}, texts of {length} tokens, {most} kept, {random} drawn. "
            "Give texts longer than window and kept tokens, and a window with room for the draw."
        )
    check_whole_number("stride", stride, 1, window)
    generator = torch.Generator().manual_seed(seed)
    drawn = [
        (most + torch.randperm(window - most, generator=generator)[:random]).tolist()
        for _ in input_ids
    ]
    layouts: dict[str, list] = {"dense": [None] * len(input_ids)}
    layouts |= {str(count): [list(range(count))] * len(input_ids) for count in sinks}
    layouts["random"] = drawn
    losses, turns = {}, tried(model)
    with progress("streaming", len(layouts) * len(input_ids)) as show:
        for number, (layout, choices) in enumerate(layouts.items()):
            rows = []
            for row, kept in zip(input_ids.split(1), choices, strict=True):
                way = nullcontext() if kept is None else _streaming(model, window, kept, turns)
                with way:
                    rows.append(token_losses(model, row)[0])
                show(number * len(input_ids) + len(rows))
            losses[layout] = np.stack(rows)
    losses["recompute"] = recomputed_losses(model, input_ids, window=window, stride=stride)
    return xr.DataArray(
        np.stack(list(losses.values())),
        dims=("layout", "text", "position"),
        coords={"layout": list(losses), "position": np.arange(1, length)},
    )


def recomputed_losses(
    model: AnyModel, input_ids: Tokens, *, window: int, stride: int
) -> Float[np.ndarray, "text scored"]:
    """Loss of each token but the first, from a text that begins `window` tokens before it or less.

    The last `stride` tokens of every window are scored; NaN before position `window`, and for what
    is left over at the end of a text. Raises `SinkbookError` if `stride` exceeds `window`.
    """
    window, stride = whole_number("window", window, 1), whole_number("stride", stride, 1)
    if stride > window:
        raise SinkbookError(
            f"steps of {stride} with a window of {window} would leave tokens out. "
            f"Give a stride of at most {window}."
        )
    check_token_ids("input_ids", input_ids)
    texts, length = input_ids.shape
    losses = np.full((texts, length - 1), np.nan, dtype=np.float32)
    for end in range(window + stride, length + 1, stride):
        scored = slice(end - stride - 1, end - 1)
        rows = input_ids[:, end - window - 1 : end]
        losses[:, scored] = token_losses(model, rows, last=stride)
    return losses
