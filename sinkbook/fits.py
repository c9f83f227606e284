"""Fits and events of training curves, with intervals: how fast, how straight, and when."""

from typing import NamedTuple

import numpy as np
import xarray as xr
from jaxtyping import Float, Shaped
from scipy import stats


class Fit(NamedTuple):
    """A straight line through points, with a 95 % bootstrap interval of its slope."""

    slope: float
    low: float
    high: float
    intercept: float
    r_squared: float


def line(x: Shaped[np.ndarray, " point"], y: Float[np.ndarray, " point"], *, seed: int = 0) -> Fit:
    """Least squares of `y` on `x`; the interval resamples the points 1,000 times.

    >>> fit = line(np.arange(9.0), 2 * np.arange(9.0) + 1)
    >>> round(fit.slope, 6), round(fit.intercept, 6), round(fit.r_squared, 6)
    (2.0, 1.0, 1.0)
    """
    x, y = np.asarray(x, dtype=float), np.asarray(y, dtype=float)
    found = stats.linregress(x, y)
    generator = np.random.default_rng(seed)
    draws = generator.integers(len(x), size=(1000, len(x)))
    draws = draws[np.ptp(x[draws], axis=1) > 0]
    centred = x[draws] - x[draws].mean(axis=1, keepdims=True)
    slopes = (centred * y[draws]).sum(axis=1) / np.square(centred).sum(axis=1)
    low, high = np.percentile(slopes, [2.5, 97.5])
    numbers = (found.slope, low, high, found.intercept, found.rvalue**2)
    return Fit(*(float(number) for number in numbers))


def first_step(holds: xr.DataArray) -> xr.DataArray:
    """The first measured step from which on a condition holds; NaN where it never does.

    `holds` is boolean with a dimension `step`; the result has the other dimensions.
    """
    return holds.step.where(holds).min("step")
