"""Cutting and replacing parts of a running model, the same way in every model that `layout` reads.

    with zero(model, "mlp", layer=11, position=0):
        loss_without = loss_of(model, tokens)

Every intervention is a context manager that leaves the model as it found it, also after an
exception. Interventions nest, and each sees what the ones before it have changed.
"""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sinkbook.errors import SinkbookError
from sinkbook.models.layout import Layer, layers
from sinkbook.models.wrappers import uncompiled

PARTS = ("attention", "head", "value", "mlp", "residual")


@contextmanager
def replace(
    model: nn.Module,
    part: str,
    with_: float | Float[Tensor, "..."],
    *,
    layer: int | Iterable[int],
    head: int | Iterable[int] | None = None,
    position: int | Iterable[int] | None = None,
) -> Iterator[None]:
    """Replace what a part writes by `with_`, at all positions or at those given.

    Parts, and the shape that `with_` is broadcast to:

    - "attention": what the layer's attention adds, (batch, position, width);
    - "head": the outputs of `head` before W_O, (batch, position, head, head width);
    - "value": the value states of `head`, a key-value head where heads share them, or of all,
      (batch, position, head, head width);
    - "mlp": what the layer's MLP adds, (batch, position, width);
    - "residual": the residual state after the layer, (batch, position, width).

    Layers, heads and positions count from 0; negative positions from the end.
    Raises `SinkbookError` for a part, layer or head that the model does not have.
    """
    if part not in PARTS:
        raise SinkbookError(f"no part named {part!r} to replace. Known: {', '.join(PARTS)}.")
    if (head is None and part == "head") or (head is not None and part not in ("head", "value")):
        raise SinkbookError(
            f"part {part!r} got head={head}; the part 'head' needs one, 'value' takes one."
        )
    found = layers(model)
    with uncompiled(), ExitStack() as hooks:
        for index in _indices(layer):
            if not 0 <= index < len(found):
                raise SinkbookError(f"layer {index} is not there; 0 to {len(found) - 1} are.")
            module = _module(found[index], part)
            if module is None:
                raise SinkbookError(f"layer {index} has no {part} of its own to replace.")
            heads = {"head": found[index].heads, "value": found[index].value_heads}.get(part)
            start = found[index].value_start if part == "value" else 0.0
            where = {"heads": heads, "start": start, "head": head, "position": position}
            hook = partial(_write_over, with_=with_, **where)
            if part == "head":
                handle = module.register_forward_pre_hook(
                    lambda _, inputs, hook=hook: (hook(inputs[0]), *inputs[1:])
                )
            else:
                handle = module.register_forward_hook(
                    lambda _, __, output, hook=hook: (
                        hook(output)
                        if torch.is_tensor(output)
                        else type(output)((hook(output[0]), *output[1:]))
                    )
                )
            hooks.callback(handle.remove)
        yield


def zero(model: nn.Module, part: str, **where) -> AbstractContextManager[None]:
    """Cut a part: `replace` with 0. Zeroed heads, attentions and MLPs write nothing."""
    return replace(model, part, 0.0, **where)


def _indices(one_or_many: int | Iterable[int]) -> list[int]:
    return [one_or_many] if isinstance(one_or_many, int) else list(one_or_many)


def _module(layer: Layer, part: str) -> nn.Module | None:
    """The module that writes a part, or for a head the one that reads it."""
    return {
        "attention": layer.attention,
        "head": layer.output,
        "value": layer.value,
        "mlp": layer.mlp,
        "residual": layer.block,
    }[part]


def _write_over(
    states: Float[Tensor, "batch position states"],
    *,
    with_: float | Tensor,
    heads: int | None,
    start: float,
    head: int | Iterable[int] | None,
    position: int | Iterable[int] | None,
) -> Float[Tensor, "batch position states"]:
    """A copy of a part's states in which those of some heads and positions are replaced.

    `heads` stand side by side in the last dimension, from the fraction `start` of it on; `None`
    for parts that are not divided into heads.
    """
    states = states.clone()
    rows = torch.arange(states.shape[1])
    rows = rows if position is None else rows[_indices(position)]
    new = torch.as_tensor(with_).to(states)
    if heads is None:
        states[:, rows] = new
        return states
    chosen = list(range(heads)) if head is None else _indices(head)
    if not all(0 <= h < heads for h in chosen):
        raise SinkbookError(f"head {head} is not there; 0 to {heads - 1} are.")
    own = states[..., round(start * states.shape[-1]) :].unflatten(-1, (heads, -1))
    own[:, rows[:, None], chosen] = new
    return states
