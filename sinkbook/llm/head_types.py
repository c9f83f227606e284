"""What each head of a language model habitually looks at, and what it is there for."""

from contextlib import ExitStack

import numpy as np
import torch
import torch.nn.functional as F
import xarray as xr
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from sinkbook.annotations import check_arguments
from sinkbook.arguments import check_number, check_token_ids, check_whole_number
from sinkbook.models.interventions import reading
from sinkbook.models.layout import layers
from sinkbook.models.pretrained import LanguageModel
from sinkbook.models.trials.heads import heads
from sinkbook.models.wrappers import check_ids
from sinkbook.probe.attention_maps import attention_maps
from sinkbook.probe.measure import measure
from sinkbook.probe.recorder import write_factor

Tokens = Int[Tensor, "text position"]

KINDS = ("first token", "previous token", "induction", "delimiter")


@check_arguments
def random_repeated(
    language_model: LanguageModel, *, count: int, length: int, seed: int = 0
) -> Tokens:
    """A stretch of `length` random tokens, twice over, after the model's first token if it has one.

    None of them is special and none occurs twice in a stretch. In the second one, only copying
    what came after the last occurrence predicts what comes next.
    """
    check_whole_number("count", count, 1)
    check_whole_number("length", length, 1, len(language_model.ordinary_tokens))
    generator = np.random.default_rng(seed)
    ordinary = language_model.ordinary_tokens
    drawn = torch.from_numpy(
        np.stack([generator.choice(ordinary, length, replace=False) for _ in range(count)])
    )
    first = torch.tensor(language_model.prefix, dtype=torch.long).expand(count, -1)
    return torch.cat([first, drawn, drawn], 1)


@check_arguments
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
    check_token_ids("repeated", repeated)
    offset = len(language_model.prefix)  # what stands before the pair
    stretch = (repeated.shape[1] - offset) // 2
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


@check_arguments
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


@check_arguments
@torch.no_grad()
def writes_at_rest(model: nn.Module, tokens: Tokens, *, least: float = 0.5) -> xr.Dataset:
    """What each head writes while it looks at the first token: nothing, or always the same?

    Over (layer, head), of the queries after position 0 that give it more than `least`:

    - `share`: how many of all these queries do;
    - `relative_norm`: the length of what is written to the residual stream there (root mean
      square), over the mean length of the other tokens' values as the head writes them;
    - `effective_rank`: of what is written there, see `effective_rank`.

    A no-op writes next to nothing: the first is near 0, whatever the second is. A broadcast writes
    one constant direction of ordinary length: the first is about 1 and so is the second. NaN where
    no query rests, and for layers without heads to take hold of. Source: the two kinds of sinks of
    arXiv 2606.08105, negligible values and outputs of low rank.
    """
    check_token_ids("tokens", tokens)
    check_number("least", least, 0, 1)
    known, found = heads(model), layers(model)
    readable = [n for n in range(len(found)) if not known[n].no_heads]
    with ExitStack() as hooks:
        written = {n: hooks.enter_context(reading(model, "head", layer=n)) for n in readable}
        result = measure(model, tokens, ("sink_attention_by_query", "value_norm"))
    shape = (3, result.sizes["layer"], result.sizes["head"])
    values = np.full(shape, np.nan)
    for number in readable:
        (states,) = written[number]
        factor = write_factor(found[number].output, states.shape[2], states)
        if factor is None:
            continue
        writes = torch.einsum("bphw,hrw->hbpr", states.to(factor), factor)[:, :, 1:]
        there = result.isel(layer=number, head=slice(len(writes)), position=slice(1, None))
        rests = there.sink_attention_by_query.transpose("head", "batch", "position") > least
        rests = torch.from_numpy(rests.values).to(writes.device)
        ordinary = there.value_norm.mean(("batch", "position")).values
        for head, (one, at) in enumerate(zip(writes, rests, strict=True)):
            resting = one[at].double()
            length = resting.square().sum(-1).mean().sqrt().item()
            rank = effective_rank(resting).item()
            values[:, number, head] = at.double().mean().item(), length / ordinary[head], rank
    names = ("share", "relative_norm", "effective_rank")
    return xr.Dataset(
        {name: (("layer", "head"), of_all) for name, of_all in zip(names, values, strict=True)},
        coords={"layer": result.layer, "head": result["head"]},
    )


@check_arguments
def effective_rank(states: Float[Tensor, "*batch state width"]) -> Float[Tensor, "*batch"]:
    """Participation ratio of the squared singular values, `(sum s^2)^2 / sum s^4`.

    As many as there are directions if all carry the same, and 1 if one carries all; NaN if there
    is nothing. Of the states themselves, without subtracting their mean, which a constant is.
    Source: Gao et al., "A theory of multineuronal dimensionality, dynamics and measurement"
    (bioRxiv 214262), who take the covariance.

    >>> effective_rank(torch.tensor([[3.0, 0.0], [0.0, 3.0], [0.0, 0.0]])).item()
    2.0
    """
    moment = states.mT @ states
    return moment.diagonal(dim1=-2, dim2=-1).sum(-1).square() / moment.square().sum((-2, -1))


@check_arguments
def is_delimiter(language_model: LanguageModel, tokens: Tokens) -> Bool[Tensor, "text position"]:
    """Which tokens hold no letter and no digit: punctuation, spaces and line breaks."""
    check_token_ids("tokens", tokens)
    check_ids(language_model, tokens)
    tokens = tokens.cpu()
    ids = tokens.unique()
    texts = language_model.tokenizer.batch_decode(ids[:, None])
    plain = torch.tensor([not any(map(str.isalnum, text)) for text in texts])
    return plain[torch.searchsorted(ids, tokens.contiguous())]


def _maps(model: nn.Module, tokens: Tokens) -> list[Float[Tensor, "_head query query"]]:
    """The attention weights of every layer on one text; one NaN for layers without attention."""
    nothing = torch.full((1, tokens.shape[1], tokens.shape[1]), float("nan"))
    found = attention_maps(model, tokens)
    return [nothing if of_layer is None else of_layer.weights[0] for of_layer in found]


def _stack(layers: list[Float[Tensor, "kind _head"]]) -> Float[Tensor, "kind layer _heads"]:
    """Layers side by side; where the number of heads differs, NaN up to the largest."""
    heads = max(scores.shape[1] for scores in layers)
    padded = [F.pad(s, (0, heads - s.shape[1]), value=float("nan")).cpu() for s in layers]
    return torch.stack(padded, 1)
