"""Cutting the writer of a peak out of a model's weights, and training on: on a tiny Llama."""

import math
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from sinkbook.data import corpora
from sinkbook.figures import peak_recovery as recovery_figures
from sinkbook.llm import components, peak_recovery
from sinkbook.llm.peak_recovery import DOMAINS, SETS, Config, cut_writer, find_writer, fine_tune
from sinkbook.models import pretrained
from tiny import WORDS, tiny_model, tiny_reader

pytestmark = pytest.mark.weights

TINY = Config(
    learning_rate=1e-2,
    batch_size=4,
    length=12,
    steps=12,
    measurements=2,
    measure_every=6,
    evaluation_size=2,
)
TOKENS = torch.arange(1, 25).reshape(2, 12)


def llama():
    return tiny_model("llama", num_hidden_layers=3)


@pytest.fixture
def words(tmp_path, monkeypatch):
    """A tiny model under any name, texts of a few words, and an empty store."""

    def texts(domain, minimum_characters):
        generator = np.random.default_rng(DOMAINS.index(domain))
        return [" ".join(generator.choice(WORDS[2:5], 20)) for _ in range(100)]

    monkeypatch.setenv("SINKBOOK_RUNS", str(tmp_path / "runs"))
    monkeypatch.setattr(pretrained, "load", lambda name, dtype: tiny_reader(llama()))
    monkeypatch.setattr(corpora, "texts", texts)
    peak_recovery.passages.cache_clear()
    yield
    peak_recovery.passages.cache_clear()


def test_a_cut_takes_what_it_says_and_nothing_else():
    whole, model = llama(), llama()
    writer = cut_writer(model, TOKENS, share=0.5)
    assert writer == find_writer(whole, TOKENS, share=0.5)
    assert 0.5 <= writer.carried < 1 and 0 < len(writer.units) < 64
    before, after = whole.state_dict(), model.state_dict()
    name = f"model.layers.{writer.layer}.mlp.down_proj.weight"
    assert [n for n in before if not torch.equal(before[n], after[n])] == [name]
    columns = list(writer.units)
    kept = np.setdiff1d(np.arange(64), columns)
    assert (after[name][:, columns] == 0).all()
    assert torch.equal(after[name][:, kept], before[name][:, kept])
    assert not torch.allclose(whole(TOKENS).logits, model(TOKENS).logits)


def test_no_fewer_units_would_carry_as_much():
    model = llama()
    writer = find_writer(model, TOKENS, share=0.5)
    fewer = find_writer(model, TOKENS, share=writer.carried - 1e-6)
    assert fewer.units == writer.units
    assert find_writer(model, TOKENS, share=0.1).carried < writer.carried


def test_with_all_units_cut_the_mlp_writes_nothing():
    model = llama()
    writer = cut_writer(model, TOKENS, share=math.inf)
    assert len(writer.units) == 64
    written = components.writes(model, TOKENS).norm.sel(part="mlp")
    assert (written.sel(layer=writer.layer) == 0).all()
    assert (written.drop_sel(layer=writer.layer) > 0).all()


def test_fine_tuning_lowers_the_loss_and_starts_without_the_units(words):
    measured = fine_tune(TINY)
    assert measured.step.values.tolist() == [0, 1, 6, 12]
    assert measured.loss.isel(step=-1).mean() < measured.loss.isel(step=0).mean() - 0.5
    assert measured.units_norm[0] == 0 < measured.units_norm[-1]
    assert fine_tune(replace(TINY, cut=False)).units_norm[0] > 0


@pytest.mark.parametrize("optimizer", peak_recovery.OPTIMIZERS)
def test_the_same_config_gives_the_same_run_bit_by_bit(words, tmp_path, monkeypatch, optimizer):
    config = replace(TINY, optimizer=optimizer, steps=4)
    first = fine_tune(config)
    monkeypatch.setenv("SINKBOOK_RUNS", str(tmp_path / "other"))
    assert fine_tune(config).equals(first)
    assert not fine_tune(replace(config, seed=1)).equals(first)


def test_a_record_goes_on_after_the_runs_that_are_there(words, monkeypatch):
    base = replace(TINY, steps=4)
    monkeypatch.setattr(peak_recovery, "SWEEP_STEPS", 2)
    monkeypatch.setattr(peak_recovery, "RATES", {"adamw": (1e-3, 1e-2), "sgd": (0.01, 0.1)})
    train, finished = peak_recovery.train_measured, []

    def counted(*arguments, most, **options):
        if len(finished) == most:
            raise KeyboardInterrupt
        measured = train(*arguments, **options)
        finished.append(measured)
        return measured

    monkeypatch.setattr(peak_recovery, "train_measured", partial(counted, most=5))
    with pytest.raises(KeyboardInterrupt):
        peak_recovery.record(base)
    monkeypatch.setattr(peak_recovery, "train_measured", partial(counted, most=9))
    record = peak_recovery.record(base)  # four runs of the sweep and five more, each once
    assert len(finished) == 9
    assert peak_recovery.record(base).equals(record)

    best = record.sweep_loss.argmin("candidate")
    chosen = record.sweep_rate.isel(candidate=best).sel(optimizer="sgd")
    sgd = record.learning_rate[record.condition == "cut, SGD"]
    assert (sgd == chosen).all() and sgd.sizes == {"run": 2}
    assert (peak_recovery.recovered(record).loss.isel(step=0) == 0).all()
    means = peak_recovery.above_the_cut(record)
    whole, cut = peak_recovery.before_and_after_the_cut(means)
    assert cut.loss == means.loss.isel(run=0, step=0)
    first = next(ax.lines[0] for ax in recovery_figures.phases(means, whole))
    assert first.get_ydata()[0] == whole.loss
    ratio = record.residual_peak_ratio
    starts = peak_recovery.before_and_after_the_cut(ratio)
    drawn = recovery_figures.peak_by_layer(ratio.isel(step=-1), *starts).lines
    assert [line.get_ydata().tolist() for line in drawn[:2]] == [s.values.tolist() for s in starts]
    assert len(drawn) == 2 + record.sizes["run"]


@pytest.mark.parametrize("domain", DOMAINS)
def test_held_out_texts_are_never_trained_on(domain):
    found = peak_recovery.passages(domain, length=64)
    trained = {text[:300] for text in found["trained"]}
    for held_out in SETS:
        assert len(found[held_out]) >= Config().evaluation_size
        assert not trained & {text[:300] for text in found[held_out]}
    first, second = (set(found[name]) for name in SETS)
    assert not first & second


def test_batches_are_trained_texts_after_the_first_token(words):
    reader = tiny_reader(llama())
    batch = peak_recovery.batch_at(reader, TINY, step=3)
    assert batch.shape == (4, 12) and (batch[:, 0] == reader.first_token).all()
    assert torch.equal(batch, peak_recovery.batch_at(reader, TINY, step=3))
    assert not torch.equal(batch, peak_recovery.batch_at(reader, TINY, step=4))
    trained = [t for d in DOMAINS for t in peak_recovery.passages(d, TINY.length)["trained"]]
    beginnings = reader.encode(trained, TINY.length).tolist()
    assert all(row in beginnings for row in batch.tolist())
