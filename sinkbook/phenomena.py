"""The three extreme-token phenomena and the two risks of a toy model, in one dataset."""

from contextlib import nullcontext

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float, Int
from torch import Tensor

from sinkbook.interventions import zero
from sinkbook.probe import measure
from sinkbook.runs import Run
from sinkbook.tasks import Risks, Task
from sinkbook.transformer import Transformer


def measure_toy(model: Transformer, task: Task, tokens: Int[Tensor, "text position"]) -> xr.Dataset:
    """The three extreme-token phenomena and the two risks of a toy model, on given texts.

    The sink token is position 0. Its own query, and keys that a query cannot see, never count.
    Variables, with `layer`, `head` and, for residual states, `residual_layer` dimensions:

    - `backcopy_risk`, `bigram_risk`, `backcopy_excess`, `bigram_excess`: nats.
    - `sink_attention`, `sink_attention_triggers`: mean attention on the sink token, over queries
      that are not triggers, and over those that are.
    - `sink_logit_by_token`: Δlogit of the paper, averaged over the occurrences of each token id.
    - `value_norm`, `other_value_norm`: of the sink token; mean over other non-triggers.
    - `residual_norm`, `other_residual_norm`: of the sink token; median over other tokens.
    - `residual_peak`: norm at the sink token minus the mean over other tokens, the peak's height.
    """
    with torch.no_grad():
        risks = task.risks(model(tokens), tokens)
    probed = measure(
        model,
        tokens,
        ("sink_attention_by_query", "sink_logit_by_query", "value_norm", "residual_norm"),
    )
    triggers = xr.DataArray(task.at_triggers(tokens).cpu().numpy(), dims=("batch", "position"))
    later = xr.DataArray(np.arange(tokens.shape[1]) > 0, dims="position")
    ordinary = later & ~triggers
    over_texts = ("batch", "position")
    token = xr.DataArray(tokens.cpu().numpy(), dims=over_texts, name="token")
    attention, value = probed.sink_attention_by_query, probed.value_norm
    residual = probed.residual_norm
    others = residual.where(later)
    sink_residual = residual.isel(position=0).mean("batch")
    by_token = _mean_by(probed.sink_logit_by_query.where(later), token, task.vocab_size)
    return xr.Dataset(
        {
            **{name: risk.item() for name, risk in _named(risks).items()},
            "sink_attention": attention.where(ordinary).mean(over_texts),
            "sink_attention_triggers": attention.where(triggers & later).mean(over_texts),
            "sink_logit_by_token": by_token,
            "value_norm": value.isel(position=0).mean("batch"),
            "other_value_norm": value.where(ordinary).mean(over_texts),
            "residual_norm": sink_residual,
            "other_residual_norm": others.median(over_texts),
            "residual_peak": sink_residual - others.mean(over_texts),
        }
    )


def excess_risks(
    runs: list[Run], *, without: str | None = None, layer: int = 0
) -> dict[str, Float[np.ndarray, " seed"]]:
    """Excess backcopy and bigram risk of every run, in nats, whole or with a part cut.

    `without` is "attention" or "mlp", whose output in `layer` is set to zero (Figure 4a of
    arXiv 2410.13835).
    """
    found = []
    for run in runs:
        cut = zero(run.model, without, layer=layer) if without else nullcontext()
        with cut, torch.no_grad():
            found.append(run.task.risks(run.model(run.evaluation_tokens), run.evaluation_tokens))
    return {
        "backcopy": np.array([risks.backcopy_excess.item() for risks in found]),
        "bigram": np.array([risks.bigram_excess.item() for risks in found]),
    }


def _named(risks: Risks) -> dict[str, Tensor]:
    names = {"backcopy": "backcopy_risk", "bigram": "bigram_risk"}
    return {names.get(name, name): value for name, value in risks._asdict().items()}


def _mean_by(values: xr.DataArray, token: xr.DataArray, vocab_size: int) -> xr.DataArray:
    """Mean over texts and positions for each token id; NaN for ids that do not occur."""
    values = values.transpose("layer", "head", "batch", "position")
    array, ids = values.values.reshape(*values.shape[:2], -1), token.values.reshape(-1)
    sums = np.zeros((*array.shape[:2], vocab_size))
    counts = np.zeros_like(sums)
    for index in np.ndindex(array.shape[:2]):
        known = np.isfinite(array[index])
        counts[index] = np.bincount(ids[known], minlength=vocab_size)
        sums[index] = np.bincount(ids[known], array[index][known], minlength=vocab_size)
    with np.errstate(invalid="ignore"):
        means = sums / counts
    return xr.DataArray(means, dims=("layer", "head", "token"))
