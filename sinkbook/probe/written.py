"""What a head writes to the residual stream, by its W_O."""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sinkbook.errors import SinkbookError


def write_factor(
    projection: nn.Module, heads: int, value: Float[Tensor, "*states width"]
) -> Float[Tensor, "head rank width"] | None:
    """`R` of each head with `|R v| = |W_O^h v|`: the triangular root of `W_O^h`'s Gram matrix.

    By QR and not by squaring, which would lose half of the digits of a drained value. `None` if
    the projection does not take the heads one after the other. `value` are states of these heads.
    """
    width, weight = value.shape[-1], getattr(projection, "weight", None)
    plain = type(projection).forward is nn.Linear.forward and not is_replaced(projection)
    if plain and weight.is_floating_point():
        weight = weight.T
    elif type(projection).__name__ != "Conv1D" or is_replaced(projection):
        # Quantised, adapted or replaced: try it on unit vectors of the kind that it is called with.
        if next(projection.parameters(), next(projection.buffers(), None)) is None:
            raise SinkbookError(
                f"{type(projection).__module__}.{type(projection).__name__} keeps W_O packed and "
                "rounds what it reads in one range for all texts, so what a head writes depends on "
                "the others. Leave value_norm and head_output_norm out of the variables."
            )
        parameter = next(projection.parameters(), value)
        # Under autocast values come in another dtype than the weights that read them.
        dtype = parameter.dtype if parameter.is_floating_point() else value.dtype
        units = torch.eye(heads * width + 1, heads * width, dtype=dtype, device=value.device)
        written = projection.forward(units)
        weight = written[:-1] - written[-1]
    if len(weight) != heads * width:
        return None
    weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
    return torch.linalg.qr(weight.unflatten(0, (heads, width)).mT, mode="r").R


def is_replaced(module: nn.Module) -> bool:
    """Whether somebody has put a forward function of their own on this one module."""
    return "forward" in vars(module)
