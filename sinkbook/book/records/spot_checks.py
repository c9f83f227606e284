"""Does a record's training begin today as it began when the record was made?

A record is made once, for hours or on a GPU. Its training begun again on this machine must meet
the stored trajectory in its first steps; if it does not, the code or the record has changed.
"""

from dataclasses import dataclass, replace

import numpy as np
import xarray as xr

from sinkbook.arguments import check_known
from sinkbook.book.experiments import pretrainings
from sinkbook.book.records import changed_toys, long_levers, paper_scale
from sinkbook.book.records.kept import whole_file
from sinkbook.errors import SinkbookError
from sinkbook.toy.runs import TrainingConfig
from sinkbook.toy.training import train

# Relative differences that rounding explains: the records' matrix products are in bfloat16, these
# in float32, which every CPU can do. Between the two, ten steps on a GPU and on CPUs differed by
# at most a ten-thousandth in risks and a five-hundredth in norms.
TOLERANCES = {
    "backcopy_risk": 1e-3,
    "bigram_risk": 1e-3,
    "residual_norm": 5e-3,
    "other_residual_norm": 5e-3,
    "value_norm": 5e-3,
    "other_value_norm": 5e-3,
}

# The pretrainings on Shakespeare are in float32 in both.
PRETRAINING_TOLERANCES = {
    "second_half_loss": 1e-3,
    "residual_norm": 5e-3,
    "value_norm": 5e-3,
    "other_value_norm": 5e-3,
}

# So are the changed toys, whose measurements have other names.
CHANGED_TOY_TOLERANCES = {
    "excess_risk": 1e-3,
    "query_key_norm": 5e-3,
    "residual_norm": 5e-3,
    "other_residual_norm": 5e-3,
}

# The small Llama is in float32 in both, and its loss moves little in its first steps.
LONG_LEVER_TOLERANCES = {"loss": 1e-4}


@dataclass(frozen=True)
class SpotCheck:
    """The first steps of a training, stored and begun again, along `step`."""

    name: str
    training: str
    seed: int
    stored: xr.Dataset
    again: xr.Dataset
    furthest: float  # the largest relative difference, in units of what is tolerated

    def __str__(self) -> str:
        return (
            f"Begun again on this machine, the training {self.training!r} of the record "
            f"{self.name!r}, seed {self.seed}, meets its first {self.again.step.values[-1]} steps: "
            f"the largest difference is {self.furthest:.2f} of what rounding may make."
        )


def spot_check(name: str, training: str, *, steps: int = 2) -> SpotCheck:
    """Begin the first seed of a record's training again, and lay it over the stored trajectory.

    Raises `SinkbookError` if they part by more than rounding does, and where; and for a training
    that the record has not, or not yet.
    """
    known = (*paper_scale.GROUPS, "shakespeare", long_levers.NAME, *changed_toys.GROUPS)
    check_known("record whose trainings are begun again", name, known)
    if name == "shakespeare":
        return _pretraining_begun_again(training, steps)
    if name == long_levers.NAME:
        return _long_lever_begun_again(training)
    if name in changed_toys.GROUPS:
        return _changed_toy_begun_again(name, training, steps)
    groups = paper_scale.GROUPS[name]()
    check_known(f"training of the record {name!r}", training, groups)
    config = groups[training][0]
    finished = paper_scale.trainings(whole_file(name))
    if (training, config.seed) not in finished:
        raise SinkbookError(
            f"the training {training!r} of the record {name!r}, seed {config.seed}, is not "
            f"finished. Go on with: sinkbook record {name}"
        )
    stored, _ = finished[training, config.seed]
    stored, again = _at_common_steps(stored, first_steps(config, steps))
    return compared(name, training, config.seed, stored, again)


def _at_common_steps(stored: xr.Dataset, again: xr.Dataset) -> tuple[xr.Dataset, xr.Dataset]:
    """Both at the steps where both were measured: a record need not have every one of the first."""
    both = np.intersect1d(stored.step, again.step)
    return stored.sel(step=both), again.sel(step=both)


def _pretraining_begun_again(training: str, steps: int) -> SpotCheck:
    from sinkbook.llm import copying_head, shakespeare_pretraining

    groups = pretrainings()
    check_known("training of the record 'shakespeare'", training, groups)
    config = groups[training][0]
    stored = copying_head.of_training(whole_file("shakespeare"), training).sel(seed=config.seed)
    beginning = replace(config, steps=steps, measurements=steps, measure_every=steps)
    again = shakespeare_pretraining.pretrain(beginning).measurements
    stored, again = _at_common_steps(stored, again)
    return compared(
        "shakespeare", training, config.seed, stored, again, tolerances=PRETRAINING_TOLERANCES
    )


def _long_lever_begun_again(lever: str) -> SpotCheck:
    name = long_levers.NAME
    record = whole_file(name)
    check_known(f"training of the record {name!r}", lever, dict.fromkeys(record.lever.values))
    seed, stored, again = long_levers.begun_again(record, lever)
    return compared(name, lever, seed, stored, again, tolerances=LONG_LEVER_TOLERANCES)


def _changed_toy_begun_again(name: str, training: str, steps: int) -> SpotCheck:
    seed, again = changed_toys.begun_again(name, training, steps)
    visits = {dim: slice(again.sizes[dim]) for dim in ("visit", "residual_visit")}
    stored = whole_file(name).sel(training=training, seed=seed).isel(visits)
    stored, again = _at_common_steps(stored, again)
    return compared(name, training, seed, stored, again, tolerances=CHANGED_TOY_TOLERANCES)


def first_steps(config: TrainingConfig, steps: int) -> xr.Dataset:
    """The measurements of a training's first steps, each of them, in float32."""
    beginning = replace(config, steps=steps, measurements=steps, precision="float32", details=False)
    return train(beginning).measurements


def compared(
    name: str,
    training: str,
    seed: int,
    stored: xr.Dataset,
    again: xr.Dataset,
    *,
    tolerances: dict[str, float] = TOLERANCES,
) -> SpotCheck:
    """A spot check of two trajectories over the same steps; raises `SinkbookError` as they part."""
    furthest = 0.0
    for variable, tolerance in tolerances.items():
        old, new = xr.broadcast(stored[variable], again[variable])
        parted = np.abs(new - old) / np.abs(old) / tolerance
        if not (parted.fillna(0.0) <= 1).all():
            steps = parted.step.values[(parted > 1).any(set(parted.dims) - {"step"}).values]
            raise SinkbookError(
                f"the training {training!r} of the record {name!r}, seed {seed}, no longer begins "
                f"as it was recorded: {variable} at step {steps[0]} differs by "
                f"{tolerance * parted.max().item():.1e}, and rounding by {tolerance:.0e} at most. "
                f"Either the code of trainings has changed, and the record has to be made again "
                f"(sinkbook record {name}), or the record's file has."
            )
        if parted.isnull().all():
            raise SinkbookError(f"the record {name!r} holds no {variable} of its first steps.")
        furthest = max(furthest, parted.max().item())
    return SpotCheck(name, training, seed, stored, again, furthest)
