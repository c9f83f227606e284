"""What the largest number in the residual states leaves: room in float16, steps of eight bits.

Works on what `report.probe` returns. The states are those between the layers, the embedding and the
last one included; what a layer holds inside is not seen here, and can be larger.
"""

from dataclasses import asdict, dataclass

import numpy as np
import xarray as xr
from jaxtyping import Float

from sinkbook.annotations import check_arguments
from sinkbook.mitigations.quantization import STEPS

FLOAT16 = 65504.0  # the largest finite number
TIGHT = 2.0  # a factor below which another text may overflow
FEW_STEPS = 16.0  # four bits beside the sign


@dataclass(frozen=True)
class Largest:
    """The entry of largest magnitude among the residual states, and what it leaves to the others.

    `residual_layer` counts the layers passed, 0 for the embedding. `float16_factor` is 65,504 over
    the magnitude. `int8_steps` is for the tensor that holds it, one text's states after that layer,
    in one range for the whole tensor: how many of the 127 steps of either sign the largest entry of
    the median other token gets. NaN where there is no other token.
    """

    magnitude: float
    residual_layer: int
    text: int
    position: int
    token: str
    is_first: bool  # the first token, which is the sink that is measured
    float16_factor: float
    int8_steps: float


@dataclass(frozen=True)
class Headroom:
    """The largest entry of all, and the same with every text's first token apart."""

    all_tokens: Largest
    first_token_apart: Largest
    # In the tensor that holds the largest entry of all, once the first token has its own range.
    int8_steps_there: float

    def row(self) -> dict:
        """As plain data."""
        return asdict(self)


@check_arguments
def headroom(result: xr.Dataset) -> Headroom | None:
    """The headroom of a measurement with `residual_max_abs` and `token`.

    None where it is not known: models with several residual streams have no one state to look at.
    """
    size = _sizes(result)
    if np.isnan(size).any():
        return None
    first = np.asarray(result.sink.values)
    apart = size.copy()
    apart[np.arange(len(size)), :, first] = np.nan
    if np.isnan(apart).all():
        return None  # texts of one token
    everything = _largest(result, size)
    return Headroom(
        all_tokens=everything,
        first_token_apart=_largest(result, apart),
        int8_steps_there=_steps(apart[everything.text, everything.residual_layer]),
    )


def _sizes(result: xr.Dataset) -> Float[np.ndarray, "text residual_layer position"]:
    size = result.residual_max_abs.transpose("batch", "residual_layer", "position")
    return size.values.astype(np.float64)


def _largest(
    result: xr.Dataset, size: Float[np.ndarray, "text residual_layer position"]
) -> Largest:
    """The largest of sizes, of which those that are NaN do not count."""
    text, layer, position = (int(i) for i in np.unravel_index(np.nanargmax(size), size.shape))
    magnitude = float(size[text, layer, position])
    return Largest(
        magnitude=magnitude,
        residual_layer=layer,
        text=text,
        position=position,
        token=str(result.token.values[text, position]),
        is_first=position == int(result.sink.values[text]),
        float16_factor=FLOAT16 / magnitude if magnitude else float("inf"),
        int8_steps=_steps(size[text, layer]),
    )


def _steps(size: Float[np.ndarray, " position"]) -> float:
    """Of 127 steps up to the largest entry, those up to the median other token's largest."""
    known = np.sort(size[~np.isnan(size)])
    if len(known) < 2 or not known[-1]:
        return float("nan")
    return STEPS * float(np.median(known[:-1])) / float(known[-1])


# --- In words --------------------------------------------------------------------------------


UNKNOWN = (
    "Headroom is unknown: this model has no one residual state whose largest entry could be read."
)
COLUMNS = ("residual states of", "largest entry", "where", "left in float16", "int8 steps")
NOTE = (
    f"Left in float16: how many times the largest entry fits below {FLOAT16:,.0f}. Int8 steps: "
    "with one range for the tensor that holds it, how many of 127 the largest entry of the median "
    "other token gets. Between the layers only: inside of a layer there can be larger numbers."
)


def rows(known: Headroom) -> list[tuple[str, str, str, str, str]]:
    """The table that `COLUMNS` heads, one row with the first token and one without."""
    return [
        (
            words,
            magnitude(largest.magnitude),
            place(largest),
            f"{magnitude(largest.float16_factor)} times"
            if largest.float16_factor >= 1
            else "overflows",
            f"{magnitude(largest.int8_steps)} of {STEPS}",
        )
        for words, largest in (
            ("all tokens", known.all_tokens),
            ("all but the first", known.first_token_apart),
        )
    ]


def magnitude(value: float) -> str:
    """Three digits, or whole numbers with their thousands apart; – for what is not known.

    >>> magnitude(16342.7), magnitude(4.0081), magnitude(0.01234), magnitude(float("nan"))
    ('16,343', '4.01', '0.0123', '–')
    """
    if np.isnan(value):
        return "–"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def after(residual_layer: int) -> str:
    """Where a residual state stands between the layers, which count from 0."""
    return f"after layer {residual_layer - 1}" if residual_layer else "in the embedding"


def place(largest: Largest) -> str:
    """Layer and token of an entry in words."""
    return f"{after(largest.residual_layer)}, token {largest.token!r} ({largest.position})"


def sentence(known: Headroom | None) -> str:
    """Float16 and eight bits in one sentence."""
    if known is None:
        return UNKNOWN
    everything, apart = known.all_tokens, known.first_token_apart
    factor = everything.float16_factor
    room = f"{magnitude(factor)} times below float16's limit" if factor >= 1 else "beyond float16"
    text = (
        f"The largest residual entry is {magnitude(everything.magnitude)}, {place(everything)}: "
        f"{room}"
    )
    if np.isfinite(everything.int8_steps):
        text += (
            f". It leaves the median other token {magnitude(everything.int8_steps)} of {STEPS} "
            f"steps of an int8 range"
        )
        if np.isfinite(known.int8_steps_there):
            text += f", with the first token apart {magnitude(known.int8_steps_there)}"
    text += f". Without the first token the largest is {magnitude(apart.magnitude)}, {place(apart)}"
    if np.isfinite(apart.int8_steps):
        text += f", which leaves the others {magnitude(apart.int8_steps)} steps"
    return f"{text}."


def advice(known: Headroom | None, has_sinks: bool) -> str:
    """What to do about it, in one sentence; the book's chapter 11 tells why."""
    to_do = []
    if known is not None and known.all_tokens.float16_factor < TIGHT:
        to_do.append("compute in bfloat16 or float32 rather than in float16")
    if has_sinks:
        to_do.append("keep one first token in a cache that drops old ones")
    if known is not None and known.all_tokens.int8_steps < FEW_STEPS:
        to_do.append("give int8 activations one range per token")
    if has_sinks:
        to_do.append("do not cut heads of the first layers because they write little")
    if not to_do:
        return "Nothing that was measured here asks for care with caches, int8 or pruning."
    *others, last = to_do
    joined = f"{', '.join(others)}, and {last}" if others else last
    return f"What to do (chapter 11): {joined}."
