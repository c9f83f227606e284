"""Taking a language model apart: where the peak of its sink is written, and by which part.

`writes` reads off what every attention and every MLP adds to the residual state of one position.
`cut_each` silences one part after the other and measures what is left of sinks, drain and peak;
`neurons.py` does the same inside one MLP. Toys and models of transformers are treated alike.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float, Int
from torch import Tensor, nn

from sinkbook.annotations import check_arguments
from sinkbook.arguments import (
    check_all,
    check_some,
    check_token_ids,
    check_whole_number,
    names_of,
    whole_number,
)
from sinkbook.errors import SinkbookError
from sinkbook.models.interventions import WAYS, reading, replace, stand_in, zero
from sinkbook.models.layout import Layer, layers
from sinkbook.models.partial_forward import can_resume, given, kept, residual_states, state_of
from sinkbook.probe.measure import measure
from sinkbook.probe.metrics import residual_peak_ratio, value_drain_ratio
from sinkbook.progress import progress

PARTS = ("attention", "mlp")
IN_ITS_PLACE = (*WAYS, "elsewhere")
Tokens = Int[Tensor, "batch position"]

# --- What is written -------------------------------------------------------------------------


@check_arguments
@torch.no_grad()
def writes(model: nn.Module, input_ids: Tokens, *, position: int = 0) -> xr.Dataset:
    """What each attention and each MLP adds to the residual state at one position, layer by layer.

    Where a norm or a dropout stands between a part and the residual stream, the write is what
    comes out of it. Variables:

    - `residual` (batch, residual_layer, dimension): the state, 0 for the embedding;
    - `write` (batch, part, layer, dimension): what "attention" and "mlp" add; NaN for absent parts;
    - `norm` (batch, part, layer): its length;
    - `along` (batch, part, layer): its component along the peak, the direction of the state where
      it is longest (`residual_layer` `top`), which is negative where the peak is erased;
    - `remainder` (batch, layer): length of what the two writes leave unexplained of the change of
      the state, over the length of the state. It is 0 but for rounding, or else `write` is not to
      be trusted: the model scales its writes, or has parts of other kinds.
    - `share` (batch, dimension): share of each dimension in the squared length of the peak.
    """
    found = layers(model)
    kept_parts: list[dict[str, Tensor]] = [{} for _ in found]
    with ExitStack() as hooks:
        states = hooks.enter_context(residual_states(model))
        for layer, written in zip(found, kept_parts, strict=True):
            hooks.enter_context(_part_writes(layer, written))
        measure(model, input_ids, ("residual_norm",))

    def there(state: Tensor) -> np.ndarray:
        return state.reshape(states[0].shape)[:, position].float().cpu().numpy()

    residual = np.stack([there(state) for state in states])
    absent = np.full_like(residual[0], np.nan)
    write = [
        [there(written[part]) if part in written else absent for written in kept_parts]
        for part in PARTS
    ]
    return _described(
        xr.Dataset(
            {
                "residual": (("residual_layer", "batch", "dimension"), residual),
                "write": (("part", "layer", "batch", "dimension"), np.array(write)),
            },
            coords={"part": list(PARTS), "layer": np.arange(len(found))},
        )
    )


def _described(result: xr.Dataset) -> xr.Dataset:
    """`residual` and `write`, and what `writes` derives from them."""
    residual, write = result.residual, result.write
    length = _length(residual)
    top = int(length.mean("batch").argmax("residual_layer"))
    peak = residual.isel(residual_layer=top)
    after = length.isel(residual_layer=slice(1, None)).rename(residual_layer="layer")
    change = residual.diff("residual_layer").rename(residual_layer="layer")
    unexplained = _length(change - write.sum("part"))
    return (
        result.assign(
            norm=_length(write),
            along=(write * peak).sum("dimension", skipna=False) / _length(peak),
            remainder=unexplained / after,
            share=np.square(peak) / np.square(_length(peak)),
        )
        .assign_coords(top=top)
        .transpose("batch", ...)
    )


def _length(vectors: xr.DataArray) -> xr.DataArray:
    return np.sqrt(np.square(vectors).sum("dimension", skipna=False))


@contextmanager
def _part_writes(layer: Layer, written: dict[str, Tensor]) -> Iterator[None]:
    """Keep what the parts of a layer give, and then what the norms that follow make of it."""
    owners = {"attention": layer.attention, "mlp": layer.mlp}

    def note(module, arguments, output):
        for part, owner in owners.items():
            follows = bool(arguments) and arguments[0] is written.get(part)
            if module is owner or follows:
                written[part] = state_of(output)

    modules = {*layer.block.children(), *filter(None, owners.values())}
    with ExitStack() as hooks:
        for module in modules:
            hooks.callback(module.register_forward_hook(note).remove)
        yield


@check_arguments
@torch.no_grad()
def compression(model: nn.Module, input_ids: Tokens) -> xr.Dataset:
    """How much of a text's residual states lies along one direction, layer by layer.

    `with_sink` and `without_sink`, over (batch, residual_layer): the share of the first singular
    direction in the squared length of all states of the text, with position 0 and without.
    Source: the compression of arXiv 2510.06477, without subtracting the mean.
    """
    check_token_ids("input_ids", input_ids)
    if input_ids.shape[1] < 2:
        raise SinkbookError("texts of one token have nothing beside the sink. Give longer texts.")
    with residual_states(model) as states:
        measure(model, input_ids, ("residual_norm",))

    def share(states: Float[Tensor, "batch position width"]) -> Float[Tensor, " batch"]:
        singular = torch.linalg.svdvals(states.double()).square()
        return singular[:, 0] / singular.sum(-1)

    dims = ("residual_layer", "batch")
    found = {
        "with_sink": (dims, torch.stack([share(s) for s in states]).cpu().numpy()),
        "without_sink": (dims, torch.stack([share(s[:, 1:]) for s in states]).cpu().numpy()),
    }
    return xr.Dataset(found).transpose(*reversed(dims))


# --- What is needed --------------------------------------------------------------------------


@check_arguments
def symptoms(model: nn.Module, input_ids: Tokens) -> xr.Dataset:
    """Sinks, drain, peak and loss of every text, in one pass, heads averaged.

    `sink_attention` and `value_drain_ratio` over (batch, layer), `residual_norm` of position 0 and
    `residual_peak_ratio` over (batch, residual_layer), `loss` over batch in nats. The ratios are
    the probe's.
    """
    result = measure(model, input_ids, ("sink_attention", "value_norm", "residual_norm", "loss"))
    return xr.Dataset(
        {
            "sink_attention": result.sink_attention.mean("head"),
            "value_drain_ratio": value_drain_ratio(result).mean("head"),
            "residual_norm": result.residual_norm.isel(position=0, drop=True),
            "residual_peak_ratio": residual_peak_ratio(result),
            "loss": result.loss,
        }
    ).drop_vars("sink")


@check_arguments
def reads_peak(whole: xr.Dataset) -> xr.DataArray:
    """Which layers read the peak: those at whose input it has at least half its full height.

    `whole` is what `symptoms` returns; the result is boolean over `layer`. The height is the norm
    of position 0 above that of the median token, mean over texts, and full where it is largest at
    the input of a layer. Attention plays no part in it.
    """
    height = (whole.residual_norm * (1 - 1 / whole.residual_peak_ratio)).mean("batch")
    at_input = height.isel(residual_layer=slice(None, -1)).rename(residual_layer="layer")
    return (at_input >= at_input.max() / 2).drop_vars("residual_layer", errors="ignore")


@check_arguments
def cut_each(
    model: nn.Module,
    input_ids: Tokens,
    *,
    position: int | None = 0,
    parts: Sequence[str] = PARTS,
    cuts: Sequence[int] | None = None,
) -> xr.Dataset:
    """Silence each attention and each MLP in turn and measure the `symptoms`.

    The part writes zeros at `position`, or at every one if that is None. The result has the
    variables of `symptoms`, over (part, cut) besides; `cut` is the layer of the silenced part, one
    of `cuts` if they are given. NaN for parts that a layer does not have. Shows progress on a
    terminal.

    Layers below a cut are not run again. Where layers hand on more than the residual state, such
    as keys that several of them share, everything is.
    """
    check_token_ids("input_ids", input_ids)
    found, parts = layers(model), names_of("part", parts, PARTS)
    if cuts is None:
        cuts = range(len(found))
    check_all("cuts", cuts, int, np.integer)
    check_some("cuts", cuts)
    cuts = [whole_number("cuts", cut, 0, len(found) - 1) for cut in cuts]
    with kept(model) as outputs:
        whole = symptoms(model, input_ids)
    resumes = can_resume(model, input_ids)
    missing = xr.full_like(whole, float("nan"))
    results = {part: [] for part in parts}
    with progress("cutting", len(parts) * len(cuts)) as show:
        for done, number in enumerate(cuts, 1):
            for part in parts:
                if getattr(found[number], part) is None:
                    results[part].append(missing)
                    continue
                below = number if resumes else 0
                cut = zero(model, part, layer=number, position=position)
                with cut, given(model, outputs, below=below):
                    results[part].append(symptoms(model, input_ids).fillna(whole))
            show(done * len(parts))
    of_parts = [xr.concat(results[part], dim="cut") for part in parts]
    together = xr.concat(of_parts, dim=xr.Variable("part", list(parts)))
    return together.assign_coords(cut=cuts)


@check_arguments
def effects(cuts: xr.Dataset, whole: xr.Dataset) -> xr.Dataset:
    """What each cut of `cut_each` leaves, over (part, cut, batch), against the `whole` model.

    - `norm_left`, `peak_left`: share of the residual norm of position 0, and of its ratio to the
      median token, that is left at three quarters of the depth (layer 24 of 32 in the paper).
    - `sinks_left`, `drain`: share of the sink attention that is left, and the value ratio, mean
      over the layers above the cut that read the peak in the whole model; NaN if there are none.
    - `loss_gain`: nats.
    """
    depth = round(0.75 * whole.sizes["layer"])
    there = {"residual_layer": depth}
    above = reads_peak(whole) & (whole.layer > cuts.cut)
    sinks = [result.sink_attention.where(above).mean("layer") for result in (cuts, whole)]
    return xr.Dataset(
        {
            "norm_left": cuts.residual_norm.sel(there) / whole.residual_norm.sel(there),
            "peak_left": cuts.residual_peak_ratio.sel(there) / whole.residual_peak_ratio.sel(there),
            "sinks_left": sinks[0] / sinks[1],
            "drain": cuts.value_drain_ratio.where(above).mean("layer"),
            "loss_gain": cuts.loss - whole.loss,
        }
    ).drop_vars("residual_layer")


@check_arguments
def effects_of_each(
    model: nn.Module,
    *groups: Int[Tensor, "_batch _position"],
    position: int | None = 0,
    parts: Sequence[str] = PARTS,
    cuts: Sequence[int] | None = None,
) -> xr.Dataset:
    """`effects` of silencing each part in turn, on groups of texts put together along `batch`.

    The texts of a group have one length; groups may differ. `parts` and `cuts` as in `cut_each`.
    """
    which = {"position": position, "parts": parts, "cuts": cuts}
    found = [
        effects(cut_each(model, tokens, **which), symptoms(model, tokens)).drop_vars(
            "batch", errors="ignore"
        )
        for tokens in groups
    ]
    return xr.concat(found, dim="batch")


@check_arguments
def in_its_place(
    model: nn.Module,
    input_ids: Tokens,
    part: str,
    *,
    layer: int,
    position: int = 0,
    ways: Sequence[str] = IN_ITS_PLACE,
    seed: int = 0,
) -> xr.Dataset:
    """`symptoms` with each of several things in the place of what a part writes at one position.

    Over `way` besides, for `effects`: "whole" first, the model as it is, then the `ways`. Those of
    `interventions.stand_in` take a part's place by what it writes at this position of other texts;
    "elsewhere" by its mean over all other positions of all texts, what it writes on average.
    Position 0 sees only itself: where the texts begin with the same token, they write the same
    there, and "mean" and "shuffled" change nothing. Raises `SinkbookError` for other words.
    """
    check_token_ids("input_ids", input_ids)
    check_whole_number("position", position, 0, input_ids.shape[1] - 1)
    ways = names_of("way", ways, IN_ITS_PLACE)
    with kept(model) as outputs, reading(model, part, layer=layer) as runs:
        found = [symptoms(model, input_ids)]
    written = runs[0]
    at = written[:, [position]]
    others = torch.arange(written.shape[1], device=written.device) != position % written.shape[1]
    below = layer if can_resume(model, input_ids) else 0
    for way in ways:
        if way == "elsewhere":
            new = written[:, others].float().mean((0, 1)).to(written)
        else:
            new = stand_in(at, way, seed=seed)
        cut = replace(model, part, new, layer=layer, position=position)
        with cut, given(model, outputs, below=below):
            found.append(symptoms(model, input_ids).fillna(found[0]))
    together = xr.concat(found, dim=xr.Variable("way", ["whole", *ways]))
    return together.assign_coords(cut=layer)


@check_arguments
def matters_most(left: Float[xr.DataArray, "part cut batch"]) -> tuple[str, int]:
    """The part without which least is left of something, mean over texts: "mlp", 11 for example.

    Raises `SinkbookError` if nothing is known of any part, since no layer above one reads a peak.
    """
    means = left.mean("batch").stack(which=("part", "cut")).dropna("which")
    if not means.size:
        raise SinkbookError(
            "no layer above a part reads a peak, so no part matters to it. This model has none at "
            "position 0: see sinkbook.llm.sink_location.seen_by_all for other positions."
        )
    part, cut = means.which.values[int(means.argmin("which"))]
    return part, int(cut)
