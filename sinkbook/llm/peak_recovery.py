"""Does a sink come back? A pretrained model fine-tuned without the units that write its peak.

`find_writer` finds the few units of one MLP that write the peak at the first token, `cut_writer`
sets their output weights to zero, and `fine_tune` trains all weights on real text and measures
sinks, drain and peak on the way. `record` is the whole experiment: cut and not cut, Adam and SGD.
"""

import hashlib
import json
import time
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import torch
import transformers
import xarray as xr
from jaxtyping import Int
from torch import Tensor, nn

from sinkbook import store
from sinkbook.annotations import check_arguments, check_fields
from sinkbook.arguments import (
    check_known,
    check_multiple,
    check_number,
    check_numbers,
    check_seed,
    check_token_ids,
    check_whole_numbers,
)
from sinkbook.data import corpora
from sinkbook.dependencies import code_hash
from sinkbook.llm import components
from sinkbook.llm.neurons import down_projection, unit_writes
from sinkbook.llm.sink_location import seen_by_all
from sinkbook.models import pretrained
from sinkbook.models.losses import next_token_loss
from sinkbook.models.partial_forward import logits_of
from sinkbook.models.pretrained import LanguageModel
from sinkbook.provenance import provenance
from sinkbook.toy.tasks import generator_at
from sinkbook.toy.training_loop import descend, schedule, train_measured

DOMAINS = ("prose-en", "code")  # half of each batch and of each held-out set
HELD_OUT = 20  # of so many texts one is measured on, one chooses learning rates, the rest train
SETS = ("measured", "choosing")

OPTIMIZERS = {
    "adamw": lambda weights, rate: torch.optim.AdamW(
        weights, rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True
    ),
    "sgd": lambda weights, rate: torch.optim.SGD(weights, rate, momentum=0.9, fused=True),
}
# Candidates; `record` takes the one with the lowest held-out loss of the cut model after 20 steps.
RATES = {"adamw": (1e-5, 3e-5, 1e-4, 3e-4), "sgd": (0.003, 0.01, 0.03, 0.1)}
SWEEP_STEPS = 20
CONDITIONS = (  # label, whether cut, optimizer
    ("cut, AdamW", True, "adamw"),
    ("cut, SGD", True, "sgd"),
    ("whole, AdamW", False, "adamw"),
)
CUT, WHOLE = [label for label, cut, _ in CONDITIONS if cut], "whole, AdamW"

Measured = TypeVar("Measured", xr.Dataset, xr.DataArray)


@dataclass(frozen=True)
class Config:
    """All that decides a fine-tuning."""

    model: str = "smollm2-135m"  # what `pretrained.load` takes; trained in float32
    cut: bool = True  # False: the control, a whole model
    share: float = 0.99  # of the peak's write that the units cut out carry
    optimizer: str = "adamw"  # a name in OPTIMIZERS
    learning_rate: float = 1e-4  # constant, no warm-up
    clip: float = 1.0  # largest norm of the gradient of all weights
    batch_size: int = 2  # texts of a step, as many of each domain
    length: int = 64  # tokens of a text, the model's first token included
    steps: int = 160
    seed: int = 0  # of the batches
    measurements: int = 9  # on a logarithmic schedule
    measure_every: int = 40  # steps, besides
    evaluation_size: int = 6  # held-out texts of each domain
    held_out: str = "measured"  # which of SETS

    def __post_init__(self):
        check_fields(self)
        check_whole_numbers(self, length=2, steps=1, measurements=0, measure_every=1)
        check_whole_numbers(self, evaluation_size=1)
        check_numbers(self, share=(0, 1), learning_rate=0, clip=0)
        check_multiple("batch_size", self.batch_size, 2)
        check_known("held_out", self.held_out, SETS)
        check_known("optimizer", self.optimizer, OPTIMIZERS)
        check_seed(self.seed)

    @property
    def measured_steps(self) -> tuple[int, ...]:
        """The numbers of steps after which the model is measured; 0 is right after the cut."""
        return schedule(self.steps, self.measurements, every=self.measure_every)

    @property
    def folder(self) -> Path:
        """Where the store keeps the run: named by all that decides it."""
        # One hash for training and measuring: weights of the way would be half a gigabyte a step.
        code = code_hash(f"{__name__}:_train")
        decides = [asdict(self), torch.__version__, transformers.__version__, code]
        digest = hashlib.sha256(json.dumps(decides, sort_keys=True).encode())
        return store.runs_folder() / f"reemergence-{digest.hexdigest()[:16]}"


# --- The cut ---------------------------------------------------------------------------------


class Writer(NamedTuple):
    """The units of one MLP that write the peak at position 0."""

    layer: int
    units: tuple[int, ...]  # columns of its last linear map, the largest share first
    carried: float  # share of the whole write that they carry together
    length: float  # of that write


def find_writer(
    model: nn.Module, tokens: Int[Tensor, "text position"], *, share: float = 0.99
) -> Writer:
    """The MLP that writes most of the peak, and the fewest of its units that carry `share` of it.

    The MLP is chapter 12's: the one whose write at position 0 has the largest component along the
    peak. What a unit carries is its component along the MLP's write; mean over texts.
    """
    check_token_ids("tokens", tokens)
    check_number("share", share, 0, infinite=True)
    along = components.writes(model, tokens).along.sel(part="mlp").mean("batch")
    layer = int(along.argmax("layer"))
    units = unit_writes(model, tokens, layer=layer).mean("batch")
    order = np.argsort(-units.share.values, kind="stable")
    short = np.maximum.accumulate(units.share.values[order].cumsum()) < share
    chosen = order[: short.sum() + 1]
    carried = units.share.values[chosen].sum()
    return Writer(layer, tuple(chosen.tolist()), float(carried), float(units.along.sum("unit")))


def cut_writer(
    model: nn.Module, tokens: Int[Tensor, "text position"], *, share: float = 0.99
) -> Writer:
    """Set the output weights of the writer's units to zero, at all positions; returns the writer.

    What makes the units active is left as it is, so that new output weights could use it.
    """
    writer = find_writer(model, tokens, share=share)
    with torch.no_grad():
        _output_weights(model, tokens, writer.layer)[:, list(writer.units)] = 0
    return writer


def _output_weights(model: nn.Module, tokens: Tensor, layer: int) -> Tensor:
    """The weights of an MLP's last linear map, (width, unit): a view of the model's own."""
    projection = down_projection(model, tokens, layer)
    return projection.weight if isinstance(projection, nn.Linear) else projection.weight.T


# --- Texts -----------------------------------------------------------------------------------


@cache
@check_arguments
def passages(domain: str, length: int) -> dict[str, list[str]]:
    """The texts of a domain by what they are for: one of SETS, or "trained"."""
    found = corpora.texts(domain, minimum_characters=7 * length)
    trained = [text for i, text in enumerate(found) if i % HELD_OUT >= len(SETS)]
    return {name: found[i::HELD_OUT] for i, name in enumerate(SETS)} | {"trained": trained}


def batch_at(reader: LanguageModel, config: Config, step: int) -> Int[Tensor, "text position"]:
    """The texts of a training step, a function of (seed, step)."""
    generator = generator_at(config.seed, step)
    chosen = []
    for domain in DOMAINS:
        texts = passages(domain, config.length)["trained"]
        count = config.batch_size // len(DOMAINS)
        chosen += [texts[i] for i in torch.randint(len(texts), (count,), generator=generator)]
    return reader.encode(chosen, config.length)


def held_out(reader: LanguageModel, config: Config) -> Int[Tensor, "text position"]:
    """Texts that are never trained on, domain after domain."""
    sets = [passages(domain, config.length)[config.held_out] for domain in DOMAINS]
    chosen = [text for texts in sets for text in texts[: config.evaluation_size]]
    return reader.encode(chosen, config.length)


# --- Fine-tuning -----------------------------------------------------------------------------


@check_arguments
def measure_reemergence(
    model: nn.Module, tokens: Int[Tensor, "text position"], writer: Writer
) -> xr.Dataset:
    """The symptoms of `components.symptoms`, means over texts, and who writes at position 0.

    `loss` is over `domain`. Besides:

    - `write_norm` (part, layer): length of what each part writes at position 0;
    - `units_norm`: length of what the units of `writer` write there together;
    - `rival_peak_ratio` (residual_layer), on a third of the texts: residual norm of the longest
      token after the first over the median, large where there are peaks elsewhere;
    - `attraction`, `rival_attraction` (layer), on the same: what `sink_location.seen_by_all` calls
      so, of the first token and of the most attractive other one in the first half of a text.
    """
    check_token_ids("tokens", tokens)
    found = components.symptoms(model, tokens)
    beginning = tokens[:1, :8]  # what position 0 sees, itself, is the same in every text
    activation = unit_writes(model, beginning, layer=writer.layer).activation.values[0]
    columns = _output_weights(model, beginning, writer.layer)[:, list(writer.units)]
    written = columns.detach().double().cpu().numpy() @ activation[list(writer.units)]
    seen = seen_by_all(model, tokens[::3])
    others = seen.residual_peak_ratio.isel(position=slice(1, None))
    early = seen.attraction.isel(position=slice(1, tokens.shape[1] // 2))
    means = found.drop_vars("loss").mean("batch")
    return means.assign(
        loss=("domain", found.loss.values.reshape(len(DOMAINS), -1).mean(1)),
        write_norm=components.writes(model, beginning).norm.isel(batch=0).drop_vars("top"),
        units_norm=np.linalg.norm(written),
        rival_peak_ratio=others.max("position").mean("batch"),
        attraction=seen.attraction.isel(position=0, drop=True).mean("batch"),
        rival_attraction=early.max("position").mean("batch"),
    )


def fine_tune(config: Config) -> xr.Dataset:
    """The measurements of a fine-tuning along `step`: read from the store, or else made and kept.

    Variables are those of `measure_reemergence`, and `above` (layer): whether a layer lies above
    the writer and reads the peak in the whole model. Attributes hold the writer and the provenance.
    An interrupted run begins anew. Shows progress on a terminal.
    """
    _, measured, facts = store.finished(config.folder, lambda: _train(config))
    provenance = {name: facts[name] for name in ("device", "date", "seconds")}
    versions = json.dumps(facts["versions"])
    return measured.assign_attrs(facts["writer"] | provenance, versions=versions)


def _train(config: Config) -> None:
    started = time.monotonic()
    reader = pretrained.load(config.model, dtype=torch.float32)
    model, tokens = reader.model, held_out(reader, config)
    above = components.reads_peak(components.symptoms(model, tokens))
    find = cut_writer if config.cut else find_writer
    writer = find(model, tokens[:1, :8], share=config.share)
    above = above & (above.layer > writer.layer)
    weights = list(model.requires_grad_(True).parameters())
    optimizer = OPTIMIZERS[config.optimizer](weights, config.learning_rate)
    measured = train_measured(
        descend(
            optimizer,
            lambda texts: next_token_loss(logits_of(model, texts)[:, :-1], texts),
            clip=config.clip,
        ),
        (batch_at(reader, config, step) for step in range(config.steps)),
        partial(measure_reemergence, model, tokens, writer),
        measured=config.measured_steps,
        label="fine-tuning",
    )
    measured = measured.assign(above=above).assign_coords(domain=list(DOMAINS))
    facts = {
        "config": asdict(config),
        "writer": writer._asdict(),
        "seconds": time.monotonic() - started,
    } | provenance()
    store.save_run(config.folder, {}, measured, facts)


# --- The experiment --------------------------------------------------------------------------


def sweep(base: Config) -> xr.Dataset:
    """Held-out loss of the cut model after a few steps, nats, over (optimizer, candidate).

    `rate` has the learning rates. The texts are not those that are measured later.
    """
    short = replace(base, steps=SWEEP_STEPS, measurements=0, measure_every=SWEEP_STEPS)
    short = replace(short, held_out="choosing")
    runs = [
        [fine_tune(replace(short, optimizer=name, learning_rate=rate)) for rate in rates]
        for name, rates in RATES.items()
    ]
    losses = [[run.loss.isel(step=-1).mean() for run in row] for row in runs]
    dims = ("optimizer", "candidate")
    found = {"loss": (dims, np.array(losses)), "rate": (dims, np.array([*RATES.values()]))}
    seconds = sum(run.attrs["seconds"] for row in runs for run in row)
    return xr.Dataset(found, {"optimizer": list(RATES)}, {"seconds": seconds})


def record(base: Config | None = None, seeds: int = 2) -> xr.Dataset:
    """All runs along `run`: the variables of `fine_tune`, and `sweep_loss` and `sweep_rate`.

    `condition`, `seed` and `learning_rate` are coordinates of `run`; the control has one seed.
    Attributes hold the config, the writer and the provenance. Each run is kept once it has ended.
    """
    base = base or Config()
    swept = sweep(base)
    best = swept.rate.isel(candidate=swept.loss.fillna(np.inf).argmin("candidate"))
    configs = [
        (label, replace(base, cut=cut, optimizer=optimizer, learning_rate=rate, seed=seed))
        for seed in range(seeds)
        for label, cut, optimizer in CONDITIONS
        for rate in [best.sel(optimizer=optimizer).item()]
        if cut or seed == 0
    ]
    runs = [fine_tune(config) for _, config in configs]
    together = xr.concat(runs, "run", combine_attrs="override").assign_coords(
        condition=("run", [label for label, _ in configs]),
        seed=("run", [config.seed for _, config in configs]),
        learning_rate=("run", [config.learning_rate for _, config in configs]),
    )
    return together.assign(sweep_loss=swept.loss, sweep_rate=swept.rate).assign_attrs(
        config=json.dumps(asdict(base)),
        seconds=round(sum(made.attrs["seconds"] for made in (swept, *runs))),
    )


@check_arguments
def runs_of(measured: Measured, *conditions: str) -> Measured:
    """The runs under some of `CONDITIONS`, by label."""
    return measured.isel(run=np.flatnonzero(measured.condition.isin(conditions)))


@check_arguments
def before_and_after_the_cut(measured: Measured) -> tuple[Measured, Measured]:
    """What was measured of the whole model before fine-tuning, and right after the cut."""
    whole = runs_of(measured, WHOLE).isel(run=0, step=0, drop=True)
    return whole, runs_of(measured, *CUT).isel(run=0, step=0, drop=True)


@check_arguments
def above_the_cut(measured: xr.Dataset) -> xr.Dataset:
    """Loss, sink attention, value ratio and residual ratio, along the dimensions of the runs.

    Means over domains, and over the layers above the writer that read the peak in the whole model;
    the residual ratio is that at their input.
    """
    at_input = measured.residual_peak_ratio.isel(residual_layer=slice(None, -1))
    ratios = {
        "sink_attention": measured.sink_attention,
        "value_drain_ratio": measured.value_drain_ratio,
        "residual_peak_ratio": at_input.rename(residual_layer="layer"),
    }
    means = {name: values.where(measured.above).mean("layer") for name, values in ratios.items()}
    return xr.Dataset({"loss": measured.loss.mean("domain")} | means)


@check_arguments
def recovered(measured: xr.Dataset) -> xr.Dataset:
    """Share of what the cut changed that is undone, over (run, step), runs that were cut.

    The variables of `above_the_cut`, the residual ratio by its logarithm: 0 right after the cut,
    1 where the whole model was before fine-tuning. The loss can go beyond 1.
    """
    means = above_the_cut(measured)
    means["residual_peak_ratio"] = np.log(means.residual_peak_ratio)
    before = runs_of(means, WHOLE).isel(run=0, step=0, drop=True)
    runs = runs_of(means, *CUT)
    right_after = runs.isel(step=0, drop=True)
    return (runs - right_after) / (before - right_after)
