"""Sinks while a model trains: a callback for transformers' `Trainer`, a function for other loops.

Both measure the same few texts again and again and give one number for each thing to watch, by keys
that TensorBoard and its like group under `sink`:

- `sink/rate`: the share of heads whose mean attention on the sink exceeds 0.3, mean over texts.
- `sink/strongest_attention`: the mean attention on the sink of the head that has most of it.
- `sink/value_drain_ratio`: the sink's value norm over the mean of the others', median over the
  heads that are sinks, over all where none is.
- `sink/residual_peak_ratio`: the sink's residual norm over the median of the others', after the
  layer where that is largest, median over texts.
- `sink/largest_magnitude`: the largest entry of any residual state. float16 ends at 65,504.

What a model does not have is left out.

>>> from sinkbook.toy.transformer import Transformer, TransformerConfig
>>> model = Transformer(TransformerConfig(vocab_size=9, length=16, width=8, layers=2))
>>> sorted(sink_metrics(model, [[1, 2, 3, 4, 5], [6, 7, 8]]))
['sink/largest_magnitude', 'sink/rate', 'sink/residual_peak_ratio', 'sink/strongest_attention',
 'sink/value_drain_ratio']
"""

import math
import sys
import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from operator import index

import torch
import xarray as xr
from jaxtyping import Int
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from transformers.trainer_callback import (
    CallbackHandler,
    TrainerCallback,
    TrainerControl,
    TrainerState,
)
from transformers.training_args import TrainingArguments

from sinkbook.annotations import check_arguments
from sinkbook.arguments import check_kind, check_whole_number, whole_number
from sinkbook.errors import NotFiniteError, SinkbookError
from sinkbook.models.partial_forward import alone_with
from sinkbook.models.pretrained import prefix_of
from sinkbook.models.wrappers import check_ids, computing_device, in_own_precision, taking
from sinkbook.probe.measure import measure
from sinkbook.probe.metrics import THRESHOLD, residual_peak_ratio, sink_rate, value_drain_ratio

NORMS = ("value_norm", "residual_norm", "residual_max_abs")  # not every architecture has them

# Token ids, (batch, position) or lists of any lengths, or texts: looked at before they are taken.
Inputs = Tensor | Iterable
# Token ids and their mask; None where nothing is padding.
Batch = tuple[Int[Tensor, "batch position"], Tensor | None]


@check_arguments
def sink_metrics(
    model: nn.Module,
    inputs: Inputs,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    attention_mask: Int[Tensor, "batch position"] | None = None,
    length: int = 512,
) -> dict[str, float]:
    """What to watch of a model's sinks while it trains, by key; see `SinkCallback` for `inputs`.

    The training goes on as if nothing had happened: gradients, modes of modules and states of
    random numbers are as they were, also after an exception. Dropout is off, and so is mixed
    precision: the model computes in the type of its weights, float32 unless they are stored in 16
    bits. The numbers are those of `measure` on the same weights; norms are in the units of the
    residual stream, all else has none. Raises `SinkbookError` as `measure` does, and for inputs
    that are no token ids of the model.
    """
    ids, mask = _batch(inputs, tokenizer, attention_mask, length)
    return _metrics(_measured(model, ids, mask))


class SinkCallback(TrainerCallback):
    """Has transformers' `Trainer` log a model's sinks every so many steps of training.

    `Trainer(..., callbacks=[SinkCallback(input_ids)])`. `inputs` are always the same: a tensor of
    token ids (batch, position), with an `attention_mask` if some are padding; a list of lists of
    ids, of any lengths; or a list of texts, of which the first `length` tokens count, read by
    `tokenizer` or else by the trainer's `processing_class`. They are measured in one batch, in the
    memory of one forward pass. `every` counts steps of the optimizer, whatever the number of
    batches that they accumulate.

    What is measured is logged at once, as `trainer.log` would, beside what the trainer logs and not
    with it: `every` and `logging_steps` have nothing to do with each other. It is in
    `trainer.state.log_history` under its step, and reaches every integration of `report_to`, which
    put `train/` before the keys. `sink_metrics` says how it is measured; only the main process
    does. One text is tried before the training begins, and what is wrong with model or inputs is
    raised then; what cannot be measured later on is a warning.

    Raises `SinkbookError` for `every` below 1, texts without a tokenizer, inputs of another kind.
    """

    def __init__(
        self,
        inputs: Inputs,
        *,
        every: int = 100,
        tokenizer: PreTrainedTokenizerBase | None = None,
        attention_mask: Int[Tensor, "batch position"] | None = None,
        length: int = 512,
    ):
        check_kind("tokenizer", tokenizer, PreTrainedTokenizerBase | None)
        check_kind("attention_mask", attention_mask, Int[Tensor, "batch position"] | None)
        self.every = whole_number("every", every, 1)
        self._inputs = (inputs, attention_mask, length)
        self._batch: Batch | None = None  # texts that wait for the trainer's tokenizer have none
        if tokenizer is not None or not _are_texts(inputs):
            self._batch = _batch(inputs, tokenizer, attention_mask, length)

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        processing_class=None,
        **_,
    ) -> None:
        if not state.is_world_process_zero:
            return
        if self._batch is None:
            inputs, attention_mask, length = self._inputs
            tokenizer = getattr(processing_class, "tokenizer", processing_class)
            self._batch = _batch(inputs, tokenizer, attention_mask, length)
        ids, mask = self._batch
        longest = slice(None, 1) if mask is None else mask.sum(1).argmax()[None]
        check_ids(model, ids)  # of all texts, of which one is measured to see that it can be
        _measured(model, ids[longest], None if mask is None else mask[longest])

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **_,
    ) -> TrainerControl | None:
        if not state.is_world_process_zero or state.global_step % self.every:
            return None
        try:
            logs = _metrics(_measured(model, *self._batch))
        except SinkbookError as error:  # a training of days does not end for this
            warnings.warn(f"no sinks measured at step {state.global_step}: {error}", stacklevel=2)
            return None
        if state.epoch is not None:
            logs["epoch"] = state.epoch
        state.log_history.append({**logs, "step": state.global_step})
        handler = _calling_handler()
        if handler is None:
            return None
        return handler.call_event("on_log", args, state, control, logs=logs)


def _calling_handler() -> CallbackHandler | None:
    """The trainer's list of callbacks, which is calling us; None in other loops.

    It hands itself to no callback, and the integrations come before us in it: what we added to the
    trainer's own logs in `on_log` they would never see.
    """
    frame = sys._getframe(1)
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, CallbackHandler):
            return caller
        frame = frame.f_back
    return None


# --- Inputs ----------------------------------------------------------------------------------


def _are_texts(inputs: Inputs) -> bool:
    """Whether these are texts, which need a tokenizer."""
    if isinstance(inputs, Tensor | Mapping | str) or not isinstance(inputs, Iterable) or not inputs:
        return False
    return all(isinstance(text, str) for text in inputs)


def _batch(
    inputs: Inputs,
    tokenizer: PreTrainedTokenizerBase | None,
    attention_mask: Tensor | None,
    length: int,
) -> Batch:
    """Token ids, with padding after the shorter texts, and where there is none."""
    check_whole_number("length", length, 1)
    if isinstance(inputs, Tensor):
        if inputs.ndim != 2 or inputs.is_floating_point() or not inputs.numel():
            raise SinkbookError(
                f"the token ids are {inputs.dtype} of shape {tuple(inputs.shape)}. Give whole "
                "numbers of shape (batch, position), one text as input_ids[None]."
            )
        return inputs, attention_mask
    if attention_mask is not None:
        raise SinkbookError("attention_mask goes with a tensor of token ids. Leave it out.")
    if _are_texts(inputs):
        inputs = _tokenised(inputs, tokenizer, length)
    try:
        rows = [torch.tensor([index(token) for token in row]) for row in inputs]
    except TypeError as error:
        raise SinkbookError(
            f"{str(inputs)[:60]!r} is no tensor of token ids, no list of lists of them and no list "
            "of texts. Give one text as [ids] or [text], and of a tokenizer's output the input_ids."
        ) from error
    if not rows or not all(map(len, rows)):
        raise SinkbookError("a text without tokens, or no text at all. Leave empty ones out.")
    pad = nn.utils.rnn.pad_sequence
    mask = pad([torch.ones_like(row) for row in rows], batch_first=True)
    return pad(rows, batch_first=True), None if mask.all() else mask


def _tokenised(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase | None, length: int
) -> list[list[int]]:
    if tokenizer is None:
        raise SinkbookError(
            "there are texts, and no tokenizer to read them. Give `tokenizer`, or token ids; a "
            "Trainer's processing_class is taken if it has one."
        )
    prefix = prefix_of(tokenizer.name_or_path, tokenizer)
    rows = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
    return [[*prefix, *row][:length] if row else [] for row in rows]


# --- Measuring -------------------------------------------------------------------------------


def _measured(model: nn.Module, ids: Tensor, mask: Tensor | None) -> xr.Dataset:
    """What `measure` finds of a model that is being trained, in the type of its weights."""
    device = computing_device(model)
    of_cuda = [device] if device.type == "cuda" else []
    # No model draws in evaluation mode; one with code of its own might.
    every = taking(model, ids)
    with alone_with(model), torch.random.fork_rng(of_cuda), in_own_precision(model), every:
        try:
            names = ("sink_attention", *NORMS)
            return measure(model, ids, names, attention_mask=mask)
        except NotFiniteError:
            raise
        except SinkbookError:
            result = measure(model, ids, ("sink_attention",), attention_mask=mask)
            for name in NORMS:
                with suppress(SinkbookError):
                    result[name] = measure(model, ids, (name,), attention_mask=mask)[name]
            return result


def _metrics(result: xr.Dataset) -> dict[str, float]:
    """One number for each thing to watch, without those that are not known."""
    attention = result.sink_attention.mean("batch")
    found = {
        "rate": sink_rate(result).mean(),
        "strongest_attention": attention.max(),
    }
    if "value_norm" in result:
        drain, sinks = value_drain_ratio(result).mean("batch"), attention > THRESHOLD
        found["value_drain_ratio"] = (drain.where(sinks) if sinks.any() else drain).median()
    if "residual_norm" in result:
        found["residual_peak_ratio"] = residual_peak_ratio(result).median("batch").max()
    if "residual_max_abs" in result:
        found["largest_magnitude"] = result.residual_max_abs.max()
    numbers = {f"sink/{name}": float(value) for name, value in found.items()}
    return {key: number for key, number in numbers.items() if not math.isnan(number)}
