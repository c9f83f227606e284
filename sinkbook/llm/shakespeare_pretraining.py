"""A pretraining small enough to watch: a character-level language model on real Shakespeare.

Half of its texts repeat their first half. There a head that copies what came half a text before is
worth a lot; in the other half there is nothing to copy. So the model has a head that is active on
some texts and has to be dormant on others, as heads of large models are (arXiv 2410.13835, section
3.1), and one can see when it learns which.
"""

import hashlib
import json
import os
import time
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
import xarray as xr
from jaxtyping import Int
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from sinkbook import store
from sinkbook.annotations import check_arguments, check_fields
from sinkbook.arguments import check_known, check_numbers, check_seed, check_whole_numbers
from sinkbook.data import corpora
from sinkbook.data.shakespeare import SYMBOLS
from sinkbook.dependencies import KEEPERS, code_hash
from sinkbook.devices import device_of
from sinkbook.llm.checkpoint_metrics import concentration, measure_checkpoint
from sinkbook.models.losses import next_token_loss, next_token_losses
from sinkbook.models.token_labels import token_label
from sinkbook.parallel import in_processes
from sinkbook.probe.attention_maps import attention_weights
from sinkbook.probe.metrics import residual_peak_ratio, value_drain_ratio
from sinkbook.provenance import provenance
from sinkbook.toy.optimizers import OPTIMIZERS
from sinkbook.toy.runs import EVALUATION_SEED, in_groups
from sinkbook.toy.tasks import generator_at
from sinkbook.toy.training_loop import descend, schedule, train_measured
from sinkbook.toy.transformer import Transformer, TransformerConfig

START = len(SYMBOLS)  # the id of <s>; ids below are characters
QUERIED_TEXTS = 4  # whose beginnings random queries are put after
HELD_OUT = 20  # one scene of so many is measured on and never trained on


@dataclass(frozen=True)
class PretrainingConfig:
    """All that decides a pretraining."""

    repeated: float = 0.5  # share of the texts whose second half repeats their first
    starts: bool = True  # whether texts begin with <s>
    length: int = 64  # T, positions of a text
    width: int = 64
    layers: int = 2
    heads: int = 2
    attention: str = "softmax"  # a name in attention.KERNELS
    optimizer: str = "adamw"  # a name in OPTIMIZERS
    learning_rate: float = 3e-3  # constant, no warm-up
    weight_decay: float = 1e-4
    batch_size: int = 32
    steps: int = 2_500
    seed: int = 0  # of the initial weights and of the batches
    measurements: int = 16  # on a logarithmic schedule
    measure_every: int = 100  # steps, besides
    evaluation_size: int = 32  # held-out texts of each kind

    def __post_init__(self):
        check_fields(self)
        check_whole_numbers(self, length=4, width=1, layers=1, heads=1, batch_size=1, steps=1)
        check_whole_numbers(self, measurements=1, measure_every=1, evaluation_size=1)
        check_numbers(self, repeated=(0, 1), learning_rate=0, weight_decay=0)
        check_known("optimizer", self.optimizer, OPTIMIZERS)
        check_seed(self.seed)

    @property
    def model(self) -> TransformerConfig:
        return TransformerConfig(
            vocab_size=START + 1,
            length=self.length,
            width=self.width,
            layers=self.layers,
            heads=self.heads,
            attention=self.attention,
        )

    @property
    def measured_steps(self) -> tuple[int, ...]:
        """The numbers of steps after which the model is measured."""
        return schedule(self.steps, self.measurements, every=self.measure_every)

    @property
    def folder(self) -> Path:
        """Where the store keeps the run: a hash of config, code, texts and torch's version."""
        # Measuring leaves a training as it is, so how it is measured does not count.
        measuring = f"{__name__}:measure_pretraining"
        code = code_hash(f"{__name__}:_train", without=(*KEEPERS, measuring))
        decides = [json.dumps(asdict(self), sort_keys=True), torch.__version__, code]
        digest = hashlib.sha256("\n".join(decides).encode())
        digest.update(character_ids(held_out=False).numpy().tobytes())
        return store.runs_folder() / f"pretraining-{digest.hexdigest()[:16]}"

    @property
    def measured_by(self) -> str:
        """A hash of the code that measures along the way: stored measurements of another go."""
        return code_hash(f"{__name__}:measure_pretraining")


# --- Texts -----------------------------------------------------------------------------------


@cache
@check_arguments
def character_ids(held_out: bool) -> Int[Tensor, " character"]:
    """Shakespeare's scenes, one after the other, as ids of the 65 symbols; others are left out."""
    scenes = corpora.texts("shakespeare", minimum_characters=1)
    chosen = [s for i, s in enumerate(scenes) if (i % HELD_OUT == 0) == held_out]
    codes = np.frombuffer("\n\n".join(chosen).encode("utf-32-le"), dtype=np.uint32)
    order = np.array([ord(symbol) for symbol in SYMBOLS], dtype=np.uint32)
    ids = np.searchsorted(order, codes).clip(max=len(order) - 1)
    return torch.from_numpy(ids[order[ids] == codes])


class Characters:
    """Passages of Shakespeare, some of which repeat their first half, as a task to train on."""

    def __init__(self, config: PretrainingConfig):
        self.config = config
        self.ids = character_ids(held_out=False)

    @property
    def half(self) -> int:
        """How far back the repeated characters lie."""
        return self.config.length // 2

    def batch_at(
        self, size: int, seed: int, step: int, device: torch.device | str = "cpu"
    ) -> Int[Tensor, "text position"]:
        """The texts of a training step, a function of (seed, step): `length + 1` tokens each."""
        generator = generator_at(seed, step)
        repeats = torch.rand(size, generator=generator) < self.config.repeated
        return self._texts(self.ids, repeats, generator).to(device)

    def held_out(self) -> dict[str, Int[Tensor, "text position"]]:
        """Texts for measuring, by kind: the same passages as they are, and with repeats."""
        size, ids = self.config.evaluation_size, character_ids(held_out=True)
        found = {}
        for kind, repeats in (("plain", False), ("repeated", True)):
            generator = torch.Generator().manual_seed(EVALUATION_SEED)
            found[kind] = self._texts(ids, torch.full((size,), repeats), generator)
        return found

    def _texts(self, ids: Tensor, repeats: Tensor, generator: torch.Generator) -> Tensor:
        characters = self.config.length + (not self.config.starts)
        starts = torch.randint(len(ids) - characters, (len(repeats), 1), generator=generator)
        place = torch.arange(characters)
        offsets = torch.where(repeats[:, None], place % self.half, place)
        texts = ids[starts + offsets]
        return F.pad(texts, (1, 0), value=START) if self.config.starts else texts


@check_arguments
def spell(text: Int[Tensor, " position"]) -> str:
    """The characters of a text, with line breaks shown."""
    ids = [token for token in text.tolist() if token != START]
    start = "<s>" if len(ids) < len(text) else ""
    return start + "".join(SYMBOLS[i] for i in ids).replace("\n", token_label("\n"))


# --- Measuring -------------------------------------------------------------------------------


@torch.no_grad()
def measure_pretraining(model: Transformer, characters: Characters) -> xr.Dataset:
    """What a model does in the second half of held-out texts, plain ones and such that repeat.

    The variables of `checkpoint_metrics.measure_checkpoint`, means over texts, with a dimension
    `kind`. Also:

    - `second_half_loss`: mean next-token loss there, nats, over (kind).
    - `copying`: mean attention, on repeated texts, on the token after the one that was the same
      half a text ago, over (layer, head).
    - `concentration`: that of the logits from 64 random queries to the beginnings of four plain
      texts (see `checkpoint_metrics.concentration`), over (layer, head).
    """
    device, half = next(model.parameters()).device, characters.half
    found = []
    held_out = characters.held_out()
    for texts in held_out.values():
        texts = texts.to(device)
        tokens = texts[:, :-1]
        later = torch.zeros_like(tokens, dtype=torch.bool)
        later[:, half + 1 :] = True
        measured = measure_checkpoint(model, tokens, queries=later, random_queries=0).mean("text")
        losses = next_token_losses(model(tokens), texts)
        found.append(measured.assign(second_half_loss=losses[later].mean().item()))
    kinds = xr.Variable("kind", ["plain", "repeated"])
    few = held_out["plain"][:QUERIED_TEXTS, :-1].to(device)
    logits = measure_checkpoint(model, few, random_queries=64)
    queries = torch.arange(half + 1, tokens.shape[1], device=device)
    layers = [attention_weights(model, tokens, layer=i) for i in range(model.config.layers)]
    scores = torch.stack([w[:, :, queries, queries - half + 1].mean((0, 2)) for w in layers])
    return xr.concat(found, dim=kinds).assign(
        copying=(("layer", "head"), scores.cpu().numpy()),
        concentration=concentration(logits),
    )


class Pretraining(NamedTuple):
    """A finished pretraining: `measurements` is `measure_pretraining` along `step`."""

    config: PretrainingConfig
    model: Transformer
    measurements: xr.Dataset
    facts: dict  # seconds, device, versions, date

    @property
    def seconds(self) -> float:
        """How long the training took."""
        return self.facts["seconds"]


@check_arguments
def pretrain(config: PretrainingConfig, *, device: str = "auto") -> Pretraining:
    """The run of a config: read from the store, or else trained and kept there.

    It trains in memory: one that is interrupted begins anew. `device` is "auto" (CUDA where there
    is one) or a device. Raises `SinkbookError` when the store cannot be written.
    """
    model = Transformer(config.model)

    def measure(weights: dict[str, Tensor]) -> xr.Dataset:
        model.load_state_dict(weights)
        return measure_pretraining(model.to(device_of(device)), Characters(config))

    weights, measurements, facts = store.finished(
        config.folder,
        lambda: _train(config, device),
        measured_by=config.measured_by,
        measure=measure,
    )
    model.load_state_dict(weights)
    model = model.cpu().eval().requires_grad_(False)
    return Pretraining(config, model, measurements, facts)


@check_arguments
def pretrain_all(configs: list[PretrainingConfig]) -> list[Pretraining]:
    """The runs of several configs, in their order; on CPUs as many at a time as there are cores."""
    missing = [c for c in dict.fromkeys(configs) if not (c.folder / "run.json").exists()]
    several = len(missing) > 1 and (os.cpu_count() or 1) > 1
    if several and not torch.cuda.is_available():
        in_processes(_pretrain_there, missing, label="pretraining")
    return [pretrain(config) for config in configs]


@check_arguments
def pretrain_groups(
    groups: dict[str, list[PretrainingConfig]],
) -> dict[str, list[Pretraining]]:
    """The runs of named groups of configs, trained as one list, so that no core waits."""
    return in_groups(pretrain_all, groups)


def _pretrain_there(config: PretrainingConfig) -> None:
    pretrain(config)  # the caller reads it from the store


def _train(config: PretrainingConfig, device: str) -> None:
    device = device_of(device)
    started = time.monotonic()
    torch.manual_seed(config.seed)
    model = Transformer(config.model).to(device)
    optimizer = OPTIMIZERS[config.optimizer](model.parameters(), config)
    characters = Characters(config)
    batches = (
        characters.batch_at(config.batch_size, config.seed, step, device)
        for step in range(config.steps)
    )
    kept: list[dict[str, Tensor]] = []
    keeps_along = store.few_enough(model.parameters(), len(config.measured_steps))

    def measure() -> xr.Dataset:
        if keeps_along:
            kept.append({n: w.to("cpu", copy=True) for n, w in model.state_dict().items()})
        return measure_pretraining(model, characters)

    measured = train_measured(
        descend(optimizer, lambda texts: next_token_loss(model(texts[:, :-1]), texts)),
        batches,
        measure,
        measured=config.measured_steps,
        label="pretraining",
    )
    along = dict(zip(config.measured_steps[:-1], kept, strict=False))
    facts = {
        "config": asdict(config),
        "measured by": config.measured_by,
        "seconds": time.monotonic() - started,
    } | provenance()
    store.save_run(config.folder, model.state_dict(), measured, facts, along)


# --- The head that learns to be dormant ------------------------------------------------------


@check_arguments
def together(runs: list[Pretraining]) -> xr.Dataset:
    """The measurements of several pretrainings, over seed."""
    seeds = xr.Variable("seed", [run.config.seed for run in runs])
    return xr.concat([run.measurements for run in runs], dim=seeds)


def copying_head(measured: xr.Dataset) -> tuple[int, int]:
    """Layer and head with the highest copying score at the end of one pretraining."""
    scores = measured.copying.isel(step=-1).transpose("layer", "head").values
    layer, head = np.unravel_index(scores.argmax(), scores.shape)
    return int(layer), int(head)


def follow_copying_head(measured: xr.Dataset) -> xr.Dataset:
    """The variables of each seed's copying head, over (seed, step), and (kind) where it matters.

    `measured` is what `together` gives. The head is chosen by its copying score on repeated texts
    alone. Residual states are those that its layer reads. `value_drain_ratio` and
    `residual_peak_ratio` compare `<s>` with other tokens.
    """
    found = []
    for seed in measured.seed:
        whole = measured.sel(seed=seed)
        layer, head = copying_head(whole)
        of_head = whole.isel(layer=layer, head=head, residual_layer=layer)
        found.append(
            of_head.assign(
                value_drain_ratio=value_drain_ratio(of_head),
                residual_peak_ratio=residual_peak_ratio(of_head),
            ).reset_coords(drop=True)
        )
    return xr.concat(found, dim=measured.seed)


WATCHED_STEPS = 200  # until a Llama has its sinks


def watched_llama(config: PretrainingConfig, callbacks: list[TrainerCallback]) -> pd.DataFrame:
    """What transformers' `Trainer` logs while it trains a Llama on the same texts.

    A row for each step at which something was logged, the loss every ten. The model is as wide
    and as deep as the toy, in all else transformers' own, and is not kept.
    """
    set_seed(config.seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.model.vocab_size,
            hidden_size=config.width,
            intermediate_size=4 * config.width,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            bos_token_id=START,
            eos_token_id=None,
        )
    )
    count = WATCHED_STEPS * config.batch_size
    texts = Characters(config).batch_at(count, config.seed, 0)
    with TemporaryDirectory() as folder:
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                output_dir=folder,
                max_steps=WATCHED_STEPS,
                per_device_train_batch_size=config.batch_size,
                learning_rate=config.learning_rate,
                lr_scheduler_type="constant",
                logging_steps=10,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                dataloader_pin_memory=False,
                seed=config.seed,
            ),
            train_dataset=[{"input_ids": text, "labels": text} for text in texts],
            callbacks=callbacks,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return pd.DataFrame(trainer.state.log_history).groupby("step").first()
