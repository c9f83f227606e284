"""Where a language model's heads look: kinds of heads, sinks elsewhere, and what makes a sink.

`changed_texts` asks whether a sink is a place or a token, by moving both. `head_scores` tells what
each head habitually looks at. `seen_by_all` finds the tokens that draw attention at any position.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import xarray as xr
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from sinkbook.models.attention_interface import attending_by
from sinkbook.models.layout import layers
from sinkbook.models.pretrained import LanguageModel
from sinkbook.probe.measure import measure, residual_peak_ratio

Tokens = Int[Tensor, "text position"]

# --- A place or a token ----------------------------------------------------------------------


class ChangedTexts(NamedTuple):
    """Texts of one condition, and where the model's own first token stands in them, if anywhere."""

    tokens: Tokens
    first_token_at: int | None


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
    natural = replace(language_model, first_token=None).encode(texts, length).cpu()
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
    if language_model.first_token is None:
        return alone | changed
    first = torch.full((count, 1), language_model.first_token)
    middle = length // 4
    parts = natural[:, :middle], first, natural[:, middle:-1]
    before = {"first token, text": ChangedTexts(torch.cat([first, natural[:, :-1]], 1), 0)}
    with_first = {
        "first token inside": ChangedTexts(torch.cat(parts, 1), middle),
        "first token, shuffled": ChangedTexts(torch.cat([first, shuffled[:, :-1]], 1), 0),
        "first token, one token": ChangedTexts(
            torch.cat([first, drawn.repeat(1, length - 1)], 1), 0
        ),
    }
    return before | alone | changed | with_first


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


# --- Kinds of heads --------------------------------------------------------------------------

KINDS = ("first token", "previous token", "induction", "delimiter")


def random_repeated(
    language_model: LanguageModel, *, count: int, length: int, seed: int = 0
) -> Tokens:
    """A stretch of `length` random tokens, twice over, after the model's first token if it has one.

    None of them is special and none occurs twice in a stretch. In the second one, only copying
    what came after the last occurrence predicts what comes next.
    """
    generator = np.random.default_rng(seed)
    ordinary = language_model.ordinary_tokens
    drawn = torch.from_numpy(
        np.stack([generator.choice(ordinary, length, replace=False) for _ in range(count)])
    )
    if language_model.first_token is None:
        return torch.cat([drawn, drawn], 1)
    first = torch.full((count, 1), language_model.first_token)
    return torch.cat([first, drawn, drawn], 1)


@torch.no_grad()
def head_scores(
    language_model: LanguageModel, tokens: Tokens, repeated: Int[Tensor, "text _repeated"]
) -> Float[xr.DataArray, "kind batch layer head"]:
    """How much of its attention every head gives to four kinds of keys, text by text.

    - "first token": position 0, over later queries;
    - "previous token": the token before, over queries from position 2 on;
    - "delimiter": punctuation and line breaks after position 0, over queries from position 1 on;
    - "induction": the token that came after the last occurrence of the query's own, over the second
      half of `repeated`, which `random_repeated` makes. The other kinds are read off `tokens`.

    Both have the same number of texts. NaN for layers without attention. Whole maps are formed,
    for one text at a time.
    """
    delimiters = is_delimiter(language_model, tokens)
    stretch = repeated.shape[1] // 2
    offset = repeated.shape[1] % 2  # where a first token stands before the pair
    prose, copies = [], []
    for row, marks in zip(tokens, delimiters, strict=True):
        by_layer = []
        for weights in _maps(language_model.model, row[None]):
            before = weights.diagonal(-1, dim1=-2, dim2=-1)[..., 1:].mean(-1)
            on_marks = (weights * marks.to(weights.device))[..., 1:, 1:].sum(-1).mean(-1)
            by_layer.append(torch.stack([weights[..., 1:, 0].mean(-1), before, on_marks]))
        prose.append(_stack(by_layer))
    for row in repeated:
        by_layer = []
        for weights in _maps(language_model.model, row[None]):
            after = weights.diagonal(1 - stretch, dim1=-2, dim2=-1)
            # Entry i is query i + stretch - 1: the second stretch begins `offset + 1` later.
            by_layer.append(after[None, ..., offset + 1 :].mean(-1))
        copies.append(_stack(by_layer))
    scores = torch.cat([torch.stack(prose, 1), torch.stack(copies, 1)])
    found = xr.DataArray(
        scores.cpu().numpy(),
        dims=("kind", "batch", "layer", "head"),
        coords={"kind": ["first token", "previous token", "delimiter", "induction"]},
    )
    return found.sel(kind=list(KINDS))


def kind_of_head(
    scores: Float[xr.DataArray, "kind layer head"], threshold: float = 0.3
) -> Int[xr.DataArray, "layer head"]:
    """What each head is there for: an index in `KINDS`, or -1 where no score exceeds `threshold`.

    It is the largest of the scores that tell of some work, and "first token" only where none of
    those exceeds the threshold, since a head that works elsewhere may rest on the first token in
    prose. The threshold is that of the sink rate.
    """
    work = scores.sel(kind=list(KINDS[1:])).fillna(-1)
    rests = scores.sel(kind=KINDS[0], drop=True) > threshold
    resting = xr.where(rests, 0, -1)
    return xr.where(work.max("kind") > threshold, work.argmax("kind") + 1, resting)


def is_delimiter(language_model: LanguageModel, tokens: Tokens) -> Bool[Tensor, "text position"]:
    """Which tokens hold no letter and no digit: punctuation, spaces and line breaks."""
    tokens = tokens.cpu()
    ids = tokens.unique()
    texts = language_model.tokenizer.batch_decode(ids[:, None])
    plain = torch.tensor([not any(map(str.isalnum, text)) for text in texts])
    return plain[torch.searchsorted(ids, tokens.contiguous())]


def _maps(model: nn.Module, tokens: Tokens) -> list[Float[Tensor, "_head query query"]]:
    """The attention weights of every layer on one text; one NaN for layers without attention."""
    length = tokens.shape[1]
    nothing = torch.full((1, length, length), float("nan"))
    maps = [nothing for _ in layers(model)]

    def keep(number, _attention, _arguments, output):
        weights = [part for part in output if torch.is_tensor(part) and part.ndim == 4]
        if weights and weights[-1].shape[-2:] == (length, length):
            maps[number] = weights[-1][0]

    with ExitStack() as undo:
        undo.enter_context(attending_by(model, "eager"))
        for number, layer in enumerate(layers(model)):
            if layer.attention is not None:
                handle = layer.attention.register_forward_hook(partial(keep, number))
                undo.callback(handle.remove)
        model.base_model(tokens.to(model.device), output_attentions=True, use_cache=False)
    return maps


def _stack(layers: list[Float[Tensor, "kind _head"]]) -> Float[Tensor, "kind layer _heads"]:
    """Layers side by side; where the number of heads differs, NaN up to the largest."""
    heads = max(scores.shape[1] for scores in layers)
    padded = [F.pad(s, (0, heads - s.shape[1]), value=float("nan")).cpu() for s in layers]
    return torch.stack(padded, 1)


# --- Sinks elsewhere -------------------------------------------------------------------------


def seen_by_all(model: nn.Module, tokens: Tokens) -> xr.Dataset:
    """How much attention each token draws and how long its residual state is, at any position.

    - `attraction` (batch, layer, position): mean attention of the later queries that see the token,
      mean over heads, over what it would be if every query spread its attention evenly;
    - `residual_ratio` (batch, residual_layer, position): norm over the median of the text, position
      0 left out of the median.
    """
    result = measure(model, tokens, ("key_importance", "residual_norm"))
    length = tokens.shape[1]
    seen = np.arange(length) + 1.0  # keys that a query sees
    later = np.cumsum((1 / seen)[::-1])[::-1]
    even = xr.DataArray(later / (length - np.arange(length)), dims="position")
    norms = result.residual_norm
    return xr.Dataset(
        {
            "attraction": result.key_importance.mean("head") / even,
            "residual_ratio": norms / norms.isel(position=slice(1, None)).median("position"),
        }
    ).drop_vars("sink")


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


def labels(language_model: LanguageModel, tokens: Int[Tensor, " token"]) -> list[str]:
    """The text of each token for an axis: spaces and line breaks as signs that can be seen."""
    texts = language_model.tokenizer.batch_decode(tokens.cpu()[:, None])
    return [repr(text)[1:-1].replace(" ", "␣").replace("$", r"\$") for text in texts]
