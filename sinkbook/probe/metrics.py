"""What is derived from measurements and residual states: rates, ratios, outliers, kurtoses."""

import numpy as np
import xarray as xr
from jaxtyping import Bool, Float
from torch import Tensor

from sinkbook.annotations import check_arguments
from sinkbook.arguments import check_number
from sinkbook.errors import SinkbookError

THRESHOLD = 0.3  # mean attention above which a head has a sink: Gu et al., arXiv 2410.10781
ROUNDING = 1e-3  # of attention that is the same, relative

Hidden = Float[Tensor, "*batch position width"]


def check_measured(result: object, *names: str) -> None:
    """Refuse what is no dataset of `measure`, or lacks a variable that is needed."""
    if not isinstance(result, xr.Dataset):
        raise SinkbookError(
            f"a {type(result).__name__} is no measurement. Give the dataset that `measure` returns."
        )
    if missing := [name for name in names if name not in result]:
        raise SinkbookError(
            f"the measurement has no {missing[0]}. Measure again, with it among the `variables`."
        )


@check_arguments
def sink_rate(result: xr.Dataset, threshold: float = THRESHOLD) -> xr.DataArray:
    """Share of a layer's heads whose mean attention on the sink exceeds `threshold`.

    (batch, layer), NaN for layers without attention. Its mean is `Sink^threshold` of Gu et al.
    (arXiv 2410.10781), averaged over texts.
    """
    check_measured(result, "sink_attention")
    check_number("threshold", threshold, 0, 1)
    attention = result.sink_attention
    return (attention > threshold).where(attention.notnull()).mean("head")


@check_arguments
def above_null(result: xr.Dataset, level: float = 0.95) -> xr.DataArray:
    """Whether a head gives the sink more than heads of its layer give any position as old.

    1 or 0 over (batch, layer, head) of what `measure` gives, with `key_importance` and
    `even_importance` and without `queries`; NaN for layers without attention. Its mean over heads
    is a sink rate without a fixed threshold: where attention is spread, no token gets 0.3, and
    where it is sharp, many do, so the bar is the layer's own habit. What counts is attention
    received in units of an even spread over the same rows. A head has a sink if there it exceeds
    the quantile `level` of what all heads of the layer give, in all texts, to positions nearly as
    old as the sink: the eighth of the text that follows it, and 8 tokens at least. Were the sink
    one of these, about 1 - `level` of the heads would still have one.

    That thresholds need an empirical null is argued in arXiv 2606.02378; this one is our own.
    """
    check_measured(result, "key_importance", "even_importance")
    check_number("level", level, 0, 1)
    received = result.key_importance / result.even_importance
    age = result.position - result.sink
    length = result.key_importance.notnull().any(("layer", "head")).sum("position")
    null = received.where((age > 0) & (age <= np.maximum(length // 8, 8)))
    null = null.stack(draw=("batch", "head", "position"), create_index=False)
    known = null.notnull().any("draw")
    bar = null.where(known, 0.0).quantile(level, "draw")  # of layers that attend
    at_sink = received.sel(position=result.sink).drop_vars("position")
    above = at_sink > bar.drop_vars("quantile") * (1 + ROUNDING)
    return above.where(at_sink.notnull() & known).transpose("batch", "layer", "head")


@check_arguments
def value_drain_ratio(result: xr.Dataset, others: xr.DataArray | None = None) -> xr.DataArray:
    """The sink's value norm over the mean of the other tokens': below 1 where it is drained.

    (batch, layer, head) of what `measure` gives, with `value_norm`. `others`, a mask over (batch,
    position), chooses the tokens to compare with; the sink is never one of them. Measurements along
    a training hold the sink's norm as `value_norm` and the others' mean as `other_value_norm`;
    their ratio has the dimensions of these.
    """
    check_measured(result, "value_norm")
    if "other_value_norm" in result:
        return result.value_norm / result.other_value_norm
    at_sink, elsewhere = _apart(result.value_norm, others)
    return at_sink / elsewhere.mean("position")


@check_arguments
def residual_peak_ratio(result: xr.Dataset, others: xr.DataArray | None = None) -> xr.DataArray:
    """The sink's residual norm over the median of the other tokens': (batch, residual_layer).

    A median, since other tokens can have peaks of their own. `others`, and `other_residual_norm`
    of measurements along a training, as in `value_drain_ratio`.
    """
    check_measured(result, "residual_norm")
    if "other_residual_norm" in result:
        return result.residual_norm / result.other_residual_norm
    at_sink, elsewhere = _apart(result.residual_norm, others)
    return at_sink / elsewhere.median("position")


@check_arguments
def residual_peak_height(result: xr.Dataset, others: xr.DataArray | None = None) -> xr.DataArray:
    """The sink's residual norm minus the mean of the other tokens': (batch, residual_layer).

    The quantity whose growth arXiv 2410.13835 follows. `others` as in `value_drain_ratio`.
    """
    check_measured(result, "residual_norm")
    at_sink, elsewhere = _apart(result.residual_norm, others)
    return at_sink - elsewhere.mean("position")


def _apart(norm: xr.DataArray, others: xr.DataArray | None) -> tuple[xr.DataArray, xr.DataArray]:
    """A norm at the sink of each row, and at the other tokens."""
    elsewhere = norm.where(norm.position != norm.sink)
    if others is not None:
        elsewhere = elsewhere.where(others)
    return norm.sel(position=norm.sink).drop_vars("position"), elsewhere


@check_arguments
def massive_activations(
    hidden: Hidden, floor: float = 100.0, factor: float = 1000.0
) -> Bool[Tensor, "*batch position width"]:
    """Entries larger than `floor` and than `factor` times the text's median magnitude.

    Source: Sun et al., "Massive Activations in Large Language Models" (arXiv 2402.17762).
    """
    check_number("floor", floor, 0)
    check_number("factor", factor, 0)
    size = hidden.float().abs()
    median = size.flatten(-2).median(-1).values[..., None, None]
    return (size > floor) & (size > factor * median)


@check_arguments
def kurtosis_of_text(hidden: Hidden) -> Float[Tensor, "*batch"]:
    """Kurtosis of all entries of a text, positions and dimensions in one pool; 3 if Gaussian.

    Source: Bondarenko et al. (arXiv 2306.12929). Grows with outliers of either kind.
    """
    return _kurtosis(hidden.double().flatten(-2)).float()


@check_arguments
def kurtosis_of_tokens(hidden: Hidden) -> Float[Tensor, "*batch position"]:
    """Kurtosis over the dimensions of each token; 3 if Gaussian.

    Source: Kaul et al. (arXiv 2410.17174); Park et al. (arXiv 2506.19697) subtract 3. Tells the
    sink token from the others.
    """
    return _kurtosis(hidden.double()).float()


@check_arguments
def kurtosis_of_dimensions(hidden: Hidden) -> Float[Tensor, "*batch"]:
    """Fourth over squared second moment of the dimensions' root mean squares; 1 if all equal.

    Source: He et al. (arXiv 2405.19279). Grows with outlier dimensions, not with their signs.
    """
    square = hidden.double().square().mean(-2)  # over positions, for each dimension
    return (square.square().mean(-1) / square.mean(-1).square()).float()


def _kurtosis(values: Tensor) -> Tensor:
    deviation = values - values.mean(-1, keepdim=True)
    return deviation.pow(4).mean(-1) / deviation.square().mean(-1).square()
