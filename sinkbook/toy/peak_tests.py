"""Is it the peak that later layers go by? Parts of a toy cut, and the peak given to another token.

Both ask what the sink token's residual state causes (Figure 7b of arXiv 2410.13835), at every layer
that could have written it, and with as many random directions as a control needs.
"""

import json
from collections.abc import Callable
from contextlib import ExitStack
from itertools import product
from typing import TypeVar

import numpy as np
import pandas as pd
import torch
import xarray as xr
from jaxtyping import Float, Int
from torch import Tensor

from sinkbook import fits
from sinkbook.annotations import check_arguments
from sinkbook.arguments import check_token_ids, check_whole_number
from sinkbook.errors import SinkbookError
from sinkbook.models.interventions import replace, zero
from sinkbook.probe import measure
from sinkbook.probe.attention_maps import attention_weights
from sinkbook.toy.measurements import measure_with_sink_logit
from sinkbook.toy.runs import Run
from sinkbook.toy.transformer import Transformer

Reading = TypeVar("Reading")  # whatever is looked at
PARTS = {"attention": ("attention",), "MLP": ("mlp",), "both": ("attention", "mlp")}
PLACES = {"at the first token": 0, "everywhere": None}
MEASURED = (
    "residual_norm",
    "other_residual_norm",
    "residual_peak_height",
    "sink_attention",
    "sink_logit",
    "value_norm",
    "other_value_norm",
)


@check_arguments
def cuts(run: Run, *, texts: int = 16) -> xr.Dataset:
    """The phenomena of a run with a part of a layer cut, on some of its evaluation texts.

    Variables of `measure_with_sink_logit` along `cut_layer`, `part` ("attention", "MLP", "both")
    and `place` ("at the first token", "everywhere"), under names that begin with `cut_`; those that
    begin with `whole_` are of the model as it is. NaN where the layer has no such part.
    """
    check_whole_number("texts", texts, 1)
    tokens, layers = run.evaluation_tokens[:texts], range(len(run.model.layers))
    whole = _phenomena(run, tokens)
    found = []
    for layer, parts, position in product(layers, PARTS.values(), PLACES.values()):
        block = run.model.layers[layer]
        there = [part for part in parts if getattr(block, part) is not None]
        with ExitStack() as stack:
            for part in there:
                stack.enter_context(zero(run.model, part, layer=layer, position=position))
            measured = _phenomena(run, tokens) if there == list(parts) else whole * np.nan
        found.append(measured)
    shape = (len(layers), len(PARTS), len(PLACES))
    by_cut = {
        f"cut_{name}": (
            ("cut_layer", "part", "place", *whole[name].dims),
            np.stack([m[name].values for m in found]).reshape(*shape, *whole[name].shape),
        )
        for name in MEASURED
    }
    unchanged = {f"whole_{name}": whole[name] for name in MEASURED}
    coordinates = {"cut_layer": list(layers), "part": list(PARTS), "place": list(PLACES)}
    return xr.Dataset(unchanged | by_cut, coordinates)


def _phenomena(run: Run, tokens: Int[Tensor, "text position"]) -> xr.Dataset:
    measured = measure_with_sink_logit(run.model, run.task, tokens)
    return measured[list(MEASURED)].squeeze("head", drop=True)


@check_arguments
@torch.no_grad()
def transplants(
    run: Run, *, directions: int = 20, position: int = 8, texts: int = 16
) -> xr.Dataset:
    """What becomes of a token that is given what the peak's writer adds at the first token.

    The writer is the part, before the layer of the last attention, that adds the longest vector
    there. Along
    `written` ("own", "peak", and so many "random" directions of the same length): `received`, the
    largest mean attention, over the later layers, that the token at `position` gets from later
    tokens that are no triggers; and `written_value_norm`, the norm of its value state in the layer
    where the model as it is has its strongest sink. `writer_layer` and `writer_is_attention` say
    who the writer is.
    """
    check_whole_number("directions", directions, 1)
    check_whole_number("texts", texts, 1)
    tokens = run.evaluation_tokens[:texts]
    layer, part, vector = _writer(run.model, tokens)
    noise = torch.randn(
        directions, len(vector), generator=torch.Generator().manual_seed(run.config.seed)
    )
    noise = noise / noise.norm(dim=1, keepdim=True) * vector.norm()
    later = ~run.task.at_triggers(tokens)
    later[:, : position + 1] = False
    after = range(layer + 1, len(run.model.layers))
    attending = [i for i in after if run.model.layers[i].attention is not None]
    sink = measure(run.model, tokens, ("sink_attention",)).sink_attention.mean(("batch", "head"))
    strongest = int(np.nanargmax(sink.values))
    received, norms = [], []
    for written in (None, vector, *noise):
        with ExitStack() as changes:
            if written is not None:
                where = {"layer": layer, "position": position}
                changes.enter_context(replace(run.model, part, written, **where))
            received.append(
                max(_received(run.model, tokens, i, position, later) for i in attending)
            )
            values = measure(run.model, tokens, ("value_norm",)).value_norm
        norms.append(values.isel(layer=strongest, position=position).mean().item())
    return xr.Dataset(
        {
            "received": ("written", received),
            "written_value_norm": ("written", norms),
            "writer_layer": layer,
            "writer_is_attention": float(part == "attention"),
        },
        {"written": ["own", "peak", *(f"random {i + 1}" for i in range(directions))]},
    )


@check_arguments
@torch.no_grad()
def with_and_without_the_peak(
    run: Run,
    tokens: Int[Tensor, "text position"],
    read: Callable[[], Reading],
    *,
    position: int = 8,
) -> dict[str, Reading]:
    """What `read()` finds in a run's model as it is, and with its peak taken away or given away.

    "no peak": nothing that the layer of the peak's writer adds stands at the first token.
    "a second peak": what the writer adds there is written at `position` as well, as `transplants`
    does.
    """
    check_token_ids("tokens", tokens)
    layer, part, vector = _writer(run.model, tokens)
    found = {"as it is": read()}
    with ExitStack() as cuts_of_layer:
        for name in PARTS["both"]:
            if getattr(run.model.layers[layer], name) is not None:
                cut = zero(run.model, name, layer=layer, position=0)
                cuts_of_layer.enter_context(cut)
        found["no peak"] = read()
    with replace(run.model, part, vector, layer=layer, position=position):
        found["a second peak"] = read()
    return found


def _writer(
    model: Transformer, tokens: Int[Tensor, "text position"]
) -> tuple[int, str, Float[Tensor, " width"]]:
    """Layer and part that add the longest vector at the first token before the last attention."""
    written: dict[tuple[int, str], Tensor] = {}
    last = max(i for i, block in enumerate(model.layers) if block.attention is not None)
    with ExitStack() as hooks:
        for i, block in enumerate(model.layers[:last]):
            for name in ("attention", "mlp"):
                if (part := getattr(block, name)) is not None:
                    hook = part.register_forward_hook(
                        lambda _, __, output, key=(i, name): written.update({key: output[0, 0]})
                    )
                    hooks.callback(hook.remove)
        model(tokens[:1])
    if not written:
        raise SinkbookError(
            "nothing is written before the last attention of `run`. Give one of two layers or more."
        )
    (layer, part), vector = max(written.items(), key=lambda item: item[1].norm())
    return layer, part, vector


def _received(
    model: Transformer,
    tokens: Int[Tensor, "text position"],
    layer: int,
    position: int,
    later: Tensor,
) -> float:
    weights = attention_weights(model, tokens, layer=layer)[:, 0, :, position]
    return weights[later].mean().item()


@check_arguments
def at_the_peak(record: xr.Dataset, *, growing_from: int = 1_000) -> xr.Dataset:
    """Where each seed of a record has its peak, who writes it, how it grows, what hangs on it.

    `record` is one training of a record with `cuts` and `transplants`, along `seed` and `step`. The
    peak's layer is that with the highest peak at the end, the last layer apart. Along `seed`:

    - `layer`, `height`; `r_squared` and `slope` (height a step) of a line through the height from
      the step `growing_from` on;
    - `attention_share`: what the layer's attention adds at the first token, over what attention
      and MLP add (norms);
    - `peak_left`: height with that layer cut at the first token, over the height without;
    - `logit_kept`, `attention_kept`, `value_filled`: sink logit, attention on the first token and
      its value norm under that cut, over those without it, in the layer of the strongest sink;
    - `drawn`, `drawn_at_random`: attention that another token gets when it is given what the
      peak's writer adds, and the most that any random direction of that length gets it;
    - `emptied`, `emptied_at_random`: that token's value norm over what it was, the mean at random.
    """
    end = record.isel(step=-1, drop=True)
    layer = _peak_layer(end)
    after = {"residual_layer": layer + 1}
    height = record.residual_peak_height.isel(after)
    late = height.sel(step=slice(growing_from, None)).transpose("seed", "step")
    lines = [fits.line(late.step.values, of_seed) for of_seed in late.values]
    cut = end.sel(part="both", place="at the first token").isel(cut_layer=layer)
    sink = {"layer": end.whole_sink_attention.argmax("layer")}
    received, norms = end.received, end.written_value_norm
    at_random = {"written": slice(2, None)}
    of_own = norms / norms.sel(written="own", drop=True)
    found = {
        "layer": layer,
        "height": height.isel(step=-1, drop=True),
        "r_squared": ("seed", [line.r_squared for line in lines]),
        "slope": ("seed", [line.slope for line in lines]),
        "attention_share": _attention_share(end, layer),
        "peak_left": cut.cut_residual_peak_height.isel(after)
        / end.whole_residual_peak_height.isel(after),
        "logit_kept": cut.cut_sink_logit.isel(sink) / end.whole_sink_logit.isel(sink),
        "attention_kept": cut.cut_sink_attention.isel(sink) / end.whole_sink_attention.isel(sink),
        "value_filled": cut.cut_value_norm.isel(sink) / end.whole_value_norm.isel(sink),
        "drawn": received.sel(written="peak"),
        "drawn_at_random": received.isel(at_random).max("written"),
        "emptied": of_own.sel(written="peak"),
        "emptied_at_random": of_own.isel(at_random).mean("written"),
    }
    plain = {
        name: values if isinstance(values, tuple) else ("seed", values.values)
        for name, values in found.items()
    }
    return xr.Dataset(plain, {"seed": record.seed.values})


@check_arguments
def heights_without(record: xr.Dataset) -> dict[str, Float[xr.DataArray, " seed"]]:
    """Height of each seed's peak with a part of its layer cut at the first token, by what is cut.

    `record` is what `at_the_peak` takes; so is the layer. "whole" is the model as it is.
    """
    end = record.isel(step=-1, drop=True)
    layer = _peak_layer(end)
    cut = end.cut_residual_peak_height.sel(place="at the first token")
    at_peak = cut.isel(cut_layer=layer, residual_layer=layer + 1)
    whole = end.whole_residual_peak_height.isel(residual_layer=layer + 1)
    names = {"no attention": "attention", "no MLP": "MLP", "neither": "both"}
    return {"whole": whole} | {name: at_peak.sel(part=part) for name, part in names.items()}


@check_arguments
def writers_by_size(
    record: xr.Dataset,
) -> Float[xr.DataArray, "seed width length rate batch"]:
    """The attention's share of what is written at the first token in the layer of the peak.

    It is the norm of its write over the sum of its norm and the MLP's, at the end of training.
    `record` holds trainings that differ in all four sizes, each of them once.
    """
    end = record.isel(step=-1, drop=True)
    configs = json.loads(record.attrs["config"])
    sizes = pd.MultiIndex.from_tuples(
        [
            (c["model"]["width"], c["task"]["length"], c["learning_rate"], c["batch_size"])
            for c in map(configs.get, record.training.values.tolist())
        ],
        names=("width", "length", "rate", "batch"),
    )
    by_size = xr.Coordinates.from_pandas_multiindex(sizes, "training")
    shares = _attention_share(end, _peak_layer(end)).drop_vars("layer", errors="ignore")
    return shares.drop_vars("training").assign_coords(by_size).unstack("training")


def _attention_share(
    end: xr.Dataset, layer: Int[xr.DataArray, "*training"]
) -> Float[xr.DataArray, "*training"]:
    """Of what a layer writes at the first token, what its attention does: norm over both norms."""
    attention, mlp = (end[f"{part}_write"].isel(layer=layer) for part in ("attention", "mlp"))
    return attention / (attention + mlp)


def _peak_layer(end: xr.Dataset) -> Int[xr.DataArray, "*training"]:
    """The layer after which the peak is highest, the last apart."""
    inner = end.residual_peak_height.isel(residual_layer=slice(1, -1))
    return inner.argmax("residual_layer").drop_vars("residual_layer", errors="ignore")


@check_arguments
def heights_by_method(
    sizes: dict[str, dict[str, Float[xr.DataArray, "seed residual_layer"]]],
) -> pd.DataFrame:
    """Who grows the peak: a row a size, a column a method, in each cell the seeds' heights apart.

    `sizes` holds heights of peaks at the end of training; a cell shows the largest after any layer
    but the last. A method that was not trained at a size is left empty.
    """
    rows = {
        size: {
            method: ", ".join(f"{height:,.0f}" for height in _highest(heights))
            for method, heights in methods.items()
        }
        for size, methods in sizes.items()
    }
    return pd.DataFrame(rows).T.fillna("")


def _highest(heights: Float[xr.DataArray, "seed residual_layer"]) -> list[float]:
    return heights.isel(residual_layer=slice(1, -1)).max("residual_layer").values.tolist()
