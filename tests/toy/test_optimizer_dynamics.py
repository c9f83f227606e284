"""The steps of real trainings are those that the optimizers are known to make."""

from dataclasses import replace

import numpy as np
import pytest
import xarray as xr

from sinkbook.toy import optimizer_dynamics
from sinkbook.toy.runs import TrainingConfig
from sinkbook.toy.tasks import TaskConfig
from sinkbook.toy.training import seeds_of, train, train_all
from sinkbook.toy.transformer import TransformerConfig

SMALL = TrainingConfig(
    task=TaskConfig(length=16),
    model=TransformerConfig(length=16, width=8, layers=2),
    batch_size=4,
    steps=6,
    learning_rate=1e-2,
    evaluation_size=8,
)


def test_plain_gradient_descent_steps_are_the_rate_times_the_gradient():
    config = replace(SMALL, optimizer="sgd-without-momentum", weight_decay=0.0)
    norms = optimizer_dynamics.step_norms(config, many=8)
    np.testing.assert_allclose(
        norms.update_norm, 1e-2 * norms.batch_gradient_norm, rtol=1e-3, atol=1e-7
    )


def test_exponents_are_those_of_powers_of_the_step():
    step = xr.DataArray(np.unique(np.geomspace(1, 400, 30).round()), dims="step")
    powers = xr.DataArray([-1.5, 0.0, 0.25], dims="parameter")
    early = step < 15  # the first half of the axis does not count
    norms = xr.Dataset({"gradient_norm": xr.where(early, 7.0, 3 * step**powers)}, {"step": step})
    found = optimizer_dynamics.exponents(norms.assign(update_norm=step + 0 * powers))
    np.testing.assert_allclose(found.gradient_norm, powers, atol=1e-12)
    np.testing.assert_allclose(found.update_norm, 1.0)


def test_a_run_has_moved_as_far_as_its_weights_say_and_reached_its_losses():
    run = train(SMALL)
    assert optimizer_dynamics.distance_moved(run, layer=0) > 0
    risks = optimizer_dynamics.excess_risk(run)
    assert optimizer_dynamics.at_loss(run, "residual_peak_height", risks[-1] / 2).shape == (3,)
    assert np.isnan(optimizer_dynamics.at_loss(run, "residual_peak_height", risks[-1] / 2)).all()
    later = int(np.argmin(risks))
    found = optimizer_dynamics.at_loss(run, "residual_peak_height", risks[later])
    np.testing.assert_allclose(
        found, run.measurements.residual_peak_height.values[later], rtol=1e-6
    )


def test_a_table_of_optimizers_holds_every_seed_and_how_far_it_has_moved():
    configs = {"fast": SMALL, "slow": replace(SMALL, learning_rate=1e-3)}
    runs = {name: train_all(seeds_of(config, 2)) for name, config in configs.items()}
    table = optimizer_dynamics.optimizer_table(runs)
    sizes = {"optimizer": 2, "seed": 2, "step": 7, "residual_layer": 3, "layer": 2}
    assert table.sizes == sizes
    moved = optimizer_dynamics.distance_moved(runs["slow"][1], layer=0)
    assert table.distance_moved.sel(optimizer="slow")[1] == pytest.approx(moved)
