"""What a measurement of a language model comes to: tables by head, layer and token, and a verdict.

Works on what `report.probe` returns: a dataset of `sinkbook.measure` with the tokens beside it.
Layers and heads count from 0; norms that a model does not have are NaN, and are not spoken of.
"""

from dataclasses import dataclass

import numpy as np
import pandas as pd
import xarray as xr
from jaxtyping import Float

from sinkbook.annotations import check_arguments
from sinkbook.errors import NotFiniteError
from sinkbook.probe.metrics import (
    THRESHOLD,
    above_null,
    residual_peak_ratio,
    sink_rate,
    value_drain_ratio,
)

DRAINED, PEAKED = 0.5, 3.0  # ratios to the other tokens from which on the verdict says so
LEAST_QUERIES = 16  # fewer queries say little about a key near the end of a text

ABOVE_NULL = (
    "share of heads that give the first token more than 95 % of what the layer's heads give other "
    "early positions, in units of an even spread"
)
HEAD_COLUMNS = {
    "sink_attention": "mean attention on the sink token",
    "sink_rate": f"share of the texts in which that exceeds {THRESHOLD}",
    "above_null": "share of the texts in which the sink token gets more than 95 % of what the "
    "layer's heads give other early positions, in units of an even spread",
    "sink_logit": "logit of the sink token above the mean of the other visible keys",
    "attention_entropy": "mean entropy of an attention row, nats",
    "value_drain_ratio": "norm of the sink token's value state over the mean of the others'",
    "head_output_norm": "mean norm of the head's write to the residual stream",
}
LAYER_COLUMNS = (
    "layer",
    "sink rate",
    "above null",
    "strongest heads",
    "value ratio",
    "residual ratio",
    "largest entry",
)


@check_arguments
def head_table(result: xr.Dataset) -> pd.DataFrame:
    """One row per layer and head: means over texts of what `HEAD_COLUMNS` describes."""
    attention = result.sink_attention
    columns = xr.Dataset(
        {
            "sink_attention": attention,
            "sink_rate": (attention > THRESHOLD).where(attention.notnull()),
            "above_null": above_null(result),
            "sink_logit": result.sink_logit,
            "attention_entropy": result.attention_entropy,
            "value_drain_ratio": value_drain_ratio(result),
            "head_output_norm": result.head_output_norm,
        }
    )
    table = (
        columns.astype(float).mean("batch").to_dataframe(dim_order=("layer", "head")).reset_index()
    )
    # Some layers have no attention, and some fewer heads than others.
    return table[["layer", "head", *HEAD_COLUMNS]].dropna(
        subset="sink_attention", ignore_index=True
    )


def drained(result: xr.Dataset) -> pd.DataFrame:
    """The rows of `head_table` that have a value ratio to show on a logarithmic axis."""
    table = head_table(result)
    return table[table.value_drain_ratio > 0].reset_index(drop=True)


@check_arguments
def layer_table(result: xr.Dataset, strongest: int = 2) -> pd.DataFrame:
    """One row per layer.

    - `sink_rate`: share of the layer's heads that are sinks, mean over texts.
    - `above_null`: the same share by the layer's own null in place of a threshold.
    - `strongest`: the heads with most attention on the sink token, a list of (head, attention).
    - `value_drain_ratio`: the median over heads of the drain ratio.
    - `residual_peak_ratio`: the sink token's residual norm after the layer over the median of the
      other tokens', median over texts.
    - `residual_max_abs`: the largest magnitude in any token's residual state after the layer.
    - `attends`: whether the layer has softmax attention. Mamba's and linear attention are none.
    """
    heads = head_table(result).groupby("layer")
    table = pd.DataFrame(
        {
            "sink_rate": sink_rate(result).mean("batch").to_series(),
            "above_null": heads.above_null.mean(),
            "value_drain_ratio": heads.value_drain_ratio.median(),
            "residual_peak_ratio": median_peak_ratio(result).values[1:],
            "residual_max_abs": result.residual_max_abs.max(("batch", "position")).values[1:],
            "attends": result.attention_entropy.notnull().any(("batch", "head")).to_series(),
        }
    )
    largest = {}
    for layer, group in heads:
        rows = group.nlargest(strongest, "sink_attention")
        largest[layer] = list(zip(rows["head"], rows["sink_attention"], strict=True))
    table["strongest"] = [largest.get(layer, []) for layer in table.index]
    return table


def strongest_heads(row: pd.Series, separator: str) -> str:
    """A row of `layer_table` in words: the strongest heads, or that there are none to measure."""
    heads = [f"{head:2} ({attention:.2f})" for head, attention in row.strongest]
    return separator.join(heads) or ("" if row.attends else "no softmax attention")


@check_arguments
def median_peak_ratio(result: xr.Dataset) -> Float[xr.DataArray, " residual_layer"]:
    """`residual_peak_ratio`, median over texts."""
    return residual_peak_ratio(result).astype(float).median("batch")


def residual_trace(result: xr.Dataset) -> dict[str, Float[xr.DataArray, "batch residual_layer"]]:
    """Norms of the residual states by layer: of the sink token, and of the others."""
    norm = result.residual_norm
    others = norm.where(norm.position != norm.sink)
    return {
        "first token": norm.sel(position=norm.sink).drop_vars("position"),
        "largest other token": others.max("position"),
        "median token": others.median("position"),
    }


@dataclass(frozen=True)
class Peak:
    """Where the sink token's residual state grows, and where it shrinks again."""

    ratio: float  # the largest ratio of its norm to the other tokens' median
    written: range  # layers that bring its norm from a tenth of the largest to half of it or more
    erased: range  # layers that bring it from there to its later level; empty: it stays
    final: float  # the ratio after the last layer

    def __str__(self) -> str:
        written = f"written in {_layers(self.written)}" if self.written else "from the embedding on"
        end = "still there at the end"
        if self.erased:
            end = f"erased in {_layers(self.erased)} (to {_ratio(self.final)} times)"
        return f"peaks at {_ratio(self.ratio)} times the median, {written} and {end}"


@check_arguments
def residual_peak(result: xr.Dataset) -> Peak | None:
    """The peak of the sink token's residual state; None where it has none or no norm is known."""
    ratio = median_peak_ratio(result).values
    if not np.nanmax(ratio, initial=0) >= PEAKED:
        return None
    norm = residual_trace(result)["first token"].median("batch").values
    high = np.flatnonzero(norm >= norm.max() / 2)
    first = np.flatnonzero(norm >= norm.max() / 10)[0]
    later = norm[high[-1] + 1 :]
    settled = np.flatnonzero(later <= 1.25 * later.min()) if later.size else [-1]
    return Peak(
        ratio=float(np.nanmax(ratio)),
        written=range(max(first - 1, 0), high[0]),
        erased=range(high[-1], high[-1] + settled[0] + 1),
        final=float(ratio[-1]),
    )


@check_arguments
def sink_positions(result: xr.Dataset, count: int = 10) -> pd.DataFrame:
    """The tokens that are sinks of some head, the first one and others, most heads first.

    A token at a position is a sink of a head whose `key_importance` there exceeds the threshold.
    Tokens that read the same are put together, but for the sink token itself. Columns: `token`,
    `texts` in how many it is a sink, the range of its `positions`, the mean number of `heads` in
    these texts, the strongest (`layer`, `head`, `importance`), and `residual_peak_ratio`, its
    largest residual norm over that layer's median. Keys with too few queries after them are left
    out.
    """
    rows = []
    found = _sinks(result)
    for (first, token), group in found.groupby(["first", "token"]):
        strongest = group.loc[group.importance.idxmax()]
        low, high = group.position.min(), group.position.max()
        rows.append(
            {
                "first": first,
                "token": first_token(result) if first else repr(token),
                "texts": group.text.nunique(),
                "positions": str(low) if low == high else f"{low}-{high}",
                "heads": group.groupby("text").heads.sum().mean(),
                **strongest[["layer", "head", "importance"]],
                "residual_peak_ratio": group.residual_peak_ratio.median(),
            }
        )
    columns = ["first", "token", "texts", "positions", "heads", "layer", "head", "importance"]
    table = pd.DataFrame(rows, columns=[*columns, "residual_peak_ratio"]).astype({"first": bool})
    order = ["first", "texts", "heads"]
    return table.sort_values(order, ascending=False, ignore_index=True).head(count)


def _sinks(result: xr.Dataset) -> pd.DataFrame:
    """One row per text and position that is a sink of some head."""
    length = result.sizes["position"]
    importance = result.key_importance.isel(
        position=slice(length - min(LEAST_QUERIES, length // 2))
    ).transpose("batch", "position", "layer", "head")
    norm = result.residual_norm
    median = norm.where(norm.position != norm.sink).median("position")
    ratio = (norm / median).max("residual_layer").transpose("batch", "position").values
    heads = (importance > THRESHOLD).sum(("layer", "head")).values
    rows = []
    for text, position in np.argwhere(heads):
        at_key = importance.values[text, position]
        layer, head = np.unravel_index(np.nanargmax(at_key), at_key.shape)
        first = bool(position == result.sink.values[text])
        token = "" if first else str(result.token.values[text, position])
        strongest = (layer, head, at_key[layer, head])
        count, peak = heads[text, position], ratio[text, position]
        rows.append((first, token, text, position, count, *strongest, peak))
    columns = ["first", "token", "text", "position", "heads", "layer", "head", "importance"]
    return pd.DataFrame(rows, columns=[*columns, "residual_peak_ratio"])


def first_token(result: xr.Dataset) -> str:
    """The token that every text begins with, or words for it where they differ."""
    token = same_first_token(result)
    return "the first token" if token is None else repr(token)


def same_first_token(result: xr.Dataset) -> str | None:
    """The token that every text begins with; None where they differ."""
    first = {str(token) for token in result.token.sel(position=result.sink).values}
    return first.pop() if len(first) == 1 else None


def drain(heads: pd.DataFrame) -> float:
    """The median drain ratio of those rows of `head_table` that are sinks; of all if none is."""
    sinks = _sink_heads(heads)
    return (sinks if len(sinks) else heads).value_drain_ratio.median()


def _sink_heads(heads: pd.DataFrame) -> pd.DataFrame:
    return heads[heads.sink_attention > THRESHOLD]


def has_sinks(result: xr.Dataset) -> bool:
    """Whether some head is a sink in some text."""
    return bool((result.sink_attention > THRESHOLD).any())


@check_arguments
def verdict(result: xr.Dataset) -> str:
    """Sinks, drain and peak in one sentence.

    Raises `NotFiniteError` for measurements that are NaN or infinite in places.
    """
    _check_finite(result)
    heads = head_table(result)
    rate = heads.sink_rate.mean()
    sinks = _sink_heads(heads)
    subject = f"{_percent(rate)} of the heads are sinks" if rate else "no head is a sink"
    parts = [f"{subject} on the first token (mean attention above {THRESHOLD})"]
    level = drain(heads)
    where = " in these heads" if len(sinks) else ""
    if np.isfinite(level):
        words = f"{level:.2f} of the others'{where}"
        drained = f"drained to {words}" if level < DRAINED else f"not drained ({words})"
        parts.append(f"its value is {drained}")
    ratio = median_peak_ratio(result).values
    if np.isfinite(ratio).any():
        peak = residual_peak(result)
        flat = f"does not peak (at most {_ratio(np.nanmax(ratio))} times the median)"
        parts.append(f"its residual state {peak or flat}")
    first, *rest = parts
    sentence = f"{first}; {' and '.join(rest)}." if rest else f"{first}."
    return sentence[0].upper() + sentence[1:]


def _check_finite(result: xr.Dataset) -> None:
    """Windows have no padding: a head, or a layer, has all of its numbers or none."""
    for name in ("sink_attention", "value_norm", "head_output_norm", "residual_norm"):
        values = result[name]
        over = [dim for dim in values.dims if dim in ("batch", "position")]
        known = np.isfinite(values)
        missing = ~known & ~values.isnull().all(over)
        if missing.any():
            first = np.argwhere(missing.transpose(*values.dims).values)[0].tolist()
            place = dict(zip(values.dims, first, strict=True))
            where = ", ".join(f"{dim.replace('_', ' ')} {at}" for dim, at in place.items())
            raise NotFiniteError(
                f"{name} is {values.isel(place).item()} at {where}, and there is no verdict on a "
                "model whose numbers are not all there. Its weights are damaged, or its training "
                "has diverged: load it afresh, or in float32."
            )


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share >= 0.01 else "less than 1 %"


def _ratio(ratio: float) -> str:
    return f"{ratio:.0f}" if ratio >= 10 else f"{ratio:.1f}"


def _layers(layers: range) -> str:
    if len(layers) == 1:
        return f"layer {layers[0]}"
    return f"layers {layers[0]}-{layers[-1]}"
