"""The training loop, and the schedule of the steps at which a model in training is measured."""

import time
from collections.abc import Callable, Collection, Iterable
from typing import TypeVar

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor, nn

from sinkbook.annotations import check_arguments
from sinkbook.arguments import check_number, check_whole_number
from sinkbook.progress import progress

Batch = TypeVar("Batch")

SHOWN_EVERY = 0.1  # seconds between two movements of the progress bar


@check_arguments
def schedule(
    steps: int, count: int, *, first: float = 1.0, every: int | None = None
) -> tuple[int, ...]:
    """The numbers of steps done at which a training of `steps` is measured, in order.

    They are the start and the end, `count` evenly on a logarithmic axis from `first` on, and each
    multiple of `every`.

    >>> schedule(1000, 4), schedule(1000, 2, every=400)
    ((0, 1, 10, 100, 1000), (0, 1, 400, 800, 1000))
    """
    check_whole_number("steps", steps, 1)
    check_whole_number("every", 1 if every is None else every, 1)
    check_number("first", first, 1e-9)
    evenly = np.geomspace(first, steps, count).round().astype(int).tolist()
    return tuple(sorted({0, *evenly, *range(0, steps, every or steps), steps}))


def descend(
    optimizer: torch.optim.Optimizer,
    loss: Callable[[Batch], Float[Tensor, ""]],
    *,
    clip: float | None = None,
) -> Callable[[Batch], None]:
    """A step of an optimizer that lowers `loss(batch)`, as a function of the batch.

    `clip` is the largest norm that the gradient of all weights together may have. No gradient is
    left after the step.
    """

    def take_step(batch: Batch) -> None:
        loss(batch).backward()
        if clip is not None:
            weights = [w for group in optimizer.param_groups for w in group["params"]]
            nn.utils.clip_grad_norm_(weights, clip)
        optimizer.step()
        optimizer.zero_grad()

    return take_step


def train_steps(
    take_step: Callable[[Batch], None],
    batches: Iterable[Batch],
    *,
    steps: int,
    start: int = 0,
    measured: Collection[int] = (),
    measure: Callable[[int], Callable[[], None] | None] | None = None,
    after_step: Callable[[int], bool] | None = None,
    label: str = "training",
) -> bool:
    """Train from step `start` to `steps`, a batch a step; shows progress. True if it got there.

    `measure` is called with the number of steps done, before each of the `measured` ones. What has
    to be seen of the step that follows is left to a function that it returns, called after that.
    `after_step` is called with the number of steps done, to keep what there is; if it returns true,
    the training stops.
    """
    batches, shown = iter(batches), time.monotonic()
    with progress(label, steps, start) as show:
        for step in range(start, steps + 1):
            look_back = measure(step) if measure is not None and step in measured else None
            if step == steps:
                break
            take_step(next(batches))
            if look_back is not None:
                look_back()
            if after_step is not None and after_step(step + 1):
                return False
            if time.monotonic() - shown >= SHOWN_EVERY:
                show(step + 1)
                shown = time.monotonic()
    return True


def train_measured(
    take_step: Callable[[Batch], None],
    batches: Iterable[Batch],
    measure: Callable[[], xr.Dataset],
    *,
    measured: Collection[int],
    label: str = "training",
) -> xr.Dataset:
    """Train to the last of the `measured` steps; what `measure` gave at each of them, by `step`."""
    found: list[xr.Dataset] = []

    def keep(step: int) -> None:
        found.append(measure().expand_dims(step=[step]))

    train_steps(
        take_step, batches, steps=max(measured), measured=measured, measure=keep, label=label
    )
    return xr.concat(found, "step")
