"""Records: measurements of trainings too long for a page, kept with their provenance.

A record is `book/records/NAME.nc`: the measurements of a run, with its config, seed, versions,
device, date, duration and the command that makes it again as attributes. It is written by
`sinkbook record NAME` and never edited. The page that shows it says so.
"""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import xarray as xr

from sinkbook import page, store
from sinkbook.errors import SinkbookError
from sinkbook.experiments import one_layer
from sinkbook.runs import TrainingConfig
from sinkbook.training import train

_PAPER = replace(one_layer("paper")[0], evaluation_size=64)

RECORDS: dict[str, TrainingConfig] = {
    # The paper's width, length and optimizer on two CPU cores, with a quarter of its batch.
    "one-layer-batch-128": replace(_PAPER, batch_size=128, steps=1_000),
    # The same with the paper's batch, as far as it gets in the same time.
    "one-layer-batch-512": replace(_PAPER, batch_size=512, steps=300),
}


def path_of(name: str) -> Path:
    """Where a record lies in the repository.

    Raises `SinkbookError` for an unknown name and outside of a copy of the repository.
    """
    if name not in RECORDS:
        raise SinkbookError(f"no record named {name!r}. Known: {', '.join(RECORDS)}.")
    root = page.repository()
    if root is None:
        raise SinkbookError(
            "records lie in the book's repository, and this is none. Go to a clone of it."
        )
    return root / "book" / "records" / f"{name}.nc"


def make(name: str) -> Path:
    """Train a record's run, or go on where an interrupted one stopped, and write the record."""
    path = path_of(name)
    run = train(RECORDS[name])
    measurements = run.measurements.astype(np.float32)
    measurements.attrs = {
        "record": name,
        "command": f"sinkbook record {name}",
        "config": json.dumps(run.facts["config"]),
        "seed": run.config.seed,
        "versions": json.dumps(run.facts["versions"]),
        "device": run.facts["device"],
        "date": run.facts["date"],
        "seconds": round(run.seconds),
    }
    path.parent.mkdir(exist_ok=True)
    store.write(path, lambda part: measurements.to_netcdf(part, engine="h5netcdf"))
    return path


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
