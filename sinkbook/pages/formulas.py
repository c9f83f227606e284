"""Formulas that a reader is asked for: a line on the page to type one into, and what it is told.

A `Formula` is tried on numbers, in a notebook by `check` and on a page by `_static/questions`,
which reads arithmetic and nothing else. Nothing is compared symbol by symbol: any formula that
gives the numbers is right.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from html import escape

import numpy as np

from sinkbook.pages.scripts import carried

CASES = 8  # sets of numbers that a formula is tried on
# What is read beside numbers and names, for those who wonder how to write it.
SIGNS = "+ - * / **, @ to multiply two lists and add up, exp log sqrt sum mean max min len"
TOLERANCE = {"rtol": 1e-5, "atol": 1e-8}  # those of the page's script as well

Value = float | int | np.ndarray


@dataclass(frozen=True)
class Formula:
    """What is asked for, and how an answer is tried.

    `case(rng)` draws what the formula is given, in the order of `names`, and computes what it
    should give. `mistakes` are formulas that readers come up with, by what to tell them.
    """

    says: str  # what the line on the page begins with: "C ="
    names: dict[str, str]  # of what is given, each with what it is, in words
    case: Callable[[np.random.Generator], tuple[tuple, Value]]
    mistakes: dict[str, Callable[..., Value]]
    right: str

    @cached_property
    def cases(self) -> list[tuple[tuple, Value]]:
        """Sets of numbers, each with what the formula should give; the same ones every time."""
        return [self.case(np.random.default_rng(seed)) for seed in range(CASES)]

    def check(self, candidate: Callable[..., Value]) -> None:
        """Print whether a formula is right; if not, numbers for which it is wrong, and a hint."""
        wrong = next((c for c in self.cases if not _agree(candidate(*c[0]), c[1])), None)
        if wrong is None:
            print(f"Right: {self.right}")
            return
        given, truth = wrong
        numbers = ", ".join(
            f"{n} = {_shown(value)}" for n, value in zip(self.names, given, strict=True)
        )
        yours = f"yours gives {_shown(candidate(*given))}, it should be {_shown(truth)}"
        hints = [hint for hint, mistake in self.mistakes.items() if self._same(candidate, mistake)]
        print(" ".join([f"Not yet: for {numbers} {yours}.", *hints[:1]]))

    def _same(self, candidate: Callable[..., Value], mistake: Callable[..., Value]) -> bool:
        return all(_agree(candidate(*given), mistake(*given)) for given, _ in self.cases)

    def html(self, name: str) -> str:
        """A line to type into, with the numbers to try an answer on; a page's script shows it."""
        data = {
            "names": list(self.names),
            "cases": [
                {
                    "given": [_plain(value) for value in given],
                    "truth": _plain(truth),
                    "mistakes": [_plain(mistake(*given)) for mistake in self.mistakes.values()],
                }
                for given, truth in self.cases
            ],
            "hints": list(self.mistakes),
            "right": self.right,
        }
        given = "; ".join(f"<code>{n}</code>: {escape(what)}" for n, what in self.names.items())
        field = (
            f'<input id="formula-{name}" type="text" maxlength="300" autocomplete="off" '
            f'autocapitalize="off" spellcheck="false" aria-describedby="formula-{name}-given">'
        )
        return (
            f'<div class="sinkbook-formula" data-formula="{name}" hidden><form>'
            f'<label for="formula-{name}">{escape(self.says)}</label>{field}'
            '<button type="submit">Check</button></form>'
            f'<p class="formula-given" id="formula-{name}-given">{given}. Write {SIGNS}.</p>'
            '<p class="formula-says" role="status"></p>'
            f'<script type="application/json">{carried(data)}</script></div>'
        )


def _agree(value: Value, truth: Value) -> bool:
    return np.shape(value) == np.shape(truth) and np.allclose(value, truth, **TOLERANCE)


def _plain(value: Value) -> float | list[float]:
    """Numbers as JSON has them, with the digits that the comparison needs."""
    return np.vectorize(lambda number: float(f"{number:.9g}"))(value).tolist()


def _shown(value: Value) -> str:
    """Four digits of a number, or of each in a list.

    >>> _shown(np.array([1.0, 2 / 3]))
    '[1, 0.6667]'
    """
    if np.ndim(value):
        return f"[{', '.join(map(_shown, value))}]"
    return f"{value:.4g}"
