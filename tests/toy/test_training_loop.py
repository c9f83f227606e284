"""The loop takes every step once, measures where it says, and can be stopped and gone on with."""

import pytest
import torch
import xarray as xr

from sinkbook.toy.training_loop import descend, schedule, train_measured, train_steps


def test_a_schedule_has_the_start_the_end_and_no_step_twice():
    assert schedule(10, 20) == (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10)
    assert schedule(1000, 4) == (0, 1, 10, 100, 1000)
    assert schedule(1000, 0, every=400) == (0, 400, 800, 1000)
    assert schedule(1000, 3, first=10.0) == (0, 10, 100, 1000)


def test_every_batch_is_one_step_and_measurements_stand_between_the_steps():
    told = []
    done = train_steps(
        lambda batch: told.append(f"step on {batch}"),
        iter("abc"),
        steps=3,
        measured=(0, 2, 3),
        measure=lambda step: told.append(f"measured after {step}"),
    )
    assert done
    assert told == [
        *("measured after 0", "step on a", "step on b", "measured after 2", "step on c"),
        "measured after 3",
    ]


def test_what_a_measurement_wants_to_see_of_the_next_step_it_sees():
    weight = torch.nn.Parameter(torch.tensor(1.0))
    moved = []

    def measure(step):
        before = weight.item()
        return lambda: moved.append(weight.item() - before)

    take_step = descend(torch.optim.SGD([weight], lr=0.5), lambda batch: batch * weight)
    train_steps(take_step, [1.0, 3.0], steps=2, measured=(1, 2), measure=measure)
    assert moved == [-1.5]


def test_a_stopped_training_takes_no_further_step_and_goes_on_where_it_was():
    taken = []
    stopped = train_steps(taken.append, range(5), steps=5, after_step=lambda done: done == 2)
    assert not stopped and taken == [0, 1]
    assert train_steps(taken.append, range(2, 5), start=2, steps=5)
    assert taken == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("clip", [None, 0.25])
def test_a_step_goes_down_the_gradient_and_no_further_than_the_clip(clip):
    weights = [torch.nn.Parameter(torch.zeros(2)) for _ in range(2)]
    take_step = descend(
        torch.optim.SGD(weights, lr=1.0), lambda batch: batch @ (weights[0] + weights[1]), clip=clip
    )
    take_step(torch.tensor([0.3, 0.4]))  # the gradient of both weights has a norm of 0.5 * sqrt(2)
    norm = torch.cat([w.detach() for w in weights]).norm().item()
    assert norm == pytest.approx(clip or 0.5 * 2**0.5, rel=1e-5)
    assert all(w.grad is None for w in weights)


def test_measurements_stand_along_the_steps_done():
    weight = torch.nn.Parameter(torch.tensor(0.0))
    take_step = descend(torch.optim.SGD([weight], lr=1.0), lambda batch: -batch * weight)
    found = train_measured(
        take_step, [1.0] * 4, lambda: xr.Dataset({"weight": weight.item()}), measured=(0, 1, 4)
    )
    assert found.step.values.tolist() == [0, 1, 4]
    assert found.weight.values.tolist() == [0, 1, 4]
