"""On what, with what and when something was computed, and where the book's sources are."""

import json
import os
import platform
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def repository(start: Path | None = None) -> Path | None:
    """The folder with the book's sources: the nearest one from `start` upwards, else the package's.

    `start` defaults to the working directory. None: neither the working directory nor the
    installed package lies in a copy of the repository.
    """
    beside_package = Path(__file__).resolve().parent.parent
    here = (start or Path.cwd()).resolve()
    for folder in (here, *here.parents, beside_package):
        # Whatever has these names: what is wrong with one is said when it is read.
        if all(os.path.lexists(folder / name) for name in ("_toc.yml", "book/claims.yml")):
            return folder
    return None


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on, by package name."""
    found = {"python": platform.python_version()}
    for package in ("sinkbook", "torch", "transformers", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def device() -> str:
    """The device that is computed on, in words."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    threads = torch.get_num_threads()
    return f"CPU, {threads} thread{'s' if threads > 1 else ''}"


def of_trainings(count: int, time: str) -> str:
    """How long so many trainings took together, in words.

    >>> of_trainings(1, "5 minutes"), of_trainings(2, "5 minutes")
    ('one training of 5 minutes', '2 trainings of 5 minutes in all')
    """
    return f"one training of {time}" if count == 1 else f"{count} trainings of {time} in all"


def provenance() -> dict:
    """On what, with what and when something was computed here, for the file that keeps it."""
    date = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    return {"device": device(), "versions": versions(), "date": date}


def of_record(config: dict, facts: dict, seconds: float) -> dict:
    """How a record was made, as the attributes of its file; `facts` are those of `provenance`."""
    return {
        "config": json.dumps(config),
        "versions": json.dumps(facts["versions"]),
        "device": facts["device"],
        "date": facts["date"],
        "seconds": round(seconds),
    }
