"""Cutting and replacing parts of a running model, the same way for toys and pretrained models.

    with zero(model, "mlp", layer=11, position=0):
        loss_without = loss_of(model, tokens)

Every intervention is a context manager that leaves the model as it found it, also after an
exception. Interventions nest, and each sees what the ones before it have changed.
"""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sinkbook.anatomy import Layer, layers
from sinkbook.errors import SinkbookError

PARTS = ("attention", "head", "mlp", "residual")


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
    - "mlp": what the layer's MLP adds, (batch, position, width);
    - "residual": the residual state after the layer, (batch, position, width).

    Layers, heads and positions count from 0; negative positions from the end.
    Raises `SinkbookError` for a part, layer or head that the model does not have.
    """
    if part not in PARTS:
        raise SinkbookError(f"no part named {part!r} to replace. Known: {', '.join(PARTS)}.")
    if (head is None) != (part != "head"):
        raise SinkbookError(f"part {part!r} got head={head}; heads go with the part 'head'.")
    found = layers(model)
    where = slice(None) if position is None else _indices(position)
    with ExitStack() as hooks:
        for index in _indices(layer):
            if not 0 <= index < len(found):
                raise SinkbookError(f"layer {index} is not there; 0 to {len(found) - 1} are.")
            hooks.enter_context(_hook(model, found[index], part, with_, head, where, index))
        yield


def zero(model: nn.Module, part: str, **where) -> AbstractContextManager[None]:
    """Cut a part: `replace` with 0. Zeroed heads, attentions and MLPs write nothing."""
    return replace(model, part, 0.0, **where)


def _indices(one_or_many: int | Iterable[int]) -> list[int]:
    return [one_or_many] if isinstance(one_or_many, int) else list(one_or_many)


@contextmanager
def _hook(model, layer: Layer, part: str, with_, head, where, index: int):
    modules = {
        "attention": layer.attention,
        "head": layer.output,
        "mlp": layer.mlp,
        "residual": layer.block,
    }
    module = modules[part]
    if module is None:
        raise SinkbookError(f"layer {index} has no {part} to replace.")
    if part == "head":
        heads = _heads(model, layer)
        chosen = _indices(head)
        if not all(0 <= h < heads for h in chosen):
            raise SinkbookError(f"head {head} is not there; 0 to {heads - 1} are.")

        def replace_heads(_module, inputs):
            states = inputs[0].unflatten(-1, (heads, -1)).clone()
            rows = torch.arange(states.shape[1])[where]
            states[:, rows[:, None], chosen] = torch.as_tensor(with_).to(states)
            return (states.flatten(-2), *inputs[1:])

        handle = module.register_forward_pre_hook(replace_heads)
    else:

        def replace_output(_module, _inputs, output):
            states = (output[0] if isinstance(output, tuple) else output).clone()
            states[:, where] = torch.as_tensor(with_).to(states)
            return (states, *output[1:]) if isinstance(output, tuple) else states

        handle = module.register_forward_hook(replace_output)
    try:
        yield
    finally:
        handle.remove()


def _heads(model: nn.Module, layer: Layer) -> int:
    if hasattr(layer.attention, "heads"):
        return layer.attention.heads
    return model.config.get_text_config().num_attention_heads
