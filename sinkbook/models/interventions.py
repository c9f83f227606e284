"""Cutting and replacing parts of a running model, the same way in every model that `layout` reads.

    with zero(model, "mlp", layer=11, position=0):
        loss_without = loss_of(model, tokens)

Every intervention is a context manager that leaves the model as it found it, also after an
exception. Interventions nest, and each sees what the ones before it have changed. Another thread
that would measure or change the same model waits until the body has ended. Where a part's writes
can be taken hold of is tried on a short text the first time (`trials`).

Zero is not the only thing to put in a part's place, and may harm more than the part's absence:
`reading` keeps what a part writes, and `stand_in` makes of it what is put there instead.
"""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import SupportsIndex

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sinkbook.annotations import check_arguments
from sinkbook.errors import SinkbookError
from sinkbook.models.layout import Layer, layers
from sinkbook.models.partial_forward import alone_with, state_of
from sinkbook.models.trials.heads import Heads, heads
from sinkbook.models.trials.sums import Term
from sinkbook.models.trials.writers import Inside, rewrite, with_state, writers
from sinkbook.models.wrappers import AnyModel, uncompiled, unwrapped

PARTS = ("attention", "head", "value", "mlp", "residual")
WRITING = ("attention", "head", "mlp")
WAYS = ("zero", "mean", "shuffled")  # of taking a part away: what stands in its place
Numbers = SupportsIndex | Iterable[SupportsIndex]  # one or many: lists, ranges, arrays, tensors


@check_arguments
@contextmanager
def replace(
    model: AnyModel,
    part: str,
    with_: float | Float[Tensor, "..."],
    *,
    layer: Numbers,
    head: Numbers | None = None,
    position: Numbers | None = None,
) -> Iterator[None]:
    """Replace what a part writes by `with_`, at all positions or at those given.

    Parts, and the shape that `with_` is broadcast to:

    - "attention": what the layer's attention adds, or the mixer in its place, such as Mamba's,
      (batch, position, width);
    - "head": the outputs of `head` before W_O, (batch, position, head, head width);
    - "value": the value states of `head`, a key-value head where heads share them, or of all,
      (batch, position, head, head width);
    - "mlp": what the layer's MLP adds, (batch, position, width);
    - "residual": the residual state after the layer, (batch, position, width).

    What is added is what reaches the residual state, after norms and multipliers. Layers, heads
    and positions count from 0; negative positions from the end.
    Raises `SinkbookError` for a part, layer or head that the model does not have, and where a layer
    does not do as the parts say: without attention and MLP it must pass on its input, and with a
    vector in the place of one of them add it.
    """
    if part not in PARTS:
        raise SinkbookError(f"no part named {part!r} to replace. Known: {', '.join(PARTS)}.")
    if (head is None and part == "head") or (head is not None and part not in ("head", "value")):
        raise SinkbookError(
            f"part {part!r} got head={head}; the part 'head' needs one, 'value' takes one."
        )
    model = unwrapped(model)
    found = layers(model)
    chosen = _numbers("layer", layer)
    for index in chosen:
        _check_layer(index, len(found))
    where = {
        "with_": _as_states(with_),
        "head": None if head is None else _numbers("head", head),
        "position": None if position is None else _numbers("position", position),
    }
    with alone_with(model), uncompiled(), _not_run_again(model), ExitStack() as hooks:
        for index in chosen:
            _hang(model, part, found, index, where, hooks)
        yield


@contextmanager
def _not_run_again(model: nn.Module) -> Iterator[None]:
    """Without gradient checkpoints, which run a layer again past our hooks, or after the body."""
    again = [m for m in model.modules() if getattr(m, "gradient_checkpointing", False) is True]
    try:
        for module in again:
            module.gradient_checkpointing = False
        yield
    finally:
        for module in again:
            module.gradient_checkpointing = True


@check_arguments
def zero(
    model: AnyModel,
    part: str,
    *,
    layer: Numbers,
    head: Numbers | None = None,
    position: Numbers | None = None,
) -> AbstractContextManager[None]:
    """Cut a part: `replace` with 0. Zeroed heads, attentions and MLPs write nothing."""
    return replace(model, part, 0.0, layer=layer, head=head, position=position)


def _as_states(with_: float | Tensor) -> Tensor:
    try:
        states = torch.as_tensor(with_)
        finite = bool(states.isfinite().all())
    except (ValueError, TypeError, RuntimeError):
        finite = False
    if not finite:
        raise SinkbookError(
            f"`with_={with_!r:.60}` is no finite number, and no tensor of them. Give one."
        )
    return states


@check_arguments
@contextmanager
def reading(model: nn.Module, part: str, *, layer: int) -> Iterator[list[Tensor]]:
    """Keep what a part of one layer writes, a tensor for each run of the model in the body.

    Parts are those in `WRITING`, and shapes as in `replace`: for "head" those of all heads. With
    what was kept in its place (`replace`) the model does what it did. Raises as `replace`.
    """
    if part not in WRITING:
        raise SinkbookError(f"no part named {part!r} to read. Known: {', '.join(WRITING)}.")
    found = layers(model)
    _check_layer(layer, len(found))
    written: list[Tensor] = []
    with alone_with(model), uncompiled(), ExitStack() as hooks:
        block = found[layer].block
        if part == "head":
            count = _known_heads(model, part, layer).count

            def note(states: Tensor) -> Tensor:
                written.append(states.detach().unflatten(-1, (count, -1)).clone())
                return states

            inside = Inside(block, hooks, own_shape=True, all_run=True)
            inside.change_input(found[layer].output, note, hooks)
        else:
            terms = _known_terms(model, part, found, layer)
            _note_terms(Inside(block, hooks, all_run=True), terms, written, hooks)
        yield written


def _note_terms(inside: Inside, terms: list[Term], written: list[Tensor], hooks: ExitStack) -> None:
    """Add up the terms that a part's write is the sum of, run by run."""
    came = 0

    def note(states: Tensor, factor: float) -> Tensor:
        nonlocal came
        own = factor * states.detach()
        if came % len(terms):
            written[-1] = written[-1] + own
        else:
            written.append(own)
        came += 1
        return states

    for term in terms:
        inside.change_output(term.module, partial(note, factor=term.factor), hooks)


@check_arguments
def stand_in(
    written: Float[Tensor, "text position *states"], way: str, *, seed: int = 0
) -> Float[Tensor, "text position *states"]:
    """What is put in the place of what a part writes on some texts, by a way in `WAYS`.

    - "zero": nothing;
    - "mean": at each position its mean over the *other* texts, so that of a text's own nothing is
      left, however few there are;
    - "shuffled": what it writes on another text at the same position. Which one is drawn by
      `seed`; each text is another's once.

    What the texts have in common stays with the last two, so that what they cost is what the part
    says of one text and not of the others. Raises `SinkbookError` for an unknown way, and for one
    text, which has no others. Source: arXiv 2604.14433 for the controls; 2211.00593 for means at
    each position.
    """
    check_ways([way])
    if way == "zero":
        return torch.zeros_like(written)
    count = len(written)
    if count < 2:
        raise SinkbookError(
            f"way {way!r} needs other texts, and there is {count}. Give two or more."
        )
    if way == "mean":
        exact = written.to(torch.promote_types(written.dtype, torch.float32))
        return ((exact.sum(0) - exact) / (count - 1)).to(written)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    another = torch.empty_like(order)
    another[order] = order.roll(1)
    return written[another.to(written.device)]


def check_ways(ways: Iterable[str]) -> None:
    """Raises `SinkbookError` for a word that is not in `WAYS`."""
    for way in ways:
        if way not in WAYS:
            raise SinkbookError(f"no way {way!r} to take a part away. Known: {', '.join(WAYS)}.")


def _numbers(name: str, given: Numbers) -> list[int]:
    """One or many whole numbers, however they are given."""
    many = isinstance(given, Iterable) and not torch.is_tensor(given)
    try:
        numbers = torch.as_tensor(list(given) if many else given)
    except (TypeError, ValueError, RuntimeError):
        numbers = torch.tensor(0.5)
    none = not numbers.numel() and name == "layer"  # where others may ask for nothing
    if none or numbers.numel() and (numbers.is_floating_point() or numbers.dtype == torch.bool):
        raise SinkbookError(
            f"{name}={given} is not made of whole numbers. Give one, such as 0, or a list of them."
        )
    return numbers.flatten().tolist()


def _check_layer(index: int, count: int) -> None:
    if not 0 <= index < count:
        raise SinkbookError(f"layer {index} is not there; 0 to {count - 1} are.")


def _known_terms(model: nn.Module, part: str, found: list[Layer], index: int) -> list[Term]:
    """What a part adds to the residual state; none for "residual", which is the state."""
    writing, layer = writers(model)[index], found[index]
    refusal = writing.odd_state if part == "residual" else writing.refusal
    if not refusal and part != "residual" and not getattr(writing, part):
        refusal = f"layer {index} has no {part} of its own"
        if getattr(layer, part) is not None:
            refusal = f"what it gives is not itself added to the residual state of layer {index}"
        if writing.others:
            refusal += f", which is added {writing.of_others()}"
    if refusal:
        raise SinkbookError(
            f"no {part} to replace in layer {index} of {type(model).__name__}: {refusal}."
        )
    return [] if part == "residual" else getattr(writing, part)


def _known_heads(model: nn.Module, part: str, index: int) -> Heads:
    known = heads(model)[index]
    refusal = known.no_heads if part == "head" else known.no_values
    if refusal:
        raise SinkbookError(f"layer {index} has no {part} to replace: it has {refusal}.")
    return known


def _hang(
    model: nn.Module, part: str, found: list[Layer], index: int, where: dict, hooks: ExitStack
) -> None:
    """Hang the hooks of one layer on it."""
    layer = found[index]
    if part in ("head", "value"):
        _hang_on_heads(model, part, layer, index, where, hooks)
        return
    terms = _known_terms(model, part, found, index)
    if part == "residual":
        write = partial(_write_over, heads=None, start=0.0, **where)
        handle = layer.block.register_forward_hook(
            lambda _, __, output: with_state(output, write(state_of(output)))
        )
        hooks.callback(handle.remove)
        return

    def add(states: Tensor, factor: float) -> Tensor:
        own = where["with_"] / factor if factor else torch.tensor(0.0)
        return _write_over(states, heads=None, start=0.0, **where | {"with_": own})

    rewrite(Inside(layer.block, hooks, all_run=True), terms, add, hooks)


def _hang_on_heads(
    model: nn.Module, part: str, layer: Layer, index: int, where: dict, hooks: ExitStack
) -> None:
    known = _known_heads(model, part, index)
    count, start = (known.count, 0.0) if part == "head" else (known.values, known.start)
    for number in where["head"] or []:
        if not 0 <= number < count:
            raise SinkbookError(f"head {number} is not there; 0 to {count - 1} are.")
    write = partial(_write_over, heads=count, start=start, **where)
    inside = Inside(layer.block, hooks, own_shape=True, all_run=True)
    if part == "head":
        inside.change_input(layer.output, write, hooks)
    else:
        inside.change_output(layer.value, write, hooks)


def _write_over(
    states: Float[Tensor, "batch position states"],
    *,
    with_: Tensor,
    heads: int | None,
    start: float,
    head: list[int] | None,
    position: list[int] | None,
) -> Float[Tensor, "batch position states"]:
    """A copy of a part's states in which those of some heads and positions are replaced.

    `heads` stand side by side in the last dimension, from the fraction `start` of it on; `None`
    for parts that are not divided into heads.
    """
    states, length = states.clone(), states.shape[1]
    for index in position or []:
        if not -length <= index < length:
            raise SinkbookError(f"position {index} is not there; 0 to {length - 1} are.")
    rows = torch.arange(length)
    rows = rows if position is None else rows[position]
    new = with_.to(states)
    chosen, place = (slice(None), rows), states
    if heads is not None:
        place = states[..., round(start * states.shape[-1]) :].unflatten(-1, (heads, -1))
        chosen = (slice(None), rows[:, None], list(range(heads)) if head is None else head)
    try:
        place[chosen] = new
    except RuntimeError as error:
        raise SinkbookError(
            f"with_ of shape {tuple(new.shape)} does not fit what it replaces, of shape "
            f"{tuple(place[chosen].shape)}. Give a number, or a tensor that is broadcast to that."
        ) from error
    return states
