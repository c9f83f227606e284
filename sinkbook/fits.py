"""Fits and events of training curves, with intervals: how fast, how straight, and when."""

from typing import NamedTuple

import numpy as np
import xarray as xr
from jaxtyping import Float, Float64, Shaped
from scipy import stats

from sinkbook.annotations import check_arguments
from sinkbook.errors import SinkbookError


class Fit(NamedTuple):
    """A straight line through points, with a 95 % bootstrap interval of its slope."""

    slope: float
    low: float
    high: float
    intercept: float
    r_squared: float


@check_arguments
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


@check_arguments
def log_slope(
    times: Float64[np.ndarray, " time"], values: Float64[np.ndarray, "time *rest"]
) -> np.float64 | np.ndarray:
    """The slope of values against ln t, by least squares, one for each column.

    Raises `SinkbookError` for times that are not positive and increasing.
    """
    logs = np.log(positive_times(times))
    if len(logs) < 2 or not np.isfinite(values).all():
        raise SinkbookError(
            f"no slope through {len(logs)} times and values up to {np.max(values)}. Give two times "
            "or more, and finite values."
        )
    logs = logs - logs.mean()
    return np.tensordot(logs, values, axes=1) / (logs @ logs)


def positive_times(times: Float64[np.ndarray, " time"]) -> Float64[np.ndarray, " time"]:
    """The same times, if they have logarithms and increase; else `SinkbookError` is raised."""
    times = np.asarray(times)
    numbers = times.ndim == 1 and times.size and np.issubdtype(times.dtype, np.number)
    if not numbers or not np.isfinite(times).all():
        raise SinkbookError(f"times {times!r:.60} are no row of finite numbers. Give one or more.")
    if times[0] <= 0 or (np.diff(times) <= 0).any():
        raise SinkbookError(
            f"times {times[:3]} ... are not positive and increasing. Start after t = 0, where "
            "log t is not defined; a state at t = 0 is given apart."
        )
    return times


@check_arguments
def interval_of_mean(values: Float[np.ndarray, " text"]) -> tuple[float, float]:
    """The ends of the 95 % interval of a mean over texts, by Student's t."""
    low, high = stats.t.interval(0.95, len(values) - 1, np.mean(values), stats.sem(values))
    return float(low), float(high)


class Plateau(NamedTuple):
    """Growth with the logarithm of time up to a break, and a constant from there on.

    The intervals are 95 % bootstrap intervals.
    """

    slope: float  # per unit of ln t, before the break
    slope_low: float
    slope_high: float
    end: float  # the time at which growth ends
    end_low: float
    end_high: float
    level: float  # after the break
    r_squared: float

    def at(self, times: Shaped[np.ndarray, " point"]) -> Float64[np.ndarray, " point"]:
        """The fitted values."""
        missing = np.log(self.end) - np.log(np.asarray(times, dtype=float))
        return self.level - self.slope * np.maximum(missing, 0.0)


@check_arguments
def log_then_plateau(
    times: Shaped[np.ndarray, " point"], y: Float[np.ndarray, " point"], *, seed: int = 0
) -> Plateau:
    """Least squares of `level - slope * max(0, ln end - ln t)`: the paper's reading of OLMo.

    The end of growth is sought on a grid between the second point and the last; where `y` still
    grows at the end it is the last point. The intervals resample the points 300 times. Raises
    `SinkbookError` for fewer than four points, or a time that is not positive.
    Source: arXiv 2410.13835, section 3.2.

    >>> times = np.array([1.0, 2.0, 4.0, 8.0, 16.0, 32.0])
    >>> fit = log_then_plateau(times, np.minimum(np.log(times), np.log(8.0)))
    >>> round(fit.slope, 3), round(fit.end, 1)
    (1.0, 8.0)
    """
    if len(times) < 4 or np.min(times) <= 0:
        raise SinkbookError(
            f"a plateau cannot be fitted to these {len(times)} points. Give four at least, with "
            "positive times."
        )
    logs, y = np.log(np.asarray(times, dtype=float)), np.asarray(y, dtype=float)
    breaks = np.unique(np.concatenate([logs[1:], np.linspace(logs[1], logs[-1], 100)]))
    slope, end, level, error = _best_break(logs, y, breaks)
    generator = np.random.default_rng(seed)
    draws = generator.integers(len(y), size=(300, len(y)))
    again = [_best_break(logs[d], y[d], breaks)[:2] for d in draws if np.ptp(logs[d]) > 0]
    (slope_low, end_low), (slope_high, end_high) = np.percentile(again, [2.5, 97.5], axis=0)
    r_squared = 1 - error / np.square(y - y.mean()).sum()
    ends = np.exp([end, end_low, end_high])
    numbers = (slope, slope_low, slope_high, *ends, level, r_squared)
    return Plateau(*(float(number) for number in numbers))


def _best_break(logs, y, breaks) -> tuple[float, float, float, float]:
    """Slope, break, level and squared error of the best fit over a grid of breaks."""
    hinge = np.minimum(logs - breaks[:, None], 0.0)  # (break, point)
    centred = hinge - hinge.mean(axis=1, keepdims=True)
    size = np.square(centred).sum(axis=1)
    slopes = (centred * (y - y.mean())).sum(axis=1) / np.where(size > 0, size, np.inf)
    levels = y.mean() - slopes * hinge.mean(axis=1)
    errors = np.square(y - levels[:, None] - slopes[:, None] * hinge).sum(axis=1)
    best = int(errors.argmin())
    return slopes[best], breaks[best], levels[best], errors[best]


@check_arguments
def halfway(values: xr.DataArray) -> xr.DataArray:
    """The first measured step at which half of the way from the first value to the last is gone.

    `values` has a dimension `step`; the result has the other dimensions.
    """
    start, end = values.isel(step=0), values.isel(step=-1)
    return first_step((values - start) / (end - start) >= 0.5)


@check_arguments
def first_step(holds: xr.DataArray) -> xr.DataArray:
    """The first measured step from which on a condition holds; NaN where it never does.

    `holds` is boolean with a dimension `step`; the result has the other dimensions.
    """
    return holds.step.where(holds).min("step")
