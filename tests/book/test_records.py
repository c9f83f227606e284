"""Records say where they come from, and making one again is one command."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

from sinkbook.book import experiments, records
from sinkbook.book.records import (
    changed_toys,
    kept,
    largest_magnitude,
    long_levers,
    makers,
    paper_scale,
    spot_checks,
)
from sinkbook.book.settings import Settings
from sinkbook.errors import SinkbookError
from sinkbook.files import cache_folder
from sinkbook.mitigations import registry
from sinkbook.mitigations.registry import MITIGATIONS
from sinkbook.toy import optimizers, training
from sinkbook.toy.runs import TrainingConfig
from sinkbook.toy.tasks import TaskConfig
from sinkbook.toy.training import TimeIsUpError
from sinkbook.toy.transformer import TransformerConfig

NAMES = ("softmax", "relu", "key-bias")


def there() -> list[str]:
    return [name for name in records.NAMES if records.path_of(name).exists()]


@pytest.mark.parametrize("name", there())
def test_a_record_tells_its_provenance(name):
    record = kept.whole_file(name)
    assert record.attrs["command"] == f"sinkbook record {record.attrs['record']}"
    assert record.attrs["record"] == name
    assert json.loads(record.attrs["config"]) and json.loads(record.attrs["versions"])
    assert record.attrs["seconds"] > 0 and record.attrs["device"] and record.attrs["date"]
    assert record.attrs["date"][:10] in records.about(name)
    numbers = [v for v in record.data_vars.values() if v.dtype.kind == "f"]
    assert any(np.isfinite(values).any() for values in numbers)


@pytest.mark.parametrize("name", [name for name in there() if name in paper_scale.GROUPS])
def test_a_record_holds_the_trainings_that_its_config_describes(name):
    """A change of `paper_scale` without a new record is found."""
    configs = json.loads(kept.whole_file(name).attrs["config"])
    groups = paper_scale.GROUPS[name]()
    # A field that has come since is taken at its default: as it was, or spot checks part.
    assert {label: as_recorded(of_first) for label, of_first in configs.items()} == {
        label: group[0] for label, group in groups.items()
    }


def as_recorded(kept: dict) -> TrainingConfig:
    """The config that a record keeps as JSON."""
    of_model = {n: tuple(v) if isinstance(v, list) else v for n, v in kept["model"].items()}
    return TrainingConfig(
        **kept | {"task": TaskConfig(**kept["task"]), "model": TransformerConfig(**of_model)}
    )


def test_the_records_that_can_be_made_are_the_records_that_are_named():
    assert [*paper_scale.GROUPS, *makers.MAKERS] == list(records.NAMES)


def test_unknown_and_missing_records_say_what_to_do(elsewhere):
    with pytest.raises(SinkbookError, match="no record named 'lague'. Known: .*league"):
        records.load("lague")
    with pytest.raises(SinkbookError, match="sinkbook record league"):
        records.load("league")
    assert records.about("league") == "league: not made yet"
    with pytest.raises(SinkbookError, match="no weights of 'AdamW'.*sinkbook record three-layers"):
        records.run_of("three-layers", "AdamW")


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """Runs and records go to a folder of the test, which is a repository for the time."""
    (tmp_path / "book").mkdir()
    monkeypatch.setenv("SINKBOOK_RUNS", str(tmp_path / "runs"))
    monkeypatch.setattr(kept, "repository", lambda: tmp_path)
    # Trained in this process, where the patches are; others would import torch for a few steps.
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    return tmp_path


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Callable[[str, Path], None]:
    """Makes a small record in a test's folder: once, and copies it with its runs from then on."""
    whole = tmp_path_factory.mktemp("made")

    def make(name: str, folder: Path) -> None:
        if (whole / name).exists():
            shutil.copytree(whole / name, folder, dirs_exist_ok=True)
        else:
            makers.make(name)
            shutil.copytree(folder, whole / name)

    return make


@pytest.fixture
def small(elsewhere, monkeypatch):
    """The records at the paper's scale, of trainings so small that they take no time."""

    def smaller(groups):
        return lambda: {
            label: [
                replace(
                    config,
                    task=replace(config.task, length=16),
                    model=replace(config.model, width=8, length=16),
                    steps=6,
                    batch_size=2,
                    evaluation_size=2,
                    measurements=4,
                    learning_rate=0.03,
                )
                for config in configs[:2]
            ]
            for label, configs in groups().items()
        }

    groups = {name: smaller(of_name) for name, of_name in paper_scale.GROUPS.items()}
    for name, of_name in groups.items():
        monkeypatch.setitem(paper_scale.GROUPS, name, of_name)
    monkeypatch.setattr(paper_scale, "cuts", lambda run: xr.Dataset())
    monkeypatch.setattr(paper_scale, "transplants", lambda run: xr.Dataset())
    return elsewhere


def test_a_record_interrupted_goes_on_where_it_stopped_even_on_another_machine(small, monkeypatch):
    trained = []

    def some(configs, **_):
        for config in configs[: 2 if not trained else None]:
            trained.append(config)
            training.train(config)
        if len(trained) < 6:
            raise TimeIsUpError("the time is up")

    monkeypatch.setattr(makers, "train_all", some)
    said = "of its 6 trainings 2 so far. Go on with: sinkbook record three-layers"
    with pytest.raises(TimeIsUpError, match=said):
        makers.make("three-layers")
    assert "of its 6 trainings 2 so far" in records.about("three-layers")
    assert records.load("three-layers").training.values.tolist() == ["AdamW"]
    for run in (small / "runs").iterdir():  # the other machine has none of them
        run.rename(small / f"gone-{run.name}")
    makers.make("three-layers")
    assert len(trained) == len(set(trained)) == 6
    record = records.load("three-layers")
    assert record.training.values.tolist() == ["AdamW", "SGD", "ReLU"]
    assert np.isfinite(record.backcopy_risk).all() and record.sizes["seed"] == 2
    assert "so far" not in records.about("three-layers")


def test_what_is_missing_is_made_in_order_and_what_is_there_is_left_alone(small):
    first = makers.make("one-layer").read_bytes()
    made = makers.make_missing(minutes=0.0)
    assert made == [] and records.path_of("one-layer").read_bytes() == first
    assert not records.path_of("loop").exists()


def test_records_of_unlike_structures_stand_in_one_table(small):
    makers.make("structures")
    record = records.load("structures")
    two = record.sel(training="2 × TF")
    assert np.isfinite(two.residual_peak_height.isel(residual_layer=slice(3))).all()
    assert two.residual_peak_height.isel(residual_layer=3).isnull().all()


@pytest.fixture
def begun(small, made):
    """A small record of one layer, and its first steps."""
    made("one-layer", small)
    return small


def test_a_record_gives_back_the_run_that_its_weights_are_of(begun):
    config = paper_scale.GROUPS["one-layer"]()["softmax"][0]
    run, whole = records.run_of("one-layer", "softmax"), training.train(config)
    for name, weight in whole.model.state_dict().items():
        np.testing.assert_allclose(run.model.state_dict()[name], weight, rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(
        run.measurements.value_norm, whole.measurements.value_norm, rtol=1e-5
    )
    assert run.config == config and run.seconds > 0


def test_a_training_begun_again_meets_its_record(begun):
    check = spot_checks.spot_check("one-layer", "softmax")
    assert check.furthest < 1 and "first 2 steps" in str(check)


def test_one_altered_number_of_a_record_is_found(begun):
    path = records.path_of("one-layer")
    record = xr.load_dataset(path, engine="h5netcdf")
    record.backcopy_risk[{dim: 0 for dim in record.backcopy_risk.dims} | {"step": 2}] *= 1.01
    record.to_netcdf(path, engine="h5netcdf")
    with pytest.raises(SinkbookError, match=": backcopy_risk at step 2 differs by"):
        spot_checks.spot_check("one-layer", "softmax")


def test_one_altered_number_of_any_variable_is_found(begun):
    check = spot_checks.spot_check("one-layer", "softmax")
    for variable in spot_checks.TOLERANCES:
        altered = check.stored.copy(deep=True)
        altered[variable][{dim: 0 for dim in altered[variable].dims} | {"step": 2}] *= 1.01
        with pytest.raises(SinkbookError, match=f": {variable} at step 2 differs by"):
            spot_checks.compared("one-layer", "softmax", 42, altered, check.again)


def changed_rate(monkeypatch):
    real = optimizers.OPTIMIZERS["adamw"]
    faster = lambda weights, config: real(weights, replace(config, learning_rate=6e-4))  # noqa: E731
    monkeypatch.setitem(optimizers.OPTIMIZERS, "adamw", faster)


def changed_seed(monkeypatch):
    monkeypatch.setattr("sinkbook.toy.tasks.generator_at", other_generator_at)


def other_generator_at(seed, step, device="cpu"):
    import torch

    return torch.Generator(device).manual_seed(7 * seed + step)


@pytest.mark.parametrize("change", [changed_rate, changed_seed])
def test_one_altered_line_of_the_training_code_is_found(begun, monkeypatch, change):
    change(monkeypatch)
    monkeypatch.setenv("SINKBOOK_RUNS", str(begun / "other runs"))
    with pytest.raises(SinkbookError, match="no longer begins as it was recorded"):
        spot_checks.spot_check("one-layer", "softmax")


def test_a_training_that_a_record_has_not_or_not_yet_is_named(begun):
    with pytest.raises(SinkbookError, match="no training of the record 'one-layer' named 'relu'"):
        spot_checks.spot_check("one-layer", "relu")
    with pytest.raises(SinkbookError, match="no record whose trainings are begun again named 'le"):
        spot_checks.spot_check("league", "softmax")
    with pytest.raises(SinkbookError, match="no training of the record 'shakespeare' named 'no'"):
        spot_checks.spot_check("shakespeare", "no")
    record = kept.whole_file("one-layer")
    record["facts"] = record.facts.copy(data=np.full(record.facts.shape, ""))
    record.to_netcdf(kept.path_of("one-layer"), engine="h5netcdf")
    with pytest.raises(SinkbookError, match="Go on with: sinkbook record one-layer"):
        spot_checks.spot_check("one-layer", "softmax")


def test_what_is_measured_seldom_is_compared_where_it_was_measured(begun):
    """Twenty measurements of three thousand steps leave out the third."""
    every, seldom = (xr.Dataset(coords={"step": steps}) for steps in ([0, 1, 2, 3], [0, 1, 2, 4]))
    both = spot_checks._at_common_steps(seldom, every)
    assert [found.step.values.tolist() for found in both] == [[0, 1, 2], [0, 1, 2]]


@pytest.mark.book
def test_a_training_that_no_chapter_begins_again_begins_as_it_was_recorded():
    """Chapters 04, 05 and 09 begin the others again, and stop if they part."""
    assert spot_checks.spot_check("three-layers", "SGD", steps=2).furthest < 1


def test_the_record_of_the_league_is_made_of_its_runs(elsewhere, monkeypatch):
    few = {name: MITIGATIONS[name] for name in NAMES}
    monkeypatch.setattr(registry, "MITIGATIONS", few)
    few_steps = {"batch_size": 4, "steps": 4, "measurements": 2, "evaluation_size": 2}

    def small(settings, *, layers):
        base = experiments.league_base(settings, layers=layers)
        return replace(base, model=replace(base.model, width=8), **few_steps)

    monkeypatch.setattr(makers, "league_base", small)
    monkeypatch.setitem(makers.MAKERS, "league", lambda: makers._league(seeds=2))
    made = xr.load_dataset(makers.make("league"), engine="h5netcdf")
    assert made.sizes["mitigation"] == 3 and made.sizes["seed"] == 2
    assert made.depth.values.tolist() == [1, 3]
    assert made.sink_attention.sel(depth=1).isel(layer=slice(1, None)).isnull().all()
    np.testing.assert_allclose(made.destinations.sum("destination"), 1, atol=1e-5)
    trained = len(list((elsewhere / "runs").glob("*/run.json")))
    assert trained == 2 * (2 * 3 + 3)  # both depths, and the three controls of the key bias
    xr.testing.assert_identical(records.load("league"), made)


def test_the_record_of_the_optimizers_is_made_of_its_runs(elsewhere, monkeypatch):
    whole = experiments.optimizer_sweep(Settings("quick"))
    small = {
        name: replace(c, model=replace(c.model, width=8), batch_size=4, evaluation_size=2)
        for name, c in whole.items()
        if name in ("AdamW", "SGD")
    }
    monkeypatch.setattr(makers, "optimizer_sweep", lambda settings: small)
    making = partial(makers._optimizers, seeds=2, steps=4)
    monkeypatch.setitem(makers.MAKERS, "optimizers", making)
    made = xr.load_dataset(makers.make("optimizers"), engine="h5netcdf")
    assert made.optimizer.values.tolist() == list(small)
    assert made.step.values.tolist() == [0, 1, 2, 3, 4]
    assert made.norm_step.values.tolist() == [1, 2, 3, 4]
    assert made.damped_peak.dims == ("seed", "residual_layer")
    assert np.isfinite(made.damped_peak).all() and (made.update_norm > 0).all()
    xr.testing.assert_identical(records.load("optimizers"), made)


def long_lever(sink: float, layers: int = 4) -> tuple[xr.Dataset, dict]:
    """What is kept of a training of a small Llama with so strong a sink."""
    over, of_heads = ("domain", "step"), np.full((2, 4, layers, 4), sink / 2)
    of_heads[:, :, -1, 1] = sink
    found = xr.Dataset(
        {
            "sink_attention": ((*over, "layer", "head"), of_heads),
            "residual_peak_ratio": (
                (*over, "residual_layer"),
                np.full((2, 4, layers + 1), 1 + sink),
            ),
            "loss": (over, np.full((2, 4), 7.0)),
            "first_loss": (("first_step", "domain"), np.full((2, 2), [[7.0], [6.9]])),
        },
        {
            "step": [0, 100, 1_000, 4_000],
            "first_step": [0, long_levers.FIRST_STEPS],
            "domain": ["prose-en", "code"],
            "layer": range(layers),
            "head": range(4),
            "residual_layer": range(layers + 1),
        },
    )
    facts = {"device": "CPU", "versions": {"torch": "2"}, "date": "2026-11-27T10:00:00+0000"}
    return found, facts | {"seconds": 60.0}


def test_the_record_of_the_long_levers_grows_by_whole_trainings(elsewhere, monkeypatch):
    made = []

    def trained(config):
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(config)
        return long_lever(0.2 + 0.1 * config.seed, config.layers)

    monkeypatch.setattr(long_levers, "_trained", trained)
    with pytest.raises(TimeIsUpError, match="lacks 9 of its 9 trainings. Go on with: sinkbook rec"):
        makers.make(long_levers.NAME, until=0.0)
    with pytest.raises(KeyboardInterrupt):
        makers.make(long_levers.NAME)
    assert "of its 9 trainings 2 so far" in records.about(long_levers.NAME)
    assert not kept.is_finished(long_levers.NAME)
    made.append(None)
    makers.make(long_levers.NAME)
    assert len(set(made)) == len(made) == 10 and kept.is_finished(long_levers.NAME)
    record = records.load(long_levers.NAME)
    places = zip(record.lever.values, record.seed.values, strict=True)
    assert tuple(places) == long_levers.WANTED and record.attrs["trainings"] == 9
    shallow = record.isel(run=record.lever.values == "2 layers").sink_attention
    assert shallow.isel(layer=[0, 1]).notnull().all() and shallow.isel(layer=[2, 3]).isnull().all()
    with pytest.raises(StopIteration):
        next(long_levers.growing(long_levers.trainings(record)))


def test_every_lever_is_trained_and_named_as_the_small_llama_has_it():
    from sinkbook.llm import small_llama

    assert set(long_levers.SEEDS) == set(small_llama.LEVERS)
    assert small_llama.best_lever(records.load("small-llama-levers")) == long_levers.LONGER
    longer = json.loads(records.load("small-llama").attrs["config"])
    assert longer == asdict(small_llama.long_run(long_levers.LONGER))


@pytest.mark.skipif(long_levers.NAME not in there(), reason="the record is not there yet")
def test_the_record_of_the_long_levers_is_of_the_trainings_of_today():
    from sinkbook.llm import small_llama

    record = kept.whole_file(long_levers.NAME)
    today = {lever: asdict(small_llama.long_run(lever)) for lever in long_levers.SEEDS}
    assert json.loads(record.attrs["config"]) == today
    assert tuple(record.step.values) == small_llama.long_run(long_levers.LONGER).saved_steps


def test_claims_on_levers_are_decided_by_the_trainings_that_are_there():
    from sinkbook.llm import small_llama

    sinks = dict(
        zip(long_levers.WANTED, (0.2, 0.3, 0.4, 0.5, 0.1, 0.2, 0.3, 0.4, 0.1), strict=True)
    )
    made = {place: long_lever(sink) for place, sink in sinks.items()}
    decided = long_levers.decided(small_llama.at_the_end(long_levers.together(made)))
    expected = {
        "reference": [0.2],
        "weight-decay": [1.5, 2, 2.5],
        "no-weight-decay": [1],
        "learning-rate": [0.5],
        "packed": [1.5],
        "length": [0.5],
        "two-layers": [0.4],
        "chance": [
            np.log([0.3, 0.4, 0.5]).std(ddof=1)
            / np.log([0.2, 0.3, 0.1, 0.2, 0.3, 0.4, 0.1]).std(ddof=1)
        ],
        "peak": [1],
    }
    assert decided.keys() == {f"levers.{claim}" for claim in expected}
    for claim, values in expected.items():
        np.testing.assert_allclose(decided[f"levers.{claim}"], values)
    few = {place: made[place] for place in long_levers.WANTED[:2]}
    decided = long_levers.decided(small_llama.at_the_end(long_levers.together(few)))
    assert decided.keys() == {"levers.reference", "levers.weight-decay"}


def test_a_long_lever_begun_again_meets_its_record_and_an_altered_number_is_found(
    elsewhere, monkeypatch
):
    from sinkbook.llm import small_llama

    monkeypatch.setattr(long_levers, "_trained", lambda config: long_lever(0.2, config.layers))
    makers.make(long_levers.NAME)
    again = long_lever(0.2)[0].first_loss.rename(first_step="step").copy()
    monkeypatch.setattr(small_llama, "first_losses", lambda config, steps: again)
    check = spot_checks.spot_check(long_levers.NAME, "packed")
    assert check.furthest < 1 and "first 6 steps" in str(check)
    for step in again.step.values:
        again.loc[{"step": step}] *= 1.001
        with pytest.raises(SinkbookError, match=f": loss at step {step} differs by"):
            spot_checks.spot_check(long_levers.NAME, "packed")
        again.loc[{"step": step}] /= 1.001
    with pytest.raises(SinkbookError, match="no training of the record .* named 'unpacked'"):
        spot_checks.spot_check(long_levers.NAME, "unpacked")


@pytest.fixture
def shakespeare(elsewhere, monkeypatch, made):
    """The record of the pretrainings on Shakespeare, small, with one control."""
    groups = experiments.pretrainings()
    sizes = {"length": 16, "width": 16, "batch_size": 4, "steps": 6, "evaluation_size": 4}
    sizes |= {"measurements": 3, "measure_every": 3}
    small = {
        name: [replace(config, **sizes) for config in groups[name]]
        for name in ("as it is", "no <s>")
    }
    for module in (makers, spot_checks):
        monkeypatch.setattr(module, "pretrainings", lambda: small)
    made("shakespeare", elsewhere)
    return elsewhere


def test_the_record_of_shakespeare_holds_seeds_controls_and_what_was_asked_of_them(shakespeare):
    record = records.load("shakespeare")
    assert record.training.values.tolist() == ["as it is", "no <s>"] and record.sizes["seed"] == 3
    assert np.isfinite(record.copying.sel(training="as it is")).all()
    assert record.copying.sel(training="no <s>").isnull().any(("step", "layer", "head")).sum() == 2
    assert np.isfinite(record.by_content).all() and np.isfinite(record.attention).all()
    assert record.attrs["trainings"] == 4
    assert json.loads(record.attrs["config"])["no <s>"]["starts"] is False


def test_a_pretraining_begun_again_meets_its_record_and_an_altered_number_is_found(shakespeare):
    check = spot_checks.spot_check("shakespeare", "as it is")
    assert check.furthest < 1 and "first 2 steps" in str(check)
    path = records.path_of("shakespeare")
    record = xr.load_dataset(path, engine="h5netcdf")
    record.value_norm[{"training": 0, "seed": 0, "step": 1}] *= 1.01
    record.to_netcdf(path, engine="h5netcdf")
    with pytest.raises(SinkbookError, match=": value_norm at step 1 differs by"):
        spot_checks.spot_check("shakespeare", "as it is")


def test_the_record_of_shakespeare_has_the_trainings_of_today():
    configs = json.loads(kept.whole_file("shakespeare").attrs["config"])
    today = {name: asdict(group[0]) for name, group in experiments.pretrainings().items()}
    assert configs == today


def test_a_changed_toy_begun_again_meets_its_record_and_an_altered_number_is_found(monkeypatch):
    spot = spot_checks.spot_check("second-visit", "one layer, once", steps=2)
    assert spot.furthest <= 1 and spot.again.sizes["visit"] == 1
    altered = kept.whole_file("second-visit")
    altered.excess_risk.loc[{"training": "one layer, once", "seed": 42, "step": 1}] *= 1.01
    monkeypatch.setattr(spot_checks, "whole_file", lambda name: altered)
    with pytest.raises(SinkbookError, match="excess_risk at step 1 differs"):
        spot_checks.spot_check("second-visit", "one layer, once", steps=2)
    with pytest.raises(SinkbookError, match="no training 'twice'. Known: 'one layer, twice'"):
        spot_checks.spot_check("second-visit", "twice")


@pytest.mark.parametrize("damage", ["cut short", "another file", "no seconds"])
def test_a_damaged_training_of_a_changed_toy_is_named_with_what_to_do(
    elsewhere, monkeypatch, damage
):
    monkeypatch.setenv("SINKBOOK_CACHE", str(elsewhere / "cache"))
    changed = changed_toys.ChangedToy(1)
    watched = xr.Dataset({"excess_risk": ("step", [1.0])}, coords={"step": [0]})
    monkeypatch.setattr(changed_toys.toys, "train_watched", lambda *_: watched)
    made = changed_toys._trained(changed, changed.config)
    xr.testing.assert_identical(changed_toys._trained(changed, changed.config), made)
    (path,) = (cache_folder() / "changed-toys").glob("*.nc")
    if damage == "no seconds":
        watched.to_netcdf(path, engine="h5netcdf")
    else:
        path.write_bytes(path.read_bytes()[:200] if damage == "cut short" else b"no numbers")
    with pytest.raises(SinkbookError, match=r"cannot read .*changed-toys.*Delete it") as raised:
        changed_toys._trained(changed, changed.config)
    assert str(path) in str(raised.value)


def test_the_record_of_largest_magnitudes_has_a_number_for_every_toy_seed_range_and_layer(
    elsewhere, monkeypatch
):
    base = replace(experiments.league_base(Settings("quick"), layers=3), steps=2, measurements=1)
    monkeypatch.setattr(largest_magnitude, "league_base", lambda *_, **__: base)
    made = largest_magnitude.record(seeds=2, methods=("softmax", "relu"))
    assert made.error.dims == ("training", "seed", "ranges", "layer")
    assert made.training.values.tolist() == ["softmax", "relu"] and made.attrs["trainings"] == 4
    assert made.seed.values.tolist() == [base.seed, base.seed + 1]
    assert (made.largest > 0).all() and (made.outlier >= 1).all() and np.isfinite(made.error).all()
