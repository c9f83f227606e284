"""Heads that sleep on one kind of text and work on another: found on some texts, tested on others.

    chosen_on, held_out = halves(domain_tokens(reader, count=16, length=128))
    candidates = select(scan(reader.model, chosen_on), count=6)
    changes = ablate(reader.model, held_out, candidates)

A scan measures all heads in one pass. What a head is worth is only known once it is taken away,
which takes a pass for each, so `select` proposes a few. `dormant_head_tests.py` judges them. In the
place of a head can stand nothing, its mean over texts, or what it writes on another (`ablate`).
Source: arXiv 2410.13835, section 3.1 and Figure 8.
"""

from collections.abc import Sequence
from contextlib import ExitStack

import numpy as np
import pandas as pd
import torch
import xarray as xr
from jaxtyping import Float, Int
from torch import Tensor, nn

from sinkbook.annotations import check_arguments
from sinkbook.arguments import (
    check_known,
    check_some,
    check_token_ids,
    check_whole_number,
)
from sinkbook.data import corpora
from sinkbook.models import token_windows
from sinkbook.models.interventions import check_ways, reading, replace, stand_in
from sinkbook.models.losses import next_token_losses
from sinkbook.models.partial_forward import can_resume, given, kept, logits_of
from sinkbook.models.pretrained import LanguageModel
from sinkbook.models.wrappers import computing_device
from sinkbook.probe.measure import measure
from sinkbook.progress import progress

# Domains that people wrote (but for the numbers), by their name here and in `corpora`.
WRITTEN = {
    "prose": "prose-en",
    "code": "code",
    "French": "prose-fr",
    "Spanish": "prose-es",
    "numbers": "numbers",
    "JSON": "json",
}
REPEATED = ("repeated prose", "repeated random")
SIDES = ("active", "dormant")

BATCH = 8  # texts that run side by side

# --- Texts -----------------------------------------------------------------------------------


@check_arguments
def domain_tokens(
    language_model: LanguageModel, *, count: int, length: int, seed: int = 0
) -> Int[xr.DataArray, "domain text position"]:
    """Token ids of `count` texts of each domain, `length` tokens each.

    Written domains give the beginnings of their first long texts. In "repeated prose" the
    beginning of text i of "prose" stands four times in a row; in "repeated random" it is a
    passage of tokens drawn evenly from the vocabulary, by `seed`.
    Raises `SinkbookError` if a domain has fewer texts that are long enough.
    """
    rows = {}
    for name, domain in WRITTEN.items():
        texts = corpora.texts(domain, minimum_characters=4 * length)
        rows[name] = token_windows.of_texts(language_model, texts, count=count, length=length)
    generator = np.random.default_rng(seed)
    ordinary = language_model.ordinary_tokens
    drawn = rows["prose"].clone()
    first = len(language_model.prefix)
    drawn[:, first:] = torch.from_numpy(generator.choice(ordinary, size=drawn[:, first:].shape))
    for name, tokens in zip(REPEATED, (rows["prose"], drawn), strict=True):
        rows[name] = repeated(tokens, keep=first)
    tokens = np.stack([tokens.numpy() for tokens in rows.values()])
    return xr.DataArray(
        tokens,
        dims=("domain", "text", "position"),
        coords={"domain": list(rows), "text": np.arange(count), "position": np.arange(length)},
    )


@check_arguments
def repeated(
    tokens: Int[Tensor, "text position"], *, keep: int = 1, times: int = 4
) -> Int[Tensor, "text position"]:
    """The beginning of each text `times` over, in as many tokens; the first `keep` stay as is.

    >>> repeated(torch.arange(9)[None], times=2)
    tensor([[0, 1, 2, 3, 4, 1, 2, 3, 4]])
    """
    check_token_ids("tokens", tokens)
    check_whole_number("keep", keep, 0, tokens.shape[1] - 1)
    check_whole_number("times", times, 1)
    length = tokens.shape[1] - keep
    passage = tokens[:, keep : keep + -(-length // times)]
    again = passage.repeat(1, times)[:, :length]
    return torch.cat([tokens[:, :keep], again], dim=1)


@check_arguments
def halves(tokens: xr.DataArray, seed: int = 0) -> tuple[xr.DataArray, xr.DataArray]:
    """Texts to choose heads on, and as many others to test them on, drawn by `seed`.

    All domains are split alike, so that a passage and its repetition stay together.
    """
    order = np.random.default_rng(seed).permutation(tokens.text)
    middle = len(order) // 2
    return tokens.sel(text=np.sort(order[:middle])), tokens.sel(text=np.sort(order[middle:]))


# --- Looking at all heads --------------------------------------------------------------------


@check_arguments
def scan(model: nn.Module, tokens: Int[xr.DataArray, "domain text position"]) -> xr.Dataset:
    """Three signs of every head's work on every text, over (domain, text, layer, head).

    - `sink_attention` and `head_output_norm`, as `probe.measure` defines them;
    - `output_share`: the head's output norm over the mean of its layer's heads on the same text,
      the detector of arXiv 2504.03889.
    """
    variables = ("sink_attention", "head_output_norm")
    results = []
    with progress("scanning", tokens.sizes["domain"]) as show:
        for domain in tokens:
            batches = _batches(model, domain)
            parts = [measure(model, ids, variables).drop_vars("sink") for ids in batches]
            together = xr.concat(parts, dim="batch").rename(batch="text")
            results.append(together.assign_coords(text=tokens.text))
            show(len(results))
    result = xr.concat(results, dim=tokens.domain)
    norm = result.head_output_norm
    result["output_share"] = norm / norm.mean("head")
    return result


def _batches(model: nn.Module, tokens: Int[xr.DataArray, "text position"]) -> list[Tensor]:
    """Token ids on the model's device, a few texts at a time."""
    device = computing_device(model)
    return list(torch.as_tensor(tokens.values, device=device).split(BATCH))


@check_arguments
def gaps(
    scanned: xr.Dataset, by: str = "sink_attention", pair: tuple[str, str] | None = None
) -> pd.DataFrame:
    """For every head, how far apart are the two domains where it works most and least?

    One row a head: `name` as the paper writes it, `layer`, `head`, the domains `active` and
    `dormant`, and the `gap` between them. `by` is a variable of `scan`, of which the means over
    texts are compared: a head works most where `sink_attention` is least, or the others largest.
    `pair` fixes the active and the dormant domain; then the gap can be negative. Heads that some
    domain has no value for are left out.
    """
    check_known("variable `by`", by, scanned)
    means = scanned[by].mean("text").stack(row=("layer", "head")).transpose("row", "domain")
    work = means.to_pandas().dropna() * (-1 if by == "sink_attention" else 1)
    active, dormant = (work.idxmax(axis=1), work.idxmin(axis=1)) if pair is None else pair
    found = pd.DataFrame({"active": active, "dormant": dormant}, index=work.index).reset_index()
    found["name"] = [f"L{row.layer}H{row.head}" for row in found.itertuples()]
    sides = [work.values[found.index, work.columns.get_indexer(found[side])] for side in SIDES]
    found["gap"] = sides[0] - sides[1]
    return found[["name", "layer", "head", "active", "dormant", "gap"]]


@check_arguments
def select(
    scanned: xr.Dataset,
    count: int,
    *,
    by: str = "sink_attention",
    pair: tuple[str, str] | None = None,
) -> pd.DataFrame:
    """The `count` heads with the largest gaps, largest first: rows of `gaps`.

    `chosen_by` says how they were found, and `chosen_on` on which texts.
    """
    found = gaps(scanned, by, pair).nlargest(count, "gap")
    label = by.replace("_", " ") if pair is None else f"{pair[0]} against {pair[1]}"
    return _chosen(found, label, scanned)


def pooled(*candidates: pd.DataFrame) -> pd.DataFrame:
    """One table of several, without heads that stand further up already."""
    return pd.concat(candidates).drop_duplicates("name", ignore_index=True)


@check_arguments
def random_heads(
    scanned: xr.Dataset, count: int, *, without: pd.DataFrame, seed: int = 0
) -> pd.DataFrame:
    """A control: heads drawn evenly from all that `without` does not hold.

    They get what selected heads got, the two domains between which their own gap is largest.
    """
    order = gaps(scanned).sample(frac=1, random_state=seed)
    others = order[~order.name.isin(without.name)]
    return _chosen(others.head(count), "random", scanned)


def _chosen(found: pd.DataFrame, label: str, scanned: xr.Dataset) -> pd.DataFrame:
    texts = tuple(scanned.text.values.tolist())
    found = found.assign(chosen_by=label, chosen_on=[texts] * len(found))
    return found.reset_index(drop=True)


# --- Taking heads away -----------------------------------------------------------------------


@check_arguments
@torch.no_grad()
def loss_changes(
    model: nn.Module,
    tokens: Int[xr.DataArray, "text position"],
    heads: Sequence[tuple[int, int]],
    *,
    way: str = "zero",
    seed: int = 0,
) -> Float[xr.DataArray, "cut text query"]:
    """What taking each head away, alone, adds to the loss of every next token, in nats.

    `heads` are (layer, head). In the place of what a head writes stands what `way` says, a word in
    `interventions.WAYS`: nothing, its mean over the other texts, or what it writes on another one,
    drawn by `seed`. The change at position n is that of predicting token n + 1; the last position
    has none. The layers below a head are not run again, where the model allows that.
    Raises `SinkbookError` for an unknown way, and for one text where others are needed.
    """
    check_ways([way])
    check_some("heads", heads)
    resumes = can_resume(model, _batches(model, tokens)[0])
    return _loss_changes(model, tokens, [(*head, way) for head in heads], resumes, seed)


def _loss_changes(
    model: nn.Module,
    tokens: xr.DataArray,
    cuts: Sequence[tuple[int, int, str]],
    resumes: bool,
    seed: int,
) -> xr.DataArray:
    """`cuts` are (layer, head, way)."""
    batches, changes = _batches(model, tokens), []
    reads = {layer for layer, _, way in cuts if way != "zero"}
    run = None
    with ExitStack() as hooks:
        written = {n: hooks.enter_context(reading(model, "head", layer=n)) for n in reads}
        for ids in batches if reads else ():
            run = _whole(model, ids)
    states = {layer: torch.cat(parts) for layer, parts in written.items()}
    stand_ins = [
        stand_in(states[layer][:, :, [head]], way, seed=seed).split(BATCH) if layer in reads else ()
        for layer, head, way in cuts
    ]
    for number, ids in enumerate(batches):
        outputs, whole = run if run and len(batches) == 1 else _whole(model, ids)
        rows = []
        for (layer, head, _), instead in zip(cuts, stand_ins, strict=True):
            new = instead[number] if instead else 0.0
            cut = replace(model, "head", new, layer=layer, head=head)
            with cut, given(model, outputs, below=layer if resumes else 0):
                rows.append(_losses(model, ids) - whole)
        changes.append(torch.stack(rows))
    found = torch.cat(changes, dim=1).cpu().numpy()
    return xr.DataArray(
        found,
        dims=("cut", "text", "position"),
        coords={"text": tokens.text, "position": tokens.position[:-1]},
    )


def _whole(model: nn.Module, ids: Int[Tensor, "text position"]) -> tuple[list, Tensor]:
    """What the layers of the whole model give, and its losses."""
    with kept(model) as outputs:
        return outputs, _losses(model, ids)


def _losses(model: nn.Module, ids: Int[Tensor, "text position"]) -> Float[Tensor, "text query"]:
    """Next-token losses, one text at a time, since logits are the largest thing in memory."""
    logits = logits_of(model, ids)
    return torch.cat(
        [next_token_losses(r[None], i[None]) for r, i in zip(logits, ids, strict=True)]
    )


@check_arguments
@torch.no_grad()
def ablate(
    model: nn.Module,
    tokens: Int[xr.DataArray, "domain text position"],
    candidates: pd.DataFrame,
    *,
    everywhere: Sequence[int] = (),
    way: str | Sequence[str] = "zero",
    other_ways: Sequence[int] | None = None,
    seed: int = 0,
) -> Float[xr.DataArray, "*way candidate domain text"]:
    """What taking each candidate away adds to the mean next-token loss of each text, in nats.

    Each is taken away in its own two domains, those in the rows `everywhere` in all of them; NaN
    elsewhere. Several words for a `way` (`loss_changes`) give a dimension of that name; those after
    the first are tried on the rows `other_ways` alone (all rows if that is None), in their own two
    domains. Means and other texts are those of the same domain. Shows progress on a terminal.
    """
    ways = [way] if isinstance(way, str) else list(way)
    check_some("way", ways)
    check_ways(ways)
    coords = {"way": ways, "candidate": candidates.index}
    coords |= {"domain": tokens.domain.values, "text": tokens.text.values}
    shape = [len(values) for values in coords.values()]
    changes = xr.DataArray(np.full(shape, np.nan), dims=tuple(coords), coords=coords)
    resumes = can_resume(model, _batches(model, tokens[0])[0])
    tried = candidates.index if other_ways is None else other_ways
    with progress("taking heads away", tokens.sizes["domain"]) as show:
        for number, domain in enumerate(tokens.domain.values):
            own = (candidates[list(SIDES)] == domain).any(axis=1)
            rows = {
                name: candidates.index[
                    own & candidates.index.isin(tried)
                    if place
                    else own | candidates.index.isin(everywhere)
                ]
                for place, name in enumerate(ways)
            }
            cuts = [
                (*candidates.loc[row, ["layer", "head"]], name)
                for name, of_way in rows.items()
                for row in of_way
            ]
            if cuts:
                texts = tokens.sel(domain=domain)
                found = _loss_changes(model, texts, cuts, resumes, seed).mean("position").values
                for name, of_way in rows.items():
                    where = {"way": name, "candidate": of_way, "domain": domain}
                    changes.loc[where], found = found[: len(of_way)], found[len(of_way) :]
            show(number + 1)
    return changes.isel(way=0, drop=True) if isinstance(way, str) else changes


@check_arguments
def running_texts(
    tokens: Int[xr.DataArray, "domain text position"], parts: Sequence[str], *, length: int
) -> Int[xr.DataArray, "text along"]:
    """Texts that change their domain: `length` tokens of each part, after the first token.

    A part is a domain, each time another text of it, or "again" for the part before once more.
    The coordinate `part` numbers them along the text; the first token belongs to part 0.
    """
    check_whole_number("length", length, 1, tokens.sizes["position"] - 1)
    check_some("parts", parts)
    segments, used = [], dict.fromkeys(parts, 0)
    for part in parts:
        if part != "again":
            texts = np.roll(tokens.sel(domain=part).values, -used[part], axis=0)
            used[part] += 1
        segments.append(texts[:, 1 : 1 + length])
    first = tokens.sel(domain=parts[0]).values[:, :1]
    return xr.DataArray(
        np.concatenate([first, *segments], axis=1),
        dims=("text", "position"),
        coords={
            "text": tokens.text,
            "position": np.arange(1 + len(parts) * length),
            "part": ("position", np.repeat([0, *range(len(parts))], [1] + [length] * len(parts))),
        },
    )


@check_arguments
def trace(
    model: nn.Module, tokens: Int[xr.DataArray, "text along"], candidates: pd.DataFrame
) -> xr.Dataset:
    """What heads do along texts, over (candidate, text, position), token by token.

    - `sink_attention`: of the query at each position;
    - `change`: what zeroing the head adds to the loss of the next token, in nats.

    The first position, where all attention goes to the sink, and the last are left out.
    """
    heads = list(candidates[["layer", "head"]].itertuples(index=False, name=None))
    variable = "sink_attention_by_query"
    batches = [measure(model, ids, (variable,))[variable] for ids in _batches(model, tokens)]
    attention = np.stack(
        [
            np.concatenate([found.sel(layer=layer, head=head) for found in batches])
            for layer, head in heads
        ]
    )
    change = loss_changes(model, tokens, heads).rename(cut="candidate")
    result = xr.Dataset(
        {"sink_attention": change.copy(data=attention[..., :-1]), "change": change},
        coords={"candidate": candidates.name.to_numpy(dtype=str), "part": tokens.part[:-1]},
    )
    return result.isel(position=slice(1, None))
