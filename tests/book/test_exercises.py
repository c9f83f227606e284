"""The checks accept the solutions that the chapters give, and say what is wrong with the rest."""

import numpy as np
import pytest

from sinkbook.book import exercises

SOLUTIONS = {
    exercises.check_sink_gradient: lambda p, q, a, beta, mean: (
        a * (1 - a) * (q - p) @ (beta - mean)
    ),
    exercises.check_growth_rate: lambda p, W, weight: weight * (p @ W**2 - (p @ W) ** 2),
    exercises.check_settled_value: lambda start, W, alpha: (
        start.mean() + np.exp(-alpha) * (W.mean() - W)
    ),
    exercises.check_peak_growth: lambda t, start, c: (
        (start**4 + 2 * (1 - c**2) * np.log(t) ** 2) ** 0.25
    ),
    exercises.check_relu_row: lambda logits: np.maximum(logits, 0).mean(),
    exercises.check_null_slot: lambda logits, b: 1 / (1 + np.exp(logits - b).sum()),
    exercises.check_cache_distance: lambda n, i, sinks, window: min(n, sinks + window - 1) - i,
}


@pytest.mark.parametrize("check", SOLUTIONS, ids=lambda check: check.__name__)
def test_a_solution_is_accepted(check, capsys):
    check(SOLUTIONS[check])
    assert capsys.readouterr().out.startswith("Right: ")


@pytest.mark.parametrize("check", SOLUTIONS, ids=lambda check: check.__name__)
def test_any_other_formula_is_met_with_the_number_that_it_should_give(check, capsys):
    check(lambda *given: 1.01 * SOLUTIONS[check](*given))
    assert "it should give" in capsys.readouterr().out


def test_a_turned_sign_is_recognised(capsys):
    solution = SOLUTIONS[exercises.check_sink_gradient]
    exercises.check_sink_gradient(lambda *given: -solution(*given))
    assert "The sign is turned" in capsys.readouterr().out
