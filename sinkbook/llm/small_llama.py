"""A larger pretraining, too long for a page: a Llama of transformers' own on prose and code.

Its checkpoints are revisions of a model in a hub cache of their own, so that it is measured by what
measures OLMo and Pythia, `sinkbook checkpoints`, and by whoever wants to look at it later.
"""

import hashlib
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import torch
import transformers
import xarray as xr
from huggingface_hub.file_download import repo_folder_name
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors, trainers
from tokenizers.models import BPE
from torch.utils.data import Dataset
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from sinkbook import store
from sinkbook.annotations import check_arguments, check_fields
from sinkbook.arguments import check_numbers, check_seed, check_whole_numbers
from sinkbook.children import lifeline
from sinkbook.data import corpora
from sinkbook.dependencies import code_hash
from sinkbook.files import write_json
from sinkbook.fits import first_step
from sinkbook.llm.checkpoint_metrics import concentration
from sinkbook.llm.checkpoints import texts_to_measure
from sinkbook.models.losses import next_token_loss
from sinkbook.models.pretrained import quiet
from sinkbook.probe.metrics import residual_peak_ratio, value_drain_ratio
from sinkbook.progress import progress
from sinkbook.provenance import provenance
from sinkbook.toy.training_loop import schedule

MODEL_ID = "sinkbook/small-llama"
DOMAINS = ("prose-en", "code")
MEASURED_TEXTS = 8  # of each domain, and never trained on
MEASURED_LENGTH = 128  # tokens of each


@dataclass(frozen=True)
class SmallLlama:
    """All that decides a pretraining of a Llama-style model."""

    vocabulary: int = 2048  # tokens, byte pairs of the training texts
    length: int = 256  # tokens of a text
    width: int = 128
    layers: int = 4
    heads: int = 4
    packed: bool = False  # <s> between documents; else before every text
    learning_rate: float = 3e-3  # of AdamW, constant after a warm-up
    weight_decay: float = 0.1
    warmup: int = 100  # steps
    batch_size: int = 8
    steps: int = 500
    checkpoints: int = 3  # revisions, on a logarithmic schedule; and one of the start
    seed: int = 0

    def __post_init__(self):
        check_fields(self)
        check_whole_numbers(self, vocabulary=300, length=2, width=1, layers=1, heads=1, warmup=0)
        check_whole_numbers(self, batch_size=1, steps=1, checkpoints=1)
        check_numbers(self, learning_rate=0, weight_decay=0)
        check_seed(self.seed)

    @property
    def saved_steps(self) -> tuple[int, ...]:
        """The numbers of steps after which the model becomes a revision."""
        return schedule(self.steps, self.checkpoints, first=self.steps / 40)

    @property
    def folder(self) -> Path:
        """Where its hub cache and its training lie: named by all that decides."""
        code = code_hash(f"{__name__}:_train")
        decides = [asdict(self), torch.__version__, transformers.__version__, code]
        digest = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()
        return store.runs_folder() / f"small-llama-{digest[:16]}"


# What the literature names as making sinks or hindering them (Gu et al., arXiv 2410.10781; Queipo
# et al., arXiv 2510.06477), one at a time.
LEVERS: dict[str, dict] = {
    "as it is": {},
    "learning rate / 3": {"learning_rate": 1e-3},
    "weight decay 0": {"weight_decay": 0.0},
    "weight decay 0.5": {"weight_decay": 0.5},
    "length / 2": {"length": 128, "batch_size": 16},
    "2 layers": {"layers": 2},
    "packed": {"packed": True},
}
LAST = 3  # checkpoints whose mean is the end: attention still moves from one to the next
BEGUN = 0.15  # strongest sink from which on it has begun, half of what Gu et al. count a head from


# --- Texts -----------------------------------------------------------------------------------


@cache
def training_texts() -> list[str]:
    """The documents of all domains without those that `sinkbook checkpoints` measures."""
    found = []
    for domain in DOMAINS:
        measured = texts_to_measure(domain, count=MEASURED_TEXTS, length=MEASURED_LENGTH)
        found += [
            text for text in corpora.texts(domain, minimum_characters=200) if text not in measured
        ]
    return found


@cache
def tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """Byte pairs of the training texts, and `<s>` before every text that it is given."""
    made = Tokenizer(BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(training_texts(), trainer)
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", made.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>")


class Windows(Dataset):
    """The training texts, prose and then code, cut into windows of one length.

    With `<s>` before every window, or, packed, before every document and wherever that falls.
    """

    def __init__(self, config: SmallLlama):
        known = tokenizer(config.vocabulary)
        cut = config.length - (not config.packed)
        ids = known(training_texts(), add_special_tokens=config.packed)["input_ids"]
        stream = torch.tensor([token for text in ids for token in text])
        self.windows = stream[: len(stream) // cut * cut].view(-1, cut)
        if not config.packed:
            start = torch.full((len(self.windows), 1), known.bos_token_id)
            self.windows = torch.cat([start, self.windows], dim=1)

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, i: int) -> dict:
        return {"input_ids": self.windows[i], "labels": self.windows[i]}


# --- Training --------------------------------------------------------------------------------


def pretrain(config: SmallLlama) -> dict:
    """Train a model, or go on where an interrupted training stopped.

    What it leaves are the revisions `step0`, `step12`, ... of `MODEL_ID` in the hub cache
    `config.folder / "hub"`. Returns versions, device, date and the `seconds` that it took, since
    the last interruption if there was one.
    """
    finished = config.folder / "finished.json"
    with store.locked(config.folder):
        if not finished.exists():
            started = time.monotonic()
            with quiet():
                _train(config)
            seconds = time.monotonic() - started
            write_json(
                finished,
                {"seconds": seconds} | provenance(),
                otherwise=store.IN_ANOTHER_FOLDER,
            )
    return json.loads(finished.read_text())


def _train(config: SmallLlama) -> None:
    set_seed(config.seed)
    known = tokenizer(config.vocabulary)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocabulary,
            hidden_size=config.width,
            intermediate_size=8 * config.width // 3,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            max_position_embeddings=config.length,
            tie_word_embeddings=True,
            bos_token_id=known.bos_token_id,
            eos_token_id=None,
        )
    )
    folder = config.folder / "trainer"
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=config.steps,
        per_device_train_batch_size=config.batch_size,
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        adam_beta2=0.95,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=config.warmup,
        seed=config.seed,
        save_steps=max(config.steps // 20, 1),
        save_total_limit=1,
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    with progress("pretraining", config.steps) as show:
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=Windows(config),
            callbacks=[_Revisions(config, show)],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train(resume_from_checkpoint=any(folder.glob("checkpoint-*")) or None)


class _Revisions(TrainerCallback):
    """Saves a model as revisions in a hub cache, as a download would have left them."""

    def __init__(self, config: SmallLlama, show):
        self.config, self.show = config, show

    def on_train_begin(self, args, state, control, model=None, **_) -> None:
        self._save(state.global_step, model)

    def on_step_end(self, args, state, control, model=None, **_) -> None:
        self.show(state.global_step)
        self._save(state.global_step, model)

    def _save(self, step: int, model) -> None:
        if step not in self.config.saved_steps:
            return
        name = repo_folder_name(repo_id=MODEL_ID, repo_type="model")
        repository = self.config.folder / "hub" / name
        # By all that decides the weights, since measurements are kept by commit.
        commit = hashlib.sha1(f"{self.config.folder.name} {step}".encode()).hexdigest()  # nosec B324
        snapshot = repository / "snapshots" / commit
        model.save_pretrained(snapshot)
        tokenizer(self.config.vocabulary).save_pretrained(snapshot)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / f"step{step}").write_text(commit)


# --- Measuring -------------------------------------------------------------------------------


def measure(config: SmallLlama) -> xr.Dataset:
    """What `sinkbook checkpoints` finds in all revisions, over (domain, revision, ...)."""
    environment = os.environ | {
        "HF_HUB_CACHE": str(config.folder / "hub"),
        "HF_HUB_OFFLINE": "1",
    }
    found = []
    for domain in DOMAINS:
        file = config.folder / f"{domain}.nc"
        command = [sys.executable, "-m", "sinkbook.cli", "checkpoints", MODEL_ID]
        command += ["--domain", domain, "--texts", str(MEASURED_TEXTS)]
        command += ["--length", str(MEASURED_LENGTH), "--out", str(file), "--force"]
        with lifeline(config.folder) as tied:
            subprocess.run(tied(command), env=environment, check=True, stdout=subprocess.DEVNULL)
        found.append(xr.load_dataset(file, engine="h5netcdf"))
    names = xr.Variable("domain", list(DOMAINS))
    return xr.concat(found, dim=names).drop_vars(["commit", "tokens", "token"])


def strongest_sink(measured: xr.Dataset) -> xr.DataArray:
    """Mean attention on the first token in the head that has most of it, over domains and texts."""
    averaged = [dim for dim in ("domain", "text") if dim in measured.sink_attention.dims]
    return measured.sink_attention.mean(averaged).max(["layer", "head"])


def means_over_texts(measured: xr.Dataset) -> xr.Dataset:
    """What a record of many pretrainings keeps of `measure`, over (domain, step, ...).

    Of each head `sink_attention`, `sink_logit` and `value_drain_ratio`, of each residual layer
    `residual_peak_ratio`, and the `loss` in nats.
    """
    along = measured.swap_dims(revision="step").drop_vars("revision")
    kept = along[["sink_attention", "sink_logit", "loss"]].assign(
        value_drain_ratio=value_drain_ratio(along), residual_peak_ratio=residual_peak_ratio(along)
    )
    return kept.mean("text")


def at_the_end(runs: xr.Dataset) -> xr.Dataset:
    """What each pretraining ends with, given `means_over_texts` of some along `run`.

    `strongest_sink`, `highest_peak` and, by `domain`, the `loss` in nats: means over the last
    `LAST` checkpoints. `begins` is the first step at which the strongest sink is `BEGUN`, NaN where
    it never is.
    """
    last = runs.isel(step=slice(-LAST, None)).mean("step")
    return xr.Dataset(
        {
            "strongest_sink": strongest_sink(last),
            "highest_peak": last.residual_peak_ratio.mean("domain").max("residual_layer"),
            "loss": last.loss,
            "begins": first_step(strongest_sink(runs) >= BEGUN),
        }
    )


def follow_strongest_head(measured: xr.Dataset) -> xr.Dataset:
    """The head with the strongest sink at the end of a pretraining, along `step`.

    Means over texts, by domain: its `sink_attention`, `sink_logit`, `value_drain_ratio` and
    `concentration`; of the residual states the highest `residual_peak_ratio` of all layers, and
    `loss`, nats. `residual_peak_ratio` compares the first token with the median of the others.
    """
    along = measured.swap_dims(revision="step")
    attention = along.sink_attention.mean("text")
    last = attention.isel(step=-1).mean("domain").transpose("layer", "head")
    layer, head = np.unravel_index(last.values.argmax(), last.shape)
    of_head = along.isel(layer=int(layer), head=int(head))
    return xr.Dataset(
        {
            "sink_attention": of_head.sink_attention.mean("text"),
            "sink_logit": of_head.sink_logit.mean("text"),
            "value_drain_ratio": value_drain_ratio(of_head).mean("text"),
            "concentration": of_head.groupby("domain").map(concentration),
            "residual_peak_ratio": residual_peak_ratio(along).mean("text").max("residual_layer"),
            "loss": along.loss.mean("text"),
        }
    )


def sweep() -> xr.Dataset:
    """A short pretraining under each of `LEVERS`, one seed each: their ends, over `lever`.

    NaN for layers that a model lacks. `seconds` is the time that each took.
    """
    ends = []
    for changes in LEVERS.values():
        config = replace(SmallLlama(), **changes)
        seconds = pretrain(config)["seconds"]
        ends.append(measure(config).isel(revision=-1, drop=True).assign(seconds=seconds))
    return xr.concat(ends, dim=xr.Variable("lever", list(LEVERS)), join="outer")


def best_lever(levers: xr.Dataset) -> str:
    """The lever with the strongest sink at the end of `sweep`."""
    return str(levers.lever[int(strongest_sink(levers).values.argmax())].item())


@check_arguments
def long_run(lever: str, *, steps: int = 4_000, checkpoints: int = 24, seed: int = 0) -> SmallLlama:
    """The longer pretraining under a lever; the record `small-llama` has the `best_lever`."""
    return replace(SmallLlama(), steps=steps, checkpoints=checkpoints, seed=seed, **LEVERS[lever])


def first_losses(config: SmallLlama, steps: int) -> xr.DataArray:
    """The loss on the measured texts, nats, of a pretraining that begins once more.

    Over (domain, step): before the first step and after so many.
    """
    beginning = replace(config, steps=steps, checkpoints=1)
    pretrain(beginning)
    (repository,) = (beginning.folder / "hub").iterdir()
    known, found = tokenizer(config.vocabulary), []
    for step in beginning.saved_steps:
        commit = (repository / "refs" / f"step{step}").read_text()
        with quiet():
            model = LlamaForCausalLM.from_pretrained(repository / "snapshots" / commit)
        found.append([_loss(model, _measured_tokens(known, domain)) for domain in DOMAINS])
    return xr.DataArray(
        found, {"step": list(beginning.saved_steps), "domain": list(DOMAINS)}, ("step", "domain")
    )


def _measured_tokens(known: PreTrainedTokenizerFast, domain: str) -> torch.Tensor:
    texts = texts_to_measure(domain, count=MEASURED_TEXTS, length=MEASURED_LENGTH)
    return torch.tensor([ids[:MEASURED_LENGTH] for ids in known(texts)["input_ids"]])


@torch.no_grad()
def _loss(model: LlamaForCausalLM, tokens: torch.Tensor) -> float:
    return next_token_loss(model(tokens[:, :-1]).logits, tokens).item()
