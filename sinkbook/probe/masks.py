"""What is asked of an attention, and which keys each of its queries sees."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sinkbook.errors import SinkbookError

Heads = Float[Tensor, "batch head position width"]
KeyHeads = Float[Tensor, "batch key_head position width"]
Values = Float[Tensor, "batch key_head position value_width"]
Outputs = Float[Tensor, "batch head position value_width"]
PerQuery = Float[Tensor, "batch head position"]

TokenTable = Int[Tensor, "batch position"] | Sequence | np.ndarray

HIDDEN = -3e4  # additive masks hold something lower, biases do not
FAINT = -5e3  # and where they hold -1e4, as in half precision, there is a gap above it
GAP = 2e3
PADDED = (
    "Give rows of one length, padded where they are shorter, with an attention_mask that says so."
)

ROWS = 512  # queries whose masks exist at one time


@dataclass(frozen=True)
class Scope:
    """What is asked of every layer: which sink, over which queries, which variables."""

    sink: Int[Tensor, " batch"]
    counted: Bool[Tensor, "batch position"]  # queries that enter the means
    real: Bool[Tensor, "batch position"]  # tokens that are no padding
    variables: frozenset[str]

    def to(self, device: torch.device) -> "Scope":
        return Scope(
            self.sink.to(device), self.counted.to(device), self.real.to(device), self.variables
        )

    def after_sink(self) -> Bool[Tensor, "batch position"]:
        positions = torch.arange(self.counted.shape[1], device=self.sink.device)
        return self.counted & (positions > self.sink[:, None])

    def asks_for(self, *variables: str) -> bool:
        return not self.variables.isdisjoint(variables)


class Spans(NamedTuple):
    """The keys that each query sees when they are neighbours: `first` to `last`, both included.

    Causal attention, padding, sliding windows, chunks and packed documents all have this form.
    """

    first: Int[Tensor, "batch position"]
    last: Int[Tensor, "batch position"]
    causal: bool  # from key 0 to the query itself, for every query that counts


def causal_spans(real: Bool[Tensor, "batch position"]) -> Spans:
    """Every key up to the query itself."""
    last = torch.arange(real.shape[1], device=real.device).expand(real.shape)
    return Spans(torch.zeros_like(last), last, causal=True)


def find_spans(
    visible: Bool[Tensor, "batch 1 query key"], real: Bool[Tensor, "batch query"]
) -> Spans | None:
    """The spans that a mask amounts to; `None` if some query's visible keys have a gap.

    A query that sees nothing, as left padding does, is given itself: its output is of no use
    but must be finite.
    """
    own = torch.arange(visible.shape[-1], device=visible.device).expand(real.shape)
    first, count, runs = [], [], []
    for rows in visible[:, 0].split(ROWS, dim=1):
        starts = (rows[..., 1:] & ~rows[..., :-1]).sum(-1) + rows[..., 0]
        first.append(rows.to(torch.uint8).argmax(-1))
        count.append(rows.sum(-1))
        runs.append(starts)
    first, count, runs = (torch.cat(parts, dim=1) for parts in (first, count, runs))
    if (runs > 1).any():
        return None
    first = torch.where(count > 0, first, own)
    last = torch.where(count > 0, first + count - 1, own)
    causal = bool((~real | ((first == 0) & (last == own))).all())
    return Spans(first, last, causal)


def pairs(
    visible: Spans | Bool[Tensor, "batch head_or_1 position key"], queries: Int[Tensor, " query"]
) -> Bool[Tensor, "batch head_or_1 query key"]:
    """The keys that some of the queries see, one by one."""
    if not isinstance(visible, Spans):
        return visible[:, :, queries]
    keys = torch.arange(visible.first.shape[1], device=queries.device)
    first, last = (ends[:, queries, None] for ends in (visible.first, visible.last))
    return ((first <= keys) & (keys <= last))[:, None]


def shown(values: Tensor) -> Tensor:
    """Where an additive mask, or logits that one was added to, lets a query see a key.

    Masks hold -inf, the lowest number of a dtype, or -1e4. The last is told by the gap between it
    and what is visible from biases that fall steadily with the distance, as those of ALiBi do.
    """
    visible = values > HIDDEN
    faint = visible & (values < FAINT)
    if faint.any():
        above = values[visible & ~faint]
        if len(above) and above.min() - values[faint].max() > GAP:
            visible &= ~faint
    return visible


def table(name: str, given: Tensor | Sequence | np.ndarray, instead: str) -> Tensor:
    """A tensor of any nested sequence; `SinkbookError` says what to give `instead` of another."""
    try:
        return torch.as_tensor(given)
    except (ValueError, TypeError, RuntimeError) as error:
        raise SinkbookError(
            f"{name} cannot be read as a table (batch, position): {error}. {instead}"
        ) from error


def integers(
    name: str, given: Tensor | Sequence | np.ndarray, shape: torch.Size | None = None
) -> Int[Tensor, "batch position"] | Bool[Tensor, "batch position"]:
    """Ids, or marks of tokens, as a tensor of integers or truth values, from any nested sequence.

    Raises `SinkbookError` for rows of different lengths, for other numbers, and for another shape.
    """
    values = table(name, given, PADDED)
    if values.is_floating_point() or values.is_complex():
        raise SinkbookError(f"{name} holds numbers of {values.dtype}. Give integers.")
    if shape is None and values.dtype == torch.bool:
        raise SinkbookError(f"{name} holds truth values, as a mask does. Give integers.")
    if shape is not None and values.shape != shape:
        raise SinkbookError(
            f"{name} has shape {tuple(values.shape)} and input_ids {tuple(shape)}. Give one entry "
            "per token."
        )
    if shape is None and (values.ndim != 2 or not values.numel()):
        raise SinkbookError(
            f"{name} has shape {tuple(values.shape)}, not (batch, position) with one token at "
            f"least. Give one text as {name}[None]."
        )
    return values


def blank(values: Tensor, kept: Tensor) -> Tensor:
    """The values, with NaN where they are not kept."""
    return values.masked_fill(~kept, float("nan"))
