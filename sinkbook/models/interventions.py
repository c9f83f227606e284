"""Cutting and replacing parts of a running model, the same way in every model that `layout` reads.

    with zero(model, "mlp", layer=11, position=0):
        loss_without = loss_of(model, tokens)

Every intervention is a context manager that leaves the model as it found it, also after an
exception. Interventions nest, and each sees what the ones before it have changed. Another thread
that would measure or change the same model waits until the body has ended. Where a part's writes
can be taken hold of is tried on a short text the first time (`trials`).
"""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import SupportsIndex

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sinkbook.errors import SinkbookError
from sinkbook.models.layout import Layer, layers
from sinkbook.models.partial_forward import alone_with, state_of
from sinkbook.models.trials.heads import heads
from sinkbook.models.trials.writers import Inside, rewrite, with_state, writers
from sinkbook.models.wrappers import uncompiled

PARTS = ("attention", "head", "value", "mlp", "residual")
Numbers = SupportsIndex | Iterable[SupportsIndex]  # one or many: lists, ranges, arrays, tensors


@contextmanager
def replace(
    model: nn.Module,
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
    found = layers(model)
    chosen = _numbers("layer", layer)
    for index in chosen:
        if not 0 <= index < len(found):
            raise SinkbookError(f"layer {index} is not there; 0 to {len(found) - 1} are.")
    where = {
        "with_": torch.as_tensor(with_),
        "head": None if head is None else _numbers("head", head),
        "position": None if position is None else _numbers("position", position),
    }
    with alone_with(model), uncompiled(), ExitStack() as hooks:
        for index in chosen:
            _hang(model, part, found[index], index, where, hooks)
        yield


def zero(model: nn.Module, part: str, **where) -> AbstractContextManager[None]:
    """Cut a part: `replace` with 0. Zeroed heads, attentions and MLPs write nothing."""
    return replace(model, part, 0.0, **where)


def _numbers(name: str, given: Numbers) -> list[int]:
    """One or many whole numbers, however they are given."""
    many = isinstance(given, Iterable) and not torch.is_tensor(given)
    try:
        numbers = torch.as_tensor(list(given) if many else given)
    except (TypeError, ValueError, RuntimeError):
        numbers = torch.tensor(0.5)
    if numbers.numel() and (numbers.is_floating_point() or numbers.dtype == torch.bool):
        raise SinkbookError(
            f"{name}={given} is not made of whole numbers. Give one, such as 0, or a list of them."
        )
    return numbers.flatten().tolist()


def _hang(
    model: nn.Module, part: str, layer: Layer, index: int, where: dict, hooks: ExitStack
) -> None:
    """Hang the hooks of one layer on it."""
    if part in ("head", "value"):
        _hang_on_heads(model, part, layer, index, where, hooks)
        return
    writing = writers(model)[index]
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

    rewrite(Inside(layer.block, hooks), getattr(writing, part), add, hooks)


def _hang_on_heads(
    model: nn.Module, part: str, layer: Layer, index: int, where: dict, hooks: ExitStack
) -> None:
    known = heads(model)[index]
    refusal = known.no_heads if part == "head" else known.no_values
    if refusal:
        raise SinkbookError(f"layer {index} has no {part} to replace: it has {refusal}.")
    count, start = (known.count, 0.0) if part == "head" else (known.values, known.start)
    for number in where["head"] or []:
        if not 0 <= number < count:
            raise SinkbookError(f"head {number} is not there; 0 to {count - 1} are.")
    write = partial(_write_over, heads=count, start=start, **where)
    inside = Inside(layer.block, hooks, own_shape=True)
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
    if heads is None:
        states[:, rows] = new
        return states
    chosen = list(range(heads)) if head is None else head
    own = states[..., round(start * states.shape[-1]) :].unflatten(-1, (heads, -1))
    own[:, rows[:, None], chosen] = new
    return states
