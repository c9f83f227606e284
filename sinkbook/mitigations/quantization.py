"""Eight-bit numbers, simulated: what rounding costs, and how much of it is the sink's doing.

A tensor in int8 is one of 255 evenly spaced values, and its largest entry decides how far apart
they lie. One token with a residual-state peak sets that range for all others, which are then
rounded to a handful of values, or to zero. The rounding here is simulated in floating point: the
numbers are those of an int8 kernel with symmetric ranges, the speed is not.
"""

import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from inspect import signature
from math import prod

import numpy as np
import torch
import torch.nn.functional as F
import xarray as xr
from jaxtyping import Float, Int
from torch import Tensor, nn

from sinkbook.annotations import check_arguments
from sinkbook.arguments import check_known, check_token_ids, whole_number
from sinkbook.errors import SinkbookError
from sinkbook.mitigations.experts import check_by_text, compute_by_text
from sinkbook.mitigations.matrices import Part, parts
from sinkbook.models.layout import blocks, of_transformers
from sinkbook.models.losses import token_losses
from sinkbook.models.partial_forward import alone_with, put_back, state_into
from sinkbook.models.trials.maps import uncalled
from sinkbook.models.wrappers import (
    AnyModel,
    computing_device,
    evaluating,
    taking,
    uncompiled,
    unwrapped,
)
from sinkbook.probe import measure
from sinkbook.progress import progress
from sinkbook.toy.runs import Run

Hidden = Float[Tensor, "*batch position width"]

STEPS = 127  # of each sign
SILENT = 2**-20  # of the first token's entry: below this a channel counts as silent elsewhere

# How a text's activations get their ranges, coarse to fine.
RANGES = {
    "tensor": "one range for the whole text",
    "sink apart": "one range for the whole text but its first token",
    "token": "a range for every token",
    "token and channel": "a range for every token, after bringing the channels to one scale",
}


def round_int8(states: Float[Tensor, "..."], largest: Float[Tensor, "..."]) -> Tensor:
    """The nearest of 255 evenly spaced values from `-largest` to `largest`.

    `largest` is broadcast to `states`; what lies beyond it is cut off. Computed in single precision
    at least, and returned in the precision of `states`.

    >>> round_int8(torch.tensor([2.2, 3.0, -900.0]), torch.tensor(127.0))
    tensor([   2.,    3., -127.])
    """
    return _rounded(_wide(states), _wide(largest)).to(states.dtype)


def _rounded(states: Tensor, largest: Tensor) -> Tensor:
    step = (largest / STEPS).clamp(min=torch.finfo(states.dtype).tiny)
    return (states / step).round().clamp(-STEPS, STEPS) * step


def _wide(states: Tensor) -> Tensor:
    """The numbers in single precision at least: in half, squares overflow and steps vanish."""
    return states.to(torch.promote_types(states.dtype, torch.float32))


@check_arguments
def int8_error(
    hidden: Hidden, *, ranges: str = "tensor", first: int = 0
) -> Float[Tensor, "*batch"]:
    """Relative root-mean-square error of rounding each text's states to int8.

    A token's error is the norm of what rounding changes over the norm of its state, since the next
    layer normalises every token by itself; the result is the root of the mean of its square over
    the tokens from position `first` on. 0.01 is harmless, 1 says that nothing is left. `ranges` is
    a name in `RANGES`; the default is the plainest int8, symmetric and per tensor. The result is in
    single precision at least, whatever `hidden` is in.
    Raises `SinkbookError` for other names. Source: the setting of Bondarenko et al. (arXiv
    2306.12929); "sink apart" is what PrefixQuant (arXiv 2410.05265) achieves by computing the sink
    token beforehand; the last is SmoothQuant's idea (arXiv 2211.10438) at full strength.

    >>> hidden = torch.ones(1, 5, 8)
    >>> hidden[0, 0] = 1000.0  # a peak at the first token
    >>> int8_error(hidden, first=1).item(), int8_error(hidden, ranges="token").item() < 1e-6
    (1.0, True)
    """
    check_known("ranges", ranges, RANGES)
    if hidden.ndim < 2 or whole_number("first", first) >= hidden.shape[-2]:
        raise SinkbookError(
            f"states of shape {tuple(hidden.shape)} from position `first={first}` on. "
            "Give states of shape (..., position, width), and a position that they have."
        )
    hidden = _wide(hidden)
    change = (_rounded(hidden, largest_entries(hidden, ranges)) - hidden)[..., first:, :]
    size = hidden[..., first:, :]
    # In units of each token's largest entry, so that no square overflows or vanishes.
    unit = size.abs().amax(-1, keepdim=True)
    unit = torch.where(unit == 0, 1, unit)
    lost, whole = ((part / unit).square().sum(-1) for part in (change, size))
    return torch.where(whole == 0, 0, lost / whole).mean(-1).sqrt()


def largest_entries(
    hidden: Hidden, ranges: str
) -> Float[Tensor, "*batch position_or_1 width_or_1"]:
    """The range that each entry is rounded in, to be broadcast: `ranges` is a name in `RANGES`."""
    size = hidden.abs()
    later = size.clone()
    later[..., :1, :] = 0
    if ranges == "tensor":
        return size.amax((-2, -1), keepdim=True)
    if ranges == "sink apart":
        return later.amax((-2, -1), keepdim=True)
    if ranges == "token":
        return size.amax(-1, keepdim=True)
    return _smoothed(size, later.amax(-2, keepdim=True))


def _smoothed(size: Hidden, channel: Float[Tensor, "*batch 1 width"]) -> Hidden:
    """A range for every token, in units of each channel's own scale.

    A channel that only the first token drives has no scale among the others, and takes the first
    token's: any other would give that token a range that swamps its other channels.
    """
    whole = size.amax(-2, keepdim=True)
    channel = torch.where(channel < SILENT * whole, whole, channel)
    relative = size / torch.where(channel == 0, 1, channel)
    return channel * relative.amax(-1, keepdim=True)


@torch.no_grad()
def layer_errors(
    model: AnyModel,
    input_ids: Int[Tensor, "text position"],
    *,
    first: int = 1,
    batch_size: int = 8,
) -> xr.DataArray:
    """`int8_error` of the residual state that each layer reads, for all `RANGES`.

    Over (ranges, text, layer). `model` is a toy transformer or a causal LM of transformers; `first`
    leaves out the sink token's own error, which counts for nothing beside what its range does to
    the others.
    """
    check_token_ids("input_ids", input_ids)
    model = unwrapped(model)
    found, batch_size = blocks(model), whole_number("batch_size", batch_size, 1)
    errors = torch.empty(len(RANGES), len(input_ids), len(found))

    def read(layer: int, rows: slice, _block, arguments, keywords):
        hidden = state_into(arguments, keywords)
        for number, ranges in enumerate(RANGES):
            error = int8_error(hidden, ranges=ranges, first=first)
            errors[number, rows, layer] = error.float().cpu()

    input_ids = input_ids.to(computing_device(model))
    for start in range(0, len(input_ids), batch_size):
        rows = slice(start, start + batch_size)
        with evaluating(model), taking(model, input_ids), ExitStack() as hooks:
            for layer, block in enumerate(found):
                hook = partial(read, layer, rows)
                handle = block.register_forward_pre_hook(hook, with_kwargs=True)
                hooks.callback(handle.remove)
            model(input_ids[rows])
    coords = {"ranges": list(RANGES), "layer": np.arange(len(found))}
    return xr.DataArray(errors.numpy(), dims=("ranges", "text", "layer"), coords=coords)


def largest_and_error(
    model: AnyModel, input_ids: Int[Tensor, "text position"], *, batch_size: int = 8
) -> xr.Dataset:
    """How large the numbers are that each layer reads, and what int8 loses of ordinary tokens.

    Over layers: `largest`, the largest magnitude of any entry; `outlier`, the same over the median
    of the tokens' own largest entries; and `error`, over `RANGES` too, that of `layer_errors`. Of
    `largest` the maximum over texts, of the others the mean.
    Raises `SinkbookError` where the probe or `layer_errors` does.
    """
    check_token_ids("input_ids", input_ids)
    sizes = [
        measure(model, rows, ["residual_max_abs"]).residual_max_abs
        for rows in input_ids.split(whole_number("batch_size", batch_size, 1))
    ]
    size = xr.concat(sizes, "batch").rename(residual_layer="layer").isel(layer=slice(-1))
    of_text = size.max("position")
    errors = layer_errors(model, input_ids, batch_size=batch_size)
    layers = {"layer": errors.layer.values}
    return xr.Dataset(
        {
            "largest": of_text.max("batch").drop_vars("layer", errors="ignore"),
            "outlier": (of_text / size.median("position")).mean("batch").drop_vars("layer"),
            "error": errors.mean("text"),
        }
    ).assign_coords(layers)


def split_error(errors: xr.DataArray) -> dict[str, xr.DataArray]:
    """What `layer_errors` owes to token outliers, to channel outliers, and to rounding as such.

    Squared errors add up, so the parts are: what a range for every token takes away, what one scale
    for the channels takes away after that, and what is left. Their sum is the square of the error
    with one range for the whole text.
    """
    squares = errors**2
    whole, token, grain = (squares.sel(ranges=r) for r in ("tensor", "token", "token and channel"))
    return {"token outliers": whole - token, "channel outliers": token - grain, "rounding": grain}


@check_arguments
@contextmanager
def quantized(
    model: AnyModel, activations: str | None = "tensor", *, weights: bool = True
) -> Iterator[None]:
    """Have every linear map inside the layers compute as with 8-bit weights and activations.

    `activations` names the `RANGES` in which each text's inputs are rounded, on the fly; `None`
    leaves them exact. "sink apart" also leaves the first token's own states exact, since a prefix
    is computed once, beforehand. `weights` are rounded in one symmetric range for each matrix, of
    each expert in a mixture. Embedding, output head and the routers of transformers' mixtures stay
    as they are. Whole texts only, of one length: the first position is taken for the first token.
    The model is left as it was found, also after an exception. Raises `SinkbookError` for unknown
    ranges, for models with other matrices in their layers, or whose weights are no plain
    floating-point numbers, and if activations are to be rounded for linear maps that a short text
    never calls, though it needs them; in the body, where a map gets tokens that cannot be told by
    text. Other matrices stay exact where they are less than a fiftieth of these.
    """
    if activations is not None:
        check_known("ranges", activations, RANGES)
    elif not weights:
        raise SinkbookError(
            "nothing is to be rounded. Give `activations`, or leave the weights in."
        )
    model = unwrapped(model)
    shape: list[int] = []  # texts and tokens that the layers are called with
    with alone_with(model), ExitStack() as undo, torch.no_grad(), uncompiled():
        found = parts(model)
        if activations is not None:
            _check_called(model, found)
        if activations not in (None, "token"):
            own = (model.base_model if of_transformers(model) else model).register_forward_pre_hook
            undo.callback(own(_check_whole, with_kwargs=True).remove)
        for part in found:
            for matrix in part.matrices if weights else ():
                undo.callback(setattr, matrix, "data", matrix.data)
                matrix.data = round_int8(matrix.data, _wide(matrix.data).abs().amax((-2, -1), True))
            if activations is not None:
                undo.enter_context(_inputs_rounded(part, activations, shape))
        for block in blocks(model) if activations is not None else ():
            note = partial(_note_shape, shape)
            handle = block.register_forward_pre_hook(note, with_kwargs=True, prepend=True)
            undo.callback(handle.remove)
        yield


def _check_whole(model: nn.Module, arguments: tuple, keywords: dict) -> None:
    """Refuse what has no range of its own: texts with padding, and what goes on after a cache."""
    from transformers import Cache  # here, as toys are rounded without it

    call = signature(model.forward).bind_partial(*arguments, **keywords).arguments
    call |= call.pop("kwargs", {})
    mask, cache = call.get("attention_mask"), call.get("past_key_values")
    padded = torch.is_tensor(mask) and mask.ndim == 2 and not mask.bool().all()
    if padded or (isinstance(cache, Cache) and cache.get_seq_length() > 0):
        what = "texts with padding" if padded else "tokens whose beginning lies in a cache"
        raise SinkbookError(
            f"{type(model).__name__} is called with {what}, so the range of a whole text is not "
            "known. Give whole texts of one length, with use_cache=False, or `activations='token'`."
        )


def _check_called(model: nn.Module, found: list[Part]) -> None:
    names = {part.module: part.name for part in found if not part.experts}
    if past := uncalled(model, names):
        raise SinkbookError(
            f"layers of {type(model).__name__} compute with the weights of "
            f"{', '.join(names[module] for module in past)} without calling the linear map, so its "
            "inputs cannot be rounded. Give `activations=None`."
        )


def _note_shape(shape: list[int], _block: nn.Module, arguments: tuple, keywords: dict) -> None:
    shape[:] = state_into(arguments, keywords).shape[:2]


@contextmanager
def _inputs_rounded(part: Part, ranges: str, shape: list[int]) -> Iterator[None]:
    """Have a part of the model get its inputs rounded, each text's by itself."""
    module, own = part.module, vars(part.module).get("forward")
    if part.experts:
        module.forward = partial(_experts_rounded, module, ranges, shape, [module.forward])
        try:
            yield
        finally:
            put_back(module, own)
    else:
        hook = partial(_round_input, part.name, ranges, shape)
        handle = module.register_forward_pre_hook(hook, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()


def _round_input(
    name: str, ranges: str, shape: list[int], _module: nn.Module, arguments: tuple, keywords: dict
) -> tuple[tuple, dict]:
    """The input of a linear map, rounded. Some layers call it with the tokens of all texts."""
    key, given = next(iter([*enumerate(arguments), *keywords.items()]))
    one_head = given.ndim == 4 and given.shape[1] == 1 < shape[1]  # as latent attention puts it
    exact = given.squeeze(1) if one_head else given
    among_experts = re.search(r"experts?\.\d", name) is not None
    if list(exact.shape[:2]) == shape and exact.ndim > 2:
        rounded = rounded_text(exact.flatten(2), ranges)
    elif exact.shape[0] == prod(shape) and exact.ndim == 2 and not among_experts:
        rounded = rounded_text(exact.unflatten(0, shape), ranges)
    elif ranges == "token":
        rounded = rounded_text(exact, ranges)
    else:
        raise SinkbookError(
            f"{name} is called with states of shape {tuple(exact.shape)} for {shape[0]} texts of "
            f"{shape[1]} tokens, so they cannot be told by text. Give `activations='token'` or "
            "`None`."
        )
    rounded = rounded.reshape(given.shape)
    if arguments:
        return (rounded, *arguments[1:]), keywords
    return arguments, keywords | {key: rounded}


def _experts_rounded(
    module: nn.Module, ranges: str, shape: list[int], untried: list, *arguments, **keywords
) -> Tensor:
    """What experts give when each text's inputs to each matrix are rounded.

    The first call is compared with the experts' own forward function, which lies in `untried`.
    """
    called = (*arguments, *keywords.values())
    if len(called) != 3 or called[0].shape[0] != prod(shape):
        raise SinkbookError(
            f"{type(module).__name__} is called with states of shape {tuple(called[0].shape)} for "
            f"{shape[0]} texts of {shape[1]} tokens, so they cannot be told by text. "
            "Give `activations=None`."
        )
    if untried:
        check_by_text(module, untried.pop()(*arguments, **keywords), *called, texts=shape[0])
    change = partial(rounded_text, ranges=ranges)
    return compute_by_text(module, *called, texts=shape[0], change=change)


def rounded_text(states: Hidden, ranges: str, *, first: bool = True) -> Hidden:
    """The states of one text, or of several of one length, rounded in `ranges`.

    `first` says whether they begin with the text's first token.
    """
    if not first:  # a first token of zeros changes no range
        states = F.pad(states, (0, 0, 1, 0))
    rounded = round_int8(states, largest_entries(_wide(states), ranges))
    if ranges == "sink apart":
        rounded = torch.cat([states[..., :1, :], rounded[..., 1:, :]], dim=-2)
    return rounded if first else rounded[..., 1:, :]


def rounding_losses(model: AnyModel, input_ids: Int[Tensor, "text position"]) -> xr.DataArray:
    """Loss of each token in eight-bit arithmetic: over (numbers, text, position).

    `numbers` is "exact", "weights alone", or the name of the ranges in which activations are
    rounded as well: see `RANGES`.
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


def toy_rounding_errors(runs: list[Run]) -> Float[np.ndarray, "seed layer"]:
    """`int8_error` of what each layer of a toy reads, in one range, mean over its texts."""
    errors = [layer_errors(run.model, run.evaluation_tokens) for run in runs]
    return np.stack([e.sel(ranges="tensor").mean("text").values for e in errors])
