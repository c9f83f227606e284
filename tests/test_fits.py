"""Fits find the line they are given and know how sure they are."""

import numpy as np
import pytest
import xarray as xr
from scipy import stats

from sinkbook.fits import first_step, halfway, interval_of_mean, line, log_then_plateau


def test_the_interval_covers_the_true_slope_about_nineteen_times_in_twenty():
    generator = np.random.default_rng(0)
    x = np.linspace(0, 1, 30)
    covered = 0
    for trial in range(100):
        fit = line(x, 3 * x + generator.normal(size=30), seed=trial)
        covered += fit.low <= 3 <= fit.high
    assert 85 <= covered <= 100


def test_slope_and_fit_are_those_of_least_squares():
    generator = np.random.default_rng(1)
    x, y = generator.normal(size=(2, 12))
    fit, expected = line(x, y), stats.linregress(x, y)
    assert (fit.slope, fit.intercept) == pytest.approx((expected.slope, expected.intercept))
    assert fit.r_squared == pytest.approx(expected.rvalue**2)


def test_the_first_step_is_the_first_and_nan_where_there_is_none():
    values = xr.DataArray(
        [[0.1, 0.6, 0.4, 0.9], [0, 0, 0, 0]],
        dims=("seed", "step"),
        coords={"step": [0, 10, 100, 1000]},
    )
    found = first_step(values > 0.5)
    assert found[0] == 10
    assert np.isnan(found[1])


def test_a_plateau_is_found_where_it_is_and_its_intervals_cover_it():
    generator = np.random.default_rng(2)
    times = np.geomspace(10, 10_000, 40)
    covered = 0
    for trial in range(20):
        y = 3 - 1.5 * np.maximum(np.log(800 / times), 0) + 0.2 * generator.normal(size=40)
        fit = log_then_plateau(times, y, seed=trial)
        assert fit.slope == pytest.approx(1.5, rel=0.2)
        assert fit.end == pytest.approx(800, rel=0.4)
        assert fit.level == pytest.approx(3, abs=0.2)
        covered += fit.slope_low <= 1.5 <= fit.slope_high and fit.end_low <= 800 <= fit.end_high
    assert covered >= 15


def test_growth_that_goes_on_has_no_plateau_before_the_end():
    times = np.geomspace(10, 1000, 30)
    noise = 0.05 * np.random.default_rng(3).normal(size=30)
    fit = log_then_plateau(times, np.log(times) + noise)
    assert fit.end_high > 900
    np.testing.assert_allclose(fit.at(times), np.log(times), atol=0.15)


def test_halfway_is_between_the_first_value_and_the_last_in_both_directions():
    values = xr.DataArray(
        [[0.0, 0.4, 0.6, 1.0], [8.0, 5.0, 3.0, 2.0]],
        dims=("seed", "step"),
        coords={"step": [0, 10, 100, 1000]},
    )
    assert halfway(values).values.tolist() == [100, 10]


def test_the_interval_of_a_mean_is_students():
    low, high = interval_of_mean(np.array([1.0, 2.0, 3.0]))
    np.testing.assert_allclose([low, high], [2 - 4.30265 / 3**0.5, 2 + 4.30265 / 3**0.5], rtol=1e-5)
