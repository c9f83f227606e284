"""Criteria: what a number has to meet, as `book/claims.yml` writes it."""

import math
import operator
import re
from numbers import Real

from sinkbook.arguments import check_kind
from sinkbook.errors import SinkbookError

COMPARISONS = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}
_NUMBER = r"[-+]?\d+(?:\.\d+)?(?:e[-+]?\d+)?"
_BOUND = re.compile(rf"(>=|<=|>|<)\s*({_NUMBER})")
_RANGE = re.compile(rf"in\s*\[\s*({_NUMBER})\s*,\s*({_NUMBER})\s*\]")


def limits(criterion: str) -> tuple[float, float]:
    """From where to where a criterion reaches; infinite where it is open.

    >>> limits(">= 0.7"), limits("in [0.3, 3]")
    ((0.7, inf), (0.3, 3.0))
    """
    check_kind("criterion", criterion, str)
    if bound := _BOUND.fullmatch(criterion.strip()):
        at = float(bound[2])
        return (at, math.inf) if ">" in bound[1] else (-math.inf, at)
    both = _RANGE.fullmatch(criterion.strip())
    if both and float(both[1]) <= float(both[2]):
        return float(both[1]), float(both[2])
    raise SinkbookError(
        f"no way to judge by {criterion!r}. Write a criterion as '>= 0.7', '<= 0.35', '> 2', "
        "'< 0.02' or 'in [0.3, 3]'."
    )


def satisfies(criterion: str, value: float) -> bool:
    """Whether one number meets a criterion: `>= 0.7`, `<= 1`, `> 2`, `< 0.02` or `in [0.3, 3]`.

    A number that is not finite meets none. Another form of criterion raises `SinkbookError`.

    >>> satisfies(">= 0.7", 0.78), satisfies("in [0.3, 3]", 4.0), satisfies("< 1", float("nan"))
    (True, False, False)
    """
    check_kind("value", value, Real)
    low, high = limits(criterion)
    if bound := _BOUND.fullmatch(criterion.strip()):
        return math.isfinite(value) and COMPARISONS[bound[1]](value, float(bound[2]))
    return low <= value <= high


def in_words(criterion: str) -> str:
    """A criterion for readers.

    >>> in_words("in [0.3, 3]"), in_words(">= 0.7"), in_words("in [0, 0]")
    ('between 0.3 and 3', '≥ 0.7', 'exactly 0')
    """
    if both := _RANGE.fullmatch(criterion.strip()):
        low, high = limits(criterion)
        return f"exactly {both[1]}" if low == high else f"between {both[1]} and {both[2]}"
    return criterion.replace(">=", "≥").replace("<=", "≤")
