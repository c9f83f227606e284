"""How the head that rests on plain text knows what to copy, and where it looks without `<s>`."""

import numpy as np
import torch
import torch.nn.functional as F
import xarray as xr

from sinkbook.annotations import check_arguments
from sinkbook.data.shakespeare import SYMBOLS
from sinkbook.llm.shakespeare_pretraining import (
    Characters,
    Pretraining,
    copying_head,
    together,
)
from sinkbook.models.losses import next_token_losses
from sinkbook.models.token_labels import token_label
from sinkbook.probe.attention_maps import attention_weights


@check_arguments
def attention_by_character(run: Pretraining) -> xr.Dataset:
    """What a run's copying head looks at in plain held-out texts, over (character).

    `attention` is the mean attention that queries of the second half give all keys of that
    character together; `share` is the character's share of the tokens. `<s>`, if the texts begin
    with it, is a character as well. They add up to 1.
    """
    layer, head = copying_head(run.measurements)
    characters = Characters(run.config)
    tokens = characters.held_out()["plain"][:, :-1]
    weights = attention_weights(run.model, tokens, layer=layer)[:, head, characters.half + 1 :]
    kinds = F.one_hot(tokens, len(SYMBOLS) + 1).float()
    names = [*map(token_label, SYMBOLS), "<s>"]
    found = {
        "attention": ("character", (weights.mean(1, keepdim=True) @ kinds).mean((0, 1)).numpy()),
        "share": ("character", kinds.mean((0, 1)).numpy()),
    }
    return xr.Dataset(found, coords={"character": np.array(names)})


@check_arguments
def other_distances(runs: list[Pretraining]) -> xr.Dataset:
    """What each run's copying head does where texts repeat after another distance, over (seed,
    distance).

    The passages are those of the plain held-out texts; the last distance is the one trained on.
    Means over queries after half a text: `by_content`, the attention on the token after the one
    that was the same a period before; `by_place`, that on the token where it would be at the
    distance trained on; `sink`, that on position 0; and `loss`, nats.
    """
    found = []
    for run in runs:
        layer, head = copying_head(run.measurements)
        characters = Characters(run.config)
        plain, half = characters.held_out()["plain"], characters.half
        starts = int(run.config.starts)
        distances = [half * eighths // 8 for eighths in (5, 6, 7, 8)]
        rows = []
        for distance in distances:
            place = torch.arange(plain.shape[1] - starts) % distance
            texts = torch.cat([plain[:, :starts], plain[:, starts:][:, place]], dim=1)
            tokens = texts[:, :-1]
            queries = torch.arange(half + 4, tokens.shape[1])
            weights = attention_weights(run.model, tokens, layer=layer)[:, head]
            with torch.no_grad():
                losses = next_token_losses(run.model(tokens), texts)
            read = [weights[:, queries, queries - back + 1] for back in (distance, half)]
            values = [*read, weights[:, queries, 0], losses[:, queries]]
            rows.append([value.mean().item() for value in values])
        names = ("by_content", "by_place", "sink", "loss")
        columns = zip(names, np.transpose(rows), strict=True)
        variables = {name: ("distance", values) for name, values in columns}
        found.append(xr.Dataset(variables, coords={"distance": distances}))
    seeds = xr.Variable("seed", [run.config.seed for run in runs])
    return xr.concat(found, dim=seeds)


@check_arguments
def compared(groups: dict[str, list[Pretraining]]) -> xr.Dataset:
    """Pretrainings and their controls, over (training, seed); NaN for seeds that a control lacks.

    Beside the measurements `other_distances` of the first group, with its names, and along
    `character` what `attention_by_character` finds in each group's first run.
    """
    names = xr.Variable("training", list(groups))
    measured = xr.concat([together(runs) for runs in groups.values()], dim=names, join="outer")
    characters = xr.concat([attention_by_character(runs[0]) for runs in groups.values()], dim=names)
    first = next(iter(groups.values()))
    elsewhere = other_distances(first).rename(sink="resting").drop_vars("loss")
    return measured.merge(characters).merge(elsewhere)


@check_arguments
def of_training(record: xr.Dataset, name: str) -> xr.Dataset:
    """The seeds of one training of what `compared` gives."""
    return record.sel(training=name, drop=True).dropna("seed", how="all", subset=["copying"])
