"""What one checkpoint of a pretraining shows, head by head, and whether its queries agree.

The quantities are those that arXiv 2410.13835 follows through the checkpoints of OLMo (section 3.2
and Figures 9 and 10), for toys and for transformers' models alike. Here a key that a query cannot
see never counts, nor does the sink's own query, whose attention on itself is 1 by construction.
"""

from collections.abc import Iterable, Sequence

import numpy as np
import torch
import xarray as xr
from jaxtyping import Bool, Float, Int
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn

from sinkbook.annotations import check_arguments
from sinkbook.arguments import check_kind, check_seed, check_token_ids, check_whole_number
from sinkbook.errors import SinkbookError
from sinkbook.files import printable
from sinkbook.probe.attention_maps import attention_maps
from sinkbook.probe.measure import measure
from sinkbook.probe.metrics import residual_peak_ratio, value_drain_ratio


@check_arguments
def measure_checkpoint(
    model: nn.Module,
    tokens: Int[Tensor, "text position"],
    *,
    queries: Bool[Tensor, "text position"] | None = None,
    random_queries: int = 128,
    prefix: int = 8,
    seed: int = 0,
) -> xr.Dataset:
    """Sinks, drains and peaks of a causal language model on texts whose sink is position 0.

    `tokens` are texts of one length, `queries` marks those that the two means over queries are
    taken over (all by default). Over (text, layer, head), or (text, residual_layer):

    - `sink_attention`, `sink_logit`: over queries after position 0, as in `probe.measure`.
    - `value_norm`, `other_value_norm`: of position 0; mean over the other positions.
    - `residual_norm`, `other_residual_norm`: of position 0; median over the other positions.
    - `loss`: mean next-token loss over all positions, nats.
    - `query_logit_mean`, `query_logit_std`, with a dimension `key`: of the logits from random
      queries to the first `prefix` tokens (see `random_query_logits`). Left out if there are none.

    Raises `SinkbookError` as the probe does, and for texts that are not longer than `prefix`.
    """
    check_token_ids("tokens", tokens)
    probed = measure(
        model,
        tokens,
        ("sink_attention", "sink_logit", "value_norm", "residual_norm", "loss"),
        queries=queries,
        sink=0,
    ).drop_vars("sink")
    first, others = {"position": 0}, {"position": slice(1, None)}
    result = probed[["sink_attention", "sink_logit", "loss"]].assign(
        value_norm=probed.value_norm.isel(first),
        other_value_norm=probed.value_norm.isel(others).mean("position"),
        residual_norm=probed.residual_norm.isel(first),
        other_residual_norm=probed.residual_norm.isel(others).median("position"),
    )
    result = result.drop_vars("position", errors="ignore").rename(batch="text")
    if random_queries:
        logits = random_query_logits(
            model, tokens, count=random_queries, prefix=prefix, seed=seed
        ).rename(draw="query")
        result["query_logit_mean"] = logits.mean("query")
        result["query_logit_std"] = logits.std("query")
    return result.drop_attrs()


def table_of_revisions(model: str, revisions: Iterable) -> Table:
    """The revisions of a hub model that name a step, as `checkpoints.revisions_of` finds them."""
    rows = Table("revision", "step", "tokens", title=Text(printable(model)))
    for revision in revisions:
        tokens = "" if revision.tokens is None else f"{revision.tokens:.3g}"
        rows.add_row(Text(printable(revision.name)), f"{revision.step:,}", tokens)
    return rows


@check_arguments
def table(dataset: xr.Dataset) -> Table:
    """A row for each checkpoint: means over texts, the extremes over heads and layers."""
    rows = Table(
        *("step", "tokens", "sink attention", "heads > 0.3", "sink logit"),
        *("value ratio", "residual ratio", "loss"),
        title=Text(printable(dataset.attrs["model"])),
        caption="sink attention, sink logit: means over heads; value ratio: median over heads; "
        "residual ratio: largest over layers",
    )
    for index in range(dataset.sizes["revision"]):
        one = dataset.isel(revision=index)
        attention = one.sink_attention.mean("text")
        unknown = bool(one.step.isnull())
        rows.add_row(
            Text(printable(str(one.revision.item()))) if unknown else f"{int(one.step):,}",
            "" if one.tokens.isnull() else f"{one.tokens.item():.3g}",
            f"{attention.mean().item():.2f}",
            f"{(attention > 0.3).where(attention.notnull()).mean().item():.0%}",
            f"{one.sink_logit.mean().item():.2f}",
            f"{value_drain_ratio(one).mean('text').median().item():.2f}",
            f"{residual_peak_ratio(one).mean('text').max().item():.1f}",
            f"{one.loss.mean().item():.2f}",
        )
    return rows


# --- Concentration of the sink logits --------------------------------------------------------


@check_arguments
@torch.no_grad()
def random_query_logits(
    model: nn.Module,
    tokens: Int[Tensor, "text position"],
    *,
    count: int,
    prefix: int = 8,
    seed: int = 0,
) -> Float[xr.DataArray, "text layer head draw key"]:
    """Attention logits from random tokens, each put after the beginning of a text, to its keys.

    The first `prefix` tokens of every text are followed by one of `count` tokens, drawn evenly from
    the vocabulary; no text begins with one of them. The logits are those of its query, before the
    softmax and after a soft cap, to each token before it. NaN in layers without softmax attention.
    Source: arXiv 2410.13835, Figure 10.
    """
    check_kind("model", model, nn.Module)
    check_token_ids("tokens", tokens)
    check_whole_number("count", count, 1)
    check_whole_number("prefix", prefix, 1)
    check_seed(seed)
    if tokens.shape[1] < prefix:
        raise SinkbookError(
            f"texts of {tokens.shape[1]} tokens have no first {prefix}. Give longer texts."
        )
    tokens = tokens.cpu()
    vocabulary = torch.arange(_vocabulary_size(model))
    vocabulary = vocabulary[~torch.isin(vocabulary, tokens[:, 0])]
    generator = torch.Generator().manual_seed(seed)
    drawn = vocabulary[torch.randint(len(vocabulary), (count, 1), generator=generator)]
    found = []
    for text in tokens[:, :prefix]:
        ids = torch.cat([text.expand(count, -1), drawn], dim=1)
        found.append(last_query_logits(model, ids)[..., :-1].permute(1, 2, 0, 3))
    return xr.DataArray(
        torch.stack(found).cpu().numpy(), dims=("text", "layer", "head", "draw", "key")
    )


@check_arguments
def logit_spread(checkpoint: xr.Dataset, *, pool_heads: bool = False) -> xr.DataArray:
    """Standard deviation of each key's logits over random queries, and over heads if pooled.

    (text, layer, key), with `head` unless pooled.
    """
    mean, std = checkpoint.query_logit_mean, checkpoint.query_logit_std
    if not pool_heads:
        return std
    return np.sqrt(np.square(std).mean("head") + mean.var("head"))


@check_arguments
def concentration(checkpoint: xr.Dataset, *, pool_heads: bool = False) -> xr.DataArray:
    """The spread of the sink's logits over the mean spread of other keys': small if queries agree.

    Mean over texts. The paper's theory lets it go to 0 (arXiv 2410.13835, Theorem 2c).
    """
    spread = logit_spread(checkpoint, pool_heads=pool_heads).mean("text")
    return spread.isel(key=0) / spread.isel(key=slice(1, None)).mean("key")


@check_arguments
def last_query_logits(
    model: nn.Module, tokens: Int[Tensor, "text position"]
) -> Float[Tensor, "text layer head key"]:
    """The attention logits of the last position's query to all keys, itself among them.

    NaN for keys that it cannot see, and in layers without softmax attention.
    """
    check_token_ids("tokens", tokens)
    last = torch.tensor([tokens.shape[1] - 1])
    maps = attention_maps(model, tokens, queries=last)
    if not any(maps):
        raise SinkbookError(
            f"{type(model).__name__} has no softmax attention, so its queries have no logits."
        )
    logits = [None if found is None else found.logits[:, :, 0].float().cpu() for found in maps]
    every = torch.stack(_even(logits, tokens.shape), dim=1)
    return every.masked_fill(every.isneginf(), float("nan"))


def _even(layers: Sequence[Tensor | None], shape: torch.Size) -> list[Tensor]:
    """All layers with as many heads as the largest; NaN where there is nothing."""
    heads = max((logits.shape[1] for logits in layers if logits is not None), default=1)
    even = []
    for logits in layers:
        whole = torch.full((shape[0], heads, shape[1]), float("nan"))
        if logits is not None:
            whole[:, : logits.shape[1]] = logits
        even.append(whole)
    return even


def _vocabulary_size(model: nn.Module) -> int:
    config = model.config
    return getattr(config, "get_text_config", lambda: config)().vocab_size
