"""Attention read off its weights, a few queries at a time, so that memory stays linear in T.

For what no fused kernel can be asked (`fused.py`): soft caps, biases, masks that are no spans,
kernels other than softmax, and weights that a model has formed itself.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sinkbook.probe.fused import NEVER
from sinkbook.probe.masks import Outputs, Scope, Spans, Values, blank, pairs

# A cache makes the keys more than the queries.
Queries = Float[Tensor, "batch head query width"]
Keys = Float[Tensor, "batch key_head key width"]

ENTRIES = 2**23  # weights that exist at one time (32 MiB in float32)


class Rows(NamedTuple):
    """Weights that have been formed, for some of the queries."""

    positions: Int[Tensor, " query"]
    logits: Float[Tensor, "batch head query key"]
    visible: Bool[Tensor, "batch head_or_1 query key"]
    weights: Float[Tensor, "batch head query key"]


def softmax_rows(
    query: Queries,
    key: Keys,
    scaling: float,
    visible: Spans | Bool[Tensor, "batch head_or_1 query key"],
    bias: Tensor | None = None,
    softcap: float | None = None,
    learned_sink: Float[Tensor, " head"] | None = None,
    queries: Int[Tensor, " asked"] | None = None,
) -> Iterator[Rows]:
    """Softmax attention formed outright, so few queries at a time that memory stays linear.

    Of all queries, or of those at the positions `queries`.
    """
    exact = torch.promote_types(query.dtype, torch.float32)
    batch, heads, length, _ = query.shape
    asked = torch.arange(length) if queries is None else queries
    step = max(1, ENTRIES // (batch * heads * key.shape[2]))
    for positions in asked.to(query.device).split(step):
        logits = logits_of(query, key, positions, scaling, bias, softcap)
        seen = pairs(visible, positions)
        masked = logits.masked_fill(~seen, NEVER)
        if learned_sink is not None:
            extra = learned_sink.to(exact)[:, None, None].expand(*masked.shape[:-1], 1)
            weights = torch.cat([masked, extra], dim=-1).softmax(-1)[..., :-1]
        else:
            weights = masked.softmax(-1)
        yield Rows(positions, logits, seen, weights)


def logits_of(
    query: Queries,
    key: Keys,
    positions: Int[Tensor, " asked"],
    scaling: float,
    bias: Tensor | None = None,
    softcap: float | None = None,
) -> Float[Tensor, "batch head asked key"]:
    """The logits of some queries, in float32 or wider, whatever the states come in."""
    exact = torch.promote_types(query.dtype, torch.float32)
    key = key.to(exact).repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    logits = scaling * query[:, :, positions].to(exact) @ key.mT
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return logits if bias is None else logits + bias[:, :, positions].to(exact)


def outputs_of(
    rows: Iterable[Rows], value: Float[Tensor, "batch key_head key value_width"]
) -> Float[Tensor, "batch head query value_width"]:
    """The head outputs of formed weights."""
    return torch.cat([_output(part, value) for part in rows], dim=2)


def _output(part: Rows, value: Tensor) -> Tensor:
    states = value.to(part.weights.dtype)
    states = states.repeat_interleave(part.weights.shape[1] // value.shape[1], dim=1)
    return (part.weights @ states).to(value.dtype)


def read_formed(
    rows: Iterable[Rows], value: Values, scope: Scope
) -> tuple[Outputs, dict[str, Tensor]]:
    """Head outputs and variables from `softmax_rows`, as `read_fused` gives them."""
    outputs = []

    def with_outputs() -> Iterator[Rows]:
        for part in rows:
            outputs.append(_output(part, value))
            yield part

    reading = read_rows(with_outputs(), scope)
    return torch.cat(outputs, dim=2), reading


def formed_rows(
    logits: Float[Tensor, "batch head query key"],
    visible: Spans | Bool[Tensor, "batch head_or_1 query key"],
    weights: Float[Tensor, "batch head query key"],
    queries: Int[Tensor, " asked"] | None = None,
) -> Iterator[Rows]:
    """Weights that a model has formed itself, handed on in the same small parts."""
    batch, heads, length, _ = weights.shape
    exact = torch.promote_types(weights.dtype, torch.float32)
    asked = torch.arange(length) if queries is None else queries
    step = max(1, ENTRIES // (batch * heads * length))
    for positions in asked.to(weights.device).split(step):
        yield Rows(
            positions,
            logits[:, :, positions].to(exact),
            pairs(visible, positions),
            weights[:, :, positions].to(exact),
        )


def read_rows(parts: Iterable[Rows], scope: Scope, normalised: bool = True) -> dict[str, Tensor]:
    """The variables of `scope` from formed weights, in the shapes of `read_fused`.

    Rows that a kernel does not normalise have no entropy of their own: that of their shares
    `|A| / sum |A|` is taken, and rows that attend to nothing are left out.
    """
    sink_attention, sink_logit, row_sums, entropies = [], [], [], []
    received = seen = even = on_sink = in_all = 0.0
    for positions, logits, visible, weights in parts:
        counted = scope.counted[:, None, positions]
        index = scope.sink[:, None, None, None]
        at_sink = index.expand(-1, weights.shape[1], len(positions), 1)
        sees = visible.gather(3, at_sink[:, : visible.shape[1]]).squeeze(-1)
        asked = scope.after_sink()[:, None, positions] & sees
        sink_attention.append(blank(weights.gather(3, at_sink).squeeze(-1), asked))

        others = visible.scatter(3, at_sink[:, : visible.shape[1]], False)
        count = others.sum(-1)
        mean = logits.masked_fill(~others, 0.0).sum(-1) / count.clamp(min=1)
        contrast = logits.gather(3, at_sink).squeeze(-1) - mean
        sink_logit.append(blank(contrast, asked & (count > 0)))

        weights = weights.masked_fill(~visible, 0.0)
        row_sum = weights.sum(-1)
        row_sums.append(blank(row_sum, counted))
        size = weights.abs().sum(-1)
        on_sink = on_sink + sink_attention[-1].abs().nansum(-1)
        in_all = in_all + size.masked_fill(~asked, 0.0).sum(-1)
        shares = weights if normalised else weights.abs() / size[..., None]
        entropies.append(blank(torch.special.entr(shares).sum(-1), counted & (size > 0)))
        received = received + (weights * counted[..., None]).sum(2)
        asking = visible & counted[..., None]
        seen = seen + asking.sum(2)
        even = even + (asking / visible.sum(-1, keepdim=True).clamp(min=1)).sum(2)
    return {
        "sink_attention_by_query": torch.cat(sink_attention, dim=2),
        "sink_logit_by_query": torch.cat(sink_logit, dim=2),
        "sink_share": on_sink / in_all,
        "attention_row_sum": torch.cat(row_sums, dim=2).nanmean(-1),
        "attention_entropy": torch.cat(entropies, dim=2).nanmean(-1),
        "key_importance": received / seen,
        "even_importance": (even / seen).expand_as(received),
    }
