"""The larger pretraining leaves revisions that the sweep over checkpoints reads."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import xarray as xr
from huggingface_hub import constants
from safetensors.torch import load_file

from sinkbook.llm import small_llama
from sinkbook.llm.checkpoints import revisions_of, texts_to_measure
from sinkbook.llm.small_llama import MODEL_ID, SmallLlama, Windows, pretrain
from sinkbook.models import pretrained

pytestmark = pytest.mark.weights

TEXTS = [f"to be or not to be, that is the question number {i}" for i in range(40)]
TINY = SmallLlama(
    vocabulary=300, length=16, width=16, layers=2, heads=2, batch_size=4, steps=6, checkpoints=2
)


@pytest.fixture(autouse=True)
def few_texts(tmp_path, monkeypatch):
    monkeypatch.setenv("SINKBOOK_RUNS", str(tmp_path / "runs"))
    monkeypatch.setattr(small_llama, "training_texts", lambda: TEXTS)
    small_llama.tokenizer.cache_clear()
    yield
    small_llama.tokenizer.cache_clear()


def weights_at(config: SmallLlama, step: int) -> dict[str, torch.Tensor]:
    (repository,) = (config.folder / "hub").iterdir()
    commit = (repository / "refs" / f"step{step}").read_text()
    return load_file(repository / "snapshots" / commit / "model.safetensors")


def test_a_pretraining_is_a_model_with_revisions(monkeypatch):
    pretrain(TINY)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(TINY.folder / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert tuple(revision.step for revision in revisions_of(MODEL_ID)) == TINY.saved_steps
    reader = pretrained.load(MODEL_ID, revision="step6")
    tokens = reader.encode(TEXTS[:2], length=8)
    assert (tokens[:, 0] == reader.tokenizer.bos_token_id).all()
    assert TEXTS[0].startswith(reader.tokenizer.decode(tokens[0, 1:]))
    trained = reader.model(tokens, labels=tokens).loss
    fresh = pretrained.load(MODEL_ID, revision="step0")
    assert trained < fresh.model(tokens, labels=tokens).loss


def test_an_interrupted_pretraining_ends_as_an_unbroken_one(monkeypatch):
    pretrain(TINY)
    unbroken = weights_at(TINY, 6)
    again = replace(TINY, checkpoints=3)  # another folder, the same training
    with monkeypatch.context() as patch:
        step_end = small_llama._Revisions.on_step_end

        def interrupted(self, args, state, control, **rest):
            if state.global_step == 4:
                raise KeyboardInterrupt
            step_end(self, args, state, control, **rest)

        patch.setattr(small_llama._Revisions, "on_step_end", interrupted)
        with pytest.raises(KeyboardInterrupt):
            pretrain(again)
    pretrain(again)
    for name, weight in weights_at(again, 6).items():
        assert torch.equal(weight, unbroken[name])


def test_a_finished_pretraining_is_not_trained_again(monkeypatch):
    seconds = pretrain(TINY)
    monkeypatch.setattr(small_llama, "Trainer", lambda **_: pytest.fail("trained again"))
    assert pretrain(TINY) == seconds


def test_windows_begin_with_the_start_token_and_packed_ones_hold_it_where_texts_begin():
    start = small_llama.tokenizer(TINY.vocabulary).bos_token_id
    plain = Windows(TINY).windows
    assert (plain[:, 0] == start).all() and (plain[:, 1:] != start).all()
    packed = Windows(replace(TINY, packed=True)).windows
    assert len(TEXTS) - 1 <= (packed == start).sum() <= len(TEXTS)
    assert (packed[1:, 0] == start).float().mean() < 0.5


def test_measured_texts_are_not_trained_on(monkeypatch):
    monkeypatch.undo()
    trained = set(small_llama.training_texts())
    for domain in small_llama.DOMAINS:
        assert trained.isdisjoint(texts_to_measure(domain, count=8, length=128))
    assert len(trained) > 1_000


def test_measurements_cover_every_revision_in_every_domain(monkeypatch):
    monkeypatch.setattr(small_llama, "MEASURED_TEXTS", 1)
    pretrain(TINY)
    measured = small_llama.measure(TINY)
    assert measured.step.values.tolist() == list(TINY.saved_steps)
    assert measured.domain.values.tolist() == list(small_llama.DOMAINS)
    assert measured.loss.notnull().all()
    assert 0 < small_llama.strongest_sink(measured)[-1] < 1
    kept = small_llama.means_over_texts(measured)
    begun = small_llama.first_losses(TINY, 6).transpose(*kept.loss.dims)
    xr.testing.assert_allclose(begun.sel(step=[0, 6]), kept.loss.sel(step=[0, 6]), rtol=1e-5)


def test_the_first_steps_of_a_long_training_are_those_of_a_short_one():
    pretrain(long := replace(TINY, steps=12, checkpoints=13))
    small_llama.first_losses(long, 6)
    beginning = replace(long, steps=6, checkpoints=1)
    assert 6 in long.saved_steps
    for name, weight in weights_at(beginning, 6).items():
        assert torch.equal(weight, weights_at(long, 6)[name])


def test_the_end_of_a_training_is_the_mean_of_its_last_checkpoints():
    attention = np.zeros((1, 2, 5, 1, 2))  # run, domain, step, layer, head
    attention[..., 0, 0] = [0.0, 0.1, 0.2, 0.3, 0.4]
    attention[..., 0, 1] = [0.9, 0.0, 0.0, 0.0, 0.0]  # the strongest, but for the end
    over = ("run", "domain", "step")
    runs = xr.Dataset(
        {
            "sink_attention": ((*over, "layer", "head"), attention),
            "residual_peak_ratio": ((*over, "residual_layer"), np.full((1, 2, 5, 3), [1, 4, 2])),
            "loss": (over, np.full((1, 2, 5), 3.0)),
        },
        coords={"step": [0, 1, 10, 100, 1000]},
    )
    end = small_llama.at_the_end(runs).isel(run=0)
    assert end.strongest_sink.item() == pytest.approx(0.3)
    assert end.highest_peak.item() == 4 and end.loss.values.tolist() == [3, 3]
    assert small_llama.at_the_end(runs.isel(step=slice(1, None))).begins.item() == 10
