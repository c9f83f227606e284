"""How a model's positions turn the keys that lie in its cache: tried out on the model itself.

Keys can be moved within a cache if a position does nothing but turn pairs of a key's channels, and
of a query's, at fixed speeds. Which channels, in which layers, and whether anything else depends on
the position, no configuration says reliably. So one token is read at two positions near to each
other and at one beyond all lengths that the configuration names, and every layer's keys, queries
and values are compared.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer

from sinkbook.errors import SinkbookError
from sinkbook.models.attention_interface import attending_by
from sinkbook.models.layout import blocks
from sinkbook.models.wrappers import AnyModel, computing_device, evaluating, unwrapped
from sinkbook.probe.listening import active

States = Float[Tensor, "batch head position width"]
KeyStates = Float[Tensor, "batch key_head position width"]
ValueStates = Float[Tensor, "batch key_head position value_width"]

NAME = "sinkbook-trial"  # of the attention function that listens, in transformers' registries
NEAR, NEXT = 3, 8  # positions at which a token is read
WORDS = 4  # different tokens, a text each
# Parts of the names under which configurations keep lengths from which something changes.
LENGTHS = ("position", "seq_len", "sequence_length", "floor_scale")


@dataclass(frozen=True)
class Rotation:
    """A turn of pairs of a head's channels: `rotation(states, steps)` moves states by positions.

    `steps` is one number for all, or one for each position. The turn is computed in double
    precision, and applied in single at least, since angles of far positions are many turns.
    """

    frequencies: Float[Tensor, " pair"]  # radians a position; none in a layer without positions
    start: int = 0  # the first channel that turns
    neighbours: bool = False  # pairs are channels 2i and 2i + 1 (GPT-J), else halves apart (Llama)

    def __call__(self, states: States, steps: int | Int[Tensor, " position"]) -> States:
        pairs = len(self.frequencies)
        if pairs == 0:
            return states
        steps = torch.as_tensor(steps, device=states.device)
        angle = steps.double()[..., None] * self.frequencies.to(states.device, torch.float64)
        wide = torch.promote_types(states.dtype, torch.float32)
        cos, sin = angle.cos().to(wide), angle.sin().to(wide)
        before, turning, after = states.split(
            [self.start, 2 * pairs, states.shape[-1] - self.start - 2 * pairs], dim=-1
        )
        if self.neighbours:
            first, second = turning.unflatten(-1, (pairs, 2)).unbind(-1)
        else:
            first, second = turning.chunk(2, dim=-1)
        turned = (first * cos - second * sin, second * cos + first * sin)
        joined = torch.stack(turned, -1).flatten(-2) if self.neighbours else torch.cat(turned, -1)
        return torch.cat([before, joined.to(states.dtype), after], dim=-1)


class Heard(NamedTuple):
    """What one layer's attention was called with."""

    module: nn.Module
    query: States
    key: KeyStates
    value: ValueStates
    mask: Tensor | None


def streamable(model: AnyModel) -> PreTrainedModel:
    """The model of transformers that a module is or wraps, whose attention can be replaced.

    Raises `SinkbookError` if there is none.
    """
    inner = unwrapped(model)
    if not isinstance(inner, PreTrainedModel):
        raise SinkbookError(
            f"{type(inner).__name__} is no model of transformers, so nothing says how its keys "
            "turn. Give a causal language model of transformers; `streaming` also takes the toys "
            "of `sinkbook.toy.transformer`, but no other module."
        )
    if not inner._can_set_attn_implementation():
        raise SinkbookError(
            f"{_name(inner)} does not let its attention be replaced, so it cannot be tried how its "
            "positions turn keys; or it has no rotary positions. "
            "Take a model whose attention goes through transformers' AttentionInterface."
        )
    return inner


def rotations(model: PreTrainedModel) -> dict[nn.Module, Rotation]:
    """How each layer's keys and queries turn, by the module that attends, first layer to last.

    Raises `SinkbookError` with the reason for a model whose keys cannot be moved: where a position
    does something else than turn them, where layers keep something else than keys, and where
    what a position does depends on how long the text is.
    """
    near, after, far = NEAR, NEXT, 2 * longest_length(model) + NEXT
    with torch.no_grad(), evaluating(model):
        first, first_logits = _read_at(model, near)
        second, second_logits = _read_at(model, after)
        found = {}
        for number, (one, two) in enumerate(zip(first, second, strict=True)):
            candidates = (r for r in _candidates(model, one.key) if _explains(r, one, two, 5))
            found[one.module] = next(candidates, None)
            if found[one.module] is None:
                raise SinkbookError(
                    f"{_name(model)} has no rotary positions of a known kind: in layer {number} "
                    "a position does not just turn queries and keys. So keys cannot be moved. "
                    "Stream a model of the Llama, Qwen, Mistral or Pythia families."
                )
        if not any(len(rotation.frequencies) for rotation in found.values()):
            raise SinkbookError(
                f"{_name(model)} has no rotary positions: its keys are the same at every position, "
                "so it tells positions by something that does not lie in the cache, or not at all. "
                "Stream a model of the Llama, Qwen, Mistral or Pythia families."
            )
        beyond, beyond_logits = _read_at(model, far)
        again, _ = _read_at(model, near)  # also puts back frequencies that a length has changed
    steady = _close(first_logits, second_logits) and _close(first_logits, beyond_logits)
    for one, two, three in zip(first, beyond, again, strict=True):
        steady &= _close(one.key, three.key)
        steady &= _explains(found[one.module], one, two, far - near)
    if not steady:
        raise SinkbookError(
            f"{_name(model)} does something else at position {far} than at position {near}: its "
            "rotation or the size of its queries depends on the length of the text, as with "
            "dynamic or longrope scaling. So keys cannot be moved. Load it without that scaling."
        )
    return found


def longest_length(model: PreTrainedModel) -> int:
    """The largest number of positions that a model's configuration names, at least 4096."""
    found = [4096]

    def collect(settings: Mapping) -> None:
        for name, value in settings.items():
            if isinstance(value, Mapping):
                collect(value)
            elif isinstance(value, int) and any(word in name for word in LENGTHS):
                found.append(value)

    collect(model.config.get_text_config().to_dict())
    return max(found)


def hear(
    model: PreTrainedModel, position: int, layers: list[DynamicLayer]
) -> tuple[list[Heard], Float[Tensor, "text symbol"]]:
    """What each layer's attention gets when single tokens are read at a position, and the logits.

    `layers` are those of the cache. Attention gives the token's own value, whatever else it sees.
    Raises `SinkbookError` if the model cannot be run in this way.
    """
    heard = []

    def attend(module, query, key, value, attention_mask, **_):
        heard.append(Heard(module, query, key, value, attention_mask))
        own = value[:, :, -1:].repeat_interleave(query.shape[1] // value.shape[1], dim=1)
        return own.transpose(1, 2).contiguous(), None

    embedding = model.get_input_embeddings()
    words = torch.arange(1, WORDS + 1) * (embedding.num_embeddings - 1) // WORDS
    words = words[:, None].to(computing_device(model))
    try:
        with attending_by(model, NAME, attend):
            output = model(
                words,
                position_ids=torch.full_like(words, position),
                past_key_values=Cache(layers=layers),
                use_cache=True,
            )
    except Exception as error:  # whatever a layer raises that keeps something else than keys
        raise SinkbookError(
            f"{_name(model)} cannot be run with a cache of keys and values alone "
            f"({type(error).__name__}: {error}). Stream a model whose layers all attend, of the "
            "Llama, Qwen, Mistral or Pythia families."
        ) from error
    return heard, output.logits[:, -1]


class _FullLayer(DynamicLayer):
    """Stands for a cache's layer that holds many keys, late in a text, without these keys."""

    def __init__(self, held: int, read: int):
        super().__init__()
        self.held, self.read = held, read

    def update(self, key_states: KeyStates, value_states: ValueStates, *_, **__):
        return key_states, value_states

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.held + query_length, self.read - self.held

    def get_seq_length(self) -> int:
        return self.read


def seen_tokens(model: PreTrainedModel, depth: int, wanted: int) -> int:
    """How many of the last `wanted` tokens of a long text the model's own masks let a token see.

    That is asked of the masks, since configurations carry windows that are switched off. It is
    asked at the beginning of a chunk, where attention goes by chunks.
    """
    chunk = getattr(model.config.get_text_config(), "attention_chunk_size", None) or 1
    read = -(-2 * (longest_length(model) + wanted) // chunk) * chunk
    with torch.no_grad(), evaluating(model):
        layers = [_FullLayer(wanted - 1, read) for _ in range(depth)]
        heard, _ = hear(model, read, layers)
    masks = [layer.mask for layer in heard if layer.mask is not None]
    for mask in masks:
        if mask.is_floating_point() and ((mask < 0) & (mask > -1e4) | (mask > 0)).any():
            raise SinkbookError(
                f"{_name(model)} adds numbers of its own to attention logits, which may depend on "
                "positions. Stream a model of the Llama, Qwen, Mistral or Pythia families."
            )
    return min((visible(mask).sum(-1).min().item() for mask in masks), default=wanted)


def check_text(read: int, mask: Tensor | None, positions: Tensor | None) -> None:
    """Refuse padding, and positions that are not those of a text, `read` tokens of which are kept.

    Padding would be taken for the first tokens; and keys are moved from where they stand in the
    text to where they stand in the cache.
    """
    if mask is not None and not (torch.is_tensor(mask) and mask.ndim == 2 and mask.bool().all()):
        raise SinkbookError(
            "a sink cache got an attention_mask that hides tokens. Padding would be kept as the "
            "first tokens: give texts of one length, without padding and mask."
        )
    if positions is None:
        return
    expected = torch.arange(read, read + positions.shape[-1], device=positions.device)
    if not (positions == expected).all():
        raise SinkbookError(
            f"a sink cache that has read {read} tokens got position_ids from "
            f"{int(positions.min())} to {int(positions.max())}. Leave them out: the next token "
            f"of the text is at {read}, and the cache itself moves what it keeps."
        )


def check_unheard(module: nn.Module) -> None:
    """Refuse to be read by the probe: it would not see the keys that streaming moves and hides."""
    recorder = active.get()
    if recorder is not None and recorder.layer is not None:
        raise SinkbookError(
            f"{type(module).__name__} is measured inside `streaming`, where its attention cannot "
            "be read. Measure it before the body or after it; in the body, take its losses with "
            "`token_losses`, or the states that it hands on."
        )


def check_streamed(known: bool, query: States, key: KeyStates, mask: Tensor | None) -> None:
    """Refuse what cannot be streamed: another model, keys of a cache, keys that a mask hides."""
    if not known:
        raise SinkbookError(
            "another model is run inside `streaming`, one that shares the configuration of the "
            "model that streams, or is a copy of it. Run it, and copy it, outside of the body."
        )
    hides = mask is not None and bool((~visible(mask)).tril().any())
    if key.shape[2] != query.shape[2] or hides:
        raise SinkbookError(
            "streaming takes whole texts: no padding, no cache, and no window of the model's own. "
            "Give texts of one length, with use_cache=False; to generate, give `generate` a "
            "`SinkCache` outside of the body."
        )


def visible(mask: Tensor) -> Bool[Tensor, "batch head_or_1 query key"]:
    return mask if mask.dtype == torch.bool else mask == 0


def _read_at(model: PreTrainedModel, position: int) -> tuple[list[Heard], Tensor]:
    """What lies in the cache of each layer, which attends to exactly that; and the logits."""
    layers = [DynamicLayer() for _ in blocks(model)]
    heard, logits = hear(model, position, layers)
    held = [layer.keys if layer.is_initialized else None for layer in layers]
    same = len(heard) == len(held) == len({layer.module for layer in heard}) and all(
        keys is not None and torch.equal(keys, layer.key)
        for keys, layer in zip(held, heard, strict=True)
    )
    if not same:
        raise SinkbookError(
            f"{_name(model)} has layers that do not attend to keys of their own as they lie in the "
            "cache: they share them, keep something else, or do not attend at all. "
            "Stream a model of the Llama, Qwen, Mistral or Pythia families."
        )
    return heard, logits


def _candidates(model: PreTrainedModel, key: KeyStates) -> Iterator[Rotation]:
    """No turn at all, and every way to turn a part of a head at speeds that the model holds."""
    yield Rotation(torch.empty(0))
    for name, buffer in model.named_buffers():
        if not name.endswith("inv_freq") or name.endswith("original_inv_freq"):
            continue
        rest = key.shape[-1] - 2 * len(buffer)
        for start in sorted({0, rest}) if rest >= 0 else ():
            for neighbours in (False, True):
                for direction in (1, -1):
                    yield Rotation(direction * buffer.detach(), start, neighbours)


def _explains(rotation: Rotation, one: Heard, two: Heard, steps: int) -> bool:
    """Whether a rotation is all that tells the states at two positions apart."""
    return _close(one.value, two.value) and all(
        _close(rotation(a, steps), b, far=steps > NEXT)
        for a, b in ((one.key, two.key), (one.query, two.query))
    )


def _close(one: Tensor, two: Tensor, *, far: bool = False) -> bool:
    """Whether states are the same but for the precision in which the model computes.

    Far positions' angles are known to a few hundredths in single precision, but turning keeps
    the length of a state.
    """
    if one.shape != two.shape:
        return False
    tolerance = 1e-3 if one.dtype in (torch.float32, torch.float64) else 2e-2
    one, two = (
        states.to(torch.promote_types(states.dtype, torch.float32)) for states in (one, two)
    )
    lengths = one.norm(dim=-1), two.norm(dim=-1)
    grown = (lengths[0] - lengths[1]).norm() <= tolerance * lengths[1].norm()
    moved = (one - two).norm() <= (0.1 if far else tolerance) * two.norm()
    return bool(grown & moved)


def _name(model: nn.Module) -> str:
    return type(model).__name__
