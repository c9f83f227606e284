"""What optimizers do on the way: the steps that they take, and where equal losses find them."""

from dataclasses import replace

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float64, Num

from sinkbook.annotations import check_arguments
from sinkbook.arguments import check_known, check_layers
from sinkbook.fits import log_slope
from sinkbook.toy.runs import Run, TrainingConfig, together
from sinkbook.toy.training import train
from sinkbook.toy.transformer import Transformer


@check_arguments
def step_norms(config: TrainingConfig, measurements: int = 24, many: int = 256) -> xr.Dataset:
    """Every parameter's gradient and step, measured on a logarithmic schedule of a training.

    The result has three Frobenius norms over (step, parameter): `gradient_norm` of the gradient on
    `many` texts that are not trained on, `batch_gradient_norm` of that on the batch, most of which
    may be noise, and `update_norm` of the change that the optimizer makes. Steps count from 1. The
    weights are those of the config's own run.
    """
    detailed = replace(config, details=True, measurements=measurements, evaluation_size=many)
    return norms_of_steps(train(detailed).measurements)


@check_arguments
def norms_of_steps(measurements: xr.Dataset) -> xr.Dataset:
    """The three norms of `step_norms` from a training with `details`, or from a record of some.

    What is measured after so many steps is the step that follows; none follows the last.
    """
    norms = measurements[["gradient_norm", "batch_gradient_norm", "update_norm"]]
    taken = norms.isel(step=slice(None, -1))
    return taken.assign_coords(step=taken.step + 1)


@check_arguments
def exponents(norms: xr.Dataset) -> xr.Dataset:
    """The powers of the number of steps as which norms of `step_norms` grow: negative if they fade.

    Fitted to their logarithms, over the second half of the logarithmic axis of steps.
    """
    late = norms.sel(step=norms.step >= norms.step[-1] ** 0.5)
    step = late.step.values.astype(float)
    return np.log(late.astype(float)).reduce(
        lambda logs, axis: log_slope(step, np.moveaxis(logs, axis, 0)), dim="step"
    )


@check_arguments
def distance_moved(run: Run, layer: int) -> float:
    """How far a layer's attention has moved in training: norm of its weights minus their start."""
    check_layers("layer", (layer,), run.config.model.layers)
    torch.manual_seed(run.config.seed)
    start = Transformer(run.config.model).layers[layer].attention.state_dict()
    end = run.model.layers[layer].attention.state_dict()
    return sum((end[name] - start[name]).square().sum().item() for name in end) ** 0.5


@check_arguments
def at_loss(run: Run, variable: str, loss: float) -> Float64[np.ndarray, "*rest"]:
    """A measurement of a run at the moment when its excess risk first falls to `loss`, in nats.

    The excess risk is the mean over all positions; between measurements it is interpolated. NaN if
    the run never gets there.
    """
    check_known("variable", variable, run.measurements.variables)
    return _first_below(excess_risk(run), run.measurements[variable].values, loss)


def _first_below(
    risks: Float64[np.ndarray, " step"], values: Num[np.ndarray, "step *rest"], loss: float
) -> Float64[np.ndarray, "*rest"]:
    below = np.flatnonzero(risks <= loss)
    if not len(below) or below[0] == 0:
        return np.full(values.shape[1:], np.nan)
    i = below[0]
    share = np.log(risks[i - 1] / loss) / np.log(risks[i - 1] / risks[i])
    return np.asarray(values[i - 1] + share * (values[i] - values[i - 1]))


@check_arguments
def excess_risk(run: Run) -> Float64[np.ndarray, " step"]:
    """The mean excess risk over all positions, in nats, at each measured step."""
    share = run.task.at_triggers(run.evaluation_tokens).float().mean().item()
    found = run.measurements
    return (share * found.backcopy_excess + (1 - share) * found.bigram_excess).values


# What an `optimizer_table` takes from the measurements of its runs.
MEASURED = [
    "residual_peak_height",
    "residual_norm",
    "other_residual_norm",
    "value_norm",
    "other_value_norm",
    "sink_attention",
]


@check_arguments
def optimizer_table(runs: dict[str, list[Run]]) -> xr.Dataset:
    """Trainings that differ in their optimizer, by its name, along `optimizer` and `seed`.

    Along `step` as well, `excess_risk` in nats, the norms and the peak of residual states, with
    `residual_layer`, and those of value states and the sink attention, with `layer`.
    `distance_moved` is that of the first layer's attention.
    """
    found = []
    for of_optimizer in runs.values():
        measured = together(of_optimizer)[MEASURED].isel(head=0)
        risks = [excess_risk(run) for run in of_optimizer]
        moved = [distance_moved(run, layer=0) for run in of_optimizer]
        more = {"excess_risk": (("seed", "step"), risks), "distance_moved": ("seed", moved)}
        found.append(measured.assign(more).transpose("seed", "step", ...))
    return xr.concat(found, dim=xr.Variable("optimizer", list(runs)), join="exact")
