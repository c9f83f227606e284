"""The record of largest magnitudes: what toys' layers read, and what eight bits lose of it.

arXiv 2605.15572 has the largest magnitude of a language model predict its error in int8. The toys
are those of the league, three layers deep, so that they differ in attention, norm and optimizer.
"""

from dataclasses import asdict

import xarray as xr
from scipy.stats import spearmanr

from sinkbook.book.experiments import league_base, train_groups
from sinkbook.book.settings import Settings
from sinkbook.mitigations.quantization import largest_and_error
from sinkbook.mitigations.registry import under_mitigations
from sinkbook.provenance import of_record, provenance

METHODS = ("softmax", "qk-norm", "relu", "value-gate", "post-norm")


def record(seeds: int = 3, methods: tuple[str, ...] = METHODS) -> xr.Dataset:
    """What `largest_and_error` finds in toys of the league, over (training, seed, ranges, layer).

    The largest magnitude is that of all texts, the other variables are means over them.
    """
    base = league_base(Settings("quick"), layers=3)
    every = under_mitigations(base, seeds)
    groups = {name: every[name] for name in methods}
    runs = train_groups(groups)
    found = [
        xr.concat([largest_and_error(run.model, run.evaluation_tokens) for run in group], "seed")
        for group in runs.values()
    ]
    together = xr.concat(found, "training")
    trained = [run for group in runs.values() for run in group]
    config = {"base": asdict(base), "methods": list(methods)}
    numbers = [run.config.seed for run in runs[methods[0]]]
    return together.assign_coords(training=list(methods), seed=numbers).assign_attrs(
        of_record(config, provenance(), sum(run.seconds for run in trained)),
        trainings=len(trained),
    )


def one_number_each(toys: xr.Dataset, others: dict[str, list[xr.Dataset]]) -> xr.Dataset:
    """A number for every model, over (model, seed, and for the error ranges).

    `toys` is the record; `others` are models with what `largest_and_error` found, by seed. The
    largest magnitude and the outlier are maxima over layers, the error is the mean.
    """
    found = [_over_layers(toys).rename(training="model").drop_vars("seed")]
    found += [
        xr.concat([_over_layers(each) for each in parts], "seed").expand_dims(model=[name])
        for name, parts in others.items()
    ]
    together = xr.concat(found, "model")
    return together.assign_coords(seed=range(together.sizes["seed"]))


def _over_layers(found: xr.Dataset) -> xr.Dataset:
    highest = found[["largest", "outlier"]].max("layer")
    return highest.assign(error=found.error.mean("layer"))


def rank_correlation(x: xr.DataArray, y: xr.DataArray) -> list[float]:
    """Spearman's correlation over `model`, one number a seed."""
    return [float(spearmanr(x.sel(seed=s), y.sel(seed=s)).statistic) for s in x.seed]
