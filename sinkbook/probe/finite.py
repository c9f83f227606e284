"""What counts has to be a number: NaN says that there is nothing to measure, and nothing else.

A mask tells which tokens count. A state of one of them that is NaN or infinite, as in damaged
weights or after a training that has diverged, ends a measurement.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sinkbook.errors import NotFiniteError

AFRESH = "load the model afresh, or in float32"


class States:
    """The norms of the states of one forward pass, in the order in which they come."""

    def __init__(self, model: str, real: Bool[Tensor, "batch position"]):
        self._model = model
        self._real = real
        self._norms: list[tuple[str, Tensor]] = []  # what they are of, (batch, position)

    def watch(self, of: str, states: Tensor, axis: int = 1) -> Tensor:
        """The norms of states over their last dimension, in float32 or wider; kept for `check`.

        The first dimension are the texts, and the positions lie along `axis`.
        """
        exact = torch.promote_types(states.dtype, torch.float32)
        norms = torch.linalg.vector_norm(states, dim=-1, dtype=exact)
        of_tokens = norms.movedim(axis, 1)
        if of_tokens.shape[:2] == self._real.shape:
            self._norms.append((of, of_tokens.flatten(2).amax(-1) if norms.ndim > 2 else norms))
        return norms

    def check(self, cause: Exception | None = None) -> None:
        """Raise `NotFiniteError` for the first states that are no numbers at tokens that count.

        Once, at the end of the pass: on a GPU each question waits for all that runs.
        """
        broken = [~norms.isfinite().to(self._real.device) & self._real for _, norms in self._norms]
        if not broken or not torch.stack(broken).any():
            return
        first = next(number for number, found in enumerate(broken) if found.any())
        (of, norms), found = self._norms[first], broken[first]
        text, position = found.nonzero()[0].tolist()
        value = "NaN" if norms[text, position].isnan() else "infinite, or its norm is"
        raise NotFiniteError(
            f"{self._model}: {of} is {value}, first at position {position} of text {text} "
            f"({int(found.sum())} of {int(self._real.sum())} positions), so nothing can be said of "
            "it. Its weights are damaged, its training has diverged, or a number outgrew its "
            f"dtype: {AFRESH}."
        ) from cause


def check_variable(
    name: str, dims: tuple[str, ...], layers: list[Tensor | None], real: Bool[Tensor, "b t"]
) -> None:
    """Raise `NotFiniteError` for a variable that is infinite, or NaN where only padding may be.

    `layers` are (batch, head) or (batch, head, position), or without heads; `dims` those of them
    all together, with a second one for the layers.
    """
    by_token, inner = dims[-1] == "position", (dims[0], *dims[2:])
    for number, values in enumerate(layers):
        if values is None:
            continue
        broken = ~values.isfinite() if by_token and "norm" in name else values.isinf()
        if by_token:
            shape = (len(values), *[1] * (values.ndim - 2), -1)
            broken = broken & real.to(values.device).view(shape)
        if broken.any():
            place = broken.nonzero()[0].tolist()
            where = ", ".join(f"{dim} {at}" for dim, at in zip(inner, place, strict=True))
            raise NotFiniteError(
                f"{name} of {dims[1].replace('_', ' ')} {number} is {values[tuple(place)].item()} "
                f"at {where}. The weights behind it are damaged, or a number outgrew its dtype: "
                f"{AFRESH}."
            )


def check_losses(losses: Float[Tensor, " predicted"], kept: Bool[Tensor, " t"], text: int) -> None:
    """Raise `NotFiniteError` for a loss that is kept and is NaN or infinite."""
    if (broken := ~losses.isfinite() & kept).any():
        position = int(broken.nonzero()[0])
        raise NotFiniteError(
            f"the loss of the token at position {position + 1} of text {text} is "
            f"{losses[position].item()}. What reads the last layer is damaged, or a logit outgrew "
            f"its dtype: {AFRESH}."
        )
