"""Every mitigation of the registry trains, is measured right, and another one is easily added."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from sinkbook import measure
from sinkbook.errors import SinkbookError
from sinkbook.mitigations.registry import FAMILIES, MITIGATIONS, Mitigation
from sinkbook.probe.attention_maps import attention_weights
from sinkbook.toy import attention
from sinkbook.toy.runs import TrainingConfig
from sinkbook.toy.tasks import TaskConfig
from sinkbook.toy.training import train
from sinkbook.toy.transformer import Transformer, TransformerConfig

BASE = TrainingConfig(
    task=TaskConfig(length=12),
    model=TransformerConfig(vocab_size=67, length=12, width=16, heads=2, layers=2),
    learning_rate=3e-3,
    batch_size=4,
    steps=2,
    measurements=2,
    evaluation_size=4,
)


@pytest.fixture(autouse=True)
def run_store(tmp_path, monkeypatch):
    monkeypatch.setenv("SINKBOOK_RUNS", str(tmp_path / "runs"))


@pytest.mark.parametrize("name", MITIGATIONS)
def test_every_mitigation_trains(name):
    run = train(MITIGATIONS[name].applied_to(BASE))
    assert run.measurements.backcopy_risk.isel(step=-1) < run.measurements.backcopy_risk[0]
    assert np.isfinite(run.measurements.residual_norm).all()


def test_no_two_mitigations_are_the_same_and_none_but_softmax_is_the_default():
    made = {name: mitigation.applied_to(BASE) for name, mitigation in MITIGATIONS.items()}
    assert len(set(made.values())) == len(made)
    assert [name for name, config in made.items() if config == BASE] == ["softmax"]
    assert {mitigation.family for mitigation in MITIGATIONS.values()} == set(FAMILIES)


def test_another_mitigation_is_a_function_and_a_line(monkeypatch):
    monkeypatch.setitem(attention.KERNELS, "cubic", None)  # and out again after the test

    @attention.kernel_of_weights("cubic")
    def cubic_weights(scores):
        """`A = relu(S)^3`."""
        return scores.relu() ** 3

    cubic = Mitigation("cubic", "no normalisation", "this test", {"attention": "cubic"})
    monkeypatch.setitem(MITIGATIONS, "cubic", cubic)
    run = train(MITIGATIONS["cubic"].applied_to(BASE))
    assert run.measurements.sizes["step"] == len(run.config.measured_steps)
    assert run.config.model == replace(BASE.model, attention="cubic")


def test_a_family_that_is_none_is_refused():
    with pytest.raises(SinkbookError, match="no family 'magic'. Known: control"):
        Mitigation("wand", "magic", "nobody")


def close(measured, expected):
    np.testing.assert_allclose(measured, expected.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", MITIGATIONS)
def test_the_probe_reads_every_mitigation_right(name):
    config = MITIGATIONS[name].applied_to(BASE)
    torch.manual_seed(0)
    model = Transformer(config.model)
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    tokens = config.evaluation_tokens
    kept = {}
    for layer, block in enumerate(model.layers):
        kernel = block.attention.attention_function

        def keeping(*arguments, layer=layer, kernel=kernel, **keywords):
            kept[layer, "value"] = arguments[3]
            return kernel(*arguments, **keywords)

        block.attention.attention_function = keeping
        block.attention.wo.register_forward_pre_hook(
            lambda _, inputs, layer=layer: kept.update({(layer, "heads"): inputs[0]})
        )
    model(tokens)
    for block in model.layers:
        block.attention.attention_function = attention.KERNELS[config.model.attention]
    names = ("sink_attention", "sink_share", "attention_row_sum", "key_importance")
    norms = ("value_norm", "head_output_norm", "attention_entropy")
    later = torch.ones(tokens.shape, dtype=torch.bool)
    later[:, 0] = False
    result = measure(model, tokens, names + norms, queries=later)
    for layer, block in enumerate(model.layers):
        weights = attention_weights(model, tokens, layer=layer)[:, :, 1:]
        found = result.isel(layer=layer)
        close(found.sink_attention, weights[..., 0].mean(-1))
        close(found.attention_row_sum, weights.sum(-1).mean(-1))
        on_sink, in_all = weights[..., 0].abs().sum(-1), weights.abs().sum((-2, -1))
        close(found.sink_share, on_sink / in_all)
        seen = torch.tensor([11, *range(11, 0, -1)])
        close(found.key_importance, weights.sum(2) / seen)
        shares = weights.abs() / weights.abs().sum(-1, keepdim=True)
        close(found.attention_entropy, torch.special.entr(shares).sum(-1).nanmean(-1))
        written = block.attention.wo.weight.T.unflatten(0, (2, 8))
        close(found.value_norm, (kept[layer, "value"] @ written).norm(dim=-1))
        heads = kept[layer, "heads"].unflatten(-1, (2, 8)).transpose(1, 2) @ written
        close(found.head_output_norm, heads[:, :, 1:].norm(dim=-1).mean(-1))
