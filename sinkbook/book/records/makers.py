"""What makes records: how each is trained and measured, and the file that is written.

The trainings of the records at the paper's scale are in `paper_scale.GROUPS`, those of the others
here.
"""

import math
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy as np
import xarray as xr
from safetensors.torch import load_file, save_file
from torch import Tensor

from sinkbook.arguments import check_number
from sinkbook.book.experiments import (
    league_base,
    one_layer,
    optimizer_sweep,
    pretrainings,
    train_groups,
)
from sinkbook.book.records import changed_toys, long_levers, paper_scale
from sinkbook.book.records.kept import (
    IN_ANOTHER_COPY,
    NAMES,
    WITH_WEIGHTS,
    about,
    is_finished,
    load,
    path_of,
    weights_path,
    whole_file,
    write_packed,
)
from sinkbook.book.settings import Settings
from sinkbook.devices import device_of
from sinkbook.files import is_there, write
from sinkbook.mitigations.registry import MITIGATIONS, under_mitigations, under_slot_controls
from sinkbook.provenance import of_record
from sinkbook.toy.measurements import measure_toy
from sinkbook.toy.runs import Name, Run, TrainingConfig, stored
from sinkbook.toy.training import TimeIsUpError, seeds_of, train, train_all

# What only makes records is imported there: chapters read them, and transformers takes seconds.


def _one_layer(batch_size: int, steps: int) -> xr.Dataset:
    """The paper's one-layer run on two CPU cores: its width, length and optimizer."""
    (config, *_) = one_layer(Settings("paper"))
    run = train(replace(config, batch_size=batch_size, steps=steps, evaluation_size=64))
    return run.measurements.assign_attrs(
        of_record(asdict(run.config), run.facts, run.seconds), seed=run.config.seed
    )


def _league(seeds: int = 5) -> xr.Dataset:
    """The league table of all methods, in one layer and in three.

    `destinations` are those of `league.destinations`, its mitigations along `slot`.
    """
    from sinkbook.mitigations import league

    bases = {layers: league_base(Settings("quick"), layers=layers) for layers in (1, 3)}
    configs = {layers: under_mitigations(base, seeds) for layers, base in bases.items()}
    runs = {layers: train_groups(groups) for layers, groups in configs.items()}
    slots = _train_sweep(under_slot_controls(configs[1]))
    where = league.destinations(slots).drop_vars("label").rename(mitigation="slot")
    found = league.depths({layers: league.table(of_depth) for layers, of_depth in runs.items()})
    groups = [group for inner in (*runs.values(), *slots.values()) for group in inner.values()]
    trained = {run.config: run for group in groups for run in group}
    facts = runs[1]["softmax"][0].facts
    config = {"base": asdict(bases[3]), "layers": list(bases), "mitigations": list(MITIGATIONS)}
    return found.assign(destinations=where.assign_coords(seed=found.seed)).assign_attrs(
        of_record(config, facts, sum(run.seconds for run in trained.values()))
    )


def _train_sweep(
    sweep: dict[str, dict[Name, list[TrainingConfig]]],
) -> dict[str, dict[Name, list[Run]]]:
    """The runs of configs in two-storeyed groups, trained as one list."""
    flat = {f"{a}, {b}": configs for a, inner in sweep.items() for b, configs in inner.items()}
    runs = train_groups(flat)
    return {a: {b: runs[f"{a}, {b}"] for b in inner} for a, inner in sweep.items()}


def _levers() -> xr.Dataset:
    """Short pretrainings of a Llama-style model, one lever at a time."""
    from sinkbook.llm import small_llama

    found, base = small_llama.sweep(), small_llama.SmallLlama()
    config = {"base": asdict(base), "levers": small_llama.LEVERS}
    facts = small_llama.pretrain(base)  # trained in the sweep
    return found.assign_attrs(of_record(config, facts, found.seconds.sum().item()))


def _small_llama() -> xr.Dataset:
    """The longer pretraining under the best lever of the record of short ones."""
    from sinkbook.llm import small_llama

    config = small_llama.long_run(small_llama.best_lever(load("small-llama-levers")))
    facts = small_llama.pretrain(config)
    return small_llama.measure(config).assign_attrs(
        of_record(asdict(config), facts, facts["seconds"]), seed=config.seed
    )


def _long_levers(until: float = math.inf) -> xr.Dataset:
    """The longer pretraining under each lever, the record written anew as each ends."""
    name = long_levers.NAME
    made = long_levers.trainings(whole_file(name)) if is_there(path_of(name)) else {}
    for record in long_levers.growing(made, until=until):
        path_of(name).parent.mkdir(exist_ok=True)
        _write(name, record)
    return whole_file(name)


def _reemergence() -> xr.Dataset:
    """Fine-tunings of SmolLM2 without the writer of its peak, and whole."""
    from sinkbook.llm import peak_recovery

    return peak_recovery.record()


def _stand_ins() -> xr.Dataset:
    """What stands in for one token's state in SmolLM2, and what that costs."""
    from sinkbook.book.records import stand_ins

    return stand_ins.record()


def _largest_magnitude() -> xr.Dataset:
    """How large a toy's numbers are, and what eight bits lose of them."""
    from sinkbook.book.records import largest_magnitude

    return largest_magnitude.record()


def _families() -> xr.Dataset:
    """Three families of language models, measured from files that its maker has fetched."""
    from sinkbook.book.records import families

    return families.record()


def _families_in_eight_bits() -> xr.Dataset:
    """What eight bits lose in the same families."""
    from sinkbook.book.records import families

    return families.in_eight_bits()


def _shakespeare() -> xr.Dataset:
    """Pretrainings on Shakespeare and their controls, all of the same length."""
    from sinkbook.llm import copying_head, shakespeare_pretraining

    configs = pretrainings()
    runs = shakespeare_pretraining.pretrain_groups(configs)
    config = {name: asdict(of_group[0]) for name, of_group in configs.items()}
    every = [run for group in runs.values() for run in group]
    return copying_head.compared(runs).assign_attrs(
        of_record(config, every[0].facts, sum(run.seconds for run in every)),
        trainings=len(every),
    )


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
        damped.append(measure_toy(changed, run.task, run.evaluation_tokens).residual_peak_height)
    table = optimizer_dynamics.optimizer_table(runs)
    norms_of_seeds = xr.concat(norms, dim=table.seed)
    found = table.merge(norms_of_seeds, compat="no_conflicts").assign(
        damped_peak=xr.concat(damped, dim=table.seed)
    )
    config = {name: asdict(configs[0]) for name, configs in sweep.items()}
    seconds = sum(run.seconds for group in runs.values() for run in group)
    return found.assign_attrs(of_record(config, runs["AdamW"][0].facts, seconds))


MAKERS: dict[str, Callable[..., xr.Dataset]] = {
    # A quarter of the paper's batch.
    "one-layer-batch-128": partial(_one_layer, batch_size=128, steps=1_000),
    # The paper's batch, as far as it gets in the same time.
    "one-layer-batch-512": partial(_one_layer, batch_size=512, steps=300),
    "league": _league,
    "small-llama-levers": _levers,
    "small-llama": _small_llama,
    long_levers.NAME: _long_levers,
    "reemergence": _reemergence,
    "optimizers": _optimizers,
    "shakespeare": _shakespeare,
    **{name: partial(changed_toys.record, name) for name in changed_toys.GROUPS},
    "two-sinks": changed_toys.two_sinks_record,
    "stand-ins": _stand_ins,
    "largest-magnitude": _largest_magnitude,
    "families": _families,
    "families-in-eight-bits": _families_in_eight_bits,
}


def make(name: str, *, device: str = "auto", until: float = math.inf) -> Path:
    """Train a record's runs, or go on where an interrupted one stopped, and write the record.

    `until` is a time (`time.time()`) at which trainings at the paper's scale stop. The file then
    holds those that are finished, and the next call, on this machine or another, makes the others.
    Raises `TimeIsUpError` then, and `SinkbookError` for an unknown record or device.
    """
    path_of(name)  # both refuse what they do not know, before anything is trained
    device_of(device)
    if name == long_levers.NAME:
        return _write(name, MAKERS[name](until=until))
    if name not in paper_scale.GROUPS:
        return _write(name, MAKERS[name]())
    groups = paper_scale.GROUPS[name]()
    finished = paper_scale.trainings(whole_file(name)) if is_there(path_of(name)) else {}
    labels = {config: label for label, configs in groups.items() for config in configs}
    missing = [config for config in labels if (labels[config], config.seed) not in finished]
    # The longest first: side by side, none is then left to run alone at the end.
    missing.sort(key=lambda config: -config.steps * config.model.layers)
    time_is_up = None
    try:
        train_all(missing, device=device, until=until)
    except TimeIsUpError as error:
        time_is_up = error
    weights = {}
    for config in missing:
        if (run := stored(config)) is None:
            continue
        label = labels[config]
        finished[label, config.seed] = paper_scale.measured(name, label, run), run.facts
        if name in WITH_WEIGHTS and config == groups[label][0]:
            weights[label] = run.model.state_dict()
    path_of(name).parent.mkdir(exist_ok=True)
    if weights:
        _keep_weights(name, weights)
    path = _write(name, paper_scale.together(groups, finished)) if finished else path_of(name)
    if time_is_up is not None:
        raise TimeIsUpError(
            f"the time is up. {about(name)}. Go on with: sinkbook record {name}"
        ) from time_is_up
    return path


def _keep_weights(name: str, weights: dict[str, dict[str, Tensor]]) -> None:
    """Add the weights of trainings, in 16 bits, to those that stand beside a record."""
    path = weights_path(name)
    halves = load_file(path) if is_there(path) else {}
    for label, of_training in weights.items():
        for parameter, tensor in of_training.items():
            halves[f"{label}/{parameter}"] = tensor.half().contiguous()
    write(path, lambda part: save_file(halves, part), otherwise=IN_ANOTHER_COPY)


def _write(name: str, record: xr.Dataset) -> Path:
    """Write a record, its numbers in 32 bits and packed, with the command that makes it again."""
    path = path_of(name)
    record = record.assign_attrs(record=name, command=f"sinkbook record {name}")
    numbers = [n for n, values in record.data_vars.items() if values.dtype.kind in "fiu"]
    record = record.assign({n: record[n].astype(np.float32) for n in numbers})
    write_packed(path, record)
    return path


def make_missing(*, device: str = "auto", minutes: float = math.inf) -> list[Path]:
    """The records that are missing or unfinished, made in order of need until the time is up.

    What is unfinished then goes on with the next call.
    """
    check_number("minutes", minutes, 0, infinite=True)
    until, made = time.time() + 60 * minutes, []
    for name in NAMES:
        if is_finished(name):
            continue
        try:
            made.append(make(name, device=device, until=until))
        except TimeIsUpError:
            break
    return made
