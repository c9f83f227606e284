"""Where a language model's sinks are, and what makes a token one.

`changed_texts` asks whether a sink is a place or a token, by moving both. `seen_by_all` finds the
tokens that draw attention at any position.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
import xarray as xr
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from sinkbook.annotations import check_arguments
from sinkbook.arguments import check_token_ids
from sinkbook.models.pretrained import LanguageModel
from sinkbook.models.token_labels import token_label
from sinkbook.probe.measure import measure
from sinkbook.probe.metrics import residual_peak_ratio

Tokens = Int[Tensor, "text position"]

# --- A place or a token ----------------------------------------------------------------------


class ChangedTexts(NamedTuple):
    """Texts of one condition, and where the model's own first token stands in them, if anywhere."""

    tokens: Tokens
    first_token_at: int | None


@check_arguments
def changed_texts(
    language_model: LanguageModel, texts: Sequence[str], *, length: int, seed: int = 0
) -> dict[str, ChangedTexts]:
    """The same texts under conditions that part position 0 from what stands there, by name.

    All have `length` tokens, and the first condition is the text as the model knows it. Models that
    put no token of their own before a text have no conditions that speak of it. "Another token" and
    the repeated one are drawn from the texts themselves. Raises `SinkbookError` for texts that are
    too short.
    """
    generator = torch.Generator().manual_seed(seed)
    natural = replace(language_model, prefix=()).encode(texts, length).cpu()
    count = len(natural)
    order = torch.rand(natural.shape, generator=generator).argsort(1)
    shuffled = natural.gather(1, order)
    drawn = natural.flatten()[torch.randint(natural.numel(), (count, 1), generator=generator)]
    alone = {"the text alone": ChangedTexts(natural, None)}
    changed = {
        "another token, text": ChangedTexts(torch.cat([drawn, natural[:, :-1]], 1), None),
        "the text shuffled": ChangedTexts(shuffled, None),
        "one token repeated": ChangedTexts(drawn.repeat(1, length), None),
    }
    if not language_model.prefix:
        return alone | changed
    first = torch.tensor([language_model.prefix]).expand(count, -1)
    middle = length // 4
    own = length - first.shape[1]
    parts = natural[:, :middle], first, natural[:, middle:own]
    before = {"first token, text": ChangedTexts(torch.cat([first, natural[:, :own]], 1), 0)}
    with_first = {
        "first token inside": ChangedTexts(torch.cat(parts, 1), middle),
        "first token, shuffled": ChangedTexts(torch.cat([first, shuffled[:, :own]], 1), 0),
        "first token, one token": ChangedTexts(torch.cat([first, drawn.repeat(1, own)], 1), 0),
    }
    return before | alone | changed | with_first


@check_arguments
def sinks_under_change(
    language_model: LanguageModel,
    conditions: dict[str, ChangedTexts],
    layer: Bool[xr.DataArray, " layer"],
) -> xr.Dataset:
    """Where sinks and peaks are in changed texts, over (condition, batch).

    `attention_at_0` is the sink attention, mean over heads and the layers that `layer` marks;
    `attention_at_first_token` that on the model's own first token, which may stand elsewhere, NaN
    if it is absent. `peak_at_0` and `peak_at_first_token` are the residual ratios at three
    quarters of the depth; `loss` in nats.
    """
    depth = round(0.75 * layer.size)

    def there(tokens: Tokens, position: int, *more: str) -> xr.Dataset:
        names = ("sink_attention", "residual_norm", *more)
        return measure(language_model.model, tokens, names, sink=position)

    def attention(result: xr.Dataset) -> xr.DataArray:
        return result.sink_attention.mean("head").where(layer).mean("layer").drop_vars("sink")

    def peak(result: xr.Dataset) -> xr.DataArray:
        ratio = residual_peak_ratio(result).sel(residual_layer=depth)
        return ratio.drop_vars(["residual_layer", "sink"])

    rows = []
    for tokens, at in conditions.values():
        result = there(tokens, 0, "loss")
        row = {
            "attention_at_0": attention(result),
            "peak_at_0": peak(result),
            "loss": result.loss.drop_vars("sink"),
        }
        if at != 0:
            result = None if at is None else there(tokens, at)
        nothing = xr.full_like(row["loss"], float("nan"))
        row["attention_at_first_token"] = nothing if result is None else attention(result)
        row["peak_at_first_token"] = nothing if result is None else peak(result)
        rows.append(xr.Dataset(row))
    return xr.concat(rows, dim=xr.Variable("condition", list(conditions)))


# --- Sinks elsewhere -------------------------------------------------------------------------


@check_arguments
def seen_by_all(model: nn.Module, tokens: Tokens) -> xr.Dataset:
    """How much attention each token draws and how long its residual state is, at any position.

    - `attraction` (batch, layer, position): mean attention of the later queries that see the token,
      mean over heads, over what it would be if every query spread its attention evenly;
    - `residual_peak_ratio` (batch, residual_layer, position): norm over the median of the text,
      position 0 left out of the median.
    """
    check_token_ids("tokens", tokens)
    result = measure(model, tokens, ("key_importance", "residual_norm"))
    length = tokens.shape[1]
    seen = np.arange(length) + 1.0  # keys that a query sees
    later = np.cumsum((1 / seen)[::-1])[::-1]
    even = xr.DataArray(later / (length - np.arange(length)), dims="position")
    norms = result.residual_norm
    return xr.Dataset(
        {
            "attraction": result.key_importance.mean("head") / even,
            "residual_peak_ratio": norms / norms.isel(position=slice(1, None)).median("position"),
        }
    ).drop_vars("sink")


@check_arguments
def by_token(
    values: Float[xr.DataArray, "batch layer position"],
    tokens: Tokens,
    language_model: LanguageModel,
    *,
    least: int = 4,
    count: int = 10,
) -> Float[xr.DataArray, "token layer"]:
    """Mean over all occurrences of each token, position 0 left out, as the tokens' text.

    Only tokens that occur `least` times or more in the first three quarters of the texts, beyond
    which a token is seen by few; of those the `count` with the largest value in some layer.
    """
    inside = slice(1, 3 * tokens.shape[1] // 4)
    ids = tokens[:, inside].flatten().cpu().numpy()
    flat = values.isel(position=inside).transpose("batch", "position", "layer").values
    flat = flat.reshape(len(ids), -1)
    kinds, place, counts = np.unique(ids, return_inverse=True, return_counts=True)
    sums = np.zeros((len(kinds), flat.shape[1]))
    np.add.at(sums, place, flat)
    kept = np.flatnonzero(counts >= least)
    means = sums[kept] / counts[kept, None]
    strongest = np.argsort(-np.nanmax(means, axis=1), kind="stable")[:count]
    names = labels(language_model, torch.from_numpy(kinds[kept][strongest]))
    coords = {"token": names, "layer": values.layer.values}
    return xr.DataArray(means[strongest], dims=("token", "layer"), coords=coords)


@check_arguments
def labels(language_model: LanguageModel, tokens: Int[Tensor, " token"]) -> list[str]:
    """The text of each token for an axis: spaces and line breaks as signs that can be seen."""
    texts = language_model.tokenizer.batch_decode(tokens.cpu()[:, None])
    return [token_label(text).replace("$", r"\$") for text in texts]
