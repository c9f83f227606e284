"""The numbers that a report comes to, by name: as one JSON object, and held against conditions.

Works on what `report.probe` returns. What is not known of a model is NaN here and null in JSON,
and no condition can be held against it.
"""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import xarray as xr

from sinkbook.annotations import check_arguments
from sinkbook.arguments import check_known
from sinkbook.criteria import COMPARISONS
from sinkbook.errors import SinkbookError
from sinkbook.report import summary
from sinkbook.report.headroom import Headroom, advice, headroom

QUANTITIES = {
    "sink_rate": "share of the heads that are sinks on the first token, mean over texts",
    "sink_rate_above_null": f"{summary.ABOVE_NULL}, mean over texts",
    "strongest_sink_attention": "mean attention on the first token of the head with most of it",
    "value_drain_ratio": "value norm of the first token over the others': median over the heads "
    "that are sinks, over all where none is",
    "residual_peak_ratio": "residual norm of the first token over the others' median, after the "
    "layer where it is largest",
    "largest_magnitude": "largest entry of any residual state",
    "float16_factor": "65,504 over that",
    "int8_steps": "of 127, what it leaves to the largest entry of the median other token",
    "largest_magnitude_apart": "largest entry of any residual state but the first token's",
    "float16_factor_apart": "65,504 over that",
    "int8_steps_apart": "of 127, what that one leaves, in the tensor that holds it",
}
_CONDITION = re.compile(r"\s*([\w-]+)\s*(<=|>=|<|>)\s*([-+.\w]+)\s*")


@check_arguments
def quantities(result: xr.Dataset) -> dict[str, float]:
    """A number for each name in `QUANTITIES`; NaN for what is not known."""
    heads = summary.head_table(result)
    ratio = summary.median_peak_ratio(result).values
    room = headroom(result)
    found = {
        "sink_rate": heads.sink_rate.mean(),
        "sink_rate_above_null": heads.above_null.mean(),
        "strongest_sink_attention": heads.sink_attention.max(),
        "value_drain_ratio": summary.drain(heads),
        "residual_peak_ratio": np.nan if np.isnan(ratio).all() else np.nanmax(ratio),
    }
    for name, largest in _headrooms(room):
        found |= {
            f"largest_magnitude{name}": np.nan if largest is None else largest.magnitude,
            f"float16_factor{name}": np.nan if largest is None else largest.float16_factor,
            f"int8_steps{name}": np.nan if largest is None else largest.int8_steps,
        }
    return {name: float(found[name]) for name in QUANTITIES}


def _headrooms(room: Headroom | None):
    return (
        ("", room and room.all_tokens),
        ("_apart", room and room.first_token_apart),
    )


@check_arguments
def plain(result: xr.Dataset) -> dict:
    """A report as data that JSON can hold: model, texts, verdict, numbers, headroom, and how."""
    room, heads = headroom(result), summary.head_table(result)
    strongest = heads.loc[heads.sink_attention.idxmax()]
    attrs = result.attrs
    return without_nan(
        {
            "model": attrs["model"],
            "weights": attrs["weights"],
            "texts": {
                "about": attrs["texts"],
                "count": result.sizes["batch"],
                "length": result.sizes["position"],
                "first_token": summary.same_first_token(result),
            },
            "verdict": summary.verdict(result),
            "advice": advice(room, summary.has_sinks(result)),
            "numbers": quantities(result),
            "headroom": None if room is None else room.row(),
            "strongest_head": {
                "layer": int(strongest.layer),
                "head": int(strongest["head"]),
                "sink_attention": float(strongest.sink_attention),
                "value_drain_ratio": float(strongest.value_drain_ratio),
            },
            "threshold": summary.THRESHOLD,
            "measured": {
                name: attrs[name]
                for name in ("command", "route", "dtype", "device", "seconds", "sinkbook", "torch")
            },
        }
    )


def without_nan(data):
    """The same with None for numbers that are not finite, which JSON does not have.

    >>> without_nan({"a": [1.5, float("nan")], "b": float("inf")})
    {'a': [1.5, None], 'b': None}
    """
    if isinstance(data, dict):
        return {name: without_nan(value) for name, value in data.items()}
    if isinstance(data, list | tuple):
        return [without_nan(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data


@dataclass(frozen=True)
class Condition:
    """A quantity, a comparison and a bound, such as `sink_rate<0.4`."""

    name: str
    comparison: str
    bound: float

    def __str__(self) -> str:
        return f"{self.name}{self.comparison}{self.bound:g}"


@check_arguments
def condition(text: str) -> Condition:
    """Read a condition: a name in `QUANTITIES`, one of `<`, `<=`, `>`, `>=`, and a number.

    Raises SinkbookError for anything else.

    >>> condition("sink_rate < 0.4")
    Condition(name='sink_rate', comparison='<', bound=0.4)
    """
    found = _CONDITION.fullmatch(text)
    try:
        bound = float(found[3]) if found else math.nan
    except ValueError:
        bound = math.nan
    if not math.isfinite(bound):
        raise SinkbookError(
            f"{text!r} is no condition. Write a name, one of {' '.join(COMPARISONS)} and a number, "
            "as in 'sink_rate<0.4'."
        )
    check_known("quantity", found[1], QUANTITIES)
    return Condition(found[1], found[2], bound)


@check_arguments
def met(result: xr.Dataset, conditions: Iterable[Condition]) -> list[str]:
    """The conditions that a measurement meets, each with the number that does.

    Raises SinkbookError for one about a quantity that is not known of this model.
    """
    values = quantities(result)
    met_ones = []
    for asked in conditions:
        value = values[asked.name]
        if math.isnan(value):
            raise SinkbookError(
                f"{asked.name} is not known of {result.attrs['model']!r}, so whether {asked} "
                "cannot be told. Ask for another quantity of this model."
            )
        if COMPARISONS[asked.comparison](value, asked.bound):
            met_ones.append(f"{asked} is so: {asked.name} is {value:.4g}")
    return met_ones
