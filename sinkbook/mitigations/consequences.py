"""What sinks cost and what they buy: the loss of texts read with a window, or in eight bits.

Losses are in nats, token by token. What is kept of a text has beside it the same budget spent at
random. Keys of a prompt are dropped in `eviction.py`, heads are cut in `pruning.py`.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext

import numpy as np
import torch
import torch.nn.functional as F
import xarray as xr
from jaxtyping import Float, Int
from scipy import stats
from torch import Tensor, nn
from transformers import PreTrainedModel

from sinkbook.errors import SinkbookError
from sinkbook.mitigations.quantization import RANGES, layer_errors, quantized
from sinkbook.mitigations.sink_cache import streaming
from sinkbook.progress import progress
from sinkbook.toy.measurements import excess_risks
from sinkbook.toy.runs import Run

Tokens = Int[Tensor, "text position"]

AT_ONCE = 512  # tokens: the logits of a large vocabulary are the largest thing in memory


@torch.no_grad()
def token_losses(
    model: nn.Module, input_ids: Tokens, *, last: int | None = None
) -> Float[np.ndarray, "text scored"]:
    """Loss of every token but the first given those before it, in nats; or of the `last` ones.

    `model` is a toy transformer or a causal LM of transformers.
    """
    last = input_ids.shape[1] - 1 if last is None else last
    losses, device = [], next(model.parameters()).device
    for rows in input_ids.to(device).split(max(1, AT_ONCE // input_ids.shape[1])):
        if isinstance(model, PreTrainedModel):
            logits = model(rows, use_cache=False, logits_to_keep=last + 1).logits
        else:
            logits = model(rows)[:, -last - 1 :]
        logits, targets = logits[:, :-1].float(), rows[:, -last:]
        losses.append(F.cross_entropy(logits.mT, targets, reduction="none").cpu().numpy())
    return np.concatenate(losses)


def streaming_losses(
    model: nn.Module,
    input_ids: Tokens,
    *,
    window: int,
    sinks: Sequence[int] = (0, 1, 2, 4, 8),
    random: int = 4,
    stride: int = 16,
    seed: int = 0,
) -> xr.DataArray:
    """Loss of each token when a text is read with a window of `window` tokens, and ways around it.

    Over (layout, text, position):

    - "dense": every token sees all before it;
    - "recompute": it sees the last `window` tokens, read afresh as if the text began there; the
      window moves in steps of `stride`, so that some tokens see up to `stride - 1` fewer. Only from
      position `window` on;
    - "0", "1", ...: it sees the window and that many first tokens, from a cache;
    - "random": the window and `random` early tokens, drawn for each text from those that no number
      of first tokens includes and that the first window does.
    """
    length, most = input_ids.shape[1], max(sinks)
    if window - most < random or length <= window + most:
        raise SinkbookError(
            f"a window of {window}, texts of {length} tokens, {most} kept, {random} drawn. "
            "Give texts longer than window and kept tokens, and a window with room for the draw."
        )
    generator = torch.Generator().manual_seed(seed)
    drawn = [
        (most + torch.randperm(window - most, generator=generator)[:random]).tolist()
        for _ in input_ids
    ]
    layouts: dict[str, list] = {"dense": [None] * len(input_ids)}
    layouts |= {str(count): [count] * len(input_ids) for count in sinks} | {"random": drawn}
    losses = {}
    with progress("streaming", len(layouts) * len(input_ids)) as show:
        for number, (layout, choices) in enumerate(layouts.items()):
            rows = []
            for row, kept in zip(input_ids.split(1), choices, strict=True):
                way = nullcontext() if kept is None else streaming(model, window=window, kept=kept)
                with way:
                    rows.append(token_losses(model, row)[0])
                show(number * len(input_ids) + len(rows))
            losses[layout] = np.stack(rows)
    losses["recompute"] = recomputed_losses(model, input_ids, window=window, stride=stride)
    return xr.DataArray(
        np.stack(list(losses.values())),
        dims=("layout", "text", "position"),
        coords={"layout": list(losses), "position": np.arange(1, length)},
    )


def recomputed_losses(
    model: nn.Module, input_ids: Tokens, *, window: int, stride: int
) -> Float[np.ndarray, "text scored"]:
    """Loss of each token but the first, from a text that begins `window` tokens before it or less.

    The last `stride` tokens of every window are scored; NaN before position `window`, and for what
    is left over at the end of a text. Raises `SinkbookError` if `stride` exceeds `window`.
    """
    if stride > window:
        raise SinkbookError(
            f"steps of {stride} with a window of {window} would leave tokens out. "
            f"Give a stride of at most {window}."
        )
    texts, length = input_ids.shape
    losses = np.full((texts, length - 1), np.nan, dtype=np.float32)
    for end in range(window + stride, length + 1, stride):
        scored = slice(end - stride - 1, end - 1)
        rows = input_ids[:, end - window - 1 : end]
        losses[:, scored] = token_losses(model, rows, last=stride)
    return losses


def perplexity(losses: xr.DataArray, *, after: int = 0) -> xr.DataArray:
    """The exponential of the mean loss of each text's tokens from position `after` on."""
    return np.exp(losses.sel(position=slice(after, None)).mean("position"))


def rounding_losses(model: nn.Module, input_ids: Tokens) -> xr.DataArray:
    """Loss of each token in eight-bit arithmetic: over (numbers, text, position).

    `numbers` is "exact", "weights alone", or the name of the ranges in which activations are
    rounded as well: see `quantization.RANGES`.
    """
    ways = {"exact": nullcontext(model), "weights alone": quantized(model, None)}
    ways |= {ranges: quantized(model, ranges) for ranges in RANGES}
    losses = []
    with progress("rounding", len(ways)) as show:
        for way in ways.values():
            with way:
                losses.append(token_losses(model, input_ids))
            show(len(losses))
    return xr.DataArray(
        np.stack(losses),
        dims=("numbers", "text", "position"),
        coords={"numbers": list(ways), "position": np.arange(1, input_ids.shape[1])},
    )


def bigram_excess(
    toys: dict[str, list[Run]],
    changes: dict[str, Callable[[nn.Module], AbstractContextManager]],
) -> dict[str, dict[str, Float[np.ndarray, " seed"]]]:
    """Excess bigram risk of the runs of each toy under each change, in nats, by change and toy.

    A change is a context manager made of the model, such as `partial(streaming, window=8, kept=1)`
    or `quantized`. The risk is about tokens on which a head has nothing to do.
    """
    found: dict[str, dict[str, np.ndarray]] = {}
    for label, change in changes.items():
        found[label] = {}
        for name, runs in toys.items():
            with ExitStack() as changed:
                for run in runs:
                    changed.enter_context(change(run.model))
                found[label][name] = excess_risks(runs)["bigram"]
    return found


def toy_rounding_errors(runs: list[Run]) -> Float[np.ndarray, "seed layer"]:
    """`int8_error` of what each layer of a toy reads, in one range, mean over its texts."""
    errors = [layer_errors(run.model, run.evaluation_tokens) for run in runs]
    return np.stack([e.sel(ranges="tensor").mean("text").values for e in errors])


def interval_of_mean(values: Float[np.ndarray, " text"]) -> tuple[float, float]:
    """The ends of the 95 % interval of a mean over texts, by Student's t."""
    low, high = stats.t.interval(0.95, len(values) - 1, np.mean(values), stats.sem(values))
    return float(low), float(high)
