"""What drawing batches, training and measuring cost, each beside a plain reference."""

import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from benchmarks.timing import alternate, row
from sinkbook import SinkCallback
from sinkbook.book import experiments
from sinkbook.book.settings import Settings
from sinkbook.toy.optimizers import OPTIMIZERS
from sinkbook.toy.program import add_gradients
from sinkbook.toy.runs import TrainingConfig
from sinkbook.toy.tasks import Task, task
from sinkbook.toy.training import seeds_of, train, train_all
from sinkbook.toy.transformer import Transformer


def ratios() -> list[dict]:
    """Batches against a loop, steps in two precisions, many seeds, measuring and watching."""
    torch.set_num_threads(1)
    quick = experiments.one_layer(Settings("quick"))[0]
    # The paper's width and length; a smaller batch, which makes drawing it dearer per text.
    paper = replace(experiments.one_layer(Settings("paper"))[0], batch_size=64)
    three_layers = replace(experiments.three_layers(Settings("paper"))[0], batch_size=16)
    return [
        _batches_against_a_loop(task(paper.task)),
        _share_of_batches(paper),
        *_bfloat16_steps(three_layers),
        _measuring(quick),
        _many_seeds(quick),
        _watching(),
    ]


def _batches_against_a_loop(made: Task) -> dict:
    """The loop draws each token by `Generator.choice`, as the paper's official code does."""
    generator = np.random.default_rng(0)
    rows, triggers = made.transition.numpy(), set(made.triggers)

    def loop() -> None:
        text = [made.start]
        text.append(generator.choice(made.vocab_size, p=rows[made.start]))
        while len(text) <= made.config.length:
            last = text[-1]
            text.append(
                text[-2] if last in triggers else generator.choice(made.vocab_size, p=rows[last])
            )

    seconds = alternate({"loop": loop, "batch": lambda: made.batch_at(512, 0, 0)}, 7)
    per_text = [s / 512 for s in seconds["batch"]]
    name = "one text by a loop over tokens / one of a batch of 512"
    return row(name, seconds["loop"], per_text, 100, at_least=True)


def _step(config: TrainingConfig) -> Callable[[], None]:
    """One training step on a batch that is drawn beforehand."""
    torch.manual_seed(0)
    model = Transformer(config.model)
    optimizer = OPTIMIZERS[config.optimizer](model.parameters(), config)
    texts = task(config.task).batch_at(config.batch_size, 0, 0)

    def step() -> None:
        optimizer.zero_grad()
        add_gradients(model, texts, config.precision)
        optimizer.step()

    return step


def _share_of_batches(config: TrainingConfig) -> dict:
    made = task(config.task)
    passes = {"draw": lambda: made.batch_at(config.batch_size, 0, 0), "step": _step(config)}
    seconds = alternate(passes, 5)
    name = f"drawing a batch of {config.batch_size} / training step at the paper's width"
    return row(name, seconds["draw"], seconds["step"], 0.03)


# How much a step gains, at least, by a unit that the CPU may have, the faster one first: its matrix
# products gain five to eight times, and twice.
GAINS = {"amx_bf16": 2.5, "avx512_bf16": 1.5}


def _bfloat16_steps(config: TrainingConfig) -> list[dict]:
    """A step in float32 against one in bfloat16; no row where the CPU has no unit for it."""
    units = [unit for unit in GAINS if torch.cpu.get_capabilities().get(unit)]
    steps = {
        precision: _step(replace(config, precision=precision))
        for precision in ("float32", "bfloat16")
    }
    rows = []
    for unit in units[:1]:
        seconds = alternate(steps, 5)
        name = f"training step of three layers in float32 / in bfloat16, {unit}"
        rows.append(row(name, seconds["float32"], seconds["bfloat16"], GAINS[unit], at_least=True))
    return rows


def _in_an_empty_store(run: Callable) -> float:
    before = os.environ.get("SINKBOOK_RUNS")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["SINKBOOK_RUNS"] = folder
        start = time.perf_counter()
        run()
        seconds = time.perf_counter() - start
    os.environ.pop("SINKBOOK_RUNS")
    if before is not None:
        os.environ["SINKBOOK_RUNS"] = before
    return seconds


def _measuring(config: TrainingConfig) -> dict:
    """A whole training with its measurements against one that is measured at both ends only."""
    unmeasured = replace(config, measurements=1)
    seconds = {"measured": [], "unmeasured": []}
    for _ in range(2):
        seconds["measured"].append(_in_an_empty_store(lambda: train(config)))
        seconds["unmeasured"].append(_in_an_empty_store(lambda: train(unmeasured)))
    name = "training with measurements / without"
    return row(name, seconds["measured"], seconds["unmeasured"], 1.15)


def _many_seeds(config: TrainingConfig) -> dict:
    configs = seeds_of(config, 8)
    together = _in_an_empty_store(lambda: train_all(configs))
    in_a_row = _in_an_empty_store(lambda: train_all(configs, way="sequence"))
    name = "8 seeds by the chosen way / one after the other"
    return row(name, [together], [in_a_row], 0.6)


def _watching() -> dict:
    """A hundred steps of a small Llama and one call of the callback, against the steps alone.

    Steps and calls are taken in turn and added up: in two trainings of a hundred steps each, what
    is looked for would be less than what they differ by anyway.
    """
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=2048,
        hidden_size=128,
        intermediate_size=341,
        num_hidden_layers=4,
        num_attention_heads=4,
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    texts, watched = torch.randint(2048, (8, 256)), torch.randint(2048, (8, 128))
    callback, arguments = SinkCallback(watched), TrainingArguments(use_cpu=True, report_to="none")
    state, control = TrainerState(global_step=callback.every), TrainerControl()

    def step() -> None:
        model(input_ids=texts, labels=texts).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def watch() -> None:
        callback.on_step_end(arguments, state, control, model=model)

    seconds = alternate({"step": step, "watch": watch}, 7)
    plain = [callback.every * s for s in seconds["step"]]
    watching = [steps + s for steps, s in zip(plain, seconds["watch"], strict=True)]
    name = f"training a small Llama with SinkCallback(every={callback.every}) / without"
    return row(name, watching, plain, 1.01)
