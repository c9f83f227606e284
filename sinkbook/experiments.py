"""The named experiments of the book at each profile: the one place where run sizes live.

`quick` finishes each chapter in about a minute on two CPU cores. `paper` is the setting of
arXiv 2410.13835, for one GPU. A profile changes sizes only; code paths are the same.
"""

from dataclasses import dataclass

from sinkbook.page import check_profile
from sinkbook.tasks import TaskConfig, task
from sinkbook.training import TrainingConfig, seeds_of
from sinkbook.transformer import TransformerConfig


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
        dynamics_seeds=5,
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
        text_length=512,
    ),
}


def sizes(profile: str) -> Sizes:
    """The sizes of a profile. Raises `SinkbookError` for a name that is none."""
    return SIZES[check_profile(profile)]


def bigram_backcopy(profile: str, **changes) -> TaskConfig:
    """The task at the profile's length; `changes` are fields of `TaskConfig`."""
    return TaskConfig(**{"length": sizes(profile).length} | changes)


def toy(profile: str, task_config: TaskConfig, **changes) -> TransformerConfig:
    """The toy transformer for a task; `changes` are fields of `TransformerConfig`."""
    made = {"vocab_size": task(task_config).vocab_size, "length": task_config.length}
    return TransformerConfig(**made | {"width": sizes(profile).width} | changes)


def one_layer(profile: str, seed: int = 0, count: int | None = None) -> list[TrainingConfig]:
    """One-layer softmax transformers on Bigram-Backcopy, trained by AdamW (Figures 2 to 4).

    `count` seeds from `42 + seed` on, by default the profile's; 42 is the paper's.
    """
    size = sizes(profile)
    task_config = bigram_backcopy(profile)
    config = TrainingConfig(
        task=task_config,
        model=toy(profile, task_config),
        learning_rate=size.learning_rate,
        batch_size=size.batch_size,
        steps=size.steps,
        evaluation_size=size.evaluation_size,
        seed=42 + seed,
    )
    return seeds_of(config, count or size.seeds)


def sink_training(profile: str, optimizer: str) -> dict:
    """Arguments of `reduced_network.train_sink`: sink logits alone, by "sgd" or "adam".

    They start at 4, where `<s>` has half of the attention, and the laws of the theory begin.
    """
    quick = check_profile(profile) == "quick"
    return {
        "value": 5.0,
        "start": 4.0,
        "learning_rate": {"sgd": 40.0, "adam": 0.03}[optimizer],
        "steps": 3_000 if quick else 10_000,
        "batch_size": sizes(profile).batch_size,
    }


def reduced_training(profile: str) -> dict:
    """Arguments of `reduced_network.train_reduced`: all of it, by AdamW at the paper's rate."""
    return {
        "learning_rate": 0.03,
        "steps": 2_000 if check_profile(profile) == "quick" else 10_000,
        "batch_size": sizes(profile).batch_size,
    }
