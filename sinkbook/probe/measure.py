"""The probe: sinks, value drains and residual peaks of any causal language model, in one pass.

`measure` runs the model once, with an attention function in the place of the model's own that
returns the same outputs and reads off what its heads attend to (`listening.py`). It costs about
as much as the plain forward pass, is exact, and needs memory linear in the number of tokens.
`result.attrs["route"]` says how weights were read: `fused` (by log-sum-exp, `fused.py`),
`chunked` (formed a few queries at a time, `explicit.py`: soft caps, biases, other kernels) or
`eager` (formed by the model itself, one layer at a time).

>>> from sinkbook.toy.transformer import Transformer, TransformerConfig
>>> model = Transformer(TransformerConfig(vocab_size=9, length=16, width=8, layers=2))
>>> result = measure(model, torch.zeros(3, 16, dtype=torch.long))
>>> dict(result.sink_attention.sizes), dict(result.residual_norm.sizes)
({'batch': 3, 'layer': 2, 'head': 1}, {'batch': 3, 'residual_layer': 3, 'position': 16})
"""

import time
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from inspect import signature

import numpy as np
import torch
import xarray as xr
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from sinkbook.annotations import check_arguments
from sinkbook.arguments import names_of, texts_of, whole_number
from sinkbook.errors import SinkbookError
from sinkbook.models.losses import next_token_losses
from sinkbook.models.wrappers import AnyModel, computing_device, taking, unwrapped
from sinkbook.probe.finite import check_losses, check_variable
from sinkbook.probe.masks import Scope, TokenTable, integers, shown, table
from sinkbook.probe.recorder import Recorder
from sinkbook.progress import progress

HEAD = ("batch", "layer", "head")
HEAD_POSITION = (*HEAD, "position")
RESIDUAL = ("batch", "residual_layer", "position")
VARIABLES: dict[str, tuple[tuple[str, ...], str, str]] = {
    "sink_attention": (HEAD, "1", "mean attention on the sink token"),
    "sink_share": (HEAD, "1", "share of the sink token in all attention"),
    "sink_logit": (HEAD, "1", "logit of the sink token above the mean of other visible keys"),
    "attention_entropy": (HEAD, "nat", "mean entropy of an attention row"),
    "attention_row_sum": (HEAD, "1", "mean sum of an attention row"),
    "head_output_norm": (HEAD, "1", "mean norm of the head's write to the residual stream"),
    "sink_attention_by_query": (HEAD_POSITION, "1", "attention of each query on the sink token"),
    "sink_logit_by_query": (HEAD_POSITION, "1", "sink logit of each query"),
    "key_importance": (HEAD_POSITION, "1", "mean attention that a key receives"),
    "even_importance": (HEAD_POSITION, "1", "key importance if all rows were even"),
    "value_norm": (HEAD_POSITION, "1", "norm of the value state as the head writes it"),
    "raw_value_norm": (HEAD_POSITION, "1", "norm of the value state before W_O"),
    "residual_norm": (RESIDUAL, "1", "norm of the residual state"),
    "residual_max_abs": (RESIDUAL, "1", "largest magnitude in the residual state"),
    "loss": (("batch",), "nat", "mean next-token loss"),
}
DEFAULT = ("sink_attention", "sink_logit", "value_norm", "residual_norm")


@check_arguments
@torch.no_grad()
def measure(
    model: AnyModel,
    input_ids: TokenTable,
    variables: Iterable[str] = DEFAULT,
    *,
    attention_mask: Tensor | Sequence | np.ndarray | None = None,
    position_ids: TokenTable | None = None,
    queries: Bool[Tensor, "batch position"] | Sequence | np.ndarray | None = None,
    sink: int | Int[Tensor, " batch"] | None = None,
) -> xr.Dataset:
    """Measure a causal language model's extreme tokens on `input_ids`, in one forward pass.

    `model` is any causal LM of transformers, what `load` returns, a toy, or one that names its
    parts (`models.layout`); `variables` are names in `VARIABLES`. `attention_mask`, 1 for tokens
    and 0 for padding, and `position_ids`, which restart where packed documents do, go to the model
    as they are. The arithmetic is the probe's own: float32 or wider, autocast off.

    The sink is each row's first token that is no padding, or position `sink`. Means run over
    the queries that `queries` marks (all by default), never over padding:

    - `sink_attention`, `sink_logit`: over queries after the sink that can see it, which those
      beyond a sliding window or in another packed document cannot. The logit, after scaling and
      soft cap, is taken against the mean over the other keys that the query sees, itself
      included.
    - `sink_share`: over the same queries, the attention on the sink, summed, over all attention,
      summed. It is `sink_attention` under softmax; under a kernel whose rows do not add up to 1
      read both with the row sum, since a large share of nothing is nothing. Magnitudes, where
      weights may be negative; NaN for a head that attends to nothing.
    - `attention_entropy`, `attention_row_sum`, `head_output_norm`: over all queries.
    - `key_importance`: over the queries that see the key; `even_importance`: were their rows even.

    `value_norm` is `|W_O^h v|`, one per query head also where heads share their values;
    `head_output_norm` is `|W_O^h o|` of what reaches W_O, gates included. `residual_max_abs` is
    the largest magnitude among a state's entries: what overflows, and what sets an int8 range.

    Attention variables have the dimension `layer`, 0 for the first block. There is one residual
    state more than there are blocks: `residual_layer` 0 is the embedding, `l` the state after `l`
    blocks and what block `layer=l` reads. NaN where there is nothing to measure: at padding, in
    blocks without attention, for rows without a query that counts.
    Returns float32; norms in the units of the residual stream, entropy and loss in nats.
    Raises `SinkbookError` for unknown variables, inputs that do not fit, and models that are
    not causal or whose attention cannot be read; `NotFiniteError` where what counts is NaN or
    infinite. Threads wait for each other. Source: arXiv 2410.13835, sections 1 and 3.
    """
    started = time.perf_counter()
    model, variables = _checked(model), names_of("variable", variables, VARIABLES)
    inputs = _inputs(input_ids, attention_mask, position_ids, computing_device(model))
    real = counted = _real_tokens(inputs)
    if queries is not None:
        counted = real & integers("queries", queries, real.shape).to(real.device).bool()
    scope = Scope(_sink_positions(sink, real), counted, real, frozenset(variables))
    recorder = Recorder(model, scope)
    logits = _run(recorder, inputs)
    loss = _mean_loss(logits, inputs["input_ids"], real) if "loss" in variables else None
    result = _dataset(recorder, variables, loss)
    result.attrs = _circumstances(recorder) | {
        "sink": "first token of each row" if sink is None else "given by position",
        "seconds": round(time.perf_counter() - started, 3),
    }
    return result


@check_arguments
def measure_texts(
    language_model,
    texts: Iterable[str],
    variables: Iterable[str] = DEFAULT,
    *,
    length: int = 512,
    batch_size: int = 8,
) -> xr.Dataset:
    """Measure a model on texts: tokenise, batch by length, measure, and put together.

    `language_model` is what `sinkbook.models.load` returns. Each text becomes the model's first
    token, if its convention has one, and its own tokens, `length` in all at most. The result is
    in the order of `texts`, with NaN after the end of the shorter ones; one batch is in memory
    at a time. Shows progress on a terminal. Raises `SinkbookError` for a string in the place of a
    list, no texts, a text without tokens, and a `length` below 2.
    """
    variables = names_of("variable", variables, VARIABLES)
    length, batch_size = (
        whole_number("length", length, 2),
        whole_number("batch_size", batch_size, 1),
    )
    texts = texts_of(texts)
    if not hasattr(language_model, "tokenize"):
        raise SinkbookError(
            f"`language_model` is a {type(language_model).__name__}, without a tokenizer to read "
            "texts with. Give what `sinkbook.load` returns, or token ids to `sinkbook.measure`."
        )
    tokens = list(language_model.tokenize(texts))
    prefix = list(language_model.prefix)
    if prefix in tokens:
        empty = tokens.index(prefix)
        raise SinkbookError(f"text number {empty} holds no token. Leave out empty texts.")
    tokens = [torch.tensor(ids[:length]) for ids in tokens]
    order = sorted(range(len(tokens)), key=lambda number: len(tokens[number]))
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    results = []
    with progress("measuring", len(batches)) as show:
        for batch in batches:
            ids = nn.utils.rnn.pad_sequence([tokens[number] for number in batch], batch_first=True)
            sizes = torch.tensor([len(tokens[number]) for number in batch])
            mask = (torch.arange(ids.shape[1]) < sizes[:, None]).long()
            result = measure(language_model.model, ids, variables, attention_mask=mask)
            results.append(result.assign_coords(batch=batch))
            show(len(results))
    seconds = sum(result.attrs["seconds"] for result in results)
    together = xr.concat(results, dim="batch", join="outer", combine_attrs="override")
    together.attrs |= {"model": language_model.name, "seconds": round(seconds, 3)}
    return together.sortby("batch")


def _checked(model: AnyModel) -> nn.Module:
    """A model that reads tokens."""
    model = unwrapped(model)
    takes = getattr(model, "main_input_name", "input_ids")
    if takes != "input_ids" and "input_ids" not in signature(model.forward).parameters:
        raise SinkbookError(
            f"{type(model).__name__} reads {takes} and no tokens. Give a causal language model."
        )
    return model


def _mask(attention_mask: Tensor | Sequence | np.ndarray) -> Tensor:
    """A mask as a tensor: 1 and 0 for each token, or for pairs truth values or what is added."""
    instead = "Give one entry per token, in rows of one length."
    mask = table("attention_mask", attention_mask, instead)
    if mask.ndim == 4 and mask.dtype != torch.bool and not mask.is_floating_point():
        raise SinkbookError(
            f"attention_mask over pairs holds {mask.dtype}. Give truth values, True where a query "
            "sees a key, or what is added to the logits: 0 there and -inf elsewhere."
        )
    if mask.ndim == 2 and ((mask != 0) & (mask != 1)).any():
        raise SinkbookError(
            f"attention_mask holds {mask[(mask != 0) & (mask != 1)][0].item()}. Give 1 for a token "
            "and 0 for padding, or what is added to the logits as (batch, 1, query, key)."
        )
    return mask


def _inputs(
    input_ids: TokenTable,
    attention_mask: Tensor | Sequence | np.ndarray | None,
    position_ids: TokenTable | None,
    device: torch.device,
) -> dict[str, Tensor]:
    """What the model is called with, as tensors where it computes."""
    inputs = {"input_ids": integers("input_ids", input_ids)}
    if attention_mask is not None:
        inputs["attention_mask"] = _mask(attention_mask)
    if position_ids is not None:
        shape = inputs["input_ids"].shape
        inputs["position_ids"] = integers("position_ids", position_ids, shape)
        if (inputs["position_ids"] < 0).any():
            raise SinkbookError("position_ids go below 0. Give positions that count from 0.")
    return {name: states.to(device) for name, states in inputs.items()}


def _run(recorder: Recorder, inputs: dict[str, Tensor]) -> Tensor | None:
    """The forward pass that the recorder listens to. Returns the logits if the loss is wanted."""
    with taking(recorder.model, inputs["input_ids"]):
        return recorder.run(inputs, with_logits=recorder.scope.asks_for("loss"))


def _circumstances(recorder: Recorder) -> dict[str, str]:
    """Which model was measured, how, on what and with what."""
    model, parameter = recorder.model, next(recorder.model.parameters())
    return {
        "model": getattr(getattr(model, "config", None), "name_or_path", "")
        or type(model).__name__,
        "route": "+".join(sorted(recorder.routes)),
        "device": str(parameter.device),
        "dtype": str(parameter.dtype).removeprefix("torch."),
        "torch": str(torch.__version__),
        "transformers": version("transformers"),
    }


def _real_tokens(inputs: dict[str, Tensor]) -> Bool[Tensor, "b t"]:
    """Which tokens are no padding. A mask over pairs shows it on its diagonal."""
    input_ids, mask = inputs["input_ids"], inputs.get("attention_mask")
    if mask is None:
        return torch.ones_like(input_ids, dtype=torch.bool)
    if mask.ndim == 4:
        visible = mask if mask.dtype == torch.bool else shown(mask)
        mask = visible[:, 0].diagonal(dim1=-2, dim2=-1)
        mask = mask.expand(input_ids.shape) if mask.shape[1] == input_ids.shape[1] else mask
    if mask.shape != input_ids.shape:
        raise SinkbookError(
            f"attention_mask has shape {tuple(mask.shape)} and input_ids "
            f"{tuple(input_ids.shape)}. Give one entry per token."
        )
    if not mask.bool().any(dim=1).all():
        raise SinkbookError("a row of attention_mask is all padding. Leave that text out.")
    return mask.bool()


def _sink_positions(sink: int | Tensor | None, real: Tensor) -> Int[Tensor, " batch"]:
    if sink is None:
        return real.to(torch.uint8).argmax(1)
    try:
        positions = torch.as_tensor(sink, device=real.device)
        whole = not positions.is_floating_point() and positions.dtype != torch.bool
        positions = positions.expand(len(real)) if whole else None
    except (ValueError, TypeError, RuntimeError):
        positions = None
    if positions is None:
        raise SinkbookError(
            f"`sink={sink!r:.60}` is no position. Give a whole number, or one for each of the "
            f"{len(real)} texts."
        )
    if positions.min() < 0 or positions.max() >= real.shape[1]:
        raise SinkbookError(
            f"no position {sink} in a text of {real.shape[1]} tokens. "
            f"Give a sink from 0 to {real.shape[1] - 1}."
        )
    return positions


def _mean_loss(logits: Tensor, input_ids: Tensor, real: Tensor) -> Float[Tensor, " batch"]:
    """Mean next-token loss of each row, in nats, over pairs of tokens that are no padding."""
    losses = []
    for row, ids, kept in zip(logits, input_ids, real[:, 1:] & real[:, :-1], strict=True):
        (loss,) = next_token_losses(row[None], ids[None])  # one text's logits are large enough
        check_losses(loss, kept, len(losses))
        losses.append(loss[kept].mean())
    return torch.stack(losses)


def _dataset(recorder: Recorder, variables: Sequence[str], loss: Tensor | None) -> xr.Dataset:
    """Put the layers together, with NaN for layers and heads that some layers lack."""
    real = recorder.scope.real
    found = {}
    for name in variables:
        dims, units, long_name = VARIABLES[name]
        if name == "loss":
            values = loss.float().cpu().numpy()
        else:
            kept = recorder.residuals if dims == RESIDUAL else recorder.readings
            layers = [layer.get(name) for layer in kept]
            check_variable(name, dims, layers, real)
            values = _stack(layers)
            if values is None:
                raise _nothing_to_show(recorder, name)
            if "position" in dims:
                padding = ~real.cpu().numpy().reshape(len(real), *[1] * (len(dims) - 2), -1)
                values = np.where(padding, np.float32("nan"), values)
        found[name] = (dims, values, {"units": units, "long_name": long_name})
    result = xr.Dataset(found, coords={"sink": ("batch", recorder.scope.sink.cpu().numpy())})
    return result.assign_coords({dim: np.arange(size) for dim, size in result.sizes.items()})


def _nothing_to_show(recorder: Recorder, name: str) -> SinkbookError:
    """Why no layer has a variable."""
    model, layers = type(recorder.model).__name__, recorder.layers
    if VARIABLES[name][0] == RESIDUAL:
        why = "hands on several residual states side by side, which have no one norm"
        return SinkbookError(f"{model} {why}, so no {name}. Leave it out of the variables.")
    if not recorder.routes:
        kinds = {type(m).__name__ for layer in layers for m in layer.block.modules()}
        named = sorted(kind for kind in kinds if "attention" in kind.lower())
        hears = f" that sinkbook hears in {' and '.join(named)}" if named else ""
        return SinkbookError(
            f"{model} has no softmax attention{hears}, so no {name}. It has residual_norm and loss."
        )
    if name in ("value_norm", "head_output_norm") and all(layer.output is None for layer in layers):
        return SinkbookError(
            f"sinkbook does not find what projects the heads' outputs (W_O) in {model}, so no "
            f"{name}. Leave it out of the variables."
        )
    return SinkbookError(f"{model} has no {name} of its own. Leave it out of the variables.")


def _stack(layers: list[Tensor | None]) -> Float[np.ndarray, "batch layer ..."] | None:
    """Stack the layers of one variable; where the number of heads differs, up to the largest."""
    layers = [None if values is None else values.float().cpu().numpy() for values in layers]
    present = [values for values in layers if values is not None]
    if not present:
        return None
    shape = np.max([values.shape for values in present], axis=0)
    stacked = np.full((len(layers), *shape), np.nan, dtype=np.float32)
    for number, values in enumerate(layers):
        if values is not None:
            stacked[(number, *map(slice, values.shape))] = values
    return stacked.swapaxes(0, 1)
