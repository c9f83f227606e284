"""Trainings at the paper's own width, length, optimizers and rates, by record: too long for a page.

What differs from the paper (arXiv 2410.13835) is the batch, a quarter or an eighth of its 512
texts, and the precision of the matrix products, bfloat16. Every group has three seeds from the
paper's 42 on, unless it says otherwise. Order is that of need: `sinkbook record --all` follows it.
"""

import itertools
import json
from collections.abc import Callable
from dataclasses import asdict, replace

import numpy as np
import xarray as xr

from sinkbook.book.experiments import bigram_backcopy, toy
from sinkbook.book.settings import Settings
from sinkbook.mitigations.registry import MITIGATIONS
from sinkbook.toy.measurements import attention_by_key, dormant_characters, sink_logit_spread
from sinkbook.toy.peak_tests import cuts, transplants
from sinkbook.toy.runs import Run, TrainingConfig, seeds_of
from sinkbook.toy.tasks import task

PAPER = Settings("paper")
Groups = dict[str, list[TrainingConfig]]


def _training(
    *,
    seeds: int = 3,
    layers: int = 1,
    task: dict | None = None,
    model: dict | None = None,
    **changes,
) -> list[TrainingConfig]:
    """Trainings at the paper's size; what is not changed is the paper's, but for the batch."""
    of_task = bigram_backcopy(PAPER, **task or {})
    made = {"batch_size": 64, "steps": 3_000, "precision": "bfloat16", "details": True} | changes
    model = toy(PAPER, of_task, layers=layers, **model or {})
    return seeds_of(TrainingConfig(task=of_task, model=model, **made), seeds)


def one_layer() -> Groups:
    """One layer of softmax attention under AdamW (Figures 2 to 4)."""
    return {"softmax": _training(batch_size=128, steps=10_000, measurements=80)}


def three_layers() -> Groups:
    """Three layers and the paper's two ways against extreme tokens (Figures 6 and 7)."""
    base = _training(layers=3, steps=10_000, measurements=80)
    names = {"AdamW": "softmax", "SGD": "sgd", "ReLU": "relu"}
    return {
        label: [MITIGATIONS[name].applied_to(config) for config in base]
        for label, name in names.items()
    }


def loop() -> Groups:
    """The loop of mutual reinforcement, whole and cut on either side, in one layer."""
    return {
        "both free": _training(),
        "value at ordinary length": _training(model={"first_value": "ordinary"}),
        "attention capped": _training(model={"attention": "capped-softmax"}),
    }


# What the layers of the paper's minimal structures lack.
STRUCTURES: dict[str, dict] = {
    "2 × TF": {"layers": 2},
    "2 × TF + MLP": {"layers": 3, "without_attention": (2,)},
    "MLP + TF + MLP": {"layers": 3, "without_attention": (0, 2)},
    "Attn + TF + MLP": {"layers": 3, "without_attention": (2,), "without_mlp": (0,)},
}


def structures() -> Groups:
    """The paper's minimal structures; three full layers are in `three_layers`."""
    return {
        name: _training(
            layers=lacks["layers"], model={k: v for k, v in lacks.items() if k != "layers"}
        )
        for name, lacks in STRUCTURES.items()
    }


def variations() -> Groups:
    """Languages that differ in one rule: no `<s>`, or triggers that only may copy."""
    found = {"no <s>": _training(task={"starts": 0})}
    for tenths in range(1, 11):
        p = tenths / 10
        found[f"copy probability {p}"] = _training(task={"copy_probability": p}, measurements=20)
    return found


def relu_seeds() -> Groups:
    """Seven more seeds of three layers of ReLU attention, after those of `three_layers`."""
    (first, *_) = three_layers()["ReLU"]
    return {"ReLU": seeds_of(replace(first, seed=first.seed + 3, steps=3_000, measurements=40), 7)}


def languages() -> Groups:
    """The other languages of chapter 06, and the norm behind its block, a rival of chapter 08.

    What has three layers is trained for the paper's 10,000 steps: it needs them. The control of the
    norm is AdamW in `three_layers`.
    """
    base = _training(layers=3, steps=10_000)
    return {
        "two starts": _training(task={"starts": 2}),
        "delimiters": _training(task={"delimiter_probability": 0.1}),
        "Bigram-backward": _training(task={"rule": "backward"}),
        "Markov": _training(task={"rule": "markov"}),
        "1 trigger": _training(task={"triggers": 1}),
        "8 triggers": _training(task={"triggers": 8}),
        "in-context": _training(task={"rule": "in-context"}, layers=3, steps=10_000),
        "post-norm": [MITIGATIONS["post-norm"].applied_to(config) for config in base],
    }


def one_layer_seeds() -> Groups:
    """Ten seeds of one layer of softmax attention: where does it look, besides `<s>`?"""
    return {"softmax": _training(seeds=10)}


def writers() -> Groups:
    """Three layers by width, length, rate and batch: with which does the writer of the peak go?"""
    found = {}
    for length, width in itertools.product((256, 64), (256, 128, 64)):
        for rate, batch in itertools.product((3e-4, 1e-3), (128, 32)):
            found[f"d = {width}, T = {length}, rate {rate:g}, batch {batch}"] = _training(
                seeds=2,
                layers=3,
                task={"length": length},
                model={"width": width},
                learning_rate=rate,
                batch_size=batch,
                measurements=20,
            )
    return found


def concentration() -> Groups:
    """One layer for as long as the paper's figure of its logits was trained (Theorem 2c)."""
    return {"softmax": _training(steps=100_000, measurements=60)}


GROUPS: dict[str, Callable[[], Groups]] = {
    "one-layer": one_layer,
    "three-layers": three_layers,
    "loop": loop,
    "structures": structures,
    "relu-seeds": relu_seeds,
    "variations": variations,
    "one-layer-seeds": one_layer_seeds,
    "writers": writers,
    "languages": languages,
    "concentration": concentration,
}


# The trainings whose peaks are cut and transplanted once they are finished.
WITH_PEAK_TESTS = {"three-layers": ("AdamW", "SGD", "ReLU"), "structures": ("2 × TF + MLP",)}
Trainings = dict[tuple[str, int], tuple[xr.Dataset, dict]]


def measured(name: str, label: str, run: Run) -> xr.Dataset:
    """What a record keeps of a run: its measurements, and of its end what the record is made for.

    Some have their peak cut and transplanted (`peak_tests`). `variations`, `languages` and
    `one-layer-seeds` have the attention by kind of key, as `key_...`, in the layer of the strongest
    sink, and the share of `dormant_characters` where the language has `<s>`. `concentration` has
    the `sink_logit_spread`.
    """
    found = [run.measurements]
    if label in WITH_PEAK_TESTS.get(name, ()):
        found += [cuts(run), transplants(run)]
    if name in ("variations", "one-layer-seeds", "languages"):
        strongest = run.measurements.sink_attention.isel(step=-1, head=0).argmax("layer").item()
        by_key = attention_by_key([run], layer=strongest).squeeze("seed", drop=True)
        found.append(by_key.rename({kept: f"key_{kept}" for kept in by_key.data_vars}))
        if run.task.start is not None:
            found.append(xr.Dataset({"dormant_characters": dormant_characters([run]).item()}))
    if name == "concentration":
        found.append(xr.Dataset({"sink_logit_spread": sink_logit_spread(run)}))
    return xr.merge(found, compat="no_conflicts", join="exact")


def together(groups: Groups, trainings: Trainings) -> xr.Dataset:
    """Finished trainings as one dataset along `training` and `seed`, NaN where one has no such.

    `facts` is JSON: the device, versions, date and seconds of each training. A training that is
    not finished has none.
    """
    of_labels = []
    for label, configs in groups.items():
        found = {c.seed: trainings[label, c.seed] for c in configs if (label, c.seed) in trainings}
        if not found:
            continue
        symbols = task(configs[0].task).symbols
        parts = [
            _with_places(of_seed, symbols).assign(facts=json.dumps(facts))
            for of_seed, facts in found.values()
        ]
        joined = xr.concat(parts, xr.Variable("seed", list(found)), join="outer")
        of_labels.append(joined.expand_dims(training=[label]))
    record = xr.concat(of_labels, "training", join="outer", fill_value={"facts": ""})
    kept = [facts for _, facts in trainings.values()]
    return record.assign_attrs(
        config=json.dumps({label: asdict(configs[0]) for label, configs in groups.items()}),
        versions=json.dumps(kept[0]["versions"]),
        device=", ".join(dict.fromkeys(facts["device"] for facts in kept)),
        date=max(facts["date"] for facts in kept),
        seconds=round(sum(facts["seconds"] for facts in kept)),
        trainings=len(kept),
    )


def _with_places(measurements: xr.Dataset, symbols: list[str]) -> xr.Dataset:
    places = {
        dim: np.arange(measurements.sizes[dim])
        for dim in ("layer", "residual_layer")
        if dim not in measurements.coords
    }
    if "token" not in measurements.coords:
        places["token"] = symbols
    return measurements.assign_coords(places)


def finished(record: xr.Dataset) -> dict[tuple[str, int], dict]:
    """The facts of a record's finished trainings, by their label and seed."""
    places = itertools.product(record.training.values.tolist(), record.seed.values.tolist())
    facts = zip(places, record.facts.values.ravel().tolist(), strict=True)
    return {place: json.loads(of_training) for place, of_training in facts if of_training}


def trainings(record: xr.Dataset) -> Trainings:
    """The finished trainings of a record, by their label and seed: measurements and facts."""
    found = {}
    for (label, seed), facts in finished(record).items():
        one = record.sel(training=label, seed=seed)
        one = one.isel(step=np.isfinite(one.backcopy_risk.values))
        found[label, seed] = one.drop_vars(["facts", "training", "seed"]), facts
    return found
