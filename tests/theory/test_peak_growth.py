"""Peaks that grow: the toy of one number against its closed forms."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sinkbook.errors import SinkbookError
from sinkbook.theory import peak_growth

FEW = settings(max_examples=15, deadline=None)


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
