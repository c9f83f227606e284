"""Dormant heads are found where they were built in, and only fresh texts judge them."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr
from scipy import stats
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from sinkbook.data import corpora
from sinkbook.errors import SinkbookError
from sinkbook.llm import dormant_head_tests, dormant_heads
from sinkbook.models import LanguageModel, partial_forward
from sinkbook.models.interventions import zero
from sinkbook.probe import measure
from sinkbook.probe.attention_maps import attention_weights
from sinkbook.toy.transformer import Transformer, TransformerConfig
from tiny import EACH_LAYOUT, tiny_model

DOMAINS = ["prose", "code", "French"]


def toy():
    return EACH_LAYOUT["toy"]().requires_grad_(False)


def sharing_keys():
    """A model whose last layers read the keys and values of earlier ones."""
    return tiny_model(
        "gemma3n_text",
        vocab_size=50,
        vocab_size_per_layer_input=50,
        hidden_size_per_layer_input=8,
        num_hidden_layers=4,
        num_kv_shared_layers=2,
        layer_types=["full_attention"] * 4,
        head_dim=8,
        laurel_rank=4,
        activation_sparsity_pattern=[0.0] * 4,
        sliding_window=8,
    )


LAYOUTS = EACH_LAYOUT | {"sharing keys": sharing_keys}


def random_tokens(domains=DOMAINS, texts=6, length=12) -> xr.DataArray:
    ids = np.random.default_rng(0).integers(1, 40, size=(len(domains), texts, length))
    ids[..., 0] = 0
    coords = {"domain": domains, "text": range(texts), "position": range(length)}
    return xr.DataArray(ids, dims=tuple(coords), coords=coords)


def by_hand(model, ids) -> np.ndarray:
    """Next-token losses in the plainest way."""
    output = model(torch.as_tensor(ids))
    logits = output if torch.is_tensor(output) else output.logits
    chosen = logits.log_softmax(-1)[:, :-1].gather(-1, torch.as_tensor(ids)[:, 1:, None])
    return -chosen[..., 0].numpy()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_loss_changes_are_those_of_cutting_heads_in_the_whole_model(layout):
    model = LAYOUTS[layout]().requires_grad_(False)
    tokens = random_tokens().sel(domain="prose", drop=True)
    heads = [(0, 1), (2, 3), (1, 0), (2, 0)]
    changes = dormant_heads.loss_changes(model, tokens, heads)
    whole = by_hand(model, tokens.values)
    for (layer, head), change in zip(heads, changes, strict=True):
        with zero(model, "head", layer=layer, head=head):
            without = by_hand(model, tokens.values)
        np.testing.assert_allclose(change, without - whole, atol=1e-5)
    assert np.abs(changes).max() > 1e-3
    np.testing.assert_array_equal(by_hand(model, tokens.values), whole)


def test_models_whose_layers_share_keys_and_values_are_not_resumed():
    ids = torch.as_tensor(random_tokens().values[0])
    answers = {
        layout: partial_forward.can_resume(build(), ids) for layout, build in LAYOUTS.items()
    }
    assert answers == dict.fromkeys(EACH_LAYOUT, True) | {"sharing keys": False}


def test_layers_that_were_given_run_again_afterwards_also_after_an_error():
    model, ids = EACH_LAYOUT["llama"](), torch.as_tensor(random_tokens().values[0])
    with partial_forward.kept(model) as outputs:
        whole = partial_forward.logits_of(model, ids)
    other = ids.flip(0)
    with pytest.raises(ZeroDivisionError), partial_forward.given(model, outputs, below=3):
        given = partial_forward.logits_of(model, other)
        raise ZeroDivisionError
    torch.testing.assert_close(given, whole)  # the layers did not look at the other texts
    assert not torch.allclose(partial_forward.logits_of(model, other), whole)


def test_a_scan_is_the_probe_domain_by_domain_and_text_by_text():
    model, tokens = toy(), random_tokens(texts=11)  # more than one batch
    scanned = dormant_heads.scan(model, tokens)
    assert dict(scanned.sizes) == {"domain": 3, "text": 11, "layer": 3, "head": 4}
    ids = torch.as_tensor(tokens.sel(domain="French", text=[10]).values)
    alone = measure(model, ids, ("sink_attention", "head_output_norm")).isel(batch=0)
    there = scanned.sel(domain="French", text=10)
    np.testing.assert_allclose(there.sink_attention, alone.sink_attention, atol=1e-6)
    np.testing.assert_allclose(there.head_output_norm, alone.head_output_norm, rtol=1e-5)
    np.testing.assert_allclose(there.output_share.mean("head"), 1, rtol=1e-5)


# --- Other things than zero in a head's place ------------------------------------------------

OTHER_WAYS = ("mean", "shuffled")


def with_a_constant_head(layer: int, head: int):
    """A GPT-2 of which one head writes the same at every position of every text."""
    model = EACH_LAYOUT["gpt2"]().requires_grad_(False)
    projection, width = model.transformer.h[layer].attn.c_attn, model.config.n_embd
    size = width // model.config.n_head
    own = slice(2 * width + head * size, 2 * width + (head + 1) * size)
    projection.weight[:, own], projection.bias[own] = 0, 3
    return model


def test_a_head_that_writes_a_constant_is_missed_against_zero_and_not_against_its_mean():
    tokens = random_tokens(texts=9).sel(domain="prose", drop=True)  # more than one batch
    heads = [(1, 2), (1, 0)]
    zeroed, *others = (
        dormant_heads.loss_changes(with_a_constant_head(1, 2), tokens, heads, way=way)
        for way in ("zero", *OTHER_WAYS)
    )
    assert abs(zeroed[0]).max() > 1e-3
    for changes in others:
        assert abs(changes[0]).max() < 1e-6 and abs(changes[1]).max() > 1e-4


def test_what_it_writes_on_an_equal_text_is_what_a_head_writes():
    tokens = random_tokens().sel(domain="prose", drop=True)
    equal = tokens.isel(text=[2] * 5).assign_coords(text=range(5))
    for way in OTHER_WAYS:
        assert abs(dormant_heads.loss_changes(toy(), equal, [(1, 2)], way=way)).max() < 1e-6
    assert abs(dormant_heads.loss_changes(toy(), equal, [(1, 2)])).max() > 1e-3


def test_the_loss_against_a_heads_mean_is_that_of_a_slow_float64_reference():
    model = EACH_LAYOUT["llama"]().requires_grad_(False).double()
    tokens = random_tokens(texts=10).sel(domain="code", drop=True)
    layer, head, width = 1, 3, 4
    own = slice(head * width, (head + 1) * width)
    reads, written, without = model.model.layers[layer].self_attn.o_proj, [], []
    note = reads.register_forward_pre_hook(lambda _, inputs: written.append(inputs[0][0, :, own]))
    whole = np.concatenate([by_hand(model, ids[None]) for ids in tokens.values])
    note.remove()
    for number, ids in enumerate(tokens.values):
        mean = sum(other for n, other in enumerate(written) if n != number) / (len(written) - 1)

        def put(_, inputs, mean=mean):
            changed = inputs[0].clone()
            changed[0, :, own] = mean
            return (changed,)

        hook = reads.register_forward_pre_hook(put)
        without.append(by_hand(model, ids[None])[0])
        hook.remove()
    found = dormant_heads.loss_changes(model, tokens, [(layer, head)], way="mean")
    np.testing.assert_allclose(found[0], np.stack(without) - whole, rtol=0, atol=2e-6)
    assert abs(found).max() > 1e-3


def test_several_ways_stand_beside_each_other_each_as_by_itself():
    model, tokens = toy(), random_tokens()
    candidates = dormant_heads.select(dormant_heads.scan(model, tokens), 3)
    ways = ("zero", *OTHER_WAYS)
    together = dormant_heads.ablate(
        model, tokens, candidates, everywhere=[0], way=ways, other_ways=[0, 2]
    )
    assert together.dims == ("way", "candidate", "domain", "text")
    alone = dormant_heads.ablate(model, tokens, candidates, everywhere=[0])
    np.testing.assert_allclose(together.sel(way="zero"), alone, atol=1e-6)
    for way in OTHER_WAYS:
        alone = dormant_heads.ablate(model, tokens, candidates, way=way)
        assert alone.notnull().all("text").sum("domain").values.tolist() == [2, 2, 2]
        alone[1] = np.nan
        np.testing.assert_allclose(together.sel(way=way), alone, atol=1e-6)


def test_an_unknown_way_is_refused_before_anything_runs():
    tokens = random_tokens()
    candidates = pd.DataFrame({"layer": [0]})
    for way in ("means", ["zero", "means"]):
        with pytest.raises(SinkbookError, match="no way 'means'.*zero, mean, shuffled"):
            dormant_heads.ablate(torch.nn.Identity(), tokens, candidates, way=way)
    with pytest.raises(SinkbookError, match="no way 'means'"):
        dormant_heads.loss_changes(
            torch.nn.Identity(), tokens.sel(domain="code"), [(0, 1)], way="means"
        )


# --- A head that is dormant on one kind of text ----------------------------------------------

# Token 0 opens each text, 1 to 9 are words of the sleepy domain, 10 to 19 of the other.
SLEEPY, AWAKE = slice(1, 10), slice(10, 20)


def sleeper() -> Transformer:
    """One layer of two heads. Queries of the sleepy words give head 0's attention to the first
    token, whose value is 0; those of the others spread it over the text. Head 1 is not there.
    """
    torch.manual_seed(0)
    config = TransformerConfig(vocab_size=20, length=12, width=24, layers=1, heads=2)
    model = Transformer(config).eval().requires_grad_(False)
    attention, block = model.layers[0].attention, model.layers[0]
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.zero_()
    embedding = model.token_embedding.weight
    embedding[0, 0], embedding[SLEEPY, 1], embedding[AWAKE, 2] = 10, 10, 10
    embedding[AWAKE, 3:13] = 5 * torch.eye(10)
    model.layers[0].mlp = None
    block.attention_norm.weight.fill_(1)
    attention.wq.weight[0, 1] = 20  # a sleepy word asks
    attention.wk.weight[0, 0] = 20  # and the first token answers
    attention.wv.weight[1:11, 3:13] = torch.eye(10) - 0.1  # blind to what all words share
    attention.wo.weight[13:23, 1:11] = 5 * torch.eye(10)
    model.output.weight[AWAKE, 13:23] = 2 * torch.eye(10)  # what was attended to comes next
    return model


def sleeper_tokens(texts: int = 12) -> xr.DataArray:
    generator = np.random.default_rng(1)
    awake = np.repeat(generator.integers(10, 20, size=(texts, 1)), 11, axis=1)
    strays = generator.uniform(size=awake.shape) < 0.1
    awake[strays] = generator.integers(10, 20, size=strays.sum())
    ids = np.stack([generator.integers(1, 10, size=(texts, 11)), awake])
    ids = np.concatenate([np.zeros((2, texts, 1), dtype=ids.dtype), ids], axis=2)
    coords = {"domain": ["sleepy", "awake"], "text": range(texts), "position": range(12)}
    return xr.DataArray(ids, dims=tuple(coords), coords=coords)


@pytest.fixture(scope="module")
def search():
    """The whole way from texts to a verdict, on a model whose only dormant head is known."""
    model = sleeper()
    chosen_on, held_out = dormant_heads.halves(sleeper_tokens(), seed=3)
    seen = dormant_heads.scan(model, chosen_on)
    candidates = dormant_heads.select(seen, 1)
    control = dormant_heads.random_heads(seen, 1, without=candidates)
    tested = pd.concat([candidates, control], ignore_index=True)
    changes = dormant_heads.ablate(model, held_out, tested)
    return model, chosen_on, held_out, tested, changes


def test_the_search_finds_the_one_head_that_was_built_to_sleep(search):
    model, _, held_out, tested, changes = search
    assert tested.name.tolist() == ["L0H0", "L0H1"]
    assert tested.loc[0, ["active", "dormant"]].tolist() == ["awake", "sleepy"]
    found = dormant_head_tests.evidence(tested, dormant_heads.scan(model, held_out), changes)
    assert found.meets.tolist() == [True, False]
    assert found.gap[0] > 0.6 and found.active_change[0] > 0.1
    assert abs(found.dormant_change[0]) < 1e-4 and found.active_change[1] == 0


def test_texts_that_chose_a_head_are_refused_as_its_judges(search):
    model, chosen_on, held_out, tested, changes = search
    mixed = xr.concat([held_out, chosen_on.isel(text=[2])], dim="text")
    text = int(chosen_on.text[2])
    with pytest.raises(SinkbookError, match=f"text {text} had a say"):
        dormant_head_tests.evidence(tested, dormant_heads.scan(model, mixed), changes)


def test_what_stands_in_the_other_half_does_not_change_which_heads_are_chosen():
    model, tokens = toy(), random_tokens(texts=8)
    chosen_on, held_out = dormant_heads.halves(tokens, seed=1)
    before = dormant_heads.select(dormant_heads.scan(model, chosen_on), 3)
    spoilt = tokens.copy()
    spoilt.loc[{"text": held_out.text}] = 7
    again, _ = dormant_heads.halves(spoilt, seed=1)
    pd.testing.assert_frame_equal(dormant_heads.select(dormant_heads.scan(model, again), 3), before)
    assert set(chosen_on.text.values).isdisjoint(held_out.text.values)
    assert chosen_on.sizes["text"] == held_out.sizes["text"] == 4


def test_a_head_is_taken_away_in_its_own_domains_or_everywhere_if_asked():
    model, tokens = toy(), random_tokens()
    candidates = dormant_heads.select(dormant_heads.scan(model, tokens), 2)
    changes = dormant_heads.ablate(model, tokens, candidates, everywhere=[1])
    own = set(candidates.loc[0, ["active", "dormant"]])
    measured = changes.notnull().all("text")
    assert {str(d) for d in measured.domain[measured.sel(candidate=0)].values} == own
    assert measured.sel(candidate=1).all()
    row = candidates.loc[1]
    alone = dormant_heads.loss_changes(
        model, tokens.sel(domain="code"), [(int(row.layer), int(row["head"]))]
    )
    np.testing.assert_allclose(
        changes.sel(candidate=1, domain="code"), alone[0].mean("position"), atol=1e-6
    )


# --- Gaps, by hand ---------------------------------------------------------------------------


def scanned(attention: np.ndarray, domains=DOMAINS) -> xr.Dataset:
    """A scan with given sink attention, (domain, text, layer, head)."""
    dims = ("domain", "text", "layer", "head")
    coords = {name: np.arange(n) for name, n in zip(dims, attention.shape, strict=True)}
    coords["domain"] = list(domains)
    values = xr.DataArray(attention, dims=dims, coords=coords)
    norm = 2 - values
    return xr.Dataset(
        {
            "sink_attention": values,
            "head_output_norm": norm,
            "output_share": norm / norm.mean("head"),
        }
    )


def test_a_gap_lies_between_the_domains_where_a_head_works_most_and_least():
    attention = np.zeros((3, 2, 1, 2))
    attention[:, :, 0, 0] = [[0.9, 0.7], [0.1, 0.3], [0.5, 0.5]]
    attention[:, :, 0, 1] = 0.4
    first, second = dormant_heads.gaps(scanned(attention)).itertuples()
    assert (first.name, first.active, first.dormant) == ("L0H0", "code", "prose")
    assert first.gap == pytest.approx(0.6) and second.gap == pytest.approx(0)
    turned = dormant_heads.gaps(scanned(attention), pair=("prose", "code"))
    assert turned.gap[0] == pytest.approx(-0.6)
    by_norm = dormant_heads.gaps(scanned(attention), by="head_output_norm")
    assert (by_norm.active[0], by_norm.dormant[0]) == ("code", "prose")
    assert by_norm.gap[0] == pytest.approx(0.6)


def test_heads_that_were_never_measured_are_not_chosen():
    attention = np.random.default_rng(0).uniform(size=(3, 2, 2, 2))
    attention[:, :, 0] = np.nan
    assert set(dormant_heads.gaps(scanned(attention)).layer) == {1}


def test_a_candidate_in_doubt_stands_behind_one_that_is_sure():
    attention = np.zeros((2, 8, 1, 2))
    attention[0] = 0.9
    attention += np.random.default_rng(0).normal(scale=0.01, size=attention.shape)
    seen = scanned(attention, ["prose", "code"])
    candidates = dormant_heads.select(seen, 2)
    noisy, steady = np.tile([0.1, 0.9], 4), np.tile([0.19, 0.21], 4)
    values = np.stack([np.stack([np.full(8, 0.0), rise]) for rise in (noisy, steady)])
    values += np.random.default_rng(1).normal(scale=1e-4, size=values.shape)
    changes = xr.DataArray(
        values,
        dims=("candidate", "domain", "text"),
        coords={"candidate": [0, 1], "domain": seen.domain, "text": seen.text},
    )
    chosen = dormant_head_tests.shortlist(candidates, seen, changes, 2)
    assert chosen.name.tolist() == [candidates.name[1], candidates.name[0]]


def test_the_evidence_is_the_textbook_mean_error_interval_and_test():
    generator = np.random.default_rng(0)
    seen = scanned(generator.uniform(size=(2, 8, 1, 1)), ["prose", "code"])
    candidates = dormant_heads.select(seen, 1).assign(chosen_on=[(100, 101)])
    changes = xr.DataArray(
        generator.normal(0.3, 0.1, size=(1, 2, 8)),
        dims=("candidate", "domain", "text"),
        coords={"candidate": [0], "domain": seen.domain, "text": seen.text},
    )
    (found,) = dormant_head_tests.evidence(candidates, seen, changes).itertuples()
    sides = {side: changes[0].sel(domain=getattr(found, side)) for side in ("active", "dormant")}
    for side, values in sides.items():
        test = stats.ttest_1samp(values, 0)
        interval = test.confidence_interval(0.95)
        assert getattr(found, f"{side}_change") == pytest.approx(values.mean().item())
        assert getattr(found, f"{side}_error") == pytest.approx(stats.sem(values))
        assert getattr(found, f"{side}_low") == pytest.approx(interval.low)
        assert getattr(found, f"{side}_high") == pytest.approx(interval.high)
    assert found.active_p == pytest.approx(stats.ttest_1samp(sides["active"], 0).pvalue)
    attention = seen.sink_attention.squeeze()
    expected = attention.sel(domain=found.dormant) - attention.sel(domain=found.active)
    assert found.gap == pytest.approx(expected.mean().item())
    spread = attention.var("text", ddof=1).sum().item()
    assert found.gap_error == pytest.approx(np.sqrt(spread / 8))


# --- Having searched -------------------------------------------------------------------------


def test_correction_is_benjamini_and_yekutielis_step_up_by_hand():
    p = np.array([0.04, 0.001, 0.02, 0.5])
    harmonic = 1 + 1 / 2 + 1 / 3 + 1 / 4
    in_order = np.sort(p) * 4 * harmonic / np.arange(1, 5)
    stepped = np.minimum(np.minimum.accumulate(in_order[::-1])[::-1], 1)
    np.testing.assert_allclose(dormant_head_tests.corrected(p)[np.argsort(p)], stepped)


def test_the_largest_gap_of_many_heads_without_any_difference_is_rarely_above_chance():
    quantiles = []
    for seed in range(40):
        attention = np.random.default_rng(seed).uniform(size=(2, 6, 5, 8))
        seen = scanned(attention, ["prose", "code"])
        by_chance = dormant_head_tests.chance_gaps(seen, count=200, seed=seed)
        quantiles.append((by_chance >= dormant_heads.gaps(seen).gap.max()).mean())
    assert 0.3 < np.mean(quantiles) < 0.7
    assert np.mean(np.array(quantiles) <= 0.05) < 0.15


def test_a_gap_that_is_there_lies_above_all_gaps_by_chance():
    attention = np.random.default_rng(0).uniform(0, 0.2, size=(2, 6, 5, 8))
    attention[1, :, 2, 3] += 0.7
    seen = scanned(attention, ["code", "prose"])
    for pair in (None, ("code", "prose")):
        by_chance = dormant_head_tests.chance_gaps(seen, pair=pair, count=200)
        assert (by_chance < dormant_heads.gaps(seen, pair=pair).gap.max()).mean() > 0.95
    reverse = dormant_head_tests.chance_gaps(seen, pair=("prose", "code"), count=200)
    assert (reverse < dormant_heads.gaps(seen, pair=("prose", "code")).gap.max()).mean() < 0.9


def test_agreement_is_spearmans_and_resamples_heads_with_both_of_their_domains():
    generator = np.random.default_rng(0)
    seen = scanned(generator.uniform(size=(2, 4, 5, 6)), ["prose", "code"])
    control = dormant_heads.random_heads(seen, 20, without=pd.DataFrame({"name": []}))
    changes = xr.DataArray(
        generator.normal(size=(20, 2, 4)),
        dims=("candidate", "domain", "text"),
        coords={"candidate": control.index, "domain": seen.domain, "text": seen.text},
    )
    found = dormant_head_tests.cases(control, seen, changes)
    draws = dormant_head_tests.agreement(found, count=300)
    for name, detector in dormant_head_tests.DETECTORS.items():
        expected = stats.spearmanr(detector(found), found.effect).statistic
        assert draws.sel(detector=name, draw=0).item() == pytest.approx(expected)
        assert draws.sel(detector=name).std() > 0.02
    found["effect"] = 1 - found.sink_attention
    exact = dormant_head_tests.agreement(found, count=50).sel(
        detector="attention kept from the sink"
    )
    np.testing.assert_allclose(exact, 1)


# --- Texts -----------------------------------------------------------------------------------


@pytest.fixture
def reader(monkeypatch) -> LanguageModel:
    """A reader of words, and domains of as many texts as are asked for."""
    vocabulary = {"<s>": 0} | {f"w{i}": i for i in range(1, 40)}
    words = Tokenizer(models.WordLevel(vocabulary, "w1"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>")

    def texts(domain, minimum_characters):
        generator = np.random.default_rng(len(domain))
        rows = generator.integers(1, 40, size=(20, 30))
        return [" ".join(f"w{i}" for i in row) for row in rows]

    monkeypatch.setattr(corpora, "texts", texts)
    return LanguageModel("tiny", tiny_model(), tokenizer, prefix=(0,), card="")


def test_repeated_domains_say_the_same_four_times_after_the_first_token(reader):
    tokens = dormant_heads.domain_tokens(reader, count=5, length=17, seed=0)
    assert tokens.domain.values.tolist() == [*dormant_heads.WRITTEN, *dormant_heads.REPEATED]
    assert (tokens.isel(position=0) == 0).all()
    for name in dormant_heads.REPEATED:
        passages = tokens.sel(domain=name)[:, 1:].values.reshape(5, 4, 4)
        assert (passages == passages[:, :1]).all()
    prose = tokens.sel(domain="prose")[:, 1:5]
    np.testing.assert_array_equal(tokens.sel(domain="repeated prose")[:, 1:5], prose)


def test_without_a_first_token_of_their_own_texts_repeat_from_the_start(reader):
    bare = replace(reader, prefix=())
    tokens = dormant_heads.domain_tokens(bare, count=5, length=16)
    for name in dormant_heads.REPEATED:
        passages = tokens.sel(domain=name).values.reshape(5, 4, 4)
        assert (passages == passages[:, :1]).all()


def test_random_tokens_come_from_the_seed_and_are_never_special(reader):
    first, same, other = (
        dormant_heads.domain_tokens(reader, count=20, length=29, seed=s).sel(
            domain="repeated random"
        )
        for s in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, same)
    assert (first != other).mean() > 0.5
    assert first[:, 1:].min() >= 1 and first.max() > 35


def test_running_texts_change_their_domain_where_they_say(reader):
    tokens = dormant_heads.domain_tokens(reader, count=4, length=17)
    running = dormant_heads.running_texts(tokens, ("prose", "again", "code", "prose"), length=5)
    assert running.sizes == {"text": 4, "position": 21}
    parts = [running[:, 1 + 5 * number : 6 + 5 * number].values for number in range(4)]
    np.testing.assert_array_equal(parts[0], parts[1])
    np.testing.assert_array_equal(parts[2], tokens.sel(domain="code")[:, 1:6])
    assert (parts[3] != parts[0]).any(axis=1).all()
    assert running.part.values.tolist() == [0] + [0] * 5 + [1] * 5 + [2] * 5 + [3] * 5


def test_a_trace_is_the_probe_and_the_cut_token_by_token():
    model, tokens = toy(), random_tokens(length=16)
    running = dormant_heads.running_texts(tokens, ("prose", "again", "code"), length=5)
    heads = dormant_heads.select(dormant_heads.scan(model, tokens), 2)
    traced = dormant_heads.trace(model, running, heads)
    assert traced.candidate.values.tolist() == heads.name.tolist()
    assert traced.position.values.tolist() == list(range(1, 15))
    ids = torch.as_tensor(running.values)
    for row in heads.itertuples():
        found = traced.sel(candidate=row.name)
        weights = attention_weights(model, ids, layer=row.layer)[:, row.head, 1:-1, 0]
        np.testing.assert_allclose(found.sink_attention, weights, atol=1e-5)
        changes = dormant_heads.loss_changes(model, running, [(row.layer, row.head)])[0]
        np.testing.assert_allclose(found.change, changes[:, 1:], atol=1e-6)


def test_a_random_draw_leaves_out_selected_heads_and_else_stays_what_it_was():
    seen = scanned(np.random.default_rng(0).uniform(size=(3, 4, 4, 5)))
    nobody = pd.DataFrame({"name": []})
    before = dormant_heads.random_heads(seen, 6, without=nobody, seed=2)
    after = dormant_heads.random_heads(seen, 6, without=before.iloc[[1]], seed=2)
    kept = before.name.drop(1).tolist()
    assert after.name.tolist()[:5] == kept and after.name[5] not in before.name.values
    other = dormant_heads.random_heads(seen, 6, without=nobody, seed=3)
    assert set(other.name) != set(before.name)


def test_a_head_found_in_two_ways_is_one_candidate():
    seen = scanned(np.random.default_rng(0).uniform(size=(3, 4, 2, 2)))
    first, second = dormant_heads.select(seen, 3), dormant_heads.select(seen, 4, by="output_share")
    pooled = dormant_heads.pooled(first, second)
    assert sorted(pooled.name) == ["L0H0", "L0H1", "L1H0", "L1H1"]
    pd.testing.assert_frame_equal(pooled.head(3), first)
