"""Cuts at the peak take away what was written there and nothing else."""

import json

import numpy as np
import pytest
import torch
import xarray as xr

from sinkbook.probe import measure
from sinkbook.toy.measurements import measure_toy
from sinkbook.toy.peak_tests import (
    cuts,
    heights_without,
    with_and_without_the_peak,
    writers_by_size,
)
from sinkbook.toy.runs import Run, TrainingConfig
from sinkbook.toy.tasks import TaskConfig, task
from sinkbook.toy.transformer import Transformer, TransformerConfig


def untrained(seed: int) -> Run:
    task_config = TaskConfig(characters=16, length=16)
    model = TransformerConfig(
        vocab_size=task(task_config).vocab_size, length=16, width=32, layers=3
    )
    config = TrainingConfig(task=task_config, model=model, evaluation_size=16, seed=seed)
    torch.manual_seed(seed)
    return Run(config, Transformer(model).eval().requires_grad_(False), xr.Dataset(), {})


@pytest.fixture(scope="module")
def record() -> xr.Dataset:
    """Two untrained models, as a record has its trainings: one step, and what cuts find."""
    found = []
    for run in (untrained(0), untrained(1)):
        measured = measure_toy(run.model, run.task, run.evaluation_tokens)
        parts = [measured.expand_dims(step=[0]), cuts(run)]
        found.append(xr.merge(parts, compat="no_conflicts", join="exact"))
    return xr.concat(found, xr.Variable("seed", [0, 1]))


def test_without_both_parts_the_first_token_is_as_long_as_before_the_layer(record):
    found = heights_without(record)
    for seed in (0, 1):
        one = record.sel(seed=seed)
        heights = one.residual_peak_height.isel(step=0)
        layer = int(heights.values[1:-1].argmax())
        others = one.whole_residual_norm[layer + 1] - heights[layer + 1]
        assert found["whole"].sel(seed=seed) == pytest.approx(heights[layer + 1].item(), abs=1e-4)
        before = (one.whole_residual_norm[layer] - others).item()
        assert found["neither"].sel(seed=seed) == pytest.approx(before, abs=1e-4)


def test_each_part_alone_is_cut_at_the_first_token(record):
    found = heights_without(record)
    for name in ("no attention", "no MLP"):
        assert not np.allclose(found[name], found["whole"])
        assert not np.allclose(found[name], found["neither"])


def test_shares_of_writers_are_ordered_by_the_sizes_of_the_trainings():
    sizes = [(width, length) for width in (32, 64) for length in (16, 8)]
    configs = {
        f"{width} {length}": {
            "model": {"width": width},
            "task": {"length": length},
            "learning_rate": 1e-3,
            "batch_size": 4,
        }
        for width, length in sizes
    }
    # The peak is after layer 1; there the attention writes as much as the texts are long.
    heights = np.tile([0.0, 1.0, 3.0, 9.0], (4, 1, 1, 1))
    lengths = np.array([length for _, length in sizes], dtype=float)[:, None, None, None]
    writes = np.concatenate([np.full_like(lengths, 99.0), lengths, lengths], axis=-1)
    of_trainings = ("training", "seed", "step")
    record = xr.Dataset(
        {
            "residual_peak_height": ((*of_trainings, "residual_layer"), heights),
            "attention_write": ((*of_trainings, "layer"), writes),
            "mlp_write": ((*of_trainings, "layer"), np.full_like(writes, 8.0)),
        },
        {"training": list(configs), "seed": [42], "step": [0]},
        {"config": json.dumps(configs)},
    )
    shares = writers_by_size(record)
    for width, length in sizes:
        share = shares.sel(width=width, length=length, rate=1e-3, batch=4, seed=42)
        assert share.item() == length / (length + 8)


def test_a_peak_is_taken_from_the_first_token_or_given_to_another_and_the_model_stays():
    run = untrained(0)
    tokens = run.evaluation_tokens[:1]

    def norms() -> np.ndarray:
        return measure(run.model, tokens, ("residual_norm",)).residual_norm.values[0]

    before = norms()
    found = with_and_without_the_peak(run, tokens, norms, position=5)
    assert list(found) == ["as it is", "no peak", "a second peak"]
    np.testing.assert_array_equal(found["as it is"], before)
    np.testing.assert_array_equal(norms(), before)
    changed = {name: ~np.isclose(of_change, before) for name, of_change in found.items()}
    layer = int(changed["no peak"][:, 0].argmax()) - 1  # the first layer after which it differs
    assert layer in (0, 1)
    np.testing.assert_allclose(found["no peak"][layer + 1, 0], before[layer, 0], rtol=1e-5)
    assert not changed["no peak"][layer + 1, 1:].any()
    assert np.flatnonzero(changed["a second peak"][layer + 1]).tolist() == [5]
