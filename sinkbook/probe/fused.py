"""Attention read without its matrix: what one layer's heads attend to, in memory linear in T.

The fused attention kernels return, beside the head outputs, each query's log-sum-exp over its
keys. With `lse_n` in hand every single weight costs one dot product,

    A[n, j] = exp(scaling * q_n . k_j - lse_n),

so that the attention on one sink token costs O(T). Three more identities do the rest.

- The mean logit over the visible keys is the query times a running mean of the keys.
- Let the keys ask and the queries answer: with `q'_j = (scaling * k_j, 1)` and
  `k'_n = (q_n, -lse_n)` the logits `q'_j . k'_n` are `log A[n, j]`. One fused call on them, run
  backwards in time to keep it causal, returns `log sum_n A[n, j]`: the attention that every key
  receives. With the `k'` as its values it also returns `sum_n A[n, j] log A[n, j]`, whose sum
  over the keys is the entropy.
- A learned sink only adds its logit to the log-sum-exp.

Where a kernel cannot be asked, `explicit.py` reads the same from the weights themselves.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from sinkbook.probe.masks import (
    ROWS,
    Heads,
    KeyHeads,
    Outputs,
    PerQuery,
    Scope,
    Spans,
    Values,
    blank,
)

NEVER = -1e9  # a logit so low that its weight is exactly zero, and its sums stay finite


def can_be_fused(query: Tensor) -> bool:
    """Whether this device and dtype have a fused kernel that returns the log-sum-exp."""
    return query.device.type == "cpu" or (query.is_cuda and query.dtype != torch.float64)


def _fused(
    query: Float[Tensor, "batch head query width"],
    key: Float[Tensor, "batch key_head key width"],
    value: Float[Tensor, "batch key_head key value_width"],
    bias: Float[Tensor, "batch 1 query key"] | None,
    scaling: float,
) -> tuple[Float[Tensor, "batch head query value_width"], Float[Tensor, "batch head query"]]:
    """One call of the fused kernel: causal without a `bias`, masked by it otherwise.

    The CPU kernel takes grouped heads as they are; those of CUDA want them repeated. All want
    one width for keys and values, which latent attention does not have: the narrower is padded.
    """
    value_width = value.shape[-1]
    width = max(query.shape[-1], value_width)
    on_cpu = query.device.type == "cpu"
    width = width if on_cpu else -(-width // 8) * 8
    query, key, value = (
        F.pad(states, (0, width - states.shape[-1])) if states.shape[-1] < width else states
        for states in (query, key, value)
    )
    kernels = torch.ops.aten
    if on_cpu:
        output, lse = kernels._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, bias is None, attn_mask=bias, scale=scaling
        )
    else:
        groups = query.shape[1] // key.shape[1]
        key, value = (states.repeat_interleave(groups, dim=1) for states in (key, value))
        if bias is None and query.dtype != torch.float32 and width <= 256:
            output, lse = kernels._scaled_dot_product_flash_attention(
                query, key, value, 0.0, True, scale=scaling
            )[:2]
        else:
            if bias is not None:  # the kernel wants rows that begin at multiples of 16 entries
                keys = bias.shape[-1]
                bias = F.pad(bias, (0, -keys % 16))[..., :keys]
                bias = bias.expand(-1, query.shape[1], -1, -1)
            output, lse = kernels._scaled_dot_product_efficient_attention(
                query, key, value, bias, True, 0.0, bias is None, scale=scaling
            )[:2]
        lse = lse[..., : query.shape[2]]  # the kernel may round T up
    return output[..., :value_width], lse


def attend(
    query: Heads, key: KeyHeads, value: Values, scaling: float, spans: Spans
) -> tuple[Outputs, PerQuery]:
    """Head outputs and the log-sum-exp of each query, `ROWS` queries at a time if masked."""
    if spans.causal:
        return _fused(query, key, value, None, scaling)
    outputs, sums = [], []
    for rows in torch.arange(query.shape[2], device=query.device).split(ROWS):
        first, last = spans.first[:, rows], spans.last[:, rows]
        keys = torch.arange(int(first.min()), int(last.max()) + 1, device=query.device)
        hidden = (keys < first[..., None]) | (keys > last[..., None])
        bias = query.new_zeros(hidden.shape).masked_fill_(hidden, float("-inf"))
        window = slice(int(keys[0]), int(keys[-1]) + 1)
        output, lse = _fused(
            query[:, :, rows], key[:, :, window], value[:, :, window], bias[:, None], scaling
        )
        outputs.append(output)
        sums.append(lse)
    return torch.cat(outputs, dim=2), torch.cat(sums, dim=2)


def read_fused(
    query: Heads,
    key: KeyHeads,
    value: Values,
    scaling: float,
    spans: Spans,
    scope: Scope,
    learned_sink: Float[Tensor, " head"] | None = None,
) -> tuple[Outputs, dict[str, Tensor]]:
    """Head outputs and the variables of `scope`, by log-sum-exp.

    Variables of a query are (batch, head, position), NaN where the query does not count;
    those of a head (batch, head); `key_importance` is (batch, head, position).
    """
    output, lse = attend(query, key, value, scaling, spans)
    row_sum = torch.ones_like(lse)
    if learned_sink is not None:
        alone = lse
        lse = torch.logaddexp(lse, learned_sink.to(lse.dtype)[:, None].expand_as(lse))
        row_sum = (alone - lse).exp()
        output = output * row_sum[..., None].to(output.dtype)

    query, key = query.to(lse.dtype), key.to(lse.dtype)
    reading = _read_sink(query, key, scaling, lse, spans, scope)
    if scope.asks_for("sink_share"):
        on_sink = reading["sink_attention_by_query"]
        of_rows = row_sum.masked_fill(on_sink.isnan(), 0.0)
        reading["sink_share"] = on_sink.nansum(-1) / of_rows.sum(-1)
    if scope.asks_for("attention_row_sum"):
        reading["attention_row_sum"] = blank(row_sum, scope.counted[:, None]).nanmean(-1)
    if scope.asks_for("key_importance", "attention_entropy"):
        received, entropy = _read_keys(query, key, scaling, lse, spans, scope)
        reading["key_importance"] = received / _times_seen(spans, scope)[:, None]
        reading["attention_entropy"] = entropy / scope.counted.sum(-1, keepdim=True)
    if scope.asks_for("even_importance"):
        seen, spread = _times_seen(spans, scope), scope.counted / (spans.last - spans.first + 1)
        even = blank(_sum_over_seeing(spans, spread.double()) / seen, seen > 0)
        reading["even_importance"] = even[:, None].to(lse.dtype).expand_as(lse)
    return output, reading


def _read_sink(
    query: Heads, key: KeyHeads, scaling: float, lse: PerQuery, spans: Spans, scope: Scope
) -> dict[str, Tensor]:
    """Attention on the sink and its logit against the mean of the other visible keys."""
    batch, _, _, width = query.shape
    index = scope.sink[:, None, None, None].expand(batch, key.shape[1], 1, width)
    sink_key = key.gather(2, index)
    grouped = query.unflatten(1, (key.shape[1], -1))  # (batch, key head, group, query, width)
    sees = (spans.first <= scope.sink[:, None]) & (scope.sink[:, None] <= spans.last)
    asked = scope.after_sink() & sees

    reading = {}
    if scope.asks_for("sink_attention", "sink_attention_by_query", "sink_share"):
        logit = scaling * (grouped @ sink_key[:, :, None].mT).flatten(1, 2).squeeze(-1)
        weight = (logit - lse).clamp(max=0.0).exp()
        reading["sink_attention_by_query"] = blank(weight, asked[:, None])
    if scope.asks_for("sink_logit", "sink_logit_by_query"):
        # In double precision, since a window's sum is the difference of two long ones.
        total = key.cumsum(2, dtype=torch.float64)
        if not spans.causal:
            running = F.pad(total, (0, 0, 1, 0))
            total = _at(running, spans.last + 1) - _at(running, spans.first)
        others = spans.last - spans.first + 1 - sees.long()
        total = total - sink_key * sees[:, None, :, None]
        mean = total / others.clamp(min=1)[:, None, :, None]
        contrast = (sink_key - mean).to(query.dtype)
        logit = scaling * (grouped * contrast[:, :, None]).sum(-1).flatten(1, 2)
        reading["sink_logit_by_query"] = blank(logit, (asked & (others > 0))[:, None])
    return reading


def _read_keys(
    query: Heads, key: KeyHeads, scaling: float, lse: PerQuery, spans: Spans, scope: Scope
) -> tuple[PerQuery, Float[Tensor, "batch head"]]:
    """The sum over counted queries of each key's attention, and of each head's row entropies."""
    _, heads, length, _ = query.shape
    dropped = ~scope.counted[:, None, :, None]
    ones = key.new_ones(*key.shape[:-1], 1)
    asking = torch.cat([scaling * key, ones], dim=-1)
    asking = asking.repeat_interleave(heads // key.shape[1], dim=1)
    answering = torch.cat(
        [query.masked_fill(dropped, 0.0), -lse[..., None].masked_fill(dropped, -NEVER)], dim=-1
    )
    if spans.causal:  # backwards in time, the queries that see a key come before it
        asking, answering = asking.flip(2), answering.flip(2)
        output, log_received = _fused(asking, answering, answering, None, 1.0)
    else:
        outputs, sums = [], []
        for keys in torch.arange(length, device=key.device).split(ROWS):
            seen = (spans.first[:, None] <= keys[:, None]) & (keys[:, None] <= spans.last[:, None])
            queries = seen.any(1).any(0).nonzero()[:, 0]
            window = slice(int(queries[0]), int(queries[-1]) + 1) if len(queries) else slice(0, 1)
            bias = key.new_zeros(seen.shape).masked_fill_(~seen, NEVER)[:, None, :, window]
            output, log_sum = _fused(
                asking[:, :, keys], answering[:, :, window], answering[:, :, window], bias, 1.0
            )
            outputs.append(output)
            sums.append(log_sum)
        output, log_received = torch.cat(outputs, dim=2), torch.cat(sums, dim=2)
    received = log_received.exp()
    entropy = -(received * (asking * output).sum(-1)).sum(-1)
    return (received.flip(2) if spans.causal else received), entropy


def _times_seen(spans: Spans, scope: Scope) -> Float[Tensor, "batch position"]:
    """How many counted queries see each key."""
    return _sum_over_seeing(spans, scope.counted.float()).round()


def _sum_over_seeing(
    spans: Spans, values: Float[Tensor, "batch position"]
) -> Float[Tensor, "batch position"]:
    """For each key the sum of a value of the queries that see it."""
    steps = F.pad(torch.zeros_like(values), (0, 1))
    steps.scatter_add_(1, spans.first, values).scatter_add_(1, spans.last + 1, -values)
    return steps.cumsum(1)[:, :-1]


def _at(running: Tensor, index: Int[Tensor, "batch position"]) -> Tensor:
    """Rows of (batch, head, row, width) picked by a row number for each position."""
    index = index[:, None, :, None].expand(-1, running.shape[1], -1, running.shape[3])
    return running.gather(2, index)
