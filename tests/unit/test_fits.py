"""Fits find the line they are given and know how sure they are."""

import numpy as np
import pytest
import xarray as xr
from scipy import stats

from sinkbook.fits import first_step, line


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
