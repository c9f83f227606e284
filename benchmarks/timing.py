"""Ratios of times that were taken in turn, in one process, so that both saw the same machine."""

import statistics
import time
from collections.abc import Callable


def alternate(passes: dict[str, Callable], repetitions: int) -> dict[str, list[float]]:
    """CPU seconds of each pass, which other work on the machine does not disturb; one round that
    does not count comes first."""
    seconds = {name: [] for name in passes}
    for repetition in range(repetitions + 1):
        for name, run in passes.items():
            start = time.process_time()
            run()
            if repetition:
                seconds[name].append(time.process_time() - start)
    return seconds


def row(
    name: str,
    measured: list[float],
    reference: list[float],
    bound: float,
    *,
    at_least: bool = False,
) -> dict:
    """Median over median, the bound it must keep to, and the spread of the repetitions' ratios.

    `at_least` is for ratios that must not be smaller than their bound.
    """
    each = [one / other for one, other in zip(measured, reference, strict=True)]
    ratio = statistics.median(measured) / statistics.median(reference)
    return {
        "name": name,
        "ratio": round(ratio, 4),
        "bound": bound,
        "holds": ratio >= bound if at_least else ratio <= bound,
        "n": len(each),
        "spread": round(max(each) - min(each), 4),
    }
