"""Heads are cut in the order of what they do, and what that costs is what zeroing them costs."""

import numpy as np
import pytest

from sinkbook.errors import SinkbookError
from sinkbook.mitigations import pruning
from sinkbook.models.interventions import zero
from sinkbook.models.losses import token_losses
from sinkbook.probe import measure
from tiny import LOUD_TOKENS, assert_close, loud_llama, tiny_model


@pytest.fixture
def model():
    return loud_llama()


def test_heads_are_ordered_by_what_they_do(model):
    silent = (1, 2)  # layer and head
    weight = model.model.layers[silent[0]].self_attn.o_proj.weight
    weight[:, 8 * silent[1] : 8 * silent[1] + 8] *= 1e-3
    orders = pruning.head_orders(model, LOUD_TOKENS)
    assert orders["output norm"][0] == silent[0] * 4 + silent[1]
    mass = measure(model, LOUD_TOKENS).sink_attention.mean("batch").values.ravel()
    assert (np.diff(mass[orders["first-token mass"]]) <= 0).all()
    assert all(sorted(order) == list(range(8)) for order in orders.values())


def test_output_norms_are_compared_within_a_layer(model):
    """A layer whose heads all write little is not cut first: what counts is beside its others."""
    before = pruning.head_orders(model, LOUD_TOKENS)["output norm"]
    model.model.layers[1].self_attn.o_proj.weight *= 1e-3
    assert np.array_equal(pruning.head_orders(model, LOUD_TOKENS)["output norm"], before)


def test_pruned_losses_are_those_without_the_first_heads_of_each_order(model):
    orders = {"up": np.arange(8), "down": np.arange(8)[::-1]}
    losses = pruning.pruning_losses(model, LOUD_TOKENS, orders, (0.25, 0.625, 1.0), draws=2, seed=5)
    assert losses.removed.values.tolist() == [0.0, 0.25, 0.625, 1.0]
    assert_close(losses.sel(removed=0.0), np.tile(token_losses(model, LOUD_TOKENS).mean(1), (3, 1)))
    with zero(model, "head", layer=0, head=range(4)), zero(model, "head", layer=1, head=0):
        expected = token_losses(model, LOUD_TOKENS).mean(1)
    assert_close(losses.sel(order="up", removed=0.625), expected)
    with zero(model, "attention", layer=range(2)):
        assert_close(losses.sel(removed=1.0)[1], token_losses(model, LOUD_TOKENS).mean(1))
    generator = np.random.default_rng(5)
    drawn = {str(i): generator.permutation(8) for i in range(2)}
    each = pruning.pruning_losses(model, LOUD_TOKENS, drawn, (0.25,), draws=1).sel(removed=0.25)
    mean = each.sel(order=["0", "1"]).mean("order")
    assert_close(losses.sel(order="random", removed=0.25), mean)


def test_each_domain_is_read_without_the_heads_that_the_other_one_chose(model):
    texts = {"a": LOUD_TOKENS[:1], "b": LOUD_TOKENS[1:2]}
    orders = {"a": {"up": np.arange(8)}, "b": {"up": np.arange(8)[::-1]}}
    found = pruning.pruning_across_domains(model, texts, orders, (0.25,), seed=3)
    for domain, stranger in (("a", "b"), ("b", "a")):
        expected = {"own": orders[domain]["up"], "other": orders[stranger]["up"]}
        losses = pruning.pruning_losses(model, texts[domain], expected, (0.25,), seed=3)
        assert found[domain].order.values.tolist() == ["up", "same, other domain", "random"]
        assert_close(found[domain], losses)
    with pytest.raises(SinkbookError, match="1 in 'a', .* in 'b'. Give equally many texts"):
        pruning.pruning_across_domains(model, texts | {"b": LOUD_TOKENS}, orders, (0.25,))


def test_a_hybrid_is_pruned_of_the_heads_of_its_attention_alone():
    types = ["conv", "full_attention", "full_attention"]
    hybrid = tiny_model("lfm2", num_hidden_layers=3, layer_types=types).requires_grad_(False)
    orders = pruning.head_orders(hybrid, LOUD_TOKENS)
    assert all(sorted(order) == list(range(4, 12)) for order in orders.values())
    losses = pruning.pruning_losses(hybrid, LOUD_TOKENS, orders, (0.5, 1.0), draws=1)
    with zero(hybrid, "attention", layer=[1, 2]):
        whole = token_losses(hybrid, LOUD_TOKENS).mean(1)
    for order in ("output norm", "random"):
        assert_close(losses.sel(order=order, removed=1.0), whole)


def test_heads_are_cut_apart_by_the_layers_that_they_are_in(model):
    found = pruning.without_early_or_late(model, LOUD_TOKENS, np.array([1, 6, 2, 7]), below=1)
    assert found.attrs == {"cut": 4, "early": 2}
    with zero(model, "head", layer=0, head=[1, 2]):
        early = measure(model, LOUD_TOKENS, ("loss", "sink_attention"))
    assert_close(found.loss.sel(cut="early"), early.loss)
    assert_close(
        found.sink_rate.sel(cut="early"), (early.sink_attention > 0.3).mean(("layer", "head"))
    )
    with zero(model, "head", layer=1, head=[2, 3]):
        assert_close(found.loss.sel(cut="late"), measure(model, LOUD_TOKENS, ("loss",)).loss)
        with zero(model, "head", layer=0, head=[1, 2]):
            assert_close(found.loss.sel(cut="all"), measure(model, LOUD_TOKENS, ("loss",)).loss)
    assert_close(found.loss.sel(cut="none"), measure(model, LOUD_TOKENS, ("loss",)).loss)


def test_other_peaks_are_counted_where_the_first_token_is_longest(model):
    """Token 7 is made to shine after the last layer, wherever it stands and first of all at 0."""
    tokens = LOUD_TOKENS.clone()
    tokens[tokens == 7] = 8
    tokens[:, [0, 3, 9]] = 7
    model.model.embed_tokens.weight[7] *= 1000
    found = pruning.without_early_or_late(model, tokens, np.array([0]))
    assert_close(found.other_peaks.sel(cut="none"), np.full(3, 2 / 39))
    norms = measure(model, tokens, ("residual_norm",)).residual_norm
    assert_close(
        found.first_norm.sel(cut="none"), norms.isel(position=0).max("residual_layer"), 0.1
    )
