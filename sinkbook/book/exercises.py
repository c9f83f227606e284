"""Checks of a reader's formula: they try it on numbers, and say what it seems to have missed.

    exercises.check_growth_rate(lambda p, W, weight: ...)

prints what is right or wrong. Nothing is compared symbol by symbol: any formula that gives the
numbers is right.
"""

from collections.abc import Callable

import numpy as np


def check_sink_gradient(formula: Callable[..., float]) -> None:
    """Test `formula(p, q, attention, beta, mean_value)` for ∂KL(p ‖ q)/∂α of one row.

    `attention` is a, what `<s>` gets; `mean_value` is W/n. The truth is taken by differences.

    >>> check_sink_gradient(lambda p, q, a, beta, mean: a * (q - p) @ (beta - mean))
    Not yet. Moving a by moving alpha is slower at both ends: a = sigmoid(alpha - log n).
    """

    def case(rng):
        p, beta, mean_value = rng.dirichlet(np.ones(4)), rng.normal(size=4), rng.uniform(size=4)
        alpha = rng.normal()

        def parts(alpha):
            attention = 1 / (1 + np.exp(-alpha))
            q = p * np.exp(attention * beta + (1 - attention) * mean_value)
            return attention, q / q.sum()

        step = 1e-5
        low, high = (-(p * np.log(parts(alpha + s)[1] / p)).sum() for s in (-step, step))
        attention, q = parts(alpha)
        return (p, q, attention, beta, mean_value), (high - low) / (2 * step)

    a_1_a = "Moving a by moving alpha is slower at both ends: a = sigmoid(alpha - log n)."
    mistakes = {
        "The sign is turned: is q - p positive where the model says a token too often?": (
            lambda p, q, a, beta, mean: -a * (1 - a) * (q - p) @ (beta - mean)
        ),
        a_1_a: lambda p, q, a, beta, mean: a * (q - p) @ (beta - mean),
        "Attention that <s> gains is taken from the others: their mean value goes down.": (
            lambda p, q, a, beta, mean: a * (1 - a) * (q - p) @ beta
        ),
    }
    _check(formula, case, mistakes, "Right: a push that dies out when a is near 0 or near 1.")


def check_growth_rate(formula: Callable[..., float]) -> None:
    """Test `formula(p, W, weight)` for C, with which dα/dt → C·e^-2α while β is constant.

    >>> check_growth_rate(lambda p, W, weight: weight * (p @ W**2 - (p @ W) ** 2))
    Right: only differences between the successors of a token can mislead it.
    """

    def case(rng):
        p, values, weight = rng.dirichlet(np.ones(5)), rng.uniform(0, 9, 5), rng.uniform(0.1, 1)
        return (p, values, weight), weight * p @ (values - p @ values) ** 2

    mistakes = {
        "Adding a constant to W changes no softmax, but it changes your C.": (
            lambda p, W, weight: weight * p @ W**2
        ),
        "Frequent tokens learn faster: the weight of the row is missing.": (
            lambda p, W, weight: p @ (W - p @ W) ** 2
        ),
        "Errors count as often as their tokens occur: take the variance under p.": (
            lambda p, W, weight: weight * np.var(W)
        ),
    }
    right = "Right: only differences between the successors of a token can mislead it."
    _check(formula, case, mistakes, right)


def check_settled_value(formula: Callable[..., np.ndarray]) -> None:
    """Test `formula(start, W, alpha)` for β*, where β ends while α is fixed (Theorem 2b).

    >>> check_settled_value(lambda start, W, alpha: -np.exp(-alpha) * W)
    Not yet. The sum of beta never changes; the sum of your beta* is another one.
    """

    def case(rng):
        start, values, alpha = rng.normal(size=5), rng.uniform(0, 9, 5), rng.uniform(0, 3)
        return (start, values, alpha), start.mean() + np.exp(-alpha) * (values.mean() - values)

    mistakes = {
        "The sum of beta never changes; the sum of your beta* is another one.": (
            lambda start, W, alpha: -np.exp(-alpha) * W
        ),
        "e^alpha beta + W has to be constant, and yours is not: which sign has alpha?": (
            lambda start, W, alpha: start.mean() + np.exp(alpha) * (W.mean() - W)
        ),
    }
    right = "Right: <s> says exactly the opposite of what leaks past it."
    _check(formula, case, mistakes, right)


def check_peak_growth(formula: Callable[..., float]) -> None:
    """Test `formula(t, start, c)` for m(t), the solution of dm/dt = (1 - c²)·log t / (t·m³).

    >>> check_peak_growth(lambda t, start, c: (2 * np.log(t) ** 2) ** 0.25)
    Not yet. At t = 1 your peak is not where it starts.
    """

    def case(rng):
        t, start, c = np.exp(rng.uniform(0, 30)), rng.uniform(0.5, 10), rng.uniform(-0.9, 0.9)
        return (t, start, c), (start**4 + 2 * (1 - c**2) * np.log(t) ** 2) ** 0.25

    mistakes = {
        "At t = 1 your peak is not where it starts.": (
            lambda t, start, c: (2 * np.log(t) ** 2) ** 0.25
        ),
        "A direction that is already half there has less to gain: where is c?": (
            lambda t, start, c: (start**4 + 2 * np.log(t) ** 2) ** 0.25
        ),
        "The integral of log t / t is half of log² t.": (
            lambda t, start, c: (start**4 + 4 * (1 - c**2) * np.log(t) ** 2) ** 0.25
        ),
    }
    right = "Right: ten times the time adds almost nothing. No step size can hurry a logarithm."
    _check(formula, case, mistakes, right)


def check_relu_row(formula: Callable[..., float]) -> None:
    """Test `formula(logits)` for the sum of a row of ReLU attention, from its visible logits.

    >>> check_relu_row(lambda logits: 1.0)
    Not yet. Nothing makes the row add up to 1; that is the point of it.
    """

    def case(rng):
        logits = rng.normal(size=6)
        return (logits,), np.maximum(logits, 0).sum() / 6

    mistakes = {
        "Nothing makes the row add up to 1; that is the point of it.": lambda logits: 1.0,
        "Divide by the number of keys that can be seen, also those that get nothing.": (
            lambda logits: np.maximum(logits, 0).sum() / (logits > 0).sum()
        ),
        "Negative logits count as zero.": lambda logits: logits.mean(),
    }
    _check(formula, case, mistakes, "Right: it can be anything from zero upwards.")


def check_null_slot(formula: Callable[..., float]) -> None:
    """Test `formula(logits, b)` for what a row gives to a null slot with the logit b.

    >>> check_null_slot(lambda logits, b: np.exp(b) / np.exp(logits).sum())
    Not yet. The slot is one of those that share: it stands in the denominator as well.
    """

    def case(rng):
        logits, b = rng.normal(size=5), rng.normal()
        return (logits, b), np.exp(b) / (np.exp(b) + np.exp(logits).sum())

    mistakes = {
        "The slot is one of those that share: it stands in the denominator as well.": (
            lambda logits, b: np.exp(b) / np.exp(logits).sum()
        ),
        "That is what is left for the keys.": (
            lambda logits, b: np.exp(logits).sum() / (np.exp(b) + np.exp(logits).sum())
        ),
    }
    _check(formula, case, mistakes, "Right: with b = 0 it is softmax-1.")


def check_cache_distance(formula: Callable[..., int]) -> None:
    """Test `formula(n, i, sinks, window)` for how far a query sees first token `i` in a sink cache.

    `n` is the query's position in the text, `i < sinks`; the window includes the query.

    >>> check_cache_distance(lambda n, i, sinks, window: n - i)
    Not yet. That is the distance in the text; the cache closes the gap.
    """

    def case(rng):
        sinks, window, n = rng.integers(1, 8), rng.integers(8, 30), rng.integers(8, 90)
        i = rng.integers(sinks)
        return (n, i, sinks, window), min(n, sinks + window - 1) - i

    mistakes = {
        "That is the distance in the text; the cache closes the gap.": (
            lambda n, i, sinks, window: n - i
        ),
        "Before the cache is full, nothing has been closed up yet.": (
            lambda n, i, sinks, window: sinks + window - 1 - i
        ),
        "The query is one of the window's tokens: count from 0.": (
            lambda n, i, sinks, window: min(n, sinks + window) - i
        ),
    }
    right = (
        "Right: however long the text, the first tokens are never farther than the cache is long."
    )
    _check(formula, case, mistakes, right)


def _check(formula, case, mistakes: dict[str, Callable], right: str) -> None:
    """Print `right`, or the mistake whose numbers the formula gives, or the first difference."""
    cases = [case(np.random.default_rng(seed)) for seed in range(20)]

    def agrees(candidate):
        return all(np.allclose(candidate(*given), truth, rtol=1e-5) for given, truth in cases)

    def same(mistake):
        return all(np.allclose(formula(*given), mistake(*given), rtol=1e-5) for given, _ in cases)

    if agrees(formula):
        print(right)
    elif hints := [hint for hint, mistake in mistakes.items() if same(mistake)]:
        print(f"Not yet. {hints[0]}")
    else:
        given, truth = cases[0]
        shown = np.array2string(np.asarray(truth), precision=4)
        yours = np.array2string(np.asarray(formula(*given)), precision=4)
        print(f"Not yet. For one set of numbers it should give {shown}; yours gives {yours}.")
