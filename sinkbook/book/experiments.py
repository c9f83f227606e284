"""The named experiments of the book at each profile: the one place where sizes of trainings live.

What pretrained models read is in `llm_experiments.py`. `quick` finishes each chapter in about a
minute on two CPU cores. `paper` is the setting of arXiv 2410.13835, for one GPU. A profile changes
sizes only; code paths are the same. A chapter is `Settings`: `experiments.one_layer(chapter)`.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import pandas as pd
import xarray as xr

from sinkbook.book.settings import Settings
from sinkbook.mitigations.registry import MITIGATIONS, under_mitigations
from sinkbook.theory.reduced_network import over_seeds, train_sink
from sinkbook.toy.runs import Name, in_groups
from sinkbook.toy.tasks import TaskConfig, task
from sinkbook.toy.training import Run, TrainingConfig, seeds_of, train_all
from sinkbook.toy.transformer import TransformerConfig

if TYPE_CHECKING:  # it imports transformers, which chapters with nothing but toys do without
    from sinkbook.llm.shakespeare_pretraining import PretrainingConfig

# Excess bigram risk of a uniform guess, in nats: the line of the paper's Figure 4a.
UNIFORM_BIGRAM_EXCESS = 1.970


@dataclass(frozen=True)
class Sizes:
    """What a profile decides."""

    width: int  # d of the toy transformer
    length: int  # T, positions of a training text
    batch_size: int
    learning_rate: float  # of AdamW on one layer
    steps: int  # of a one-layer training
    evaluation_size: int  # texts on which a toy is measured
    seeds: int  # trainings behind every claim
    dynamics_seeds: int  # trainings behind the curves of the training dynamics
    texts: int  # real texts of each domain that a pretrained model reads
    text_length: int  # tokens of each


SIZES = {
    "quick": Sizes(
        width=64,
        length=64,
        batch_size=32,
        # Twenty times the paper's: as many steps show the same on a sixtieth of its tokens.
        learning_rate=6e-3,
        steps=1_000,
        evaluation_size=64,
        seeds=3,
        dynamics_seeds=2,
        texts=16,
        text_length=128,
    ),
    "paper": Sizes(
        width=256,
        length=256,
        batch_size=512,
        learning_rate=3e-4,
        steps=10_000,
        evaluation_size=256,
        seeds=3,
        dynamics_seeds=5,
        texts=128,
        text_length=128,
    ),
}


def sizes(settings: Settings) -> Sizes:
    """The sizes of a profile."""
    return SIZES[settings.profile]


def bigram_backcopy(settings: Settings, **changes) -> TaskConfig:
    """The task at the profile's length; `changes` are fields of `TaskConfig`."""
    return TaskConfig(**{"length": sizes(settings).length} | changes)


def toy(settings: Settings, task_config: TaskConfig, **changes) -> TransformerConfig:
    """The toy transformer for a task; `changes` are fields of `TransformerConfig`."""
    made = {"vocab_size": task(task_config).vocab_size, "length": task_config.length}
    return TransformerConfig(**made | {"width": sizes(settings).width} | changes)


def one_layer(settings: Settings, count: int | None = None) -> list[TrainingConfig]:
    """One-layer softmax transformers on Bigram-Backcopy, trained by AdamW (Figures 2 to 4).

    `count` seeds from 42 and the settings' on, by default the profile's; 42 is the paper's.
    """
    size = sizes(settings)
    task_config = bigram_backcopy(settings)
    config = TrainingConfig(
        task=task_config,
        model=toy(settings, task_config),
        learning_rate=size.learning_rate,
        batch_size=size.batch_size,
        steps=size.steps,
        evaluation_size=size.evaluation_size,
        seed=42 + settings.seed,
    )
    return seeds_of(config, count or size.seeds)


def in_the_page() -> dict[str, TrainingConfig]:
    """One-layer toys small enough for a reader's browser, by kernel; the same in every profile.

    A learning rate far above the paper's shows the same in as many steps as one likes to wait for.
    """
    task_config = TaskConfig(length=24)
    model = TransformerConfig(vocab_size=task(task_config).vocab_size, length=24, width=32)
    config = TrainingConfig(
        task=task_config, model=model, learning_rate=2e-2, batch_size=12, steps=400, seed=42
    )
    return {
        "softmax": config,
        "ReLU": replace(config, model=replace(model, attention="relu")),
    }


def toys_in_the_page() -> dict[str, Run]:
    """The runs of `in_the_page`, trained."""
    configs = in_the_page()
    return dict(zip(configs, train_all(list(configs.values())), strict=True))


# The paper's toys. Of its runs of 100,000 steps the figures that we compare with show the first.
THE_PAPER = {
    "layers": "1 and 3",
    "heads a layer": 1,
    "width d": 256,
    "length T": 256,
    "vocabulary V": 67,
    "texts in a batch": 512,
    "steps": "10,000 (some runs 100,000)",
    "rate of AdamW": 3e-4,
    "seeds": "42",
}


def facts(groups: dict[str, list[TrainingConfig]]) -> pd.DataFrame:
    """What toys are made with: a column for each group of seeds, and last the paper's."""
    columns = {}
    for label, group in groups.items():
        config, seeds = group[0], [config.seed for config in group]
        columns[label] = {
            "layers": config.model.layers,
            "heads a layer": config.model.heads,
            "width d": config.model.width,
            "length T": config.task.length,
            "vocabulary V": config.model.vocab_size,
            "texts in a batch": config.batch_size,
            "steps": f"{config.steps:,}",
            "rate of AdamW": config.learning_rate,
            "seeds": f"{seeds[0]} to {seeds[-1]}",
        }
    return pd.DataFrame(columns | {"the paper": THE_PAPER}, dtype=object)


def sink_training(settings: Settings, optimizer: str) -> dict:
    """Arguments of `reduced_network.train_sink`: sink logits alone, by "sgd" or "adam".

    They start at 4, where `<s>` has half of the attention, and the laws of the theory begin. By the
    law for Adam only steps times learning rate counts in the end: `quick` has that of `paper`.
    """
    return {
        "value": 5.0,
        "start": 4.0,
        "learning_rate": {"sgd": 40.0, "adam": 0.2 if settings.quick else 0.03}[optimizer],
        "steps": 1_500 if settings.quick else 10_000,
        "batch_size": sizes(settings).batch_size,
    }


def whole_networks(settings: Settings) -> dict:
    """Arguments of `reduced_network.train_whole`: all of it, by AdamW at the paper's rate.

    Its seeds are the same whatever the settings' is, so that a page may read what was kept of them.
    """
    quick, size = settings.quick, sizes(settings)
    steps, seeds = (1_500, 4) if quick else (10_000, size.seeds)
    chosen = {"learning_rate": 0.03, "steps": steps, "seeds": range(seeds)}
    return {"length": size.length, "batch_size": size.batch_size} | chosen


def optimizer_sweep(settings: Settings) -> dict[str, TrainingConfig]:
    """Three-layer transformers that differ in their optimizer, by its name in the figures.

    Learning rates are common ones; none was tuned. In `quick` the models are half as wide and long.
    """
    quick = settings.quick
    size = sizes(settings)
    task_config = bigram_backcopy(settings, length=size.length // 2 if quick else size.length)
    model = toy(settings, task_config, layers=3, width=size.width // 2 if quick else size.width)
    rates = {  # quick, paper
        "AdamW": ("adamw", 3e-3, 3e-4),
        "AdamW, ε = 1e-4": ("adamw-large-epsilon", 3e-3, 3e-4),
        "RMSprop": ("rmsprop", 1e-3, 1e-4),
        "signSGD": ("signsgd", 1e-3, 1e-4),
        "Muon": ("muon", 3e-3, 1e-3),
        "SGD, momentum": ("sgd", 0.1, 0.03),
        "SGD": ("sgd-without-momentum", 1.0, 0.3),
    }
    return {
        label: TrainingConfig(
            task=task_config,
            model=model,
            optimizer=name,
            learning_rate=rate if quick else paper_rate,
            batch_size=size.batch_size,
            steps=600 if quick else size.steps,
            measurements=24,
            evaluation_size=size.evaluation_size,
            seed=42 + settings.seed,
        )
        for label, (name, rate, paper_rate) in rates.items()
    }


def reduced_networks(settings: Settings) -> dict[str, xr.Dataset]:
    """Reduced networks whose sink logits alone are trained, along the profile's seeds.

    "sgd" and "adam" train them on Bigram-Backcopy, and so does "adam-long", whose mean square
    remembers 10,000 steps instead of 100. Where seeds hardly differ `quick` has one.
    """
    sgd, adam = (
        partial(train_sink, optimizer=name, **sink_training(settings, name))
        for name in ("sgd", "adam")
    )
    trainings = {"adam": adam, "sgd": sgd, "adam-long": partial(adam, second_beta=0.9999)}
    every = range(settings.seed, settings.seed + sizes(settings).seeds)
    few = every[:1] if settings.quick else every
    seeds = {"adam": every, "sgd": few, "adam-long": few}
    return over_seeds(bigram_backcopy(settings), trainings, seeds)


def averaging(settings: Settings) -> dict:
    """Arguments of `alternatives.train_averaging`, the same in both profiles but for the steps."""
    return {"steps": 1_000 if settings.quick else 10_000, "batch_size": 32}


# Of `quick`'s three layers, wherever a chapter trains them; so the chapters share their trainings.
# The league's record has 1,000.
STEPS_OF_THREE = 600


def three_layers(settings: Settings) -> list[TrainingConfig]:
    """Three full layers, by AdamW on Bigram-Backcopy (Figure 7); two seeds in `quick`, to see."""
    quick = settings.quick
    size = sizes(settings)
    task_config = bigram_backcopy(settings, length=32 if quick else size.length)
    config = TrainingConfig(
        task=task_config,
        model=toy(settings, task_config, layers=3, width=48 if quick else size.width),
        learning_rate=size.learning_rate,
        batch_size=size.batch_size,
        steps=STEPS_OF_THREE if quick else size.steps,
        evaluation_size=size.evaluation_size,
        seed=42 + settings.seed,
        measurements=40,
    )
    return seeds_of(config, 2 if quick else size.seeds)


def kept_seeds(settings: Settings, configs: list[TrainingConfig]) -> list[TrainingConfig]:
    """The first of `configs` from ten seeds in `quick`, the same whatever the settings' seed is."""
    return seeds_of(replace(configs[0], seed=42), 10 if settings.quick else sizes(settings).seeds)


def variation(settings: Settings, *, layers: int = 1, **changes) -> list[TrainingConfig]:
    """Transformers on a task that differs from Bigram-Backcopy in the fields `changes`.

    In `quick` the language has Shakespeare's 32 most frequent characters, the models are a quarter
    of the size of `one_layer`'s, and the steps twice as long: there are many of them.
    """
    quick = settings.quick
    size = sizes(settings)
    small = {"length": 32, "characters": 32} if quick else {}
    task_config = bigram_backcopy(settings, **small | changes)
    config = TrainingConfig(
        task=task_config,
        model=toy(settings, task_config, layers=layers, width=32 if quick else size.width),
        learning_rate=(2 if quick else 1) * size.learning_rate,
        batch_size=size.batch_size,
        steps=600 if quick else size.steps,
        evaluation_size=size.evaluation_size,
        seed=42 + settings.seed,
        measurements=8,  # what counts is the end
    )
    return seeds_of(config, size.seeds)


def variations(settings: Settings) -> dict[str, list[TrainingConfig]]:
    """Bigram-Backcopy and the languages that change one of its rules, by name.

    In `quick` a single seed, and two of those that are shown because seeds differ: records decide
    the claims.
    """
    one, two = (1, 2) if settings.quick else (None, None)
    return {
        "Bigram-Backcopy": variation(settings)[:two],
        "no <s>": variation(settings, starts=0)[:one],
        "two starts": variation(settings, starts=2)[:two],
        "delimiters": variation(settings, delimiter_probability=0.1)[:one],
        "in-context": variation(settings, rule="in-context", layers=3)[:one],
        "Bigram-backward": variation(settings, rule="backward")[:one],
        "Markov": variation(settings, rule="markov")[:one],
        "1 trigger": variation(settings, triggers=1)[:one],
        "8 triggers": variation(settings, triggers=8)[:one],
    }


# The paper's two mitigations beside their control, by their names in figures and in the registry.
TWO_WAYS = {"softmax, AdamW": "softmax", "ReLU, AdamW": "relu", "softmax, SGD": "sgd"}


def two_ways(settings: Settings, seeds: int | None = None) -> dict[str, list[TrainingConfig]]:
    """The methods of `TWO_WAYS` in three layers, by name; the control is `three_layers`.

    Of the profile's seeds the first few, or all.
    """
    return {
        label: [MITIGATIONS[name].applied_to(config) for config in three_layers(settings)[:seeds]]
        for label, name in TWO_WAYS.items()
    }


# Of the league's methods, those that a chapter trains before the reader's eyes.
LEAGUE_SHOWN = ("softmax", "relu", "value-gate", "post-norm")


def league(settings: Settings) -> dict[str, list[TrainingConfig]]:
    """Three-layer transformers under mitigations of the registry, by their names there.

    All of them in `paper`; in `quick` those of `LEAGUE_SHOWN`, the first `STEPS_OF_THREE` steps of
    the record's first seed.
    """
    base, count = league_base(settings), sizes(settings).seeds
    if settings.quick:
        base, count = replace(base, steps=STEPS_OF_THREE), 1
    groups = under_mitigations(base, count)
    return {name: groups[name] for name in (LEAGUE_SHOWN if settings.quick else groups)}


def league_base(settings: Settings, *, layers: int = 3) -> TrainingConfig:
    """The training that each method of the league changes; in `quick`, that of the record."""
    quick = settings.quick
    size = sizes(settings)
    task_config = bigram_backcopy(settings, length=32 if quick else size.length)
    return TrainingConfig(
        task=task_config,
        model=toy(settings, task_config, layers=layers, width=48 if quick else size.width),
        learning_rate=6e-3 if quick else size.learning_rate,
        batch_size=32 if quick else size.batch_size,
        steps=1_000 if quick else size.steps,
        evaluation_size=64 if quick else size.evaluation_size,
        seed=42 + settings.seed,
        measurements=40,
    )


# What a pretraining on Shakespeare is compared with, one change each.
PRETRAINING_CONTROLS = {
    "no repeats": {"repeated": 0.0},
    "no <s>": {"starts": False},
}


def pretraining(settings: Settings) -> "PretrainingConfig":
    """The pretraining on Shakespeare that a chapter makes: in `quick` one on shorter texts.

    The paper has none of this size: the larger one, too, is ours.
    """
    from sinkbook.llm.shakespeare_pretraining import PretrainingConfig

    quick = PretrainingConfig(seed=settings.seed, length=32, steps=1_000)
    larger = replace(
        quick, length=256, width=256, layers=4, heads=8, batch_size=128, learning_rate=1e-3,
        steps=20_000, measure_every=500, evaluation_size=64,
    )  # fmt: skip
    return {"quick": quick, "paper": larger}[settings.profile]


def pretrainings() -> dict[str, list["PretrainingConfig"]]:
    """Those of the record: three seeds "as it is", and one under each of `PRETRAINING_CONTROLS`."""
    from sinkbook.llm.shakespeare_pretraining import PretrainingConfig

    base = PretrainingConfig()
    controls = {name: [replace(base, **c)] for name, c in PRETRAINING_CONTROLS.items()}
    return {"as it is": seeds_of(base, 3)} | controls


def train_groups(groups: dict[Name, list[TrainingConfig]]) -> dict[Name, list[Run]]:
    """The runs of named groups of configs, trained as one list, so that no core waits."""
    return in_groups(train_all, groups)
