"""The league table says of known models what is known of them, and loses nothing."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import xarray as xr

from sinkbook.book import experiments, records
from sinkbook.book.settings import Settings
from sinkbook.errors import SinkbookError
from sinkbook.mitigations import league
from sinkbook.mitigations.registry import (
    MITIGATIONS,
    Mitigation,
    under_mitigations,
    under_slot_controls,
)
from sinkbook.models.interventions import zero
from sinkbook.models.partial_forward import residual_states
from sinkbook.probe import measure
from sinkbook.toy.optimizer_dynamics import excess_risk
from sinkbook.toy.runs import Run, TrainingConfig
from sinkbook.toy.tasks import TaskConfig
from sinkbook.toy.training import seeds_of, train_all
from sinkbook.toy.transformer import TransformerConfig

BASE = TrainingConfig(
    task=TaskConfig(length=12, characters=20),
    model=TransformerConfig(vocab_size=22, length=12, width=16, layers=2),
    learning_rate=6e-3,
    batch_size=8,
    steps=20,
    measurements=5,
    evaluation_size=16,
)
NAMES = ("softmax", "relu", "value-gate", "random-first")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SINKBOOK_RUNS", str(tmp_path_factory.mktemp("runs")))
        configs = {name: seeds_of(MITIGATIONS[name].applied_to(BASE), 2) for name in NAMES}
        yield {name: train_all(group, way="sequence") for name, group in configs.items()}


@pytest.fixture(scope="module")
def standings(runs):
    return league.table(runs)


def dormant_head(run: Run) -> Run:
    """The run with a first layer that gives position 0 all attention, whose value is zero."""
    model = run.model
    attention = model.layers[0].attention
    attention.attention_function = lambda _m, query, key, value, *_a, **_k: (
        torch.zeros_like(value).transpose(1, 2),
        torch.ones(*query.shape[:-1], key.shape[-2]).tril() * (torch.arange(key.shape[-2]) == 0),
    )
    return run


def test_a_head_that_sleeps_is_seen_to_sleep(runs):
    run = runs["softmax"][0]
    original = run.model.layers[0].attention.attention_function
    try:
        found = league.standing(dormant_head(run))
    finally:
        run.model.layers[0].attention.attention_function = original
    assert found.sink_attention[0] == found.sink_share[0] == found.row_sum[0] == 1
    assert found.attention_at_0[0] == 1
    assert found.sink_attention[1] < 0.9


def test_without_a_gate_values_are_the_same_before_and_after(runs, standings):
    run = runs["softmax"][0]
    before = league.value_norms_before_gate(run.model, run.evaluation_tokens)
    after = measure(run.model, run.evaluation_tokens, ("value_norm",)).value_norm
    np.testing.assert_allclose(before, after, rtol=1e-4)
    gated = standings.sel(mitigation="value-gate")
    assert (gated.value_drain_ratio != gated.value_drain_ratio_before_gate).all()
    plain = standings.sel(mitigation="softmax")
    np.testing.assert_allclose(
        plain.value_drain_ratio, plain.value_drain_ratio_before_gate, rtol=1e-4
    )


def test_residual_states_are_those_that_the_probe_measures(runs):
    run = runs["softmax"][0]
    with residual_states(run.model) as kept:
        run.model(run.evaluation_tokens)
    states = torch.stack(kept)
    measured = measure(run.model, run.evaluation_tokens, ("residual_norm",)).residual_norm
    np.testing.assert_allclose(states.norm(dim=-1).transpose(0, 1), measured, rtol=1e-5)


def test_the_sink_is_the_start_token_also_in_second_place(runs):
    run = runs["random-first"][0]
    found = league.standing(run)
    later = torch.ones(run.evaluation_tokens.shape, dtype=torch.bool)
    later[:, :2] = False
    later &= ~run.task.at_triggers(run.evaluation_tokens)
    second = measure(run.model, run.evaluation_tokens, ("sink_attention",), queries=later, sink=1)
    expected = second.sink_attention.mean(("batch", "head"))
    np.testing.assert_allclose(found.sink_attention, expected, rtol=1e-5)
    assert (found.attention_at_0 != found.sink_attention).all()


def test_risks_are_those_of_the_model(runs, standings):
    for number, run in enumerate(runs["relu"]):
        row = standings.sel(mitigation="relu").isel(seed=number)
        measured = run.measurements.isel(step=-1)
        assert row.backcopy_excess.item() == pytest.approx(measured.backcopy_excess.item())
        assert row.bigram_excess.item() == pytest.approx(measured.bigram_excess.item())


def test_the_common_loss_is_where_the_slowest_ends(runs, standings):
    finals = {name: [excess_risk(run)[-1] for run in group] for name, group in runs.items()}
    assert standings.loss.item() == max(max(group) for group in finals.values())
    assert standings.steps_to_loss.notnull().all()
    slowest = max(finals, key=lambda name: max(finals[name]))
    latest = standings.steps_to_loss.sel(mitigation=slowest).max()
    assert latest == BASE.steps
    assert (standings.steps_to_loss <= BASE.steps).all()
    assert standings.sink_attention_at_loss.sel(mitigation="random-first").isnull().all()


def test_the_worst_layer_is_the_strongest_sink_and_the_deepest_drain(standings):
    sink = league.worst_layer(standings, "sink_attention")
    np.testing.assert_array_equal(sink, standings.sink_attention.max("layer"))
    drain = league.worst_layer(standings, "value_drain_ratio")
    np.testing.assert_array_equal(drain, standings.value_drain_ratio.min("layer"))
    steps = league.worst_layer(standings, "steps_to_loss")
    np.testing.assert_array_equal(steps, standings.steps_to_loss)


def test_the_best_of_every_criterion_is_first():
    names = ["softmax", "relu", "muon"]
    quality = xr.DataArray([2.0, 1.0, 3.0], dims="mitigation")  # relu is the best, muon the worst
    columns = {column: quality for column in league.CRITERIA}
    columns["value_drain_ratio"] = 1 / quality
    columns |= {"backcopy_excess": quality, "bigram_excess": quality}
    standings = xr.Dataset(columns).expand_dims(seed=2, layer=2).transpose("mitigation", ...)
    labels = [MITIGATIONS[name].label for name in names]
    families = [MITIGATIONS[name].family for name in names]
    coords = {"label": ("mitigation", labels), "family": ("mitigation", families)}
    standings = standings.assign_coords(mitigation=names, **coords)
    standings["steps_to_loss"] = standings.steps_to_loss.isel(layer=0)
    for column in ("backcopy_excess", "bigram_excess"):
        standings[column] = standings[column].isel(layer=0)
    ranked = league.ranking(standings)
    assert ranked.index.tolist() == [labels[1], labels[0], labels[2]]
    assert ranked["mean rank"].tolist() == [1, 2, 3]
    relative = league.families(standings)
    assert relative.loc["no normalisation", "strongest sink"] == 0.5
    assert relative.loc["optimizer", "highest peak"] == 1.5
    assert "control" not in relative.index


def test_two_tables_agree_as_far_as_their_orders_do():
    names = ["softmax", "relu", "muon", "sgd"]
    rising = xr.DataArray([1.0, 2.0, 3.0, 4.0], {"mitigation": names}).expand_dims(seed=2)
    table = xr.Dataset({column: rising for column in league.CRITERIA})
    other = table.assign(sink_attention=-rising, residual_peak_ratio=rising**3).isel(
        mitigation=[3, 1, 0]
    )
    agree = league.agreement(table, other)
    assert agree["highest peak"] == agree["deepest drain"] == 1
    assert agree["strongest sink"] == 1  # attention counts by its magnitude
    assert league.agreement(table, other.assign(sink_attention=1 / rising))["strongest sink"] == -1


def test_nothing_is_lost_on_the_way_to_the_files(standings, tmp_path):
    both = league.depths({1: standings.isel(layer=[0], residual_layer=[0, 1]), 2: standings})
    path = tmp_path / "league.nc"
    path.write_bytes(bytes(both.to_netcdf(engine="h5netcdf")))
    back = xr.load_dataset(path, engine="h5netcdf")
    xr.testing.assert_allclose(back, both)
    rows = league.rows(both)
    assert len(rows) == 2 * len(NAMES) * 2
    row = rows[(rows.depth == 2) & (rows.mitigation == "relu") & (rows.seed == 43)].iloc[0]
    expected = standings.sel(mitigation="relu", seed=43)
    assert row["sink_attention.1"] == pytest.approx(expected.sink_attention.sel(layer=1).item())
    assert row["residual_peak_ratio.2"] == pytest.approx(
        expected.residual_peak_ratio.sel(residual_layer=2).item()
    )
    assert row.source == MITIGATIONS["relu"].source


@pytest.mark.parametrize("part", ["attention", "mlp"])
def test_a_peak_is_cut_at_its_writer_and_nothing_else_is(part, runs):
    found = league.peak_writers(runs["softmax"])
    for number, run in enumerate(runs["softmax"]):
        heights = run.measurements.residual_peak_height.isel(step=-1).values
        row = found.isel(seed=number)
        layer = int(row.layer)
        whole = row.sel(cut="none")
        assert whole.height.item() == pytest.approx(heights[1:].max(), rel=1e-5)
        assert heights[1:].max() == heights[layer + 1]
        tokens = run.evaluation_tokens
        with zero(run.model, part, layer=layer, position=0):
            norms = measure(run.model, tokens, ("residual_norm",)).residual_norm
            risks = run.task.risks(run.model(tokens), tokens)
        at = norms.isel(residual_layer=layer + 1)
        expected = at.isel(position=0).mean() - at.isel(position=slice(1, None)).mean()
        assert row.height.sel(cut=part).item() == pytest.approx(expected.item(), rel=1e-4)
        assert row.risk.sel(cut=part).item() == pytest.approx(risks.backcopy_excess.item())
        assert row.self_attention == 1, "softmax can give nothing else to a row of one key"


def test_attention_goes_somewhere(runs):
    shares = league.destinations({"a": {"relu": runs["relu"]}, "b": {"softmax": runs["softmax"]}})
    np.testing.assert_allclose(shares.sel(control="b", mitigation="softmax")[:, 2], 0, atol=1e-6)
    assert shares.sel(control="a", mitigation="softmax").isnull().all()
    totals = shares.sum("destination", skipna=False)
    np.testing.assert_allclose(totals.sel(control="a", mitigation="relu"), 1, atol=1e-6)


def test_the_league_of_the_book_is_the_registry(monkeypatch):
    before = experiments.league(Settings("paper"))
    assert list(before) == list(MITIGATIONS)
    fifteenth = Mitigation("no MLP", "control", "this test", {"without_mlp": (0,)})
    monkeypatch.setitem(MITIGATIONS, "no-mlp", fifteenth)
    after = experiments.league(Settings("paper"))
    assert set(after) - set(before) == {"no-mlp"}
    assert after["no-mlp"][0].model == replace(before["softmax"][0].model, without_mlp=(0,))
    assert all(len(seeds) >= 2 for seeds in after.values())


def test_what_is_trained_live_is_the_beginning_of_a_training_of_the_record():
    """So that its marks may be laid over the record's, and a quick profile cannot part from it."""
    recorded = json.loads(records.load("league").attrs["config"])
    base = recorded["base"]
    base["task"] = TaskConfig(**base["task"])
    of_model = base["model"].items()
    base["model"] = TransformerConfig(
        **{name: tuple(v) if isinstance(v, list) else v for name, v in of_model}
    )
    assert experiments.league_base(Settings("quick")) == TrainingConfig(**base)
    live = experiments.league(Settings("quick"))
    assert list(live) == [name for name in recorded["mitigations"] if name in live]
    steps = experiments.STEPS_OF_THREE
    assert base["steps"] / 2 < steps <= base["steps"]
    assert live["softmax"][0] == replace(experiments.league_base(Settings("quick")), steps=steps)


def test_slots_are_compared_with_everything_else_alike():
    base = experiments.league_base(Settings("quick"), layers=1)
    league_of_one = under_mitigations(base, 2)
    slots = under_slot_controls(league_of_one)
    assert slots["as it is"]["key-bias"] == league_of_one["key-bias"]
    assert slots["no <s>"]["sink-logit"][0].task.starts == 0
    fast = slots["slot 10 × as fast"]
    assert set(fast) == {"sink-logit", "key-bias"}
    as_it_is = league_of_one["sink-logit"][0]
    assert replace(fast["sink-logit"][0].model, null_slot_speed=1.0) == as_it_is.model


def test_the_two_ways_out_are_compared_with_the_models_of_chapter_five():
    ways = experiments.two_ways(Settings("quick"))
    assert ways["softmax, AdamW"] == experiments.three_layers(Settings("quick"))
    fewer = experiments.two_ways(Settings("quick"), seeds=2)
    assert fewer == {name: configs[:2] for name, configs in ways.items()}
    with pytest.raises(SinkbookError, match="no profile"):
        experiments.two_ways(Settings("slow"))
