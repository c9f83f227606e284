"""A pretraining on Shakespeare: its texts, its measurements on hand-made heads, and its store."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr

from sinkbook import store
from sinkbook.data.shakespeare import SYMBOLS
from sinkbook.llm import checkpoint_metrics, copying_head, shakespeare_pretraining
from sinkbook.llm.shakespeare_pretraining import START, Characters, PretrainingConfig
from sinkbook.probe.attention_maps import attention_weights
from sinkbook.toy.runs import seeds_of
from sinkbook.toy.transformer import Transformer

TINY = PretrainingConfig(
    length=16, width=16, batch_size=8, steps=12, measurements=3, measure_every=5, evaluation_size=4
)


@pytest.fixture(autouse=True)
def run_store(tmp_path, monkeypatch):
    monkeypatch.setenv("SINKBOOK_RUNS", str(tmp_path / "runs"))


@pytest.fixture(scope="module")
def store_with_a_run(tmp_path_factory) -> Path:
    """A store in which `TINY` has been trained."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("SINKBOOK_RUNS", str(folder))
        shakespeare_pretraining.pretrain(TINY)
    return folder


@pytest.fixture
def trained(run_store, store_with_a_run) -> shakespeare_pretraining.Pretraining:
    """The run of `TINY`, in the test's own store."""
    shutil.copytree(store_with_a_run, store.runs_folder(), dirs_exist_ok=True)
    return shakespeare_pretraining.pretrain(TINY)


def spelt(ids) -> str:
    return "".join(SYMBOLS[i] for i in ids)


@pytest.mark.parametrize("starts", [True, False])
def test_texts_are_passages_of_shakespeare_and_half_of_them_repeat(starts):
    characters = Characters(replace(TINY, starts=starts))
    texts = characters.batch_at(400, seed=0, step=3)
    assert texts.shape == (400, 17)
    assert (texts[:, 0] == START).all() == starts and (texts[:, 1:] < START).all()
    written = texts[:, 1:] if starts else texts
    repeats = (written[:, :8] == written[:, 8:16]).all(dim=1)
    assert 0.4 < repeats.float().mean() < 0.6
    shakespeare = spelt(characters.ids.tolist())
    assert all(spelt(row) in shakespeare for row in written[~repeats][:5].tolist())
    assert all(spelt(row[:8]) in shakespeare for row in written[repeats][:5].tolist())


def test_a_batch_is_a_function_of_seed_and_step():
    characters = Characters(TINY)
    first = characters.batch_at(8, seed=1, step=2)
    assert torch.equal(first, characters.batch_at(8, seed=1, step=2))
    assert not torch.equal(first, characters.batch_at(8, seed=2, step=2))
    assert not torch.equal(first, characters.batch_at(8, seed=1, step=3))


def test_texts_to_measure_on_are_held_out_and_come_plain_and_repeated():
    characters = Characters(TINY)
    held_out = characters.held_out()
    plain, repeated = held_out["plain"], held_out["repeated"]
    assert torch.equal(plain[:, :9], repeated[:, :9])
    assert torch.equal(repeated[:, 1:9], repeated[:, 9:])
    assert not torch.equal(plain, repeated)
    long = replace(TINY, length=64)
    trained_on = spelt(Characters(long).ids.tolist())
    passages = [spelt(row[1:]) for row in Characters(long).held_out()["plain"].tolist()]
    assert not any(passage in trained_on for passage in passages)


def test_a_head_that_looks_back_half_a_text_less_one_scores_1(monkeypatch):
    model = Transformer(TINY.model).requires_grad_(False)
    characters = Characters(TINY)

    def looking_back(model, tokens, *, layer):
        weights = attention_weights(model, tokens, layer=layer)
        if layer == 1:
            weights[:, 1] = torch.eye(16).roll(-7, dims=1).tril()  # query n looks at n - 7
        return weights

    monkeypatch.setattr(shakespeare_pretraining, "attention_weights", looking_back)
    found = shakespeare_pretraining.measure_pretraining(model, characters)
    assert found.copying.sel(layer=1, head=1) == 1
    assert (found.copying.sel(layer=0) < 0.5).all()


def test_measurements_are_those_of_the_second_halves():
    torch.manual_seed(0)
    model = Transformer(TINY.model).requires_grad_(False)
    characters = Characters(TINY)
    found = shakespeare_pretraining.measure_pretraining(model, characters)
    texts = characters.held_out()["repeated"]
    weights = attention_weights(model, texts[:, :-1], layer=1)
    np.testing.assert_allclose(
        found.sink_attention.sel(kind="repeated", layer=1), weights[:, :, 9:, 0].mean((0, 2)),
        atol=1e-5,
    )  # fmt: skip
    log_probabilities = model(texts[:, :-1]).log_softmax(-1)
    losses = -log_probabilities.gather(-1, texts[:, 1:, None])[:, 9:]
    assert found.second_half_loss.sel(kind="repeated").item() == pytest.approx(
        losses.mean().item(), rel=1e-5
    )


def test_a_run_is_trained_once_measured_on_schedule_and_read_back(monkeypatch):
    run = shakespeare_pretraining.pretrain(TINY)
    assert run.measurements.step.values.tolist() == [0, 1, 3, 5, 10, 12]
    assert tuple(run.measurements.step.values) == TINY.measured_steps
    losses = run.measurements.second_half_loss.sel(kind="plain")
    assert losses[-1] < losses[0] - 0.1
    monkeypatch.setattr(shakespeare_pretraining, "train_measured", None)
    again = shakespeare_pretraining.pretrain(TINY)
    xr.testing.assert_identical(again.measurements, run.measurements)
    for name, weight in run.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], weight)


def test_processes_give_what_one_process_gives():
    configs = seeds_of(replace(TINY, steps=6), 2)
    apart = shakespeare_pretraining.pretrain_all(configs)
    for config, run in zip(configs, apart, strict=True):
        (config.folder / "run.json").unlink()
        alone = shakespeare_pretraining.pretrain(config)
        xr.testing.assert_allclose(alone.measurements, run.measurements, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kept", [True, False])
def test_a_mended_probe_measures_a_stored_run_again_and_trains_only_if_it_must(kept, monkeypatch):
    if not kept:
        monkeypatch.setattr(store, "KEPT_ALONG", 0)
    first = shakespeare_pretraining.pretrain(TINY)
    measure = shakespeare_pretraining.measure_pretraining
    train = shakespeare_pretraining.train_measured
    trained = []

    def doubled(*arguments):
        measured = measure(*arguments)
        return measured.assign(second_half_loss=2 * measured.second_half_loss)

    def counted(*arguments, **options):
        trained.append(arguments)
        return train(*arguments, **options)

    monkeypatch.setattr(shakespeare_pretraining, "measure_pretraining", doubled)
    monkeypatch.setattr(shakespeare_pretraining, "train_measured", counted)
    another = property(lambda config: "another hash")
    monkeypatch.setattr(PretrainingConfig, "measured_by", another)
    again = shakespeare_pretraining.pretrain(TINY)
    losses = 2 * first.measurements.second_half_loss
    xr.testing.assert_identical(
        again.measurements, first.measurements.assign(second_half_loss=losses)
    )
    assert shakespeare_pretraining.pretrain(TINY).measurements.equals(again.measurements)
    assert len(trained) == (not kept)
    for name, weight in first.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], weight)


def test_a_damaged_run_is_set_aside_and_trained_again(trained, caplog):
    first = trained
    weights = TINY.folder / "weights.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    again = shakespeare_pretraining.pretrain(TINY)
    assert "damaged" in caplog.text
    xr.testing.assert_identical(again.measurements, first.measurements)


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"repeated": 0.0},
        {"starts": False},
        {"attention": "relu"},
        {"optimizer": "sgd"},
    ],
    ids=str,
)
def test_a_changed_config_is_another_run(change):
    assert replace(TINY, **change).folder != TINY.folder
    assert store.runs_folder() in TINY.folder.parents


def test_the_followed_head_is_the_one_with_the_highest_copying_score(trained):
    run = trained
    scores = run.measurements.copying.isel(step=-1).values
    layer, head = shakespeare_pretraining.copying_head(run.measurements)
    assert scores[layer, head] == scores.max()
    other = run._replace(config=replace(TINY, seed=1))
    both = shakespeare_pretraining.together([run, other])
    followed = shakespeare_pretraining.follow_copying_head(both)
    whole = run.measurements
    np.testing.assert_array_equal(
        followed.sink_attention.isel(seed=1).transpose("step", "kind"),
        whole.sink_attention.isel(layer=layer, head=head).transpose("step", "kind"),
    )
    reads = {"layer": layer, "head": head, "residual_layer": layer}
    np.testing.assert_array_equal(
        followed.residual_peak_ratio.isel(seed=0),
        checkpoint_metrics.residual_peak_ratio(whole.isel(reads)),
    )


def test_attention_by_character_adds_up_and_is_that_of_the_weights(trained):
    run = trained
    found = copying_head.attention_by_character(run)
    assert float(found.attention.sum()) == pytest.approx(1, abs=1e-5)
    assert float(found.share.sum()) == pytest.approx(1, abs=1e-5)
    layer, head = shakespeare_pretraining.copying_head(run.measurements)
    tokens = Characters(TINY).held_out()["plain"][:, :-1]
    weights = attention_weights(run.model, tokens, layer=layer)[:, head, 9:]
    assert float(found.attention.sel(character="<s>")) == pytest.approx(
        weights[..., 0].mean().item(), abs=1e-5
    )
    spaces = (tokens == SYMBOLS.index(" ")).float()[:, None]
    assert float(found.attention.sel(character="␣")) == pytest.approx(
        (weights * spaces).sum(-1).mean().item(), abs=1e-5
    )


def test_at_the_distance_trained_on_the_two_ways_to_copy_look_at_the_same_token(trained):
    run = trained
    found = copying_head.other_distances([run, run])
    assert found.distance.values.tolist() == [5, 6, 7, 8] and found.sizes["seed"] == 2
    usual = found.isel(distance=-1)
    np.testing.assert_allclose(usual.by_content, usual.by_place, rtol=1e-6)
    texts = Characters(TINY).held_out()["repeated"]
    layer, head = shakespeare_pretraining.copying_head(run.measurements)
    weights = attention_weights(run.model, texts[:, :-1], layer=layer)[:, head]
    queries = torch.arange(12, 16)
    looking_back = weights[:, queries, queries - 7].mean().item()
    assert usual.by_content.values == pytest.approx([looking_back] * 2, rel=1e-5)
    assert not np.allclose(found.by_content[:, 0], found.by_place[:, 0], rtol=1e-4)


def test_a_control_of_one_seed_stands_in_one_table_and_comes_out_as_it_went_in(trained):
    run = trained
    other = run._replace(config=replace(TINY, seed=1))
    record = copying_head.compared({"as it is": [run, other], "control": [other]})
    assert record.training.values.tolist() == ["as it is", "control"]
    alone = copying_head.of_training(record, "control")
    assert alone.seed.values.tolist() == [1]
    np.testing.assert_array_equal(alone.copying.isel(seed=0), run.measurements.copying)
    assert copying_head.of_training(record, "as it is").sizes["seed"] == 2
    spaces = record.attention.sel(training="control", character="␣")
    assert spaces == copying_head.attention_by_character(run).attention.sel(character="␣")
    np.testing.assert_array_equal(
        record.resting.isel(seed=0), copying_head.other_distances([run]).sink.isel(seed=0)
    )
