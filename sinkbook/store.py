"""The run store: one folder per training, named by a hash of everything that decides its result.

The hash is made where a run is described (`key` in `toy/runs.py` and its like) from the config and
from the code that makes the run, which `dependencies.py` follows.

A finished run is `weights.safetensors`, `measurements.nc` and `run.json`, which is written last
and holds the checksums of the others. `along.safetensors` has the weights at the measured steps,
where they are few enough: with them a run is measured again, by a mended probe, without being
trained again. An unfinished run is `checkpoint.safetensors`, in which the state of an optimizer is
tensors and JSON: no file of the store is a pickle, which can be a program. Files are written under
another name and moved into place, so that a kill leaves the old one or the new one.
"""

import errno
import hashlib
import io
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import filelock
import torch
import xarray as xr
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from sinkbook.errors import SinkbookError
from sinkbook.files import (
    NOTICES,
    cache_folder,
    check_is_file,
    chosen_folder,
    is_there,
    write,
)

# Writes netCDF 3, which is read in a twentieth of the time of netCDF 4.
ENGINE = "scipy"

# The most bytes of weights that a run keeps of its measured steps. The toys of the quick profile
# stay below it, a few hundred of them in all below a gigabyte; those of the paper's size do not.
KEPT_ALONG = 32_000_000

# What a user can do where the store cannot be written.
IN_ANOTHER_FOLDER = (
    "choose another folder with SINKBOOK_RUNS; in this one the run goes on from its last checkpoint"
)


ALONG = "along.safetensors"
Along = dict[int, dict[str, Tensor]]  # named weights by step


class DamagedError(Exception):
    """A stored file is not what was written there. Never leaves the store's callers."""


def runs_folder() -> Path:
    """The folder of the run store: `$SINKBOOK_RUNS`, by default `runs` in the cache folder."""
    return chosen_folder("SINKBOOK_RUNS") or cache_folder() / "runs"


@contextmanager
def locked(folder: Path):
    """Hold a run's folder: a second process that asks for the same run waits for the first.

    Raises `SinkbookError` for a folder that cannot be made, or lies where there are no locks.
    """
    lock = filelock.FileLock(folder / "lock")
    with _refusals(folder):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0.1)
        except filelock.Timeout:
            NOTICES.warning("Run %s is being made by another process: waiting for it.", folder.name)
            lock.acquire()
    try:
        with _refusals(folder):
            for leftover in folder.glob("*.part"):
                leftover.unlink()
        yield
    finally:
        lock.release()


@contextmanager
def _refusals(folder: Path) -> Iterator[None]:
    """What the file system refuses in a run's folder, as a message that says what to do."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        if error.errno in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS):
            reason = f"its file system has no locks ({reason})"
        raise SinkbookError(
            f"the run store cannot use {folder}: {reason}. Set SINKBOOK_RUNS to a folder on a "
            "local disk, or on one that you can write to."
        ) from error


def set_aside(folder: Path, why: str) -> None:
    """Report a damaged run and move its files away, so that the run is trained anew.

    They go to `<folder>/damaged-<time>`, for whoever wants to look at them.
    """
    attic = folder / f"damaged-{time.strftime('%Y%m%dT%H%M%S')}-{os.getpid()}"
    with _refusals(folder):
        attic.mkdir()
        for file in [f for f in folder.iterdir() if f.is_file() and f.name != "lock"]:
            file.rename(attic / file.name)
    NOTICES.warning("Run %s is damaged (%s): set aside in %s, made again.", folder.name, why, attic)


def save_checkpoint(folder: Path, tensors: dict[str, Tensor], step: int) -> None:
    """Keep the state of an unfinished run: named tensors and the number of steps done.

    `optimizer/whole` is what `torch.save` made of an optimizer's state, as bytes: that is a pickle,
    and stays in memory. The file has the tensors in it and, as JSON, what holds them.
    """
    tensors = _without_pickle(tensors)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    metadata = {"step": str(step), "run": folder.name}
    metadata["sha256"] = _digest(tensors, metadata)
    _write(folder / "checkpoint.safetensors", lambda part: save_file(tensors, part, metadata))


def load_checkpoint(folder: Path) -> tuple[dict[str, Tensor], int]:
    """The last checkpoint's tensors and its step; none and 0 where there is no checkpoint.

    Raises `DamagedError` for a file that does not hold what `save_checkpoint` wrote, or whose
    checksum leaves out the step, as those of earlier versions do; `SinkbookError` for one that may
    not be read.
    """
    path = folder / "checkpoint.safetensors"
    if not is_there(path):
        return {}, 0
    try:
        check_is_file(path)
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
        tensors = load_file(path)
    except PermissionError:
        with _refusals(folder):
            raise
    except (SafetensorError, OSError, ValueError) as error:
        raise DamagedError(f"{path.name}: {error}") from error
    checksum, step = metadata.pop("sha256", None), metadata.get("step", "")
    ours = metadata.get("run") == folder.name and step.isascii() and step.isdigit()
    if not ours or checksum != _digest(tensors, metadata):
        raise DamagedError(f"{path.name}: not this run's checkpoint, or its checksum differs")
    return _with_pickle(tensors), int(step)


WHOLE = "optimizer/whole"  # an optimizer's state as one, which has lists and numbers in it


def _without_pickle(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors in which `WHOLE` is JSON, and the tensors of that state stand beside it."""
    if WHOLE not in tensors:
        return tensors
    made = io.BytesIO(tensors[WHOLE].cpu().numpy().tobytes())
    apart: dict[str, Tensor] = {}
    text = json.dumps(_as_json(torch.load(made, map_location="cpu", weights_only=True), apart))
    return tensors | apart | {WHOLE: torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)}


def _with_pickle(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that `_without_pickle` was given; `DamagedError` for what it did not make."""
    if WHOLE not in tensors:
        return tensors
    others = {n: t for n, t in tensors.items() if not n.startswith(f"{WHOLE}/")}
    made = io.BytesIO()
    try:
        torch.save(_from_json(json.loads(others[WHOLE].numpy().tobytes()), tensors), made)
    except (ValueError, KeyError, TypeError, RuntimeError, RecursionError) as error:
        raise DamagedError(
            "the optimizer's state is no JSON with tensors, as in earlier versions"
        ) from error
    return others | {WHOLE: torch.frombuffer(bytearray(made.getvalue()), dtype=torch.uint8)}


def _as_json(state: object, apart: dict[str, Tensor]) -> object:
    """A state as JSON; its tensors go to `apart`, with the order in which their axes lie.

    Products of matrices that lie otherwise in memory are rounded otherwise.
    """
    if isinstance(state, dict):
        pairs = [[_as_json(key, apart), _as_json(value, apart)] for key, value in state.items()]
        return {"dict": pairs}
    if isinstance(state, list | tuple):
        return {type(state).__name__: [_as_json(value, apart) for value in state]}
    if isinstance(state, Tensor):
        axes = sorted(range(state.ndim), key=lambda axis: -state.stride(axis))
        name = f"{WHOLE}/{len(apart)}"
        apart[name] = state.permute(axes).contiguous()
        return {"tensor": [name, axes]}
    return state


def _from_json(kept: object, tensors: dict[str, Tensor]) -> object:
    if not isinstance(kept, dict):
        return kept
    ((kind, inner),) = kept.items()
    if kind == "tensor":
        name, axes = inner
        return tensors[name].permute([axes.index(axis) for axis in range(len(axes))])
    held = [_from_json(value, tensors) for value in inner] if kind != "dict" else inner
    if kind == "dict":
        return {_from_json(key, tensors): _from_json(value, tensors) for key, value in held}
    return {"list": list, "tuple": tuple}[kind](held)


def few_enough(weights: Iterable[Tensor], times: int) -> bool:
    """Whether a run may keep such weights at so many measured steps."""
    return times * sum(w.numel() * w.element_size() for w in weights) <= KEPT_ALONG


def save_run(
    folder: Path,
    weights: dict[str, Tensor],
    measurements: xr.Dataset,
    facts: dict,
    along: Along | None = None,
) -> None:
    """Keep a finished run and drop its checkpoint. `facts` is JSON: config, versions, seconds.

    `along` are the weights at measured steps, by step; those at the end need not be among them.
    """
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    _write(folder / "weights.safetensors", lambda part: save_file(weights, part))
    _write(folder / "measurements.nc", lambda part: measurements.to_netcdf(part, engine=ENGINE))
    files = ["weights.safetensors", "measurements.nc"]
    if along:
        tensors = flat(along)
        _write(folder / ALONG, lambda part: save_file(tensors, part, {"run": folder.name}))
        files.append(ALONG)
    facts = facts | {"run": folder.name, "files": {f: _sha256(folder / f) for f in files}}
    text = json.dumps({"facts": facts, "sha256": _sha256_of(facts)}, indent=1)
    _write(folder / "run.json", lambda part: part.write_text(text))
    (folder / "checkpoint.safetensors").unlink(missing_ok=True)


def load_run(folder: Path) -> tuple[dict[str, Tensor], xr.Dataset, dict] | None:
    """Weights, measurements and facts of a finished run; None if it is not finished.

    Raises `DamagedError` if any of its files is not what `save_run` wrote, and `SinkbookError` if
    one may not be read: another user's is not damaged.
    """
    path = folder / "run.json"
    if not is_there(path):
        return None
    try:
        check_is_file(path)
        record = json.loads(path.read_text())
        facts = record["facts"]
        if record["sha256"] != _sha256_of(facts) or facts["run"] != folder.name:
            raise DamagedError(f"{path.name}: not this run's record, or its checksum differs")
        _check_facts(facts)
        for name, checksum in facts["files"].items():
            # What is kept along the way is seldom read, and then checked; it may be thrown away.
            if name != ALONG and _sha256(folder / name) != checksum:
                raise DamagedError(f"{name}: its checksum differs")
        weights = load_file(folder / "weights.safetensors")
        measurements = _with_wide_integers(xr.load_dataset(folder / "measurements.nc"))
    except PermissionError:
        with _refusals(folder):
            raise
    except (ValueError, KeyError, TypeError, AttributeError, OSError, SafetensorError) as error:
        raise DamagedError(f"{type(error).__name__}: {error}") from error
    return weights, measurements, facts


def _check_facts(facts: dict) -> None:
    """Refuse a record without the checksum of every file that is read, or of files elsewhere."""
    held = facts["files"]
    elsewhere = [name for name in held if Path(name).name != name]
    if elsewhere or not {"weights.safetensors", "measurements.nc"} <= {*held}:
        raise DamagedError("run.json: it does not hold the checksums of the run's files")


def load_along(folder: Path, facts: dict) -> Along:
    """The weights that a finished run with these facts kept along the way, by step; none: {}.

    Raises `DamagedError` if they are not what `save_run` wrote.
    """
    path = folder / ALONG
    if ALONG not in facts["files"] or not path.exists():
        return {}
    if _sha256(path) != facts["files"][ALONG]:
        raise DamagedError(f"{ALONG}: its checksum differs")
    return by_step(load_file(path))


def measured_again(
    along: Along, steps: Iterable[int], measure: Callable[[dict[str, Tensor]], xr.Dataset]
) -> xr.Dataset | None:
    """What `measure` makes of the weights at some steps, along `step`; None if any are missing."""
    steps = list(steps)
    if not set(steps) <= set(along):
        return None
    return xr.concat([measure(along[s]).expand_dims(step=[s]) for s in steps], "step")


def flat(along: Along) -> dict[str, Tensor]:
    """Weights by step as tensors named `step/name`, contiguous and on the CPU."""
    return {
        f"{step}/{name}": tensor.detach().cpu().contiguous()
        for step, weights in along.items()
        for name, tensor in weights.items()
    }


def by_step(tensors: dict[str, Tensor]) -> Along:
    """The inverse of `flat`."""
    along: Along = {}
    for name, tensor in tensors.items():
        step, _, name = name.partition("/")
        along.setdefault(int(step), {})[name] = tensor
    return along


def finished(
    folder: Path,
    make: Callable[[], None],
    *,
    measured_by: str | None = None,
    measure: Callable[[dict[str, Tensor]], xr.Dataset] | None = None,
) -> tuple[dict[str, Tensor], xr.Dataset, dict]:
    """The finished run of a folder, as `load_run`: what is there, or else what `make` leaves there.

    A second process that asks for it waits. A damaged run is reported, set aside and made again.
    With `measured_by`, a hash of the code that measures: a run with another under "measured by" in
    its facts is measured again, by what `measure` makes of the weights at each of its steps, or
    made again if it has not kept those.
    """
    with locked(folder):
        try:
            kept = load_run(folder)
            if kept and measured_by and kept[2].get("measured by") != measured_by:
                kept = _measure_again(folder, kept, measured_by, measure)
        except DamagedError as damage:
            set_aside(folder, str(damage))
            kept = None
        if kept is None:
            make()
            kept = load_run(folder)
    return kept


def _measure_again(folder, kept, measured_by, measure):
    weights, before, facts = kept
    along, steps = load_along(folder, facts), before.step.values.tolist()
    measurements = measured_again(along | {steps[-1]: weights}, steps, measure)
    if measurements is None:
        return None
    save_run(folder, weights, measurements, facts | {"measured by": measured_by}, along)
    return load_run(folder)


def _write(path: Path, save: Callable[[Path], None]) -> None:
    write(path, save, otherwise=IN_ANOTHER_FOLDER)


def _with_wide_integers(measurements: xr.Dataset) -> xr.Dataset:
    # netCDF 3 knows no others than 32 bits, where the square of a step would overflow.
    narrow = [name for name, values in measurements.variables.items() if values.dtype == "int32"]
    return measurements.assign({name: measurements[name].astype("int64") for name in narrow})


def _digest(tensors: dict[str, Tensor], metadata: dict[str, str]) -> str:
    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _sha256(path: Path) -> str:
    check_is_file(path)
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sha256_of(facts: dict) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
