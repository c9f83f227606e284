"""The records of chapter 16: toys with one thing changed that a claim of others is about.

They are of the league's length and batch, and learn in seconds. Each training is kept in the cache
once it has ended, so that an interrupted record goes on with the next one.
"""

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial

import numpy as np
import torch
import xarray as xr

from sinkbook.arguments import check_kind, check_number
from sinkbook.book.experiments import bigram_backcopy, toy
from sinkbook.book.settings import Settings
from sinkbook.dependencies import code_hash
from sinkbook.errors import SinkbookError
from sinkbook.files import cache_folder, is_there, reading, write_netcdf
from sinkbook.provenance import of_record, provenance
from sinkbook.theory import changed_toys as toys
from sinkbook.theory import two_sinks
from sinkbook.toy.runs import TrainingConfig, seeds_of

SEEDS = 3


@dataclass(frozen=True)
class ChangedToy:
    """A toy of so many layers, and what is changed of it before its first step."""

    layers: int
    change: Callable = toys.as_it_is

    @property
    def config(self) -> TrainingConfig:
        """The training of its first seed."""
        settings = Settings("quick")
        of_task = bigram_backcopy(settings, length=32)
        return TrainingConfig(
            task=of_task,
            model=toy(settings, of_task, layers=self.layers),
            learning_rate=3e-3,
            batch_size=32,
            steps=1_500,
            measurements=24,
        )


GROUPS: dict[str, dict[str, ChangedToy]] = {
    "attention-to-oneself": {
        "as it is": ChangedToy(1),
        "no oneself": ChangedToy(1, toys.without_oneself),
        "no first": ChangedToy(1, toys.without_first),
        "a number for oneself": ChangedToy(1, toys.with_own_logit),
        "a key for oneself": ChangedToy(1, toys.with_own_key),
    },
    "second-visit": {
        "one layer, twice": ChangedToy(1, partial(toys.visited, times=2)),
        "two layers": ChangedToy(2),
        "one layer, once": ChangedToy(1),
    },
    "linear-layers": {
        "FFFF": ChangedToy(4),
        "LLFL": ChangedToy(4, partial(toys.with_linear_layers, layers=(0, 1, 3))),
        "LLLF": ChangedToy(4, partial(toys.with_linear_layers, layers=(0, 1, 2))),
        "LLLL": ChangedToy(4, partial(toys.with_linear_layers, layers=(0, 1, 2, 3))),
    },
}


def record(name: str, seeds: int = SEEDS) -> xr.Dataset:
    """All trainings of a record over (training, seed), with `toys.watched` along `step`."""
    found, seconds, facts = [], 0.0, {}
    for changed in GROUPS[name].values():
        of_seeds = [_trained(changed, config) for config in seeds_of(changed.config, seeds)]
        seconds += sum(made.attrs["seconds"] for made in of_seeds)
        facts = json.loads(of_seeds[-1].attrs["facts"])
        found.append(_along([made.drop_attrs() for made in of_seeds], "seed"))
    first = next(iter(GROUPS[name].values())).config
    numbers = range(first.seed, first.seed + seeds)
    together = _along(found, "training")
    config = {label: _described(made) for label, made in GROUPS[name].items()}
    return together.assign_coords(training=list(GROUPS[name]), seed=list(numbers)).assign_attrs(
        of_record(config, facts, seconds), trainings=len(GROUPS[name]) * seeds
    )


TWO_SINKS = {"steps": 1_500, "batch_size": 32}  # of each of its heads


def two_sinks_record(seeds: int = SEEDS) -> xr.Dataset:
    """Heads that have to be silent, to repeat, or both: their facts over (asks, kind, seed)."""
    start = time.monotonic()
    found = [
        [[_facts_of(asks, kind, seed) for seed in range(seeds)] for kind in two_sinks.HEADS]
        for asks in two_sinks.ANNOUNCING
    ]
    together = xr.concat(
        [xr.concat([xr.concat(of, "seed") for of in of_kind], "kind") for of_kind in found], "asks"
    )
    return together.assign_coords(
        asks=list(two_sinks.ANNOUNCING), kind=list(two_sinks.HEADS), seed=list(range(seeds))
    ).assign_attrs(
        of_record(TWO_SINKS, provenance(), time.monotonic() - start),
        trainings=together.silent_error.size,
    )


def _facts_of(asks: str, kind: str, seed: int) -> xr.Dataset:
    return xr.Dataset(two_sinks.trained(asks, kind, seed=seed, **TWO_SINKS))


def begun_again(name: str, training: str, steps: int) -> tuple[int, xr.Dataset]:
    """The seed, and what is watched in the first steps, of a training that begins once more."""
    if training not in GROUPS[name]:
        known = ", ".join(map(repr, GROUPS[name]))
        raise SinkbookError(f"the record {name!r} has no training {training!r}. Known: {known}.")
    changed = GROUPS[name][training]
    beginning = replace(changed.config, steps=steps, measurements=steps)
    return beginning.seed, toys.train_watched(beginning, changed.change)


def _trained(changed: ChangedToy, config: TrainingConfig) -> xr.Dataset:
    """What was watched of a training, from the cache where it has ended before."""
    described = json.dumps(_described(changed) | {"seed": config.seed}, sort_keys=True)
    code = code_hash("sinkbook.theory.changed_toys")
    digest = hashlib.sha256("\n".join([described, code, torch.__version__]).encode())
    path = cache_folder() / "changed-toys" / f"{digest.hexdigest()[:16]}.nc"
    if is_there(path):
        with reading(path, "Delete it, and the training is made again.", named=True):
            found = xr.load_dataset(path, engine="h5netcdf")
            check_number("seconds", float(found.attrs["seconds"]), 0)
            check_kind("facts", json.loads(found.attrs["facts"]), dict)
        return found
    start = time.monotonic()
    made = toys.train_watched(config, changed.change).assign_attrs(
        seconds=time.monotonic() - start, facts=json.dumps(provenance())
    )
    write_netcdf(path, made, otherwise="choose another cache: SINKBOOK_CACHE")
    return made


def _described(changed: ChangedToy) -> dict:
    """A changed toy as what JSON can hold."""
    change = changed.change
    keywords = change.keywords if isinstance(change, partial) else {}
    function = change.func if isinstance(change, partial) else change
    return asdict(changed.config) | {"change": function.__name__, **keywords}


def _along(parts: list[xr.Dataset], dim: str) -> xr.Dataset:
    """Datasets side by side; where one has fewer visits than another, NaN."""
    visits = max(part.sizes["visit"] for part in parts)
    padded = [
        part.pad(
            visit=(0, visits - part.sizes["visit"]),
            residual_visit=(0, visits - part.sizes["visit"]),
            constant_values=np.nan,
        )
        for part in parts
    ]
    return xr.concat(padded, dim)
