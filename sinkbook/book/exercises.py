"""The formulas that exercises ask for: what each is given, what it should give, likely mistakes.

A page asks for one with the directive `{formula}` and a name in `FORMULAS`; in a notebook

    exercises.check_growth_rate(lambda p, W, weight: ...)

prints what is right or wrong. The numbers are short, so that an answer can be followed by hand.
"""

from collections.abc import Callable

import numpy as np

from sinkbook.pages.formulas import Formula


def _row(rng: np.random.Generator, count: int) -> np.ndarray:
    """Probabilities with two decimals, none of them zero."""
    return (1 + rng.multinomial(20 - count, np.full(count, 1 / count))) / 20


def _sink_gradient(rng: np.random.Generator) -> tuple[tuple, float]:
    """The truth is taken by differences of the loss."""
    p, beta, mean_value = _row(rng, 3), rng.normal(size=3).round(1), rng.uniform(size=3).round(1)
    attention = round(rng.uniform(0.1, 0.9), 2)
    alpha = np.log(attention / (1 - attention))

    def predicted(alpha):
        a = 1 / (1 + np.exp(-alpha))
        q = p * np.exp(a * beta + (1 - a) * mean_value)
        return q / q.sum()

    step = 1e-5
    low, high = (-(p * np.log(predicted(alpha + s) / p)).sum() for s in (-step, step))
    return (p, predicted(alpha), attention, beta, mean_value), (high - low) / (2 * step)


def _growth_rate(rng: np.random.Generator) -> tuple[tuple, float]:
    p, values, weight = _row(rng, 4), rng.uniform(0, 9, 4).round(1), round(rng.uniform(0.1, 1), 1)
    return (p, values, weight), weight * p @ (values - p @ values) ** 2


def _settled_value(rng: np.random.Generator) -> tuple[tuple, np.ndarray]:
    start, values = rng.normal(size=3).round(1), rng.uniform(0, 9, 3).round(1)
    alpha = round(rng.uniform(0, 3), 1)
    return (start, values, alpha), start.mean() + np.exp(-alpha) * (values.mean() - values)


def _peak_growth(rng: np.random.Generator) -> tuple[tuple, float]:
    t, start = 10.0 ** rng.integers(0, 4), round(rng.uniform(0.5, 10), 1)
    c = round(rng.uniform(-0.9, 0.9), 1)
    return (t, start, c), (start**4 + 2 * (1 - c**2) * np.log(t) ** 2) ** 0.25


def _relu_row(rng: np.random.Generator) -> tuple[tuple, float]:
    logits = rng.normal(size=5).round(1)
    return (logits,), np.maximum(logits, 0).sum() / 5


def _null_slot(rng: np.random.Generator) -> tuple[tuple, float]:
    logits, b = rng.normal(size=4).round(1), round(rng.normal(), 1)
    return (logits, b), np.exp(b) / (np.exp(b) + np.exp(logits).sum())


def _cache_distance(rng: np.random.Generator) -> tuple[tuple, int]:
    sinks, window, n = (int(rng.integers(*ends)) for ends in ((1, 8), (8, 30), (8, 90)))
    i = int(rng.integers(sinks))
    return (n, i, sinks, window), min(n, sinks + window - 1) - i


def _copying_target(rng: np.random.Generator) -> tuple[tuple, int]:
    d = int(rng.integers(8, 40))
    n = d + int(rng.integers(1, d))
    return (n, d), n - d + 1


def _share_back(rng: np.random.Generator) -> tuple[tuple, float]:
    cut, back, lost = (round(rng.uniform(*ends), 1) for ends in ((1.5, 3), (2, 9), (2, 9)))
    now, whole = cut * back, cut * back * lost
    return (whole, cut, now), np.log(back) / np.log(back * lost)


def _massive_share(rng: np.random.Generator) -> tuple[tuple, float]:
    state = rng.normal(size=4).round(1)
    state[rng.integers(4)] = rng.choice([-1, 1]) * rng.integers(3, 9)
    return (state,), (state**2).max() / (state**2).sum()


def _standard_errors(rng: np.random.Generator) -> tuple[tuple, float]:
    rises = rng.normal(0.2, 0.1, size=5).round(2)
    return (rises,), rises.mean() / (rises.std(ddof=1) / np.sqrt(5))


FORMULAS = {
    "sink-gradient": Formula(
        "∂KL/∂α =",
        {
            "p": "the bigram row, a list of numbers",
            "q": "what the model says, a list",
            "attention": "a, what <s> gets",
            "beta": "the value of <s>, a list",
            "mean_value": "W/n, a list",
        },
        _sink_gradient,
        {
            "The sign is turned: is q - p positive where the model says a token too often?": (
                lambda p, q, a, beta, mean: -a * (1 - a) * (q - p) @ (beta - mean)
            ),
            "Moving a by moving alpha is slower at both ends: a = sigmoid(alpha - log n).": (
                lambda p, q, a, beta, mean: a * (q - p) @ (beta - mean)
            ),
            "Attention that <s> gains is taken from the others: their mean value goes down.": (
                lambda p, q, a, beta, mean: a * (1 - a) * (q - p) @ beta
            ),
        },
        "a push that dies out when a is near 0 or near 1.",
    ),
    "growth-rate": Formula(
        "C =",
        {
            "p": "the bigram row, a list of numbers",
            "W": "what leaks past <s>, a list",
            "weight": "π of the row",
        },
        _growth_rate,
        {
            "Adding a constant to W changes no softmax, but it changes your C.": (
                lambda p, W, weight: weight * p @ W**2
            ),
            "Frequent tokens learn faster: the weight of the row is missing.": (
                lambda p, W, weight: p @ (W - p @ W) ** 2
            ),
            "Errors count as often as their tokens occur: take the variance under p.": (
                lambda p, W, weight: weight * np.var(W)
            ),
        },
        "only differences between the successors of a token can mislead it.",
    ),
    "settled-value": Formula(
        "β* =",
        {
            "start": "β at the start, a list of numbers",
            "W": "what leaks past <s>, a list",
            "alpha": "the sink logit",
        },
        _settled_value,
        {
            "The sum of beta never changes; the sum of your beta* is another one.": (
                lambda start, W, alpha: -np.exp(-alpha) * W
            ),
            "e^alpha beta + W has to be constant, and yours is not: which sign has alpha?": (
                lambda start, W, alpha: start.mean() + np.exp(alpha) * (W.mean() - W)
            ),
        },
        "<s> says exactly the opposite of what leaks past it.",
    ),
    "peak-growth": Formula(
        "m(t) =",
        {"t": "the step", "start": "m at t = 1", "c": "the cosine that the peak begins with"},
        _peak_growth,
        {
            "At t = 1 your peak is not where it starts.": (
                lambda t, start, c: (2 * np.log(t) ** 2) ** 0.25
            ),
            "A direction that is already half there has less to gain: where is c?": (
                lambda t, start, c: (start**4 + 2 * np.log(t) ** 2) ** 0.25
            ),
            "The integral of log t / t is half of log² t.": (
                lambda t, start, c: (start**4 + 4 * (1 - c**2) * np.log(t) ** 2) ** 0.25
            ),
        },
        "ten times the time adds almost nothing. No step size can hurry a logarithm.",
    ),
    "relu-row": Formula(
        "sum of the row =",
        {"logits": "of all keys that the query sees, a list of numbers"},
        _relu_row,
        {
            "Nothing makes the row add up to 1; that is the point of it.": lambda logits: 1.0,
            "Divide by the number of keys that can be seen, also those that get nothing.": (
                lambda logits: np.maximum(logits, 0).sum() / max((logits > 0).sum(), 1)
            ),
            "Negative logits count as zero.": lambda logits: logits.mean(),
        },
        "it can be anything from zero upwards.",
    ),
    "null-slot": Formula(
        "share of the slot =",
        {"logits": "of all keys, a list of numbers", "b": "the logit of the slot"},
        _null_slot,
        {
            "The slot is one of those that share: it stands in the denominator as well.": (
                lambda logits, b: np.exp(b) / np.exp(logits).sum()
            ),
            "That is what is left for the keys.": (
                lambda logits, b: np.exp(logits).sum() / (np.exp(b) + np.exp(logits).sum())
            ),
        },
        "with b = 0 it is softmax-1.",
    ),
    "cache-distance": Formula(
        "distance =",
        {
            "n": "where the query stands in the text, from 0",
            "i": "which first token, from 0",
            "sinks": "first tokens that are kept",
            "window": "tokens of the window, the query among them",
        },
        _cache_distance,
        {
            "That is the distance in the text; the cache closes the gap.": (
                lambda n, i, sinks, window: n - i
            ),
            "Before the cache is full, nothing has been closed up yet.": (
                lambda n, i, sinks, window: sinks + window - 1 - i
            ),
            "The query is one of the window's tokens: count from 0.": (
                lambda n, i, sinks, window: min(n, sinks + window) - i
            ),
        },
        "however long the text, the first tokens are never farther than the cache is long.",
    ),
    "copying-target": Formula(
        "position =",
        {"n": "where the query stands, from 0", "d": "after how many characters the text repeats"},
        _copying_target,
        {
            "There stood the present character; what is wanted is what came next.": (
                lambda n, d: n - d
            ),
            "That is one before the present character's place, and not one behind it.": (
                lambda n, d: n - d - 1
            ),
        },
        "it looks back by the same distance from everywhere, so a head can do it by place.",
    ),
    "share-back": Formula(
        "share =",
        {
            "whole": "the peak's ratio before the cut",
            "cut": "right after the cut",
            "now": "after training on",
        },
        _share_back,
        {
            "Right after the cut nothing is back, and your share is not zero there.": (
                lambda whole, cut, now: now / whole
            ),
            "That counts differences; by factors the way up is counted in logarithms.": (
                lambda whole, cut, now: (now - cut) / (whole - cut)
            ),
            "What the cut has left has not come back: it has to be divided out.": (
                lambda whole, cut, now: np.log(now) / np.log(whole)
            ),
        },
        "a tenth of the height can be half of the way.",
    ),
    "massive-share": Formula(
        "share =",
        {"state": "its dimensions, a list of numbers"},
        _massive_share,
        {
            "Lengths add up by their squares.": lambda state: abs(state).max() / abs(state).sum(),
            "The longest may be negative: square before you look for it.": (
                lambda state: state.max() ** 2 / (state**2).sum()
            ),
            "That is the share of the length; the squares are what adds up to one.": (
                lambda state: abs(state).max() / np.sqrt((state**2).sum())
            ),
        },
        "one dimension ten times as large as each of a hundred others holds half of it.",
    ),
    "standard-errors": Formula(
        "standard errors =",
        {"rises": "of the loss, one a text, a list of numbers"},
        _standard_errors,
        {
            "That is in units of how far single texts lie apart; a mean of many is surer.": (
                lambda rises: rises.mean() / rises.std(ddof=1)
            ),
            "A mean of n texts is surer than one text; and their squares are divided by n - 1.": (
                lambda rises: rises.mean() / rises.std()
            ),
            "The mean comes from the same texts: divide their squares by n - 1.": (
                lambda rises: rises.mean() / rises.std() * np.sqrt(len(rises))
            ),
        },
        "it grows with the number of texts as well.",
    ),
}


def check_sink_gradient(formula: Callable[..., float]) -> None:
    """Test `formula(p, q, attention, beta, mean_value)` for ∂KL(p ‖ q)/∂α of one row.

    `attention` is a, what `<s>` gets; `mean_value` is W/n.

    >>> check_sink_gradient(lambda p, q, a, beta, mean: a * (q - p) @ (beta - mean))
    Not yet: for p = ... Moving a by moving alpha is slower at both ends: ...
    """
    FORMULAS["sink-gradient"].check(formula)


def check_growth_rate(formula: Callable[..., float]) -> None:
    """Test `formula(p, W, weight)` for C, with which dα/dt → C·e^-2α while β is constant.

    >>> check_growth_rate(lambda p, W, weight: weight * (p @ W**2 - (p @ W) ** 2))
    Right: only differences between the successors of a token can mislead it.
    """
    FORMULAS["growth-rate"].check(formula)


def check_settled_value(formula: Callable[..., np.ndarray]) -> None:
    """Test `formula(start, W, alpha)` for β*, where β ends while α is fixed (Theorem 2b).

    >>> check_settled_value(lambda start, W, alpha: -np.exp(-alpha) * W)
    Not yet: for start = ... The sum of beta never changes; the sum of your beta* is another one.
    """
    FORMULAS["settled-value"].check(formula)


def check_peak_growth(formula: Callable[..., float]) -> None:
    """Test `formula(t, start, c)` for m(t), the solution of dm/dt = (1 - c²)·log t / (t·m³).

    >>> check_peak_growth(lambda t, start, c: (2 * np.log(t) ** 2) ** 0.25)
    Not yet: for t = ... At t = 1 your peak is not where it starts.
    """
    FORMULAS["peak-growth"].check(formula)


def check_relu_row(formula: Callable[..., float]) -> None:
    """Test `formula(logits)` for the sum of a row of ReLU attention, from its visible logits.

    >>> check_relu_row(lambda logits: 1.0)
    Not yet: for logits = ... Nothing makes the row add up to 1; that is the point of it.
    """
    FORMULAS["relu-row"].check(formula)


def check_null_slot(formula: Callable[..., float]) -> None:
    """Test `formula(logits, b)` for what a row gives to a null slot with the logit b.

    >>> check_null_slot(lambda logits, b: np.exp(b) / np.exp(logits).sum())
    Not yet: for logits = ... The slot is one of those that share: ...
    """
    FORMULAS["null-slot"].check(formula)


def check_cache_distance(formula: Callable[..., int]) -> None:
    """Test `formula(n, i, sinks, window)` for how far a query sees first token `i` in a sink cache.

    `n` is the query's position in the text, `i < sinks`; the window includes the query.

    >>> check_cache_distance(lambda n, i, sinks, window: n - i)
    Not yet: for n = ... That is the distance in the text; the cache closes the gap.
    """
    FORMULAS["cache-distance"].check(formula)


def check_copying_target(formula: Callable[..., int]) -> None:
    """Test `formula(n, d)` for where a copying head looks from `n`, if a text repeats after `d`.

    `<s>` stands at position 0, and the query in the second half: `n > d`.

    >>> check_copying_target(lambda n, d: n - d)
    Not yet: for n = ... There stood the present character; what is wanted is what came next.
    """
    FORMULAS["copying-target"].check(formula)


def check_share_back(formula: Callable[..., float]) -> None:
    """Test `formula(whole, cut, now)` for the share of a peak's factor that is back after a cut.

    >>> check_share_back(lambda whole, cut, now: now / whole)
    Not yet: for whole = ... Right after the cut nothing is back, and your share is not zero there.
    """
    FORMULAS["share-back"].check(formula)


def check_massive_share(formula: Callable[..., float]) -> None:
    """Test `formula(state)` for the share of its largest dimension in a state's squared length.

    >>> check_massive_share(lambda state: abs(state).max() / abs(state).sum())
    Not yet: for state = ... Lengths add up by their squares.
    """
    FORMULAS["massive-share"].check(formula)


def check_standard_errors(formula: Callable[..., float]) -> None:
    """Test `formula(rises)` for how many standard errors their mean lies above zero.

    >>> check_standard_errors(lambda rises: rises.mean() / rises.std(ddof=1))
    Not yet: for rises = ... That is in units of how far single texts lie apart; ...
    """
    FORMULAS["standard-errors"].check(formula)
