"""The league table: what every mitigation does to sinks, drains and peaks, and what it costs.

`standing` measures one finished training in all the ways that the field uses, `table` puts the
trainings of all mitigations together, `ranking` makes of it what a reader looks at.
"""

from contextlib import ExitStack

import numpy as np
import pandas as pd
import torch
import xarray as xr
from jaxtyping import Float, Int
from scipy.stats import spearmanr
from torch import Tensor

from sinkbook import probe
from sinkbook.annotations import check_arguments
from sinkbook.arguments import check_token_ids
from sinkbook.mitigations.quantization import int8_error
from sinkbook.mitigations.registry import FAMILIES, MITIGATIONS
from sinkbook.models.layout import blocks
from sinkbook.models.partial_forward import residual_states
from sinkbook.probe.attention_maps import attention_weights
from sinkbook.probe.measure import measure
from sinkbook.toy.measurements import measure_without
from sinkbook.toy.optimizer_dynamics import at_loss, excess_risk
from sinkbook.toy.runs import Run
from sinkbook.toy.tasks import Task
from sinkbook.toy.transformer import Transformer

# What `standing` measures: unit, and what it is. Over `layer` or `residual_layer`, or one number.
COLUMNS = {
    "sink_attention": ("1", "mean attention on <s>, from tokens that are no triggers"),
    "sink_share": ("1", "the same, in shares of all attention that these tokens give"),
    "row_sum": ("1", "mean sum of their attention"),
    "sink_attention_triggers": ("1", "mean attention on <s> from triggers"),
    "attention_at_0": ("1", "mean attention on position 0, whatever stands there"),
    "value_drain_ratio": ("1", "value norm of <s> over the mean of the others, after a gate"),
    "value_drain_ratio_before_gate": (
        "1",
        "value norm of <s> over the mean of the others, as W_V has it",
    ),
    "silence": ("1", "head output norm at tokens that are no triggers over that at triggers"),
    "residual_peak_ratio": ("1", "residual norm of <s> over the median of the others"),
    "residual_peak_height": ("1", "residual norm of <s> minus the mean of the others"),
    "kurtosis_text": ("1", "kurtosis of all entries of a text; 3 if Gaussian"),
    "kurtosis_sink": ("1", "kurtosis over the dimensions of <s>; 3 if Gaussian"),
    "kurtosis_others": ("1", "the same, median over the other tokens"),
    "kurtosis_dimensions": ("1", "fourth over squared second moment of the dimensions; 1 if alike"),
    "int8_error": ("1", "relative error of the residual states in per-tensor int8, without <s>"),
    "backcopy_excess": ("nat", "final excess backcopy risk"),
    "bigram_excess": ("nat", "final excess bigram risk"),
    "parameters": ("1", "number of weights"),
    "seconds_per_step": ("s", "wall time of a training step, measurements included"),
}
# The same at the loss that all trainings reach.
AT_LOSS = {
    "steps_to_loss": ("1", "steps to the common loss"),
    "seconds_to_loss": ("s", "seconds to the common loss"),
    "sink_attention_at_loss": (
        "1",
        "mean attention on <s> there, from tokens that are no triggers",
    ),
    "residual_peak_ratio_at_loss": (
        "1",
        "residual norm of <s> there over the median of the others",
    ),
}


@check_arguments
def start_position(task: Task) -> int:
    """Where `<s>` stands, or would: 1 behind a random first character, else 0."""
    return int(task.config.random_first)


@check_arguments
@torch.no_grad()
def standing(run: Run) -> xr.Dataset:
    """One training in all `COLUMNS`, on its evaluation texts.

    Attention columns have the dimension `layer` and are means over heads, those of the residual
    state `residual_layer`, 0 for the embedding. The sink token is `<s>`, or position 0 in a task
    without one.
    """
    model, made, tokens = run.model, run.task, run.evaluation_tokens
    sink = start_position(made)
    triggers = made.at_triggers(tokens)
    later = torch.arange(tokens.shape[1]) > sink
    ordinary = later & ~triggers
    attention = ("sink_attention", "sink_share", "attention_row_sum", "head_output_norm")
    everything = (*attention, "value_norm", "residual_norm")
    of_ordinary = measure(model, tokens, everything, queries=ordinary, sink=sink)
    of_triggers = measure(model, tokens, attention, queries=triggers & later, sink=sink)
    on_first = measure(model, tokens, ("sink_attention",), queries=ordinary, sink=0)

    compared = xr.DataArray(ordinary.numpy(), dims=("batch", "position"))
    before_gate = of_ordinary.assign(value_norm=value_norms_before_gate(model, tokens))
    heads = {
        "sink_attention": of_ordinary.sink_attention,
        "sink_share": of_ordinary.sink_share,
        "row_sum": of_ordinary.attention_row_sum,
        "sink_attention_triggers": of_triggers.sink_attention,
        "attention_at_0": on_first.sink_attention,
        "value_drain_ratio": probe.value_drain_ratio(of_ordinary, compared),
        "value_drain_ratio_before_gate": probe.value_drain_ratio(before_gate, compared),
    }
    found = {name: values.mean(("batch", "head")) for name, values in heads.items()}
    silent, loud = (m.head_output_norm.mean(("batch", "head")) for m in (of_ordinary, of_triggers))
    found["silence"] = silent / loud
    others = xr.DataArray((torch.arange(tokens.shape[1]) != sink).numpy(), dims="position")
    found["residual_peak_ratio"] = probe.residual_peak_ratio(of_ordinary, others).mean("batch")
    found["residual_peak_height"] = probe.residual_peak_height(of_ordinary, others).mean("batch")
    with residual_states(model) as kept:
        risks = made.risks(model(tokens), tokens)
    states = torch.stack(kept)
    of_tokens = probe.kurtosis_of_tokens(states)
    apart = torch.ones(tokens.shape[1], dtype=torch.bool)
    apart[sink] = False
    residual = {
        "kurtosis_text": probe.kurtosis_of_text(states).mean(1),
        "kurtosis_sink": of_tokens[..., sink].mean(1),
        "kurtosis_others": of_tokens[..., apart].flatten(1).median(1).values,
        "kurtosis_dimensions": probe.kurtosis_of_dimensions(states).mean(1),
        "int8_error": int8_error(states, first=sink + 1).mean(1),
    }
    found |= {name: ("residual_layer", values.numpy()) for name, values in residual.items()}
    found |= {
        "backcopy_excess": risks.backcopy_excess.item(),
        "bigram_excess": risks.bigram_excess.item(),
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "seconds_per_step": run.seconds / run.config.steps,
    }
    return xr.Dataset({name: found[name] for name in COLUMNS}).drop_vars("sink", errors="ignore")


@check_arguments
@torch.no_grad()
def value_norms_before_gate(
    model: Transformer, tokens: Int[Tensor, "text position"]
) -> Float[xr.DataArray, "batch layer head position"]:
    """Norms of the value states as heads would write them if a value gate were open.

    Without a value gate they are the probe's `value_norm`.
    """
    check_token_ids("tokens", tokens)
    norms = []

    def keep(attention, values: Tensor) -> None:
        heads = (attention.heads, attention.head_dim)
        written = torch.einsum(
            "bthd,whd->bhtw", values.unflatten(-1, heads), attention.wo.weight.unflatten(-1, heads)
        )
        norms.append(written.norm(dim=-1))

    with ExitStack() as hooks:
        for block in blocks(model):
            attention = block.attention
            hook = attention.wv.register_forward_hook(
                lambda _m, _i, values, attention=attention: keep(attention, values)
            )
            hooks.callback(hook.remove)
        model(tokens)
    return xr.DataArray(torch.stack(norms, 1).numpy(), dims=("batch", "layer", "head", "position"))


@check_arguments
def table(runs: dict[str, list[Run]]) -> xr.Dataset:
    """The standings of all mitigations over (mitigation, seed), and where they are equally good.

    `loss` is the excess risk that the slowest of all trainings ends with; the `AT_LOSS` columns say
    when the others got there, and how strong sinks and peaks were by then. Seeds are paired: runs
    of one seed share their batches and the first values of the weights that they have in common.
    """
    rows = []
    loss = max(excess_risk(run)[-1] for of_name in runs.values() for run in of_name)
    for of_name in runs.values():
        seeds = [standing(run).merge(_at_loss(run, loss)) for run in of_name]
        rows.append(xr.concat(seeds, dim=xr.Variable("seed", [r.config.seed for r in of_name])))
    result = xr.concat(rows, dim=xr.Variable("mitigation", list(runs)))
    result["loss"] = loss
    for name, (units, long_name) in (COLUMNS | AT_LOSS).items():
        result[name].attrs = {"units": units, "long_name": long_name}
    known = [MITIGATIONS[name] for name in runs]
    for coordinate in ("label", "family", "source"):
        result[coordinate] = ("mitigation", [getattr(m, coordinate) for m in known])
    return result.set_coords(["label", "family", "source"])


def _at_loss(run: Run, loss: float) -> xr.Dataset:
    """The `AT_LOSS` columns of one training."""
    steps = at_loss(run, "step", loss)
    sink = at_loss(run, "sink_attention", loss).mean(-1)
    norms = [at_loss(run, f"{of}residual_norm", loss) for of in ("", "other_")]
    if start_position(run.task) != 0:  # trainings are measured at position 0
        sink, norms = np.full_like(sink, np.nan), (np.nan, norms[1])
    return xr.Dataset(
        {
            "steps_to_loss": steps,
            "seconds_to_loss": steps * run.seconds / run.config.steps,
            "sink_attention_at_loss": ("layer", sink),
            "residual_peak_ratio_at_loss": ("residual_layer", norms[0] / norms[1]),
        }
    )


@check_arguments
def peak_writers(runs: list[Run]) -> xr.Dataset:
    """The highest peak of every run, and what is left of it without what writes below it at `<s>`.

    The attention or the MLP is cut in the layer after which the height of the peak is largest, at
    `<s>` alone. Over seed: that `layer`; over (seed, cut), the cuts "none", "attention" and "mlp",
    the `height` of the peak after it and the backcopy excess `risk`. `self_attention` is the weight
    that `<s>` gives to itself there.
    """
    found = []
    for run in runs:
        heights = run.measurements.residual_peak_height.isel(step=-1).values
        layer = int(heights[1:].argmax())
        weights = attention_weights(run.model, run.evaluation_tokens[:1], layer=layer)
        cuts = {"none": (), "attention": ("attention",), "mlp": ("mlp",)}
        measured = [
            measure_without([run], *parts, layer=layer, position=0).isel(seed=0)
            for parts in cuts.values()
        ]
        dataset = xr.Dataset(
            {
                "layer": layer,
                "self_attention": weights[0, :, 0, 0].mean().item(),
                "height": ("cut", [m.residual_peak_height.values[layer + 1] for m in measured]),
                "risk": ("cut", [m.backcopy_excess.item() for m in measured]),
            },
            coords={"cut": list(cuts)},
        )
        found.append(dataset)
    return xr.concat(found, dim=xr.Variable("seed", [run.config.seed for run in runs]))


def registry() -> pd.DataFrame:
    """All mitigations with their family and source, as a table to read."""
    known = MITIGATIONS.values()
    columns = {name: [getattr(m, name) for m in known] for name in ("family", "source")}
    return pd.DataFrame(columns, index=pd.Index([m.label for m in known], name="mitigation"))


DESTINATIONS = ("<s>", "other tokens", "null slot")


@check_arguments
def destinations(runs: dict[str, dict[str, list[Run]]]) -> xr.DataArray:
    """Where one-layer runs look from tokens that are no triggers, by control and mitigation.

    Over (control, mitigation, seed, destination), the `DESTINATIONS`, which add up to 1; NaN for
    pairs that there are not. In a task without `<s>` nothing goes to it.
    """
    names = list(dict.fromkeys(name for inner in runs.values() for name in inner))
    longest = max(len(group) for inner in runs.values() for group in inner.values())
    shares = np.full((len(runs), len(names), longest, len(DESTINATIONS)), np.nan)
    for row, inner in enumerate(runs.values()):
        for name, group in inner.items():
            for seed, run in enumerate(group):
                found = standing(run).isel(layer=0)
                on_start = 0.0 if run.task.start is None else found.sink_attention.item()
                in_all = found.row_sum.item()
                shares[row, names.index(name), seed] = on_start, in_all - on_start, 1 - in_all
    coords = {"control": list(runs), "mitigation": names, "destination": list(DESTINATIONS)}
    labels = [MITIGATIONS[name].label for name in names]
    found = xr.DataArray(shares, coords, ("control", "mitigation", "seed", "destination"))
    return found.assign_coords(label=("mitigation", labels))


@check_arguments
def families(standings: xr.Dataset) -> pd.DataFrame:
    """The criteria of `ranking` by family: each training over softmax with its seed, the median.

    1 is as softmax; "controls" other than softmax are left out.
    """
    relative = {}
    for column, (label, _) in CRITERIA.items():
        values = worst_layer(standings, column)
        relative[label] = values / values.sel(mitigation="softmax", drop=True)
    frame = xr.Dataset(relative).to_dataframe().reset_index()
    frame = frame[frame.family != "control"]
    medians = frame.groupby("family", sort=False)[list(relative)].median()
    return medians.loc[[family for family in FAMILIES if family in medians.index]]


@check_arguments
def depths(standings: dict[int, xr.Dataset]) -> xr.Dataset:
    """Tables of several depths as one, over `depth`; NaN for layers that the shallow ones lack."""
    dim = xr.Variable("depth", list(standings))
    return xr.concat(list(standings.values()), dim=dim, join="outer", coords="minimal")


@check_arguments
def rows(standings: xr.Dataset) -> pd.DataFrame:
    """All numbers of `depths` flat: a row for each training, a column for each layer of a quantity.

    `sink_attention.2` is that of layer 2, `residual_peak_ratio.0` that of the embedding.
    """
    columns = {}
    for name, values in standings.data_vars.items():
        layers = next((dim for dim in values.dims if "layer" in dim), None)
        parts = (
            {name: values}
            if layers is None
            else {
                f"{name}.{number}": values.sel({layers: number}) for number in values[layers].values
            }
        )
        columns |= {part: v.drop_vars([layers], errors="ignore") for part, v in parts.items()}
    return xr.Dataset(columns).to_dataframe().dropna(how="all").reset_index()


# What the table is ranked by: a column, how its layers become one number, and what is good.
CRITERIA = {
    "sink_attention": ("strongest sink", "max"),
    "value_drain_ratio": ("deepest drain", "min"),
    "residual_peak_ratio": ("highest peak", "max"),
    "kurtosis_text": ("largest kurtosis", "max"),
    "int8_error": ("largest int8 error", "max"),
    "steps_to_loss": ("steps to the common loss", ""),
}


@check_arguments
def worst_layer(standings: xr.Dataset, column: str) -> Float[xr.DataArray, "mitigation seed"]:
    """A column of the table as one number for each training: that of its worst layer.

    Attention counts by its magnitude: that of differential attention may be negative.
    """
    how = CRITERIA[column][1]
    values = abs(standings[column])
    return getattr(values, how)([d for d in values.dims if "layer" in d]) if how else values


@check_arguments
def criteria(standings: xr.Dataset) -> xr.Dataset:
    """The `CRITERIA` of each training, one number each: those of its `worst_layer`."""
    return xr.Dataset(
        {
            column: worst_layer(standings, column).assign_attrs(long_name=label)
            for column, (label, _) in CRITERIA.items()
        }
    )


@check_arguments
def agreement(standings: xr.Dataset, others: xr.Dataset) -> pd.Series:
    """How alike two tables order the mitigations: Spearman's rank correlation by criterion.

    Of means over seeds, in the worst layer of each training, of the mitigations in both.
    """
    common = [name for name in standings.mitigation.values if name in others.mitigation]
    found = {}
    for column, (label, _) in CRITERIA.items():
        means = [worst_layer(of, column).mean("seed") for of in (standings, others)]
        found[label] = spearmanr(*(mean.sel(mitigation=common) for mean in means)).statistic
    return pd.Series(found, name="rank correlation")


@check_arguments
def ranking(standings: xr.Dataset) -> pd.DataFrame:
    """The league table: a row for each mitigation, the best mean rank over `CRITERIA` first.

    Columns are means over seeds, in the worst layer of each training. A shallow drain is better
    than a deep one.
    """
    rows = pd.DataFrame(
        {
            label: worst_layer(standings, column).mean("seed").values
            for column, (label, _) in CRITERIA.items()
        },
        index=pd.Index(standings.label.values, name="mitigation"),
    )
    rising = {label: how != "min" for label, how in CRITERIA.values()}
    ranks = [rows[label].rank(ascending=up) for label, up in rising.items()]
    rows.insert(0, "mean rank", np.mean(ranks, axis=0))
    rows.insert(0, "family", standings.family.values)
    rows["excess backcopy risk"] = standings.backcopy_excess.mean("seed").values
    rows["excess bigram risk"] = standings.bigram_excess.mean("seed").values
    return rows.sort_values("mean rank", kind="stable")
