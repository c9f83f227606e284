"""What a training is: its config, its name in the run store, and the run that comes of it."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import cache, cached_property
from pathlib import Path
from typing import TypeVar

import torch
import xarray as xr
from jaxtyping import Int
from torch import Tensor

from sinkbook import store
from sinkbook.annotations import check_arguments, check_fields
from sinkbook.arguments import (
    check_has,
    check_numbers,
    check_seed,
    check_whole_numbers,
)
from sinkbook.data.shakespeare import characters
from sinkbook.dependencies import KEEPERS, code_hash
from sinkbook.errors import SinkbookError
from sinkbook.toy.optimizers import OPTIMIZERS
from sinkbook.toy.tasks import Task, TaskConfig, task
from sinkbook.toy.training_loop import schedule
from sinkbook.toy.transformer import Transformer, TransformerConfig

Config = TypeVar("Config")  # a dataclass with a `seed`
Trained = TypeVar("Trained")
Name = TypeVar("Name", str, float)

PRECISIONS = ("float32", "bfloat16")

# The evaluation texts come from a seed that no training uses.
EVALUATION_SEED = 2**31


@dataclass(frozen=True)
class TrainingConfig:
    """All that decides a training; the defaults are the paper's (arXiv 2410.13835, section 2)."""

    task: TaskConfig = TaskConfig()
    model: TransformerConfig = TransformerConfig()
    optimizer: str = "adamw"  # a name in OPTIMIZERS
    learning_rate: float = 3e-4  # constant, no warm-up
    weight_decay: float = 1e-4  # on all parameters, as in the official code
    batch_size: int = 512
    steps: int = 10_000
    seed: int = 42  # of the initial weights and of the batches
    measurements: int = 40  # how often the model is measured, on a logarithmic schedule
    evaluation_size: int = 64  # texts that are measured
    precision: str = "float32"  # of the matrix products; weights, norms and loss are in float32
    details: bool = False  # also measure who writes at `<s>`, gradients and steps

    def __post_init__(self):
        check_fields(self)
        check_whole_numbers(self, steps=1, batch_size=1, measurements=1, evaluation_size=1)
        check_numbers(self, learning_rate=0, weight_decay=0)
        check_seed(self.seed)
        if self.precision not in PRECISIONS:
            raise SinkbookError(
                f"no precision named {self.precision!r}. Known: {', '.join(PRECISIONS)}."
            )
        if self.optimizer not in OPTIMIZERS:
            raise SinkbookError(
                f"no optimizer named {self.optimizer!r}. Known: {', '.join(OPTIMIZERS)}."
            )
        made = task(self.task)
        if (self.model.vocab_size, self.model.length) != (made.vocab_size, self.task.length):
            raise SinkbookError(
                f"the model is made for {self.model.vocab_size} tokens and {self.model.length} "
                f"positions, the task has {made.vocab_size} and {self.task.length}. "
                "Give the model the task's vocab_size and length."
            )

    @cached_property
    def key(self) -> str:
        """The run's name in the store: a hash of config, training code, statistics and torch."""
        # Measuring leaves a training as it is, so how it is measured does not count.
        measuring = "sinkbook.toy.measurements"
        code = code_hash("sinkbook.toy.training", without=(*KEEPERS, measuring))
        parts = [json.dumps(asdict(self), sort_keys=True), code, torch.__version__]
        statistics = characters()
        digest = hashlib.sha256("\n".join(parts).encode())
        digest.update(statistics.unigrams.tobytes() + statistics.bigrams.tobytes())
        return digest.hexdigest()[:16]

    @cached_property
    def measured_by(self) -> str:
        """A hash of the code that measures along the way: stored measurements of another go."""
        module = "sinkbook.toy.measurements"
        return code_hash(f"{module}:measure_toy", f"{module}:measure_writers")

    @property
    def folder(self) -> Path:
        """Where the store keeps the run, finished or not."""
        return store.runs_folder() / self.key

    @property
    def evaluation_tokens(self) -> Int[Tensor, "text position"]:
        """The texts, inputs only, on which the run is measured; none is trained on."""
        return _evaluation_tokens(self)

    @property
    def measured_steps(self) -> tuple[int, ...]:
        """The steps before which the model is measured: 0, then evenly on a log axis to the end."""
        return schedule(self.steps, self.measurements)


@dataclass(frozen=True)
class Run:
    """A finished training: the model, and what was measured along the way.

    `measurements` is a dataset over `step` (see `measure_toy`), `facts` tells versions, device
    and seconds.
    """

    config: TrainingConfig
    model: Transformer
    measurements: xr.Dataset
    facts: dict = field(repr=False)

    @property
    def task(self) -> Task:
        """The task that the model was trained on."""
        return task(self.config.task)

    @property
    def evaluation_tokens(self) -> Int[Tensor, "text position"]:
        """The texts, inputs only, on which the run was measured; none was trained on."""
        return self.config.evaluation_tokens

    @property
    def seconds(self) -> float:
        """Wall time of the training, measurements included, over all of its resumptions."""
        return self.facts["seconds"]


@check_arguments
def seeds_of(config: Config, count: int) -> list[Config]:
    """The config under `count` seeds, its own first."""
    check_has("config", config, "seed")
    return [replace(config, seed=config.seed + i) for i in range(count)]


@check_arguments
def in_groups(
    train: Callable[[list[Config]], list[Trained]], groups: dict[Name, list[Config]]
) -> dict[Name, list[Trained]]:
    """What `train` makes of named groups of configs, all in one list, so that no core waits."""
    runs = iter(train([config for configs in groups.values() for config in configs]))
    return {name: [next(runs) for _ in configs] for name, configs in groups.items()}


@check_arguments
def together(runs: list[Run]) -> xr.Dataset:
    """The measurements of several runs as one dataset, along a first dimension `seed`."""
    seeds = xr.Variable("seed", [run.config.seed for run in runs])
    return xr.concat([run.measurements for run in runs], dim=seeds)


def stored(config: TrainingConfig) -> Run | None:
    """The finished run of a config, read from the store.

    None if it is not there, whole, or was measured by other code than today's.
    """
    try:
        found = store.load_run(config.folder)
    except store.DamagedError:
        return None
    if found is None or found[2].get("measured by") != config.measured_by:
        return None
    weights, measurements, facts = found
    model = Transformer(config.model)
    model.load_state_dict(weights)
    return Run(config, model.eval().requires_grad_(False), measurements, facts)


@cache
def _evaluation_tokens(config: TrainingConfig) -> Tensor:
    return task(config.task).batch_at(config.evaluation_size, EVALUATION_SEED, 0)[:, :-1]
