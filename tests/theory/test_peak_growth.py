"""Peaks that grow: the toy against its closed forms, and what is measured in real trainings."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st

from sinkbook.errors import SinkbookError
from sinkbook.theory import peak_growth
from sinkbook.toy.runs import TrainingConfig
from sinkbook.toy.tasks import TaskConfig
from sinkbook.toy.training import seeds_of, train, train_all
from sinkbook.toy.transformer import TransformerConfig

FEW = settings(max_examples=15, deadline=None)
SMALL = TrainingConfig(
    task=TaskConfig(length=16),
    model=TransformerConfig(length=16, width=8, layers=2),
    batch_size=4,
    steps=6,
    learning_rate=1e-2,
    evaluation_size=8,
)


@given(st.floats(3, 20), st.floats(-0.9, 0.9))
@FEW
def test_the_closed_form_solves_its_equation(start, c):
    times = np.geomspace(1, 1e6, 4001)
    m = peak_growth.peak_closed_form(times, start, c)
    slope = np.gradient(m, times)[1:-1]
    expected = ((1 - c * c) * np.log(times) / (times * m**3))[1:-1]
    np.testing.assert_allclose(slope, expected, rtol=1e-2, atol=1e-8)


@given(st.floats(8, 40), st.floats(-0.9, 0.9))
@FEW
def test_a_high_peak_follows_the_closed_form(start, c):
    times = np.geomspace(1, 1e8, 20)
    flow = peak_growth.peak_flow(times, start, c)
    gained = flow**4 - start**4
    expected = peak_growth.peak_closed_form(times, start, c) ** 4 - start**4
    # The cosine falls short of 1 by c/m and 1/m²: what the closed form leaves out.
    shortfall = np.log(times[-1]) * (4 * abs(c) + 1) / start**2 + 4 * abs(c) / start
    np.testing.assert_allclose(gained, expected, rtol=shortfall + 0.02, atol=1e-6)


@pytest.mark.parametrize("c", [0.0, 0.5])
def test_the_flow_ends_at_the_stated_multiple_of_the_logarithm(c):
    times = np.geomspace(1, 1e300, 20)
    ratio = peak_growth.peak_flow(times, 1.0, c)[-1] ** 2 / np.log(times[-1])
    assert ratio == pytest.approx(peak_growth.peak_coefficient(c), rel=0.05)


def test_the_toy_ends_where_the_papers_code_does():
    sgd = peak_growth.peak_steps(lambda m: torch.optim.SGD(m, lr=0.3), 10_000, 10.0)
    assert sgd[-1] == pytest.approx(10.01, abs=0.005)
    adam = peak_growth.peak_steps(lambda m: torch.optim.Adam(m, lr=0.3), 500, 10.0)
    assert adam[-1] == pytest.approx(24.8, rel=0.01)


def test_a_time_before_one_is_refused():
    with pytest.raises(SinkbookError, match="increase from 1 on"):
        peak_growth.peak_flow(np.array([0.0, 2.0]), 1.0)


def test_plain_gradient_descent_steps_are_the_rate_times_the_gradient():
    config = replace(SMALL, optimizer="sgd-without-momentum", weight_decay=0.0)
    norms = peak_growth.step_norms(config, many=8)
    np.testing.assert_allclose(norms.update_norm, 1e-2 * norms.batch_norm, rtol=1e-3, atol=1e-7)


def test_exponents_are_those_of_powers_of_the_step():
    step = xr.DataArray(np.unique(np.geomspace(1, 400, 30).round()), dims="step")
    powers = xr.DataArray([-1.5, 0.0, 0.25], dims="parameter")
    early = step < 15  # the first half of the axis does not count
    norms = xr.Dataset({"gradient_norm": xr.where(early, 7.0, 3 * step**powers)}, {"step": step})
    found = peak_growth.exponents(norms.assign(update_norm=step + 0 * powers))
    np.testing.assert_allclose(found.gradient_norm, powers, atol=1e-12)
    np.testing.assert_allclose(found.update_norm, 1.0)


def test_a_run_has_moved_as_far_as_its_weights_say_and_reached_its_losses():
    run = train(SMALL)
    assert peak_growth.distance_moved(run, layer=0) > 0
    risks = peak_growth.excess_risk(run)
    assert peak_growth.at_loss(run, "residual_peak", risks[-1] / 2).shape == (3,)
    assert np.isnan(peak_growth.at_loss(run, "residual_peak", risks[-1] / 2)).all()
    later = int(np.argmin(risks))
    found = peak_growth.at_loss(run, "residual_peak", risks[later])
    np.testing.assert_allclose(found, run.measurements.residual_peak.values[later], rtol=1e-6)


def test_a_table_of_optimizers_compares_them_where_they_are_equally_good():
    configs = {"fast": SMALL, "slow": replace(SMALL, learning_rate=1e-3)}
    runs = {name: train_all(seeds_of(config, 2)) for name, config in configs.items()}
    table = peak_growth.optimizer_table(runs)
    sizes = {"optimizer": 2, "seed": 2, "step": 7, "residual_layer": 3, "layer": 2}
    assert table.sizes == sizes
    at = peak_growth.at_equal_loss(table, "residual_peak")
    for seed in range(2):
        reached = max(peak_growth.excess_risk(group[seed])[-1] for group in runs.values())
        for name, group in runs.items():
            expected = peak_growth.at_loss(group[seed], "residual_peak", reached)
            np.testing.assert_allclose(at.sel(optimizer=name)[seed], expected, rtol=1e-6)
    moved = peak_growth.distance_moved(runs["slow"][1], layer=0)
    assert table.distance_moved.sel(optimizer="slow")[1] == pytest.approx(moved)
