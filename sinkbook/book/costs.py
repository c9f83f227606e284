"""What the paper's scale costs: operations counted, memory added up, times that follow from both.

Models are run on torch's `meta` device, where tensors have shapes and no numbers: a training step
of 131,072 tokens and a pass through 7 billion parameters take no time and no memory to count.
Attention counts as if no key were masked.
"""

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import pandas as pd
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from sinkbook.book import experiments
from sinkbook.book.chapters import Table
from sinkbook.book.records import paper_scale
from sinkbook.book.records.kept import NAMES, path_of, whole_file
from sinkbook.book.settings import Settings
from sinkbook.files import is_there
from sinkbook.llm.shakespeare_pretraining import PretrainingConfig
from sinkbook.models.losses import next_token_loss
from sinkbook.toy.runs import TrainingConfig
from sinkbook.toy.transformer import Transformer

Config = TrainingConfig | PretrainingConfig


@dataclass(frozen=True)
class Device:
    """A GPU by its makers' numbers."""

    memory: int  # GB
    float32: float  # operations a second, without tensor cores: what the toys train with
    bfloat16: float  # the same with them; float16 on the T4, which has no bfloat16


DEVICES = {
    "T4": Device(16, 8.1e12, 65e12),
    "L4": Device(24, 30e12, 121e12),
    "A100": Device(80, 19.5e12, 312e12),
    "H100": Device(80, 67e12, 989e12),
}
# Of a maker's number, what a model gets out of a device. A guess, not a measurement: small models
# often get less, large ones more.
UTILISATION = 0.25

# The sizes of models that the paper looks at, from their public configurations.
LANGUAGE_MODELS = {
    "Llama-2-7B": ("llama", {"vocab_size": 32_000, "intermediate_size": 11_008}),
    "Llama-3.1-8B": (
        "llama",
        {"vocab_size": 128_256, "intermediate_size": 14_336, "num_key_value_heads": 8},
    ),
    "OLMo-7B-0424": ("olmo", {"vocab_size": 50_304, "intermediate_size": 11_008}),
}
_SEVEN_BILLION = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32}


class Cost(NamedTuple):
    """Of one training: floating-point operations, and bytes that it holds at its largest."""

    operations: float
    memory: float


def training_cost(config: Config) -> Cost:
    """What the steps of a training cost, its measurements not counted.

    Memory is weights, gradients and optimizer state (two numbers a weight) in float32, and what a
    step keeps for the backward pass.
    """
    model = Transformer(config.model).to("meta")
    shape = (config.batch_size, config.model.length + 1)
    texts = torch.zeros(shape, dtype=torch.long, device="meta")
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage.nbytes()
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with FlopCounterMode(display=False) as counter, hooks:
        logits = model(texts[:, :-1])
        next_token_loss(logits, texts).backward()
    weights = sum(parameter.numel() for parameter in model.parameters())
    return Cost(counter.get_total_flops() * config.steps, 16 * weights + sum(kept.values()))


def trainings_of_chapters() -> dict[str, list[Config]]:
    """What each chapter trains at the paper's sizes, every config once."""
    paper = Settings("paper")
    named = {
        "03 · active-dormant": [experiments.one_layer(paper)],
        "04 · mutual reinforcement": [
            experiments.one_layer(paper, experiments.sizes(paper).dynamics_seeds)
        ],
        "05 · residual peaks": [experiments.three_layers(paper)],
        "06 · variations": experiments.variations(paper).values(),
        "08 · Adam and peaks": [[experiments.optimizer_sweep(paper)["AdamW"]]],
        "09 · ReLU and SGD": experiments.two_ways(paper).values(),
        "10 · league table": experiments.league(paper).values(),
        "14 · pretraining": [[experiments.pretraining(paper)]],
    }
    return {
        chapter: list(dict.fromkeys(config for group in groups for config in group))
        for chapter, groups in named.items()
    }


def training_table() -> Table:
    """A row for each chapter that trains: runs, operations, memory, hours on each device.

    Chapters share trainings, which the store keeps: the row of a chapter counts all of its own.
    """
    costs: dict[Config, Cost] = {}
    rows = []
    for chapter, configs in trainings_of_chapters().items():
        for config in configs:
            alike = _without_seed(config)
            if alike not in costs:
                costs[alike] = training_cost(config)
        of_chapter = [costs[_without_seed(config)] for config in configs]
        operations = sum(cost.operations for cost in of_chapter)
        row = {
            "chapter": chapter,
            "trainings": len(configs),
            "operations": f"{operations:.1e}",
            "GB": f"{max(cost.memory for cost in of_chapter) / 1e9:.1f}",
        }
        for name, device in DEVICES.items():
            row[f"hours, {name}"] = _short(operations / (UTILISATION * device.float32) / 3600)
        rows.append(row)
    return Table(pd.DataFrame(rows).set_index("chapter"))


def measured_table() -> Table:
    """A row for each record of the paper's scale that is there: what its trainings took.

    Minutes are the median of one training's, while up to `RUNS_ON_A_GPU` ran side by side.
    """
    rows = []
    for name, groups in paper_scale.GROUPS.items():
        if not is_there(path_of(name)):
            continue
        facts = paper_scale.finished(whole_file(name)).values()
        configs = [config for of_label in groups().values() for config in of_label]
        rows.append(
            {
                "record": name,
                "trainings": len(facts),
                "layers": _range([config.model.layers for config in configs]),
                "batch": _range([config.batch_size for config in configs]),
                "steps": _range([config.steps for config in configs]),
                "minutes": _short(statistics.median(f["seconds"] for f in facts) / 60),
                "device": ", ".join(dict.fromkeys(f["device"] for f in facts)),
            }
        )
    return Table(pd.DataFrame(rows).set_index("record"))


def records_table() -> Table:
    """A row for each record that is there: what it was made on, with what, when, how long it took.

    Seconds are added up over its trainings, as if one had run after the other.
    """
    rows = []
    for name in NAMES:
        if not is_there(path_of(name)):
            continue
        facts = whole_file(name).attrs
        rows.append(
            {
                "record": name,
                "trainings": str(facts.get("trainings", "–")),
                "minutes": _short(float(facts["seconds"]) / 60),
                "device": facts["device"],
                "torch": json.loads(facts["versions"])["torch"],
                "made": facts["date"][:10],
            }
        )
    return Table(pd.DataFrame(rows).set_index("record"))


def _range(numbers: list[int]) -> str:
    low, high = min(numbers), max(numbers)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def reading_table(*, tokens: int = 1024, texts: int = 128, checkpoints: int = 31) -> Table:
    """A row for each large model: weights, operations of a text, seconds for many of them.

    The last columns are for a sweep through so many checkpoints, which downloads each.
    """
    rows = []
    for name, (kind, sizes) in LANGUAGE_MODELS.items():
        config = CONFIG_MAPPING[kind](**_SEVEN_BILLION | sizes)
        with torch.device("meta"), torch.no_grad():
            model = AutoModelForCausalLM.from_config(config)
            inputs = {
                "inputs_embeds": torch.zeros(1, tokens, config.hidden_size),
                # A mask over pairs is taken as it is; others would be looked into.
                "attention_mask": torch.zeros(1, 1, tokens, tokens),
                "position_ids": torch.zeros(1, tokens, dtype=torch.long),
            }
            with FlopCounterMode(display=False) as counter:
                model(**inputs, use_cache=False)
        operations = counter.get_total_flops()
        weights = sum(parameter.numel() for parameter in model.parameters())
        row = {
            "model": name,
            "weights (billions)": f"{weights / 1e9:.2f}",
            "GB in bfloat16": f"{2 * weights / 1e9:.1f}",
            "GB in float32": f"{4 * weights / 1e9:.1f}",
            "operations a text": f"{operations:.1e}",
        }
        for device in ("L4", "A100", "H100"):
            rate = UTILISATION * DEVICES[device].bfloat16
            row[f"seconds for {texts} texts, {device}"] = _short(texts * operations / rate)
        row[f"GB of {checkpoints} checkpoints in float32"] = (
            f"{checkpoints * 4 * weights / 1e9:.0f}"
        )
        rows.append(row)
    return Table(pd.DataFrame(rows).set_index("model"))


def _without_seed(config: Config) -> Config:
    return replace(config, seed=0)


def _short(number: float) -> str:
    return f"{number:.2f}" if number < 1 else f"{number:.1f}" if number < 10 else f"{number:,.0f}"


def devices() -> Table:
    """The devices of the tables, by their makers' numbers."""
    rows: Sequence[dict] = [
        {
            "GPU": name,
            "GB": f"{device.memory}",
            "float32 (10¹² / s)": f"{device.float32 / 1e12:.0f}",
            "bfloat16 (10¹² / s)": f"{device.bfloat16 / 1e12:.0f}",
        }
        for name, device in DEVICES.items()
    ]
    return Table(pd.DataFrame(rows).set_index("GPU"))
