"""Sweeps over checkpoints from the command line: which steps and texts, on which cluster, as what.

The measuring itself is `checkpoints.measure_checkpoints`.
"""

from collections.abc import Sequence
from pathlib import Path

import xarray as xr
from rich.table import Table

from sinkbook import files
from sinkbook.data import corpora
from sinkbook.errors import SinkbookError
from sinkbook.llm import checkpoint_metrics, checkpoints
from sinkbook.models import token_windows
from sinkbook.parallel import cluster

CHARACTERS_PER_TOKEN = 8  # more than a word piece has on average, so that texts are long enough


def parse_steps(steps: str) -> list[int]:
    """`0,1000,10_000` as numbers. Raises `SinkbookError` for anything else."""
    try:
        return [int(step) for step in steps.split(",")]
    except ValueError as error:
        raise SinkbookError(
            f"--steps {steps!r} is no list of steps. Write it as --steps 0,1000,10000"
        ) from error


def choose_texts(file: Path | None, domain: str, *, count: int, length: int) -> list[str]:
    """The first texts of a domain, or of a file with a text on every line.

    Raises `SinkbookError` for a file that cannot be read and a domain with too few long texts.
    """
    if file is None:
        return corpora.texts(domain, count, minimum_characters=CHARACTERS_PER_TOKEN * length)
    lines = [line.strip() for line in token_windows.read_document(file).splitlines()]
    return [line for line in lines if line][:count]


def sweep(
    model: str,
    *,
    steps: Sequence[int] | None,
    texts: Sequence[str],
    length: int,
    free: bool = False,
    dask: str | None = None,
) -> xr.Dataset:
    """`checkpoints.measure_checkpoints`, here or on the Dask cluster at an address."""
    options = {"length": length, "free": free}
    if dask is None:
        return checkpoints.measure_checkpoints(model, steps, texts, **options)
    with cluster(dask) as executor:
        return checkpoints.measure_checkpoints(model, steps, texts, executor=executor, **options)


def listing(model: str) -> Table:
    """The revisions of a hub model that name a step."""
    rows = Table("revision", "step", "tokens", title=model)
    for revision in checkpoints.revisions_of(model):
        tokens = "" if revision.tokens is None else f"{revision.tokens:.3g}"
        rows.add_row(revision.name, f"{revision.step:,}", tokens)
    return rows


def table(dataset: xr.Dataset) -> Table:
    """A row for each checkpoint: means over texts, the extremes over heads and layers."""
    rows = Table(
        *("step", "tokens", "sink attention", "heads > 0.3", "sink logit"),
        *("value ratio", "residual ratio", "loss"),
        title=dataset.attrs["model"],
        caption="sink attention, sink logit: means over heads; value ratio: median over heads; "
        "residual ratio: largest over layers",
    )
    for index in range(dataset.sizes["revision"]):
        one = dataset.isel(revision=index)
        attention = one.sink_attention.mean("text")
        unknown = bool(one.step.isnull())
        rows.add_row(
            str(one.revision.item()) if unknown else f"{int(one.step):,}",
            "" if one.tokens.isnull() else f"{one.tokens.item():.3g}",
            f"{attention.mean().item():.2f}",
            f"{(attention > 0.3).where(attention.notnull()).mean().item():.0%}",
            f"{one.sink_logit.mean().item():.2f}",
            f"{checkpoint_metrics.value_ratio(one).mean('text').median().item():.2f}",
            f"{checkpoint_metrics.residual_ratio(one).mean('text').max().item():.1f}",
            f"{one.loss.mean().item():.2f}",
        )
    return rows


def check_file(path: Path, *, force: bool) -> None:
    """Refuse to overwrite a file that was not asked to be replaced."""
    if path.exists() and not force:
        raise SinkbookError(f"{path} is there already. Name another file, or add --force.")


def write(dataset: xr.Dataset, path: Path) -> None:
    """Write the dataset as NetCDF, in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write(path, lambda part: dataset.to_netcdf(part, engine="h5netcdf"))
