"""The records that are kept: where they lie, what they hold, the weights beside them.

A record is `book/records/NAME.nc`: the measurements of trainings too long for a page, with config,
seeds, versions, devices, dates, seconds and the command that makes it again. `sinkbook record NAME`
writes it, and nobody edits it. The page that shows it says so.
"""

import json
from pathlib import Path

import pandas as pd
import xarray as xr
from safetensors.torch import load_file

from sinkbook.arguments import check_kind, check_known, check_number
from sinkbook.book.records import changed_toys, long_levers, paper_scale
from sinkbook.errors import SinkbookError
from sinkbook.files import is_there, reading, write_netcdf
from sinkbook.provenance import of_trainings, repository
from sinkbook.toy.runs import Run
from sinkbook.toy.transformer import Transformer

EARLIER = (  # than those at the paper's scale, or of other models
    "one-layer-batch-128",
    "one-layer-batch-512",
    "league",
    "small-llama-levers",
    "small-llama",
    long_levers.NAME,
    "reemergence",
    "optimizers",
    "shakespeare",
    *changed_toys.GROUPS,
    "two-sinks",
    "stand-ins",
    "largest-magnitude",
    "families",
    "families-in-eight-bits",
)
NAMES = (*paper_scale.GROUPS, *EARLIER)  # in the order in which they are needed

# The records whose weights stand beside them, one seed of each training, for later questions.
WITH_WEIGHTS = ("one-layer", "three-layers")

FROM_A_CLONE = "Take it from a clone of the repository"
# What a user can do where a record cannot be written.
IN_ANOTHER_COPY = "run it in a copy of the repository that you can write to"

# Records are never edited: a variable that has another name today is renamed when it is read.
RENAMED = {
    "residual_peak": "residual_peak_height",
    "cut_residual_peak": "cut_residual_peak_height",
    "whole_residual_peak": "whole_residual_peak_height",
    "peak_height": "residual_peak_height",
    "peak_ratio": "residual_peak_ratio",
    "peak_ratio_at_loss": "residual_peak_ratio_at_loss",
    "residual_ratio": "residual_peak_ratio",
    "rival_ratio": "rival_peak_ratio",
    "value_ratio": "value_drain_ratio",
    "value_ratio_before_gate": "value_drain_ratio_before_gate",
    "sink_mass": "sink_attention",
    "sink_mass_triggers": "sink_attention_triggers",
    "sink_mass_at_loss": "sink_attention_at_loss",
    "first_mass": "attention_at_0",
    "batch_norm": "batch_gradient_norm",
}


def path_of(name: str) -> Path:
    """Where a record lies in the repository.

    Raises `SinkbookError` for an unknown name and outside of a copy of the repository.
    """
    check_known("record", name, NAMES)
    root = repository()
    if root is None:
        raise SinkbookError(
            "records lie in the book's repository, and this is none. Go to a clone of it."
        )
    return root / "book" / "records" / f"{name}.nc"


def weights_path(name: str) -> Path:
    """Where the weights of a record's first seed lie, in 16 bits."""
    return path_of(name).with_suffix(".safetensors")


def whole_file(name: str) -> xr.Dataset:
    """All that a record holds under today's names, unfinished trainings of it included.

    Raises `SinkbookError` if it has not been made, naming the command that makes it.
    """
    path = path_of(name)
    if not is_there(path):
        raise SinkbookError(f"the record {name!r} is not there. Make it: sinkbook record {name}")
    with reading(path, f"{FROM_A_CLONE}, or make it again: sinkbook record {name}", named=True):
        found = xr.load_dataset(path, engine="h5netcdf")
        check_facts(found.attrs)
        if name in paper_scale.GROUPS:
            paper_scale.finished(found)
        if name == long_levers.NAME:
            long_levers.trainings(found)
    return found.rename({old: new for old, new in RENAMED.items() if old in found})


def check_facts(attrs: dict) -> None:
    """Refuse attributes that do not say how, when and with what something was made."""
    check_number("seconds", float(attrs["seconds"]), 0)
    for fact in ("date", "device", "command"):
        check_kind(fact, attrs[fact], str)
    made_with = json.loads(attrs["versions"])
    check_kind("versions", made_with, dict)
    check_kind("the version of torch", made_with["torch"], str)


def write_packed(path: Path, record: xr.Dataset) -> None:
    """Write what a record holds to its file, its numbers packed."""
    numbers = [n for n, values in record.data_vars.items() if values.dtype.kind in "fiub"]
    packed = {n: {"zlib": True, "complevel": 9} for n in numbers if record[n].ndim}
    write_netcdf(path, record, encoding=packed, otherwise=IN_ANOTHER_COPY)


def load(name: str) -> xr.Dataset:
    """A record's measurements; `attrs` hold its provenance.

    Of a record that is being made, the trainings all of whose seeds are there.
    Raises `SinkbookError` if there are none, naming the command that makes the record.
    """
    record = whole_file(name)
    if name not in paper_scale.GROUPS:
        return record
    there = paper_scale.finished(record)
    done = [
        label
        for label, configs in paper_scale.GROUPS[name]().items()
        if all((label, config.seed) in there for config in configs)
    ]
    if not done:
        raise SinkbookError(
            f"no training of the record {name!r} is finished. Go on with: sinkbook record {name}"
        )
    return record.sel(training=done)


def is_finished(name: str) -> bool:
    """Whether a record is there with all of its trainings."""
    if not is_there(path_of(name)):
        return False
    count, wanted = _counts(name)
    return count == wanted


def about(name: str) -> str:
    """One line on a record: when and on what it was made, how long that took, what is missing."""
    if not is_there(path_of(name)):
        return f"{name}: not made yet"
    facts = whole_file(name).attrs
    count, wanted = _counts(name)
    time = f"{facts['seconds'] / 60:.0f} minutes"
    time = of_trainings(count, time) if "trainings" in facts else time
    line = f"{name}: made {facts['date'][:10]} in {time} on {facts['device']}"
    return line if count == wanted else f"{line}; of its {wanted} trainings {count} so far"


def _counts(name: str) -> tuple[int, int]:
    """How many trainings of a record are there, and how many should be."""
    if name == long_levers.NAME:
        there = set(long_levers.trainings(whole_file(name)))
        return len(there & set(long_levers.WANTED)), len(long_levers.WANTED)
    if name not in paper_scale.GROUPS:
        return 1, 1
    wanted = {
        (label, config.seed)
        for label, configs in paper_scale.GROUPS[name]().items()
        for config in configs
    }
    return len(wanted & set(paper_scale.finished(whole_file(name)))), len(wanted)


def run_of(name: str, training: str) -> Run:
    """The run of a record's first seed: its measurements, and its weights in 16 bits, widened.

    Raises `SinkbookError` if the record has no weights, or none of that training.
    """
    groups = paper_scale.GROUPS[name]() if name in WITH_WEIGHTS else {}
    if training not in groups or not is_there(weights_path(name)):
        raise SinkbookError(
            f"the record {name!r} has no weights of {training!r}. Known: "
            f"{', '.join(groups) or 'none'}. Make them: sinkbook record {name}"
        )
    config = groups[training][0]
    model = Transformer(config.model)
    with reading(weights_path(name), f"{FROM_A_CLONE}, or make it again: sinkbook record {name}"):
        kept = load_file(weights_path(name))
        model.load_state_dict(
            {
                key.removeprefix(f"{training}/"): tensor.float()
                for key, tensor in kept.items()
                if key.startswith(f"{training}/")
            }
        )
    measurements, facts = paper_scale.trainings(whole_file(name))[training, config.seed]
    return Run(config, model.eval().requires_grad_(False), measurements, facts)


def paper_one_layer() -> xr.Dataset:
    """The paper's own one-layer run along `step`: risks, sink attention, sink logit and norms.

    Read from the result files of the official code (Figure 4b of arXiv 2410.13835). Its sink
    attention counts position 0, and its bigram risk has the oracle's slip there.
    """
    return _table("paper-one-layer")


def paper_olmo() -> xr.Dataset:
    """The paper's OLMo-7B-0424 along `step`: layer 24, one prompt of eight tokens.

    Read off the figures of the official notebook (Figures 9 and 10 of arXiv 2410.13835); NaN where
    a figure shows no number. Its attention is that on whichever key gets most, and its sink logit
    counts masked keys.
    """
    return _table("paper-olmo-7b")


def _table(name: str) -> xr.Dataset:
    path = path_of("one-layer").parent / f"{name}.csv"
    with reading(path, f"{FROM_A_CLONE}."):
        return pd.read_csv(path, index_col="step").to_xarray()
