"""Asking for trainings of the toy: `train(config)` is a value, computed once and kept in the store.

How a run is trained stands in `program.py`, the loop over its steps in `training_loop.py`, and what
a run is, with the key that says whether a stored one may be used, in `runs.py`.

Batches are a function of (seed, step), so a config determines its run; a killed run goes on from
its last checkpoint and ends with the same weights, bit by bit, as an unbroken one.
"""

import math
import os
from concurrent.futures import Executor
from contextlib import ExitStack
from dataclasses import replace
from functools import partial

import torch
import xarray as xr
from torch import Tensor

from sinkbook import store
from sinkbook.arguments import check_all, check_kind, check_known, check_number
from sinkbook.devices import device_of
from sinkbook.errors import SinkbookError
from sinkbook.parallel import asked_for, in_processes, on_executor
from sinkbook.toy.optimizers import MATRIX_OPTIMIZERS
from sinkbook.toy.program import Program, Unfinished, resume
from sinkbook.toy.runs import Run, TrainingConfig, seeds_of, stored, together

__all__ = ["Run", "TrainingConfig", "seeds_of", "together", "train", "train_all"]

RUNS_ON_A_GPU = 12  # at once, each in a process of its own


def train(config: TrainingConfig, *, device: str = "auto", checkpoint_seconds: float = 30.0) -> Run:
    """The run of a config: read from the store, or else trained, resumed, and kept there.

    `device` is "auto" (CUDA where there is one), "cpu" or a CUDA device. A kill loses at most
    `checkpoint_seconds`. A damaged stored run is reported, set aside and trained again; a second
    process that asks for the same run waits for the first.
    Raises `SinkbookError` for what is no config, and when the store cannot be written.
    """
    return train_all([config], device=device, checkpoint_seconds=checkpoint_seconds)[0]


class TimeIsUpError(SinkbookError):
    """Trainings are unfinished; the same call goes on with them."""


def train_all(
    configs: list[TrainingConfig],
    *,
    way: str = "auto",
    device: str = "auto",
    checkpoint_seconds: float = 30.0,
    executor: Executor | None = None,
    until: float = math.inf,
) -> list[Run]:
    """The runs of several configs, in their order; those not in the store are trained.

    `way` is how: "batched" trains runs that differ in their seed alone as one program (vmap),
    "processes" one run per CPU core with one thread each, and as many side by side on a GPU,
    "sequence" one after the other. "auto" takes processes if there is more than one run and core.
    Every way gives the same results within floating-point error.

    `until` is a time (`time.time()`) at which what is unfinished is kept for a later call.
    Raises `TimeIsUpError` then, and `SinkbookError` for an unknown way and what is no config.

    With an `executor`, or a Dask scheduler whose address is in `SINKBOOK_DASK`, each missing run
    is a task of its own there, and comes back into the store here. Workers need no store in common.
    """
    check_all("configs", configs, TrainingConfig)
    check_known("way", way, ("auto", "batched", "processes", "sequence"))
    check_number("checkpoint_seconds", checkpoint_seconds, 0, infinite=True)
    check_number("until", until, infinite=True)
    check_kind("executor", executor, Executor | None)
    runs = {config: stored(config) for config in configs}
    missing = [config for config, run in runs.items() if run is None]
    with ExitStack() as stack:
        if executor is None and missing:
            executor = stack.enter_context(asked_for())
        if executor is not None:
            kept = [config for config in missing if (config.folder / store.ALONG).exists()]
            _train_here(kept, way, device_of(device), checkpoint_seconds, until)
            elsewhere = [config for config in missing if config not in kept]
            _train_elsewhere(elsewhere, executor, device, checkpoint_seconds)
        else:
            _train_here(missing, way, device_of(device), checkpoint_seconds, until)
    runs |= {config: stored(config) for config in missing}
    if unfinished := sum(runs[config] is None for config in missing):
        raise TimeIsUpError(
            f"the time is up; {unfinished} of {len(configs)} trainings are unfinished."
        )
    return [runs[config] for config in configs]


def _train_here(
    missing: list[TrainingConfig],
    way: str,
    device: torch.device,
    checkpoint_seconds: float,
    until: float = math.inf,
) -> None:
    if way == "auto":
        several = len(missing) > 1 and (os.cpu_count() or 1) > 1
        way = "processes" if several else "sequence"
    if way == "processes" and missing:
        work = partial(
            _train_one, device=device, checkpoint_seconds=checkpoint_seconds, until=until
        )
        most = RUNS_ON_A_GPU if device.type == "cuda" else None
        in_processes(work, missing, label="training runs", most=most)
    elif way == "batched":
        groups: dict[TrainingConfig, list[TrainingConfig]] = {}
        for config in missing:
            alike = config if config.optimizer in MATRIX_OPTIMIZERS else replace(config, seed=0)
            groups.setdefault(alike, []).append(config)
        for group in groups.values():
            _train_together(group, device, checkpoint_seconds, until)
    else:
        for config in missing:
            _train_together([config], device, checkpoint_seconds, until)


def _train_elsewhere(
    configs: list[TrainingConfig], executor: Executor, device: str, checkpoint_seconds: float
) -> None:
    calls = {c: (c, _code_of(c), device, checkpoint_seconds) for c in configs}
    for config, run in on_executor(executor, _trained, calls, label="training runs"):
        with store.locked(config.folder):
            store.save_run(config.folder, *run)


def _code_of(config: TrainingConfig) -> tuple[str, str]:
    return config.key, config.measured_by


def _trained(
    config: TrainingConfig, code: tuple[str, str], device: str, checkpoint_seconds: float
) -> tuple[dict[str, Tensor], xr.Dataset, dict, store.Along]:
    """What a worker sends back: weights, measurements, facts, and weights along the way."""
    config = replace(config)  # without the key that came along with it
    if _code_of(config) != code:
        raise SinkbookError(
            "a worker has another version of sinkbook's training code, or of torch, than the "
            "machine that asks. Install the same on all of them."
        )
    _train_here([config], "sequence", device_of(device), checkpoint_seconds)
    weights, measurements, facts = store.load_run(config.folder)
    return weights, measurements, facts, store.load_along(config.folder, facts)


def _train_one(
    config: TrainingConfig, device: torch.device, checkpoint_seconds: float, until: float
) -> None:
    _train_together([config], device, checkpoint_seconds, until)


def _train_together(
    configs: list[TrainingConfig],
    device: torch.device,
    checkpoint_seconds: float,
    until: float = math.inf,
) -> None:
    """Train runs that differ in their seed alone as one program, and keep each in the store."""
    with ExitStack() as locks:
        for config in sorted(configs, key=lambda c: c.key):
            locks.enter_context(store.locked(config.folder))
        by_step: dict[int, list[Unfinished]] = {}
        for config in configs:
            if (unfinished := resume(config, device)) is not None:
                by_step.setdefault(unfinished.step, []).append(unfinished)
        for runs in by_step.values():
            Program(runs, device).run(checkpoint_seconds, until)
