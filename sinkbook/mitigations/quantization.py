"""Eight-bit numbers, simulated: what rounding costs, and how much of it is the sink's doing.

A tensor in int8 is one of 255 evenly spaced values, and its largest entry decides how far apart
they lie. One token with a residual-state peak sets that range for all others, which are then
rounded to a handful of values, or to zero. The rounding here is simulated in floating point: the
numbers are those of an int8 kernel with symmetric ranges, the speed is not.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float, Int
from torch import Tensor, nn

from sinkbook.errors import SinkbookError
from sinkbook.models.layout import blocks
from sinkbook.models.losses import token_losses
from sinkbook.models.wrappers import computing_device
from sinkbook.progress import progress
from sinkbook.toy.runs import Run

Hidden = Float[Tensor, "*batch position width"]

STEPS = 127  # of each sign

# How a text's activations get their ranges, coarse to fine.
RANGES = {
    "tensor": "one range for the whole text",
    "sink apart": "one range for the whole text but its first token",
    "token": "a range for every token",
    "token and channel": "a range for every token, after bringing the channels to one scale",
}


def round_int8(states: Float[Tensor, "..."], largest: Float[Tensor, "..."]) -> Tensor:
    """The nearest of 255 evenly spaced values from `-largest` to `largest`.

    `largest` is broadcast to `states`; what lies beyond it is cut off.

    >>> round_int8(torch.tensor([2.2, 3.0, -900.0]), torch.tensor(127.0))
    tensor([   2.,    3., -127.])
    """
    step = (largest / STEPS).clamp(min=torch.finfo(states.dtype).tiny)
    return (states / step).round().clamp(-STEPS, STEPS) * step


def int8_error(
    hidden: Hidden, *, ranges: str = "tensor", first: int = 0
) -> Float[Tensor, "*batch"]:
    """Relative root-mean-square error of rounding each text's states to int8.

    A token's error is the norm of what rounding changes over the norm of its state, since the next
    layer normalises every token by itself; the result is the root of the mean of its square over
    the tokens from position `first` on. 0.01 is harmless, 1 says that nothing is left. `ranges` is
    a name in `RANGES`; the default is the plainest int8, symmetric and per tensor.
    Raises `SinkbookError` for other names. Source: the setting of Bondarenko et al. (arXiv
    2306.12929); "sink apart" is what PrefixQuant (arXiv 2410.05265) achieves by computing the sink
    token beforehand; the last is SmoothQuant's idea (arXiv 2211.10438) at full strength.

    >>> hidden = torch.ones(1, 5, 8)
    >>> hidden[0, 0] = 1000.0  # a peak at the first token
    >>> int8_error(hidden, first=1).item(), int8_error(hidden, ranges="token").item() < 1e-6
    (1.0, True)
    """
    change = (round_int8(hidden, _largest(hidden, ranges)) - hidden)[..., first:, :]
    relative = change.square().sum(-1) / hidden[..., first:, :].square().sum(-1)
    return relative.mean(-1).sqrt()


def _largest(hidden: Hidden, ranges: str) -> Float[Tensor, "*batch position_or_1 width_or_1"]:
    """The range that each entry is rounded in, to be broadcast."""
    size = hidden.abs()
    if ranges == "tensor":
        return size.amax((-2, -1), keepdim=True)
    if ranges == "sink apart":
        return size[..., 1:, :].amax((-2, -1), keepdim=True)
    if ranges == "token":
        return size.amax(-1, keepdim=True)
    if ranges == "token and channel":
        channel = size[..., 1:, :].amax(-2, keepdim=True).clamp(min=torch.finfo(size.dtype).tiny)
        return channel * (size / channel).amax(-1, keepdim=True)
    raise SinkbookError(f"no ranges named {ranges!r}. Known: {', '.join(RANGES)}.")


@torch.no_grad()
def layer_errors(
    model: nn.Module,
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
    found = blocks(model)
    errors = torch.empty(len(RANGES), len(input_ids), len(found))

    def read(layer: int, rows: slice, _block, arguments, keywords):
        hidden = arguments[0] if arguments else keywords["hidden_states"]
        for number, ranges in enumerate(RANGES):
            error = int8_error(hidden, ranges=ranges, first=first)
            errors[number, rows, layer] = error.float().cpu()

    input_ids = input_ids.to(computing_device(model))
    for start in range(0, len(input_ids), batch_size):
        rows = slice(start, start + batch_size)
        with ExitStack() as hooks:
            for layer, block in enumerate(found):
                hook = partial(read, layer, rows)
                handle = block.register_forward_pre_hook(hook, with_kwargs=True)
                hooks.callback(handle.remove)
            model(input_ids[rows])
    coords = {"ranges": list(RANGES), "layer": np.arange(len(found))}
    return xr.DataArray(errors.numpy(), dims=("ranges", "text", "layer"), coords=coords)


def split_error(errors: xr.DataArray) -> dict[str, xr.DataArray]:
    """What `layer_errors` owes to token outliers, to channel outliers, and to rounding as such.

    Squared errors add up, so the parts are: what a range for every token takes away, what one scale
    for the channels takes away after that, and what is left. Their sum is the square of the error
    with one range for the whole text.
    """
    squares = errors**2
    whole, token, grain = (squares.sel(ranges=r) for r in ("tensor", "token", "token and channel"))
    return {"token outliers": whole - token, "channel outliers": token - grain, "rounding": grain}


@contextmanager
def quantized(
    model: nn.Module, activations: str | None = "tensor", *, weights: bool = True
) -> Iterator[None]:
    """Have every linear map inside the layers compute as with 8-bit weights and activations.

    `activations` names the `RANGES` in which each text's inputs are rounded, on the fly; `None`
    leaves them exact. "sink apart" also leaves the first token's own states exact, since a prefix
    is computed once, beforehand. `weights` are rounded in one symmetric range for each matrix.
    Embedding and output head stay as they are. Whole texts only: the first position is taken for
    the first token. The model is left as it was found, also after an exception.
    Raises `SinkbookError` for unknown ranges.
    """
    if activations is not None and activations not in RANGES:
        raise SinkbookError(f"no ranges named {activations!r}. Known: {', '.join(RANGES)}.")
    with ExitStack() as undo, torch.no_grad():
        for module in _linear_maps(model):
            if weights:
                exact = module.weight.data
                undo.callback(setattr, module.weight, "data", exact)
                module.weight.data = round_int8(exact, exact.abs().max())
            if activations is not None:
                hook = partial(_round_input, ranges=activations)
                undo.callback(module.register_forward_pre_hook(hook).remove)
        yield


def _linear_maps(model: nn.Module) -> list[nn.Module]:
    return [
        module
        for block in blocks(model)
        for module in block.modules()
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
    ]


def _round_input(_module: nn.Module, arguments: tuple, *, ranges: str) -> tuple:
    (exact,) = arguments
    rounded = round_int8(exact, _largest(exact, ranges))
    if ranges == "sink apart":
        rounded = torch.cat([exact[..., :1, :], rounded[..., 1:, :]], dim=-2)
    return (rounded,)


def rounding_losses(model: nn.Module, input_ids: Int[Tensor, "text position"]) -> xr.DataArray:
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
