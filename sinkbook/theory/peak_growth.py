"""Why residual peaks grow: the paper's toy of one number.

The toy (arXiv 2410.13835, section 2.3): the residual state of `<s>` is e + m·u, unit vectors with
e·u = c. A layer norm hands on its direction alone, of which

    cos = (m + c) / sqrt(m² + 2mc + 1)

points along u, where the sink is. The loss is exp(-y·cos) with y = log t, a sink logit that grows
with the logarithm of time t.
"""

from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Float64
from scipy.integrate import solve_ivp
from scipy.optimize import brentq

from sinkbook.annotations import check_arguments
from sinkbook.arguments import check_number, check_whole_number
from sinkbook.errors import SinkbookError
from sinkbook.fits import positive_times


@check_arguments
def peak_flow(
    times: Float64[np.ndarray, " time"], start: float, c: float = 0.0
) -> Float64[np.ndarray, " time"]:
    """m(t) under gradient flow, from m = `start` at t = 1.

    Raises `SinkbookError` for times before 1 or not increasing, where log t gives no sink.
    """
    _check(times, start, c)

    def velocity(log_time, state):
        m = state[0]
        length = np.sqrt(m * m + 2 * m * c + 1)
        # The loss is t^-cos, and dm/dlog t is t times dm/dt: together t^(1 - cos).
        missing = 1 - (m + c) / length
        return [log_time * (1 - c * c) / length**3 * np.exp(log_time * missing)]

    logs = np.log(times)
    solution = solve_ivp(
        velocity, (0.0, logs[-1]), [start], "LSODA", t_eval=logs, rtol=1e-10, atol=1e-12
    )
    return solution.y[0]


@check_arguments
def peak_closed_form(
    times: Float64[np.ndarray, " time"], start: float, c: float = 0.0
) -> Float64[np.ndarray, " time"]:
    """The solution of dm/dt = (1 - c²)·log t / (t·m³), the flow if the loss were exactly 1/t.

    m(t) = (start⁴ + 2·(1 - c²)·log² t)^¼, the paper's (2·log² t)^¼ where start and c are small.
    """
    _check(times, start, c)
    return (start**4 + 2 * (1 - c * c) * np.log(times) ** 2) ** 0.25


@check_arguments
def peak_coefficient(c: float = 0.0) -> float:
    """The limit of m² / log t under gradient flow: the root k of k² = 2·s·exp(s / 2k), s = 1 - c².

    The loss is not exactly 1/t: cos stays below 1 by s/2m², and m² grows no faster than log t. So
    the limit is not the sqrt(2·s) of `peak_closed_form`, but the law sqrt(log t) is the same.
    """
    check_number("c", c, -0.99, 0.99)
    s = 1 - c * c
    return brentq(lambda k: k * k - 2 * s * np.exp(s / (2 * k)), 0.1, 10)


@check_arguments
def peak_steps(
    optimizer: Callable[..., torch.optim.Optimizer], steps: int, start: float, c: float = 0.0
) -> Float64[np.ndarray, " step"]:
    """m after each of so many steps of an optimizer, made by `optimizer([m])`."""
    check_whole_number("steps", steps, 1)
    check_number("start", start, 0)
    check_number("c", c, -1, 1)
    m = torch.tensor(start, dtype=torch.float64, requires_grad=True)
    made, path = optimizer([m]), []
    for step in range(1, steps + 1):
        made.zero_grad()
        y = np.log(step)
        (-y * (m + c) / (m * m + 2 * m * c + 1).sqrt()).exp().backward()
        made.step()
        path.append(m.item())
    return np.array(path)


def _check(times, start: float, c: float) -> None:
    check_number("start", start, 0)
    check_number("c", c, -1, 1)
    first, *_ = np.ravel(times)[:1].tolist() or [1]
    if isinstance(first, float | int) and first >= 1:
        positive_times(times)  # a row of finite numbers that increase
    else:
        raise SinkbookError(
            f"times {times!r:.60} have to increase from 1 on: the toy's sink logit is log t."
        )
