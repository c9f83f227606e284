"""The record of the small Llama's levers, each for as long as the longer pretraining.

It grows by whole trainings: the file holds those that have ended, and the next call, on this
machine or another, makes the others. A training that was cut off goes on from its last checkpoint.
"""

import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict

import numpy as np
import pandas as pd
import xarray as xr

from sinkbook.provenance import of_record
from sinkbook.toy.training import TimeIsUpError

# What only makes the record imports transformers, which takes seconds: chapters read it.

NAME = "small-llama-long-levers"
REFERENCE, LONGER, SLOWER = "as it is", "weight decay 0.5", "learning rate / 3"

# The seeds of each lever of `small_llama.LEVERS`, in order of need. Three of the longer
# pretraining's own are the yardstick of chance; the one that the record `small-llama` has on other
# texts of code comes last of them.
SEEDS: dict[str, tuple[int, ...]] = {
    REFERENCE: (0,),
    LONGER: (1, 2, 0),
    SLOWER: (0,),
    "weight decay 0": (0,),
    "packed": (0,),
    "2 layers": (0,),
    "length / 2": (0,),
}
WANTED = tuple((lever, seed) for lever, seeds in SEEDS.items() for seed in seeds)
FIRST_STEPS = 6  # of each training, which a chapter takes once more

Trainings = dict[tuple[str, int], tuple[xr.Dataset, dict]]


def trainings(record: xr.Dataset) -> Trainings:
    """The trainings that a record holds, by lever and seed: what was measured, and its facts."""
    places = zip(record.lever.values.tolist(), record.seed.values.tolist(), strict=True)
    facts = map(json.loads, record.facts.values.tolist())
    plain = record.drop_vars(["lever", "seed", "facts"]).drop_attrs()
    found = [plain.isel(run=number) for number in range(record.sizes["run"])]
    return dict(zip(places, zip(found, facts, strict=True), strict=True))


def together(made: Trainings) -> xr.Dataset:
    """Trainings as one dataset along `run`, NaN for layers that a model lacks.

    Its coordinates are `lever`, `seed` and, as JSON, `facts`: device, versions, date and seconds.
    """
    from sinkbook.llm import small_llama

    there = [place for place in WANTED if place in made]
    record = xr.concat([made[place][0] for place in there], "run", join="outer")
    facts = [made[place][1] for place in there]
    configs = {lever: asdict(small_llama.long_run(lever)) for lever in SEEDS}
    newest = max(facts, key=lambda of_one: of_one["date"])
    return record.assign_coords(
        lever=("run", [lever for lever, _ in there]),
        seed=("run", [seed for _, seed in there]),
        facts=("run", list(map(json.dumps, facts))),
    ).assign_attrs(
        of_record(configs, newest, sum(of_one["seconds"] for of_one in facts)),
        trainings=len(there),
    )


def growing(made: Trainings, *, until: float = math.inf) -> Iterator[xr.Dataset]:
    """The record after each training that ends, beginning with those that are `made`.

    Raises `TimeIsUpError` before a training that would begin after `until`, a `time.time()`; those
    that have ended in the store are taken all the same.
    """
    from sinkbook.llm import small_llama

    for lever, seed in WANTED:
        if (lever, seed) in made:
            continue
        config = small_llama.long_run(lever, seed=seed)
        ended = (config.folder / "finished.json").exists()
        if time.time() >= until and not ended:
            continue
        made = made | {(lever, seed): _trained(config)}
        yield together(made)
    if missing := len(set(WANTED) - set(made)):
        raise TimeIsUpError(
            f"the record {NAME!r} lacks {missing} of its {len(WANTED)} trainings. Go on with: "
            f"sinkbook record {NAME}"
        )


def _trained(config) -> tuple[xr.Dataset, dict]:
    from sinkbook.llm import small_llama

    facts = small_llama.pretrain(config)
    found = small_llama.means_over_texts(small_llama.measure(config)).drop_attrs()
    begun = small_llama.first_losses(config, FIRST_STEPS).rename(step="first_step")
    places = {dim: np.arange(found.sizes[dim]) for dim in ("layer", "head", "residual_layer")}
    return found.assign(first_loss=begun).assign_coords(places), facts


def begun_again(record: xr.Dataset, lever: str) -> tuple[int, xr.Dataset, xr.Dataset]:
    """Seed, and the loss along `step`, stored and now, of a training that begins once more.

    The one before the first step is stored as the long training had it, the other one as a training
    of `FIRST_STEPS` had it that was made beside it.
    """
    from sinkbook.llm import small_llama

    (seed, *_), (stored, _) = SEEDS[lever], trainings(record)[lever, SEEDS[lever][0]]
    again = small_llama.first_losses(small_llama.long_run(lever, seed=seed), FIRST_STEPS)
    kept = stored.first_loss.rename(first_step="step").isel(step=slice(1, None))
    whole = xr.concat([stored.loss.sel(step=[0]), kept], "step").transpose(*again.dims)
    return seed, whole.to_dataset(name="loss"), again.to_dataset(name="loss")


def decided(ends: xr.Dataset) -> dict[str, list[float]]:
    """What decides the claims on levers, by id: of those alone whose trainings are there.

    `ends` is what `small_llama.at_the_end` finds in the record.
    """
    sinks = {lever: _of(ends, lever) for lever in dict.fromkeys(ends.lever.values.tolist())}
    over = {lever: (values / sinks[REFERENCE]).tolist() for lever, values in sinks.items()}
    found = {
        "levers.reference": sinks[REFERENCE].tolist(),
        "levers.weight-decay": over.get(LONGER),
        "levers.no-weight-decay": over.get("weight decay 0"),
        "levers.learning-rate": over.get(SLOWER),
        "levers.packed": over.get("packed"),
        "levers.length": over.get("length / 2"),
        "levers.two-layers": sinks["2 layers"].tolist() if "2 layers" in sinks else None,
    }
    if set(sinks) == set(SEEDS):
        first_seeds = [values[0] for values in sinks.values()]
        chance, moved = (np.log(values).std(ddof=1) for values in (sinks[LONGER], first_seeds))
        found["levers.chance"] = [chance / moved]
        ranks = [pd.Series(ends[name]).rank() for name in ("strongest_sink", "highest_peak")]
        found["levers.peak"] = [np.corrcoef(*ranks)[0, 1]]
    return {claim: values for claim, values in found.items() if values is not None}


def _of(ends: xr.Dataset, lever: str) -> np.ndarray:
    """The strongest sinks of a lever, one a seed."""
    return ends.strongest_sink.values[ends.lever.values == lever]


def table(ends: xr.Dataset) -> pd.DataFrame:
    """A row for each training: what it ends with, and at which step its sink begins."""
    begins = [f"{step:,.0f}" if step == step else "not yet" for step in ends.begins.values]
    return pd.DataFrame(
        {
            "seed": ends.seed.values,
            "strongest sink": ends.strongest_sink.values.round(2),
            "begins at step": begins,
            "highest peak": ends.highest_peak.values.round(1),
            **{f"loss, {d}": ends.loss.sel(domain=d).values.round(2) for d in ends.domain.values},
        },
        index=pd.Index(ends.lever.values, name="setting"),
    )
