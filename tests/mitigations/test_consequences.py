"""What dropping tokens, keys and heads costs is what slow references say it is."""

from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import xarray as xr

from sinkbook.book import experiments
from sinkbook.errors import SinkbookError
from sinkbook.mitigations import consequences as costs
from sinkbook.mitigations import eviction, pruning
from sinkbook.mitigations.quantization import int8_error, quantized
from sinkbook.mitigations.sink_cache import SinkCache, streaming
from sinkbook.models.interventions import zero
from sinkbook.probe import measure
from sinkbook.toy.measurements import excess_risks
from sinkbook.toy.runs import Run
from sinkbook.toy.transformer import Transformer, TransformerConfig
from tiny import tiny_model

TOKENS = torch.randint(0, 50, (3, 40), generator=torch.Generator().manual_seed(0))


def llama(layers=2, **changes):
    model = tiny_model(
        vocab_size=50,
        num_hidden_layers=layers,
        initializer_range=0.3,  # large, so that what is dropped makes a difference
        **changes,
    )
    return model.requires_grad_(False)


@pytest.fixture
def model():
    return llama()


def losses_of(logits, tokens):
    return F.cross_entropy(logits[:, :-1].mT, tokens[:, 1:], reduction="none").numpy()


def assert_close(found, expected, tolerance=1e-4):
    np.testing.assert_allclose(found, expected, atol=tolerance, rtol=0)


def test_token_losses_are_the_models_own(model):
    losses = costs.token_losses(model, TOKENS)
    assert_close(losses, losses_of(model(TOKENS).logits, TOKENS))
    assert_close(losses.mean(), model(TOKENS, labels=TOKENS).loss)
    assert_close(costs.token_losses(model, TOKENS, last=7), losses[:, -7:])
    toy = Transformer(TransformerConfig(vocab_size=50, length=40, width=16)).requires_grad_(False)
    assert_close(costs.token_losses(toy, TOKENS, last=7), losses_of(toy(TOKENS), TOKENS)[:, -7:])


def test_losses_under_a_window_are_those_of_the_cache(model):
    losses = costs.streaming_losses(model, TOKENS, window=9, sinks=(0, 2), random=3, stride=4)
    assert losses.layout.values.tolist() == ["dense", "0", "2", "random", "recompute"]
    assert losses.dims == ("layout", "text", "position") and losses.position[0] == 1
    for sinks in (0, 2):
        cache = SinkCache(model, sinks=sinks, window=9)
        steps = [model(TOKENS[:, i : i + 1], past_key_values=cache).logits for i in range(40)]
        assert_close(losses.sel(layout=str(sinks)), losses_of(torch.cat(steps, 1), TOKENS))
    same = losses.sel(layout=["dense", "0", "2", "random"], position=slice(1, 9))
    assert float((same.max("layout") - same.min("layout")).max()) < 1e-4
    later = losses.sel(position=slice(14, None))
    assert float(abs(later.sel(layout="0") - later.sel(layout="dense")).max()) > 0.1


def test_random_tokens_are_drawn_after_the_sinks_and_within_the_first_window(model, monkeypatch):
    drawn = []

    def watched(model, *, window, kept):
        drawn.append(kept)
        return streaming(model, window=window, kept=kept)

    monkeypatch.setattr(costs, "streaming", watched)
    run = partial(costs.streaming_losses, model, TOKENS, window=12, sinks=(0, 4), stride=4)
    first, again, other = (run(seed=seed).sel(layout="random") for seed in (0, 0, 1))
    draws = [kept for kept in drawn if isinstance(kept, list)]
    assert len(draws) == 9 and all(len(set(kept)) == 4 for kept in draws)
    assert {p for kept in draws for p in kept} <= set(range(4, 12))
    assert draws[0] != draws[1]  # texts have draws of their own
    assert first.equals(again) and not first.equals(other)


def test_reading_afresh_is_reading_a_text_that_begins_a_window_before(model):
    found = costs.recomputed_losses(model, TOKENS, window=9, stride=3)
    assert np.isnan(found[:, :8]).all() and not np.isnan(found[:, 8:38]).any()
    for position in (9, 10, 11, 12, 38):
        seen = 9 - 2 + (position - 9) % 3  # as far as its window has been filled
        alone = TOKENS[:, position - seen : position + 1]
        assert_close(found[:, position - 1], costs.token_losses(model, alone)[:, -1])
    with pytest.raises(SinkbookError, match="steps of 10 with a window of 9"):
        costs.recomputed_losses(model, TOKENS, window=9, stride=10)


def test_perplexity_is_over_the_tokens_past_a_position():
    losses = xr.DataArray(
        np.log([[9.0, 2.0, 8.0]]), dims=("text", "position"), coords={"position": [1, 2, 3]}
    )
    assert_close(costs.perplexity(losses, after=2), [4.0])


def test_a_window_that_leaves_no_room_is_refused(model):
    with pytest.raises(SinkbookError, match="a window of 10, texts of 40 tokens, 8 kept, 4 drawn"):
        costs.streaming_losses(model, TOKENS, window=10)
    with pytest.raises(SinkbookError, match="longer than window"):
        costs.streaming_losses(model, TOKENS[:, :20], window=12)


def test_what_is_evicted_is_hidden_and_nothing_else():
    """In one layer an evicted key is a masked one: positions stay, heads choose for themselves."""
    model, prompt, budget = llama(layers=1, attn_implementation="eager"), 24, 6
    losses = eviction.eviction_losses(model, TOKENS, prompt=prompt, budgets=(budget, 9), sinks=4)
    attention = model(TOKENS[:, :prompt], output_attentions=True).attentions[0]
    seen = torch.arange(prompt, 0, -1)
    importance = (attention.sum(2) / seen).unflatten(1, (2, 2)).mean(2)
    ranks = {
        "window": torch.arange(prompt).expand_as(importance).float(),
        "importance": importance,
        "importance, no first": importance.clone().index_fill_(2, torch.tensor([0]), -1.0),
    }
    ranks["sinks + window"] = ranks["window"].clone()
    ranks["sinks + window"][..., :4] += 100
    for policy, rank in ranks.items():
        kept = torch.zeros_like(rank, dtype=torch.bool)
        kept.scatter_(2, rank.topk(budget).indices, True)
        kept = kept.repeat_interleave(2, dim=1)  # the query heads that share them
        visible = torch.ones(3, 4, 40, 40, dtype=torch.bool).tril()
        visible[:, :, prompt:, :prompt] &= kept[:, :, None]
        mask = torch.zeros(visible.shape).masked_fill(~visible, float("-inf"))
        expected = losses_of(model(TOKENS, attention_mask=mask).logits, TOKENS)[:, prompt:]
        assert_close(losses.sel(policy=policy, budget=budget), expected.mean(1))


def test_with_nothing_evicted_the_text_goes_on_as_it_was(model):
    losses = eviction.eviction_losses(model, TOKENS, prompt=24, budgets=(8,))
    whole = costs.token_losses(model, TOKENS)[:, 24:].mean(1)
    assert_close(losses.sel(policy="all", budget=8), whole)
    assert float(abs(losses.sel(policy="window", budget=8) - whole).max()) > 0.01


def test_budgets_that_do_not_fit_the_prompt_are_refused(model):
    for budgets, prompt in (((4,), 24), ((24,), 24), ((8,), 39)):
        with pytest.raises(SinkbookError, match="Give budgets from 5 to"):
            eviction.eviction_losses(model, TOKENS, prompt=prompt, budgets=budgets)


def test_heads_are_ordered_by_what_they_do(model):
    silent = (1, 2)  # layer and head
    weight = model.model.layers[silent[0]].self_attn.o_proj.weight
    weight[:, 8 * silent[1] : 8 * silent[1] + 8] *= 1e-3
    orders = pruning.head_orders(model, TOKENS)
    assert orders["output norm"][0] == silent[0] * 4 + silent[1]
    mass = measure(model, TOKENS).sink_attention.mean("batch").values.ravel()
    assert (np.diff(mass[orders["first-token mass"]]) <= 0).all()
    assert all(sorted(order) == list(range(8)) for order in orders.values())


def test_output_norms_are_compared_within_a_layer(model):
    """A layer whose heads all write little is not cut first: what counts is beside its others."""
    before = pruning.head_orders(model, TOKENS)["output norm"]
    model.model.layers[1].self_attn.o_proj.weight *= 1e-3
    assert np.array_equal(pruning.head_orders(model, TOKENS)["output norm"], before)


def test_pruned_losses_are_those_without_the_first_heads_of_each_order(model):
    orders = {"up": np.arange(8), "down": np.arange(8)[::-1]}
    losses = pruning.pruning_losses(model, TOKENS, orders, (0.25, 0.625, 1.0), draws=2, seed=5)
    assert losses.removed.values.tolist() == [0.0, 0.25, 0.625, 1.0]
    assert_close(
        losses.sel(removed=0.0), np.tile(costs.token_losses(model, TOKENS).mean(1), (3, 1))
    )
    with zero(model, "head", layer=0, head=range(4)), zero(model, "head", layer=1, head=0):
        expected = costs.token_losses(model, TOKENS).mean(1)
    assert_close(losses.sel(order="up", removed=0.625), expected)
    with zero(model, "attention", layer=range(2)):
        assert_close(losses.sel(removed=1.0)[1], costs.token_losses(model, TOKENS).mean(1))
    generator = np.random.default_rng(5)
    drawn = {str(i): generator.permutation(8) for i in range(2)}
    each = pruning.pruning_losses(model, TOKENS, drawn, (0.25,), draws=1).sel(removed=0.25)
    mean = each.sel(order=["0", "1"]).mean("order")
    assert_close(losses.sel(order="random", removed=0.25), mean)


def test_each_domain_is_read_without_the_heads_that_the_other_one_chose(model):
    texts = {"a": TOKENS[:1], "b": TOKENS[1:]}
    orders = {"a": {"up": np.arange(8)}, "b": {"up": np.arange(8)[::-1]}}
    found = pruning.pruning_across_domains(model, texts, orders, (0.25,), seed=3)
    for domain, stranger in (("a", "b"), ("b", "a")):
        expected = {"own": orders[domain]["up"], "other": orders[stranger]["up"]}
        losses = pruning.pruning_losses(model, texts[domain], expected, (0.25,), seed=3)
        assert found[domain].order.values.tolist() == ["up", "same, other domain", "random"]
        assert_close(found[domain], losses)


def test_heads_are_cut_apart_by_the_layers_that_they_are_in(model):
    found = pruning.without_early_or_late(model, TOKENS, np.array([1, 6, 2, 7]), below=1)
    assert found.attrs == {"cut": 4, "early": 2}
    with zero(model, "head", layer=0, head=[1, 2]):
        early = measure(model, TOKENS, ("loss", "sink_attention"))
    assert_close(found.loss.sel(cut="early"), early.loss)
    assert_close(
        found.sink_rate.sel(cut="early"), (early.sink_attention > 0.3).mean(("layer", "head"))
    )
    with zero(model, "head", layer=1, head=[2, 3]):
        assert_close(found.loss.sel(cut="late"), measure(model, TOKENS, ("loss",)).loss)
        with zero(model, "head", layer=0, head=[1, 2]):
            assert_close(found.loss.sel(cut="all"), measure(model, TOKENS, ("loss",)).loss)
    assert_close(found.loss.sel(cut="none"), measure(model, TOKENS, ("loss",)).loss)


def test_other_peaks_are_counted_where_the_first_token_is_longest(model):
    """Token 7 is made to shine after the last layer, wherever it stands and first of all at 0."""
    tokens = TOKENS.clone()
    tokens[tokens == 7] = 8
    tokens[:, [0, 3, 9]] = 7
    model.model.embed_tokens.weight[7] *= 1000
    found = pruning.without_early_or_late(model, tokens, np.array([0]))
    assert_close(found.other_peaks.sel(cut="none"), np.full(3, 2 / 39))
    norms = measure(model, tokens, ("residual_norm",)).residual_norm
    assert_close(
        found.first_norm.sel(cut="none"), norms.isel(position=0).max("residual_layer"), 0.1
    )


def test_eight_bit_losses_stand_beside_the_exact_ones(model):
    losses = costs.rounding_losses(model, TOKENS)
    exact = costs.token_losses(model, TOKENS)
    assert_close(losses.sel(numbers="exact"), exact, 0)
    with quantized(model, "token"):
        assert_close(losses.sel(numbers="token"), costs.token_losses(model, TOKENS), 0)
    assert float(abs(losses.sel(numbers="weights alone") - exact).max()) > 0


def test_bigram_excess_is_measured_while_a_change_holds():
    config = experiments.one_layer("quick")[0]
    config = replace(config, evaluation_size=8)
    model = Transformer(config.model).requires_grad_(False)
    with torch.no_grad():
        model.layers[0].attention.wo.weight.mul_(30)  # an untrained head, loud enough to matter
    runs = [Run(config, model, xr.Dataset(), {})]
    changes = {"whole": nullcontext, "window": partial(streaming, window=4, kept=0)}
    found = costs.bigram_excess({"toy": runs}, changes)
    assert_close(found["whole"]["toy"], excess_risks(runs)["bigram"], 0)
    assert abs(found["window"]["toy"] - found["whole"]["toy"]) > 1e-3
    assert_close(excess_risks(runs)["bigram"], found["whole"]["toy"], 0)


def test_a_toys_rounding_errors_are_those_of_its_own_texts_in_one_range():
    config = replace(experiments.one_layer("quick")[0], evaluation_size=5)
    runs = []
    for seed in range(2):
        torch.manual_seed(seed)
        made = replace(config, seed=seed)
        runs.append(Run(made, Transformer(made.model).requires_grad_(False), xr.Dataset(), {}))
    found = costs.toy_rounding_errors(runs)
    assert found.shape == (2, 1)
    embedded = [
        run.model.token_embedding(run.evaluation_tokens) + run.model.position_embedding.weight
        for run in runs
    ]
    assert_close(found[:, 0], [int8_error(states, first=1).mean() for states in embedded], 1e-6)


def test_the_interval_of_a_mean_is_students():
    low, high = costs.interval_of_mean(np.array([1.0, 2.0, 3.0]))
    assert_close([low, high], [2 - 4.30265 / 3**0.5, 2 + 4.30265 / 3**0.5])
