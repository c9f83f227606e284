"""What one checkpoint shows: against plain definitions, on toys and on transformers' models."""

import numpy as np
import pytest
import torch

from sinkbook import measure
from sinkbook.errors import SinkbookError
from sinkbook.llm import checkpoint_metrics
from sinkbook.probe.attention_maps import attention_weights
from sinkbook.probe.metrics import residual_peak_ratio, value_drain_ratio
from tiny import EACH_LAYOUT, tiny_model

TOKENS = torch.randint(0, 50, (3, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=EACH_LAYOUT)
def model(request):
    return EACH_LAYOUT[request.param]().requires_grad_(False)


def test_attention_counts_neither_the_sinks_own_query_nor_any_hidden_key(model):
    found = checkpoint_metrics.measure_checkpoint(model, TOKENS, random_queries=0)
    for layer in range(found.sizes["layer"]):
        weights = attention_weights(model, TOKENS, layer=layer)
        plain = weights[:, :, 1:, 0].mean(-1)
        np.testing.assert_allclose(found.sink_attention.sel(layer=layer), plain, atol=1e-5)
    assert (found.sink_attention < 1).all()


def test_only_the_queries_that_are_asked_for_count(model):
    queries = torch.zeros_like(TOKENS, dtype=torch.bool)
    queries[:, 7:] = True
    found = checkpoint_metrics.measure_checkpoint(model, TOKENS, queries=queries, random_queries=0)
    weights = attention_weights(model, TOKENS, layer=1)
    np.testing.assert_allclose(
        found.sink_attention.sel(layer=1), weights[:, :, 7:, 0].mean(-1), atol=1e-5
    )


def test_logits_of_random_queries_explain_their_attention(model):
    ids = TOKENS[:, :9]
    logits = checkpoint_metrics.last_query_logits(model, ids)
    for layer in range(logits.shape[1]):
        weights = attention_weights(model, ids, layer=layer)[:, :, -1]
        torch.testing.assert_close(logits[:, layer].softmax(-1), weights, atol=1e-5, rtol=1e-4)


def test_a_soft_cap_is_in_the_logits():
    model = tiny_model(
        "gemma2", num_hidden_layers=2, head_dim=8, attn_logit_softcapping=0.5, seed=1
    )
    model.requires_grad_(False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8)
    logits = checkpoint_metrics.last_query_logits(model, TOKENS[:, :9])
    weights = attention_weights(model, TOKENS[:, :9], layer=1)[:, :, -1]
    assert logits.abs().max() <= 0.5
    torch.testing.assert_close(logits[:, 1].softmax(-1), weights, atol=1e-5, rtol=1e-4)


def test_random_queries_are_the_same_for_a_seed_and_never_the_sink_token(model, monkeypatch):
    asked = []
    last_query_logits = checkpoint_metrics.last_query_logits

    def listening(model, ids):
        asked.append(ids)
        return last_query_logits(model, ids)

    monkeypatch.setattr(checkpoint_metrics, "last_query_logits", listening)
    first = checkpoint_metrics.random_query_logits(model, TOKENS, count=200, prefix=5)
    assert first.sizes == {
        "text": 3,
        "layer": 3,
        "head": first.sizes["head"],
        "draw": 200,
        "key": 5,
    }
    assert all((ids[:, :5] == text[:5]).all() for ids, text in zip(asked, TOKENS, strict=True))
    drawn = asked[0][:, 5]
    assert not torch.isin(drawn, TOKENS[:, 0]).any() and len(drawn.unique()) > 20
    again = checkpoint_metrics.random_query_logits(model, TOKENS, count=200, prefix=5)
    np.testing.assert_array_equal(first, again)


def test_concentration_is_the_ratio_of_spreads(model):
    found = checkpoint_metrics.measure_checkpoint(model, TOKENS, random_queries=40, prefix=6)
    logits = checkpoint_metrics.random_query_logits(model, TOKENS, count=40, prefix=6)
    spread = logits.values.std(axis=3).mean(axis=0)  # (layer, head, key)
    by_hand = spread[..., 0] / spread[..., 1:].mean(-1)
    np.testing.assert_allclose(checkpoint_metrics.concentration(found), by_hand, rtol=1e-4)
    pooled = logits.values.std(axis=(2, 3)).mean(axis=0)  # over heads and queries
    np.testing.assert_allclose(
        checkpoint_metrics.concentration(found, pool_heads=True),
        pooled[:, 0] / pooled[:, 1:].mean(-1),
        rtol=1e-4,
    )


def test_ratios_compare_the_first_token_with_the_others(model):
    found = checkpoint_metrics.measure_checkpoint(model, TOKENS, random_queries=0)
    probed = measure(model, TOKENS, ("value_norm", "residual_norm"))
    values, states = probed.value_norm.values, probed.residual_norm.values
    np.testing.assert_allclose(
        value_drain_ratio(found),
        values[..., 0] / values[..., 1:].mean(-1),
        rtol=1e-5,
    )
    np.testing.assert_allclose(
        residual_peak_ratio(found),
        states[..., 0] / np.median(states[..., 1:], -1),
        rtol=1e-5,
    )


def test_texts_shorter_than_the_prefix_are_refused(model):
    with pytest.raises(SinkbookError, match="texts of 12 tokens have no first 20"):
        checkpoint_metrics.measure_checkpoint(model, TOKENS, prefix=20)
