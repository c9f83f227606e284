"""The run store: one folder per training, named by a hash of everything that decides its result.

A finished run is `gguf.safetensors`, `measurements.nc` and `run.json`, which is written last
and holds the checksums of the other two. An unfinished one is `checkpoint.safetensors`. Files are
written under another name and moved into place, so that a kill leaves the old one or the new one.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import filelock
import torch
import xarray as xr
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from sinkbook.files import cache_folder, write

# Writes netCDF 3, which is read in a twentieth of the time of netCDF 4.
ENGINE = "scipy"


class DamagedError(Exception):
    """A stored file is not what was written there. Never leaves the store's callers."""


def runs_folder() -> Path:
    """The folder of the run store: `$SINKBOOK_RUNS`, by default `runs` in the cache folder."""
    return Path(os.environ.get("SINKBOOK_RUNS") or cache_folder() / "runs")


@contextmanager
def locked(folder: Path):
    """Hold a run's folder: a second process that asks for the same run waits for the first."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(folder / "lock")
    try:
        lock.acquire(timeout=0.1)
    except filelock.Timeout:
        print(f"Run {folder.name} is being trained by another process: waiting for it.")
        lock.acquire()
    try:
        for leftover in folder.glob("*.part"):
            leftover.unlink()
        yield
    finally:
        lock.release()


def set_aside(folder: Path, why: str) -> None:
    """Report a damaged run and move its files away, so that the run is trained anew.

    They go to `<folder>/damaged-<time>`, for whoever wants to look at them.
    """
    attic = folder / f"damaged-{time.strftime('%Y%m%dT%H%M%S')}-{os.getpid()}"
    attic.mkdir()
    for file in [f for f in folder.iterdir() if f.is_file() and f.name != "lock"]:
        file.rename(attic / file.name)
    print(f"Run {folder.name} is damaged ({why}): set aside in {attic}, training it again.")


def save_checkpoint(folder: Path, tensors: dict[str, Tensor], step: int) -> None:
    """Keep the state of an unfinished run: named tensors and the number of steps done."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    metadata = {"step": str(step), "run": folder.name, "sha256": _digest(tensors)}
    write(folder / "checkpoint.safetensors", lambda part: save_file(tensors, part, metadata))


def load_checkpoint(folder: Path) -> tuple[dict[str, Tensor], int]:
    """The last checkpoint's tensors and its step; none and 0 where there is no checkpoint.

    Raises `DamagedError` for a file that does not hold what `save_checkpoint` wrote.
    """
    path = folder / "checkpoint.safetensors"
    if not path.exists():
        return {}, 0
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise DamagedError(f"{path.name}: {error}") from error
    if metadata.get("run") != folder.name or metadata.get("sha256") != _digest(tensors):
        raise DamagedError(f"{path.name}: not this run's checkpoint, or its checksum differs")
    return tensors, int(metadata["step"])


def save_run(folder: Path, weights: dict[str, Tensor], measurements: xr.Dataset, facts: dict):
    """Keep a finished run and drop its checkpoint. `facts` is JSON: config, versions, seconds."""
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    write(folder / "weights.safetensors", lambda part: save_file(weights, part))
    write(folder / "measurements.nc", lambda part: measurements.to_netcdf(part, engine=ENGINE))
    files = ("weights.safetensors", "measurements.nc")
    facts = facts | {"run": folder.name, "files": {f: _sha256(folder / f) for f in files}}
    text = json.dumps({"facts": facts, "sha256": _sha256_of(facts)}, indent=1)
    write(folder / "run.json", lambda part: part.write_text(text))
    (folder / "checkpoint.safetensors").unlink(missing_ok=True)


def load_run(folder: Path) -> tuple[dict[str, Tensor], xr.Dataset, dict] | None:
    """Weights, measurements and facts of a finished run; None if it is not finished.

    Raises `DamagedError` if any of its files is not what `save_run` wrote.
    """
    path = folder / "run.json"
    if not path.exists():
        return None
    try:
        record = json.loads(path.read_text())
        facts = record["facts"]
        if record["sha256"] != _sha256_of(facts) or facts["run"] != folder.name:
            raise DamagedError(f"{path.name}: not this run's record, or its checksum differs")
        for name, checksum in facts["files"].items():
            if _sha256(folder / name) != checksum:
                raise DamagedError(f"{name}: its checksum differs")
        weights = load_file(folder / "weights.safetensors")
        measurements = _with_wide_integers(xr.load_dataset(folder / "measurements.nc"))
    except (ValueError, KeyError, TypeError, OSError, SafetensorError) as error:
        raise DamagedError(f"{type(error).__name__}: {error}") from error
    return weights, measurements, facts


def finished(folder: Path, make: Callable[[], None]) -> tuple[dict[str, Tensor], xr.Dataset, dict]:
    """The finished run of a folder, as `load_run`: what is there, or else what `make` leaves there.

    A second process that asks for it waits. A damaged run is reported, set aside and made again.
    """
    with locked(folder):
        try:
            kept = load_run(folder)
        except DamagedError as damage:
            set_aside(folder, str(damage))
            kept = None
        if kept is None:
            make()
            kept = load_run(folder)
    return kept


def _with_wide_integers(measurements: xr.Dataset) -> xr.Dataset:
    # netCDF 3 knows no others than 32 bits, where the square of a step would overflow.
    narrow = [name for name, values in measurements.variables.items() if values.dtype == "int32"]
    return measurements.assign({name: measurements[name].astype("int64") for name in narrow})


def _digest(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sha256_of(facts: dict) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
