"""Records: measurements of trainings too long for a page, kept with their provenance.

A record is `book/records/NAME.nc`: the measurements of a run, with its config, seed, versions,
device, date, duration and the command that makes it again as attributes. It is written by
`sinkbook record NAME` and never edited. The page that shows it says so.
"""

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import xarray as xr
from safetensors.torch import load_file, save_file

from sinkbook.book import paper_scale
from sinkbook.book.experiments import (
    one_layer,
    optimizer_sweep,
    three_layers,
    train_groups,
    train_sweep,
    under_mitigations,
    under_slot_controls,
)
from sinkbook.book.settings import Settings
from sinkbook.errors import SinkbookError
from sinkbook.files import write
from sinkbook.mitigations.registry import MITIGATIONS
from sinkbook.provenance import repository
from sinkbook.toy.measurements import measure_toy
from sinkbook.toy.runs import in_groups
from sinkbook.toy.training import TimeIsUpError, seeds_of, train, train_all
from sinkbook.toy.transformer import Transformer

# What only makes records is imported there: chapters read them, and transformers takes seconds.


def _one_layer(batch_size: int, steps: int) -> xr.Dataset:
    """The paper's one-layer run on two CPU cores: its width, length and optimizer."""
    (config, *_) = one_layer(Settings("paper"))
    run = train(replace(config, batch_size=batch_size, steps=steps, evaluation_size=64))
    return run.measurements.assign_attrs(
        _provenance(asdict(run.config), run.facts, run.seconds), seed=run.config.seed
    )


def _league(seeds: int = 5) -> xr.Dataset:
    """The league table at the size of chapter 05's three layers, in one layer and in three.

    `destinations` are those of `league.destinations`, its mitigations along `slot`.
    """
    from sinkbook.mitigations import league

    (deep, *_) = three_layers(Settings("quick"))
    bases = {1: replace(deep, model=replace(deep.model, layers=1)), 3: deep}
    configs = {layers: under_mitigations(base, seeds) for layers, base in bases.items()}
    runs = {layers: train_groups(groups) for layers, groups in configs.items()}
    slots = train_sweep(under_slot_controls(configs[1]))
    where = league.destinations(slots).rename(mitigation="slot")
    found = league.depths({layers: league.table(of_depth) for layers, of_depth in runs.items()})
    groups = [group for inner in (*runs.values(), *slots.values()) for group in inner.values()]
    trained = {run.config: run for group in groups for run in group}
    facts = runs[1]["softmax"][0].facts
    config = {"base": asdict(deep), "layers": list(bases), "mitigations": list(MITIGATIONS)}
    return found.assign(destinations=where.assign_coords(seed=found.seed)).assign_attrs(
        _provenance(config, facts, sum(run.seconds for run in trained.values()))
    )


def _levers() -> xr.Dataset:
    """Short pretrainings of a Llama-style model, one lever at a time."""
    from sinkbook.llm import small_llama

    found, base = small_llama.sweep(), small_llama.SmallLlama()
    config = {"base": asdict(base), "levers": small_llama.LEVERS}
    facts = small_llama.pretrain(base)  # trained in the sweep
    return found.assign_attrs(_provenance(config, facts, found.seconds.sum().item()))


def _small_llama() -> xr.Dataset:
    """The longer pretraining under the best lever of the record of short ones."""
    from sinkbook.llm import small_llama

    config = small_llama.long_run(load("small-llama-levers"))
    facts = small_llama.pretrain(config)
    return small_llama.measure(config).assign_attrs(
        _provenance(asdict(config), facts, facts["seconds"]), seed=config.seed
    )


def _reemergence() -> xr.Dataset:
    """Fine-tunings of SmolLM2 without the writer of its peak, and whole."""
    from sinkbook.llm import peak_recovery

    return peak_recovery.record()


def _optimizers(seeds: int = 3, steps: int = 10_000) -> xr.Dataset:
    """The optimizers of chapter 08 for the paper's number of steps, on the chapter's small model.

    Variables are those of `optimizer_dynamics.optimizer_table`, and under AdamW the norms of
    `optimizer_dynamics.step_norms` along `norm_step`, and `damped_peak`, the peak at the end if the
    gradient through the values is damped tenfold.
    """
    from sinkbook.theory import alternatives
    from sinkbook.toy import optimizer_dynamics

    sweep = {
        name: seeds_of(replace(config, steps=steps, measurements=48), seeds)
        for name, config in optimizer_sweep(Settings("quick")).items()
    }
    runs = train_groups(sweep)
    norms, damped = [], []
    for run in runs["AdamW"]:
        norms.append(optimizer_dynamics.step_norms(run.config).rename(step="norm_step"))
        changed = alternatives.train_changed(
            run.config, lambda m: alternatives.with_damped_values(m, 0.1)
        )
        damped.append(measure_toy(changed, run.task, run.evaluation_tokens).residual_peak)
    table = optimizer_dynamics.optimizer_table(runs)
    norms_of_seeds = xr.concat(norms, dim=table.seed)
    found = table.merge(norms_of_seeds).assign(damped_peak=xr.concat(damped, dim=table.seed))
    config = {name: asdict(configs[0]) for name, configs in sweep.items()}
    seconds = sum(run.seconds for group in runs.values() for run in group)
    return found.assign_attrs(_provenance(config, runs["AdamW"][0].facts, seconds))


def _provenance(config: dict, facts: dict, seconds: float) -> dict:
    return {
        "config": json.dumps(config),
        "versions": json.dumps(facts["versions"]),
        "device": facts["device"],
        "date": facts["date"],
        "seconds": round(seconds),
    }


RECORDS: dict[str, Callable[[], xr.Dataset]] = {
    # A quarter of the paper's batch.
    "one-layer-batch-128": partial(_one_layer, batch_size=128, steps=1_000),
    # The paper's batch, as far as it gets in the same time.
    "one-layer-batch-512": partial(_one_layer, batch_size=512, steps=300),
    "league": _league,
    "small-llama-levers": _levers,
    "small-llama": _small_llama,
    "reemergence": _reemergence,
    "optimizers": _optimizers,
}


# The records whose weights stand beside them, one seed of each training, for later questions.
WITH_WEIGHTS = ("one-layer", "three-layers")


def names() -> list[str]:
    """All records: those at the paper's scale first, in the order in which they are needed."""
    return [*paper_scale.GROUPS, *RECORDS]


def _at_the_papers_scale(name: str, device: str, until: float) -> tuple[xr.Dataset, dict]:
    """The measurements of a record of `paper_scale`, and its first seed's weights by training."""
    groups = paper_scale.GROUPS[name]()
    runs = in_groups(partial(train_all, device=device, until=until), groups)
    trained = [run for group in runs.values() for run in group]
    config = {label: asdict(group[0].config) for label, group in runs.items()}
    measured = paper_scale.measurements(runs).assign_attrs(
        _provenance(config, trained[0].facts, sum(run.seconds for run in trained))
    )
    weights = {label: group[0].model.state_dict() for label, group in runs.items()}
    return measured, weights if name in WITH_WEIGHTS else {}


def path_of(name: str) -> Path:
    """Where a record lies in the repository.

    Raises `SinkbookError` for an unknown name and outside of a copy of the repository.
    """
    if name not in names():
        raise SinkbookError(f"no record named {name!r}. Known: {', '.join(names())}.")
    root = repository()
    if root is None:
        raise SinkbookError(
            "records lie in the book's repository, and this is none. Go to a clone of it."
        )
    return root / "book" / "records" / f"{name}.nc"


def make(name: str, *, device: str = "auto", until: float = math.inf) -> Path:
    """Train a record's runs, or go on where an interrupted one stopped, and write the record.

    `until` is a time (`time.time()`) at which trainings at the paper's scale stop and keep what
    they have. Raises `TimeIsUpError` then.
    """
    path = path_of(name)
    if name in paper_scale.GROUPS:
        measured, weights = _at_the_papers_scale(name, device, until)
    else:
        measured, weights = RECORDS[name](), {}
    measured = measured.assign_attrs(record=name, command=f"sinkbook record {name}")
    floats = {n: v.astype(np.float32) for n, v in measured.data_vars.items()}
    path.parent.mkdir(exist_ok=True)
    if weights:
        halves = {
            f"{training}/{parameter}": tensor.half().contiguous()
            for training, of_training in weights.items()
            for parameter, tensor in of_training.items()
        }
        write(weights_path(name), lambda part: save_file(halves, part))
    write(path, lambda part: measured.assign(floats).to_netcdf(part, engine="h5netcdf"))
    return path


def make_missing(*, device: str = "auto", minutes: float = math.inf) -> list[Path]:
    """The records that are not there, made in order of need until the minutes are up.

    What is unfinished then goes on with the next call.
    """
    until, made = time.time() + 60 * minutes, []
    for name in names():
        if path_of(name).exists():
            continue
        try:
            made.append(make(name, device=device, until=until))
        except TimeIsUpError:
            break
    return made


def weights_path(name: str) -> Path:
    """Where the weights of a record's first seed lie, in 16 bits."""
    return path_of(name).with_name(f"{name}.safetensors")


def model_of(name: str, training: str) -> Transformer:
    """The toy that a record's first seed ended as: its weights in 16 bits, widened again.

    Raises `SinkbookError` if the record has no weights, or none of that training.
    """
    if name not in WITH_WEIGHTS or not weights_path(name).exists():
        raise SinkbookError(f"the record {name!r} has no weights. Make it: sinkbook record {name}")
    kept = load_file(weights_path(name))
    weights = {
        key.partition("/")[2]: tensor.float()
        for key, tensor in kept.items()
        if key.partition("/")[0] == training
    }
    groups = paper_scale.GROUPS[name]()
    if not weights or training not in groups:
        raise SinkbookError(
            f"the record {name!r} has no training {training!r}. Known: {', '.join(groups)}."
        )
    model = Transformer(groups[training][0].model)
    model.load_state_dict(weights)
    return model.eval().requires_grad_(False)


def about(name: str) -> str:
    """One line on a record: when and on what it was made, and how long that took."""
    if not path_of(name).exists():
        return f"{name}: not made yet"
    facts = load(name).attrs
    minutes = facts["seconds"] / 60
    return f"{name}: made {facts['date'][:10]} in {minutes:.0f} minutes on {facts['device']}"


def load(name: str) -> xr.Dataset:
    """A record's measurements; `attrs` hold its provenance.

    Raises `SinkbookError` if it has not been made, naming the command that makes it.
    """
    path = path_of(name)
    if not path.exists():
        raise SinkbookError(f"the record {name!r} is not there. Make it: sinkbook record {name}")
    return xr.load_dataset(path, engine="h5netcdf")


def paper_one_layer() -> xr.Dataset:
    """The paper's own one-layer run along `step`: risks, sink attention, sink logit and norms.

    Read from the result files of the official code (Figure 4b of arXiv 2410.13835). Its sink
    attention counts position 0, and its bigram risk has the oracle's slip there.
    """
    path = path_of("one-layer-batch-128").parent / "paper-one-layer.csv"
    return pd.read_csv(path, index_col="step").to_xarray()


def paper_olmo() -> xr.Dataset:
    """The paper's OLMo-7B-0424 along `step`: layer 24, one prompt of eight tokens.

    Read off the figures of the official notebook (Figures 9 and 10 of arXiv 2410.13835); NaN where
    a figure shows no number. Its attention is that on whichever key gets most, and its sink logit
    counts masked keys.
    """
    path = path_of("one-layer-batch-128").parent / "paper-olmo-7b.csv"
    return pd.read_csv(path, index_col="step").to_xarray()
