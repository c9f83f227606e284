"""The sink cache, its one-pass twin, and StreamingLLM's definition written out agree."""

import gc
import re
from contextlib import nullcontext
from functools import partial

import jaxtyping
import numpy as np
import pytest
import torch
from torch import nn
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from sinkbook.errors import SinkbookError
from sinkbook.llm import components
from sinkbook.mitigations import sink_cache
from sinkbook.mitigations.pruning import head_orders
from sinkbook.mitigations.sink_cache import SinkCache, streaming, visible_keys
from sinkbook.models.interventions import zero
from sinkbook.models.losses import token_losses
from sinkbook.models.partial_forward import logits_of
from sinkbook.probe.attention_maps import attention_logits, attention_weights
from sinkbook.probe.measure import measure
from sinkbook.toy.attention import KERNELS
from sinkbook.toy.transformer import Transformer, TransformerConfig
from tiny import LOUD_TOKENS, assert_close, losses_of, loud_llama

TOKENS = torch.randint(0, 50, (2, 30), generator=torch.Generator().manual_seed(0))
SIZES = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "initializer_range": 0.3,  # large, so that positions and windows make a difference
    "pad_token_id": None,
    "eos_token_id": None,
}
FAMILIES = {
    "llama": (LlamaForCausalLM, LlamaConfig(**SIZES, num_key_value_heads=2)),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config(**SIZES, num_key_value_heads=2)),
    "pythia": (GPTNeoXForCausalLM, GPTNeoXConfig(**SIZES)),
}


def made(family: str):
    torch.manual_seed(0)
    kind, config = FAMILIES[family]
    return kind(config).eval().double().requires_grad_(False)


@pytest.fixture(params=FAMILIES)
def model(request):
    return made(request.param)


@pytest.fixture
def llama():
    return made("llama")


def token_by_token(model, cache):
    steps = [model(TOKENS[:, i : i + 1], past_key_values=cache).logits for i in range(30)]
    return torch.cat(steps, dim=1)


def in_one_pass(model, **layout):
    with streaming(model, **layout):
        return model(TOKENS, use_cache=False).logits


def by_definition(model, window, kept):
    """StreamingLLM to the letter, for Llama: keys are kept unrotated, and whenever a token is read
    the ones that it sees are rotated by their rank in the cache."""
    states = model.model.embed_tokens(TOKENS)
    for layer in model.model.layers:
        attention, normed = layer.self_attn, layer.input_layernorm(states)
        query, key, value = (
            projection(normed).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        outputs = []
        for n in range(TOKENS.shape[1]):
            cached = [j for j in range(n + 1) if j in kept or n - j < window]
            rank = torch.arange(len(cached))[None]
            cos, sin = model.model.rotary_emb(states, rank)
            _, keys = apply_rotary_pos_emb(key[:, :, cached], key[:, :, cached], cos, sin)
            one = query[:, :, n : n + 1]
            own, _ = apply_rotary_pos_emb(one, one, cos[:, -1:], sin[:, -1:])
            keys, values = (
                s.repeat_interleave(attention.num_key_value_groups, 1)
                for s in (keys, value[:, :, cached])
            )
            weights = (own @ keys.mT * attention.scaling).softmax(-1)
            outputs.append((weights @ values).transpose(1, 2).flatten(2))
        states = states + attention.o_proj(torch.cat(outputs, dim=1))
        states = states + layer.mlp(layer.post_attention_layernorm(states))
    return model.lm_head(model.model.norm(states))


@pytest.mark.parametrize(("sinks", "window"), [(0, 7), (2, 5), (4, 8), (1, 1), (3, 100)])
def test_the_cache_and_its_one_pass_twin_agree(model, sinks, window):
    one_by_one = token_by_token(model, SinkCache(model, sinks=sinks, window=window))
    at_once = in_one_pass(model, window=window, kept=sinks)
    torch.testing.assert_close(one_by_one, at_once, atol=1e-10, rtol=0)
    differs = (at_once - model(TOKENS).logits).abs().max()
    assert (differs > 0.1) if window < 30 else (differs < 1e-10)


@pytest.mark.parametrize("kept", [[], [0], [0, 1, 2, 3], [2, 3, 6], [1, 9, 14]])
def test_the_twin_is_streaming_by_definition_for_any_kept_tokens(llama, kept):
    expected = by_definition(llama, 6, kept)
    # The model's own rotation is in single precision.
    torch.testing.assert_close(in_one_pass(llama, window=6, kept=kept), expected, atol=1e-4, rtol=0)


def test_positions_are_counted_in_the_cache_not_in_the_text(llama):
    """With the keys left where they were read, a far query would see the sinks far away."""
    visible = visible_keys(30, 6, torch.tensor([0, 1]))
    mask = torch.zeros(30, 30, dtype=torch.float64).masked_fill(~visible, float("-inf"))
    left = llama(TOKENS, attention_mask=mask[None, None].expand(2, -1, -1, -1)).logits
    moved = in_one_pass(llama, window=6, kept=2)
    torch.testing.assert_close(moved[:, :8], left[:, :8])
    assert (moved[:, 8:] - left[:, 8:]).abs().max() > 0.1


def test_a_prompt_in_one_piece_within_the_window_changes_nothing(llama):
    cache = SinkCache(llama, sinks=2, window=9)
    parts = [llama(TOKENS[:, :9], past_key_values=cache).logits]
    parts += [llama(TOKENS[:, i : i + 1], past_key_values=cache).logits for i in range(9, 30)]
    expected = in_one_pass(llama, window=9, kept=2)
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, atol=1e-10, rtol=0)


def test_a_longer_piece_is_read_whole_on_top_of_what_is_held(llama):
    """The second piece of six sees two sinks and three more, with the sinks right before these."""
    cache = SinkCache(llama, sinks=2, window=4)
    llama(TOKENS[:, :20], past_key_values=cache)
    assert cache.layers[0].keys.shape[2] == 5 and cache.get_seq_length() == 20
    logits = llama(TOKENS[:, 20:26], past_key_values=cache).logits
    assert cache.layers[2].values.shape[2] == 5 and cache.get_seq_length() == 26
    # Its first token sees exactly sinks and window, as when it comes alone.
    alone = SinkCache(llama, sinks=2, window=4)
    llama(TOKENS[:, :20], past_key_values=alone)
    first = llama(TOKENS[:, 20:21], past_key_values=alone).logits
    torch.testing.assert_close(logits[:, :1], first, atol=1e-10, rtol=0)


def test_generate_goes_on_past_the_window_as_the_twin_predicts(model):
    prompt = TOKENS[:, :5]
    cache = SinkCache(model, sinks=2, window=6)
    written = model.generate(prompt, past_key_values=cache, max_new_tokens=40, do_sample=False)
    assert written.shape == (2, 45)
    with streaming(model, window=6, kept=2):
        predicted = model(written[:, :-1], use_cache=False).logits.argmax(-1)
    assert torch.equal(predicted[:, 4:], written[:, 5:])
    dense = model.generate(prompt, max_new_tokens=40, do_sample=False)
    assert not torch.equal(dense, written)


def test_the_cache_holds_no_more_than_sinks_and_window(llama):
    cache = SinkCache(llama, sinks=3, window=6)
    token_by_token(llama, cache)
    assert [layer.keys.shape[2] for layer in cache.layers] == [8, 8, 8]
    cache.reset()
    assert cache.get_seq_length() == 0
    again = token_by_token(llama, cache)
    torch.testing.assert_close(again, in_one_pass(llama, window=6, kept=3), atol=1e-10, rtol=0)


def test_the_cache_follows_beams(llama):
    """The scores that beam search ends with are those of its sequences under the twin."""
    found = llama.generate(
        TOKENS[:, :8],
        past_key_values=SinkCache(llama, sinks=2, window=6),
        max_new_tokens=12,
        num_beams=3,
        do_sample=False,
        return_dict_in_generate=True,
        output_scores=True,
    )
    written = found.sequences
    with streaming(llama, window=6, kept=2):
        chances = llama(written[:, :-1], use_cache=False).logits.log_softmax(-1)
    scores = chances[:, 7:].gather(2, written[:, 8:, None]).mean(1)[:, 0]
    torch.testing.assert_close(scores.float(), found.sequences_scores.float())


def test_a_toy_sees_the_window_and_its_kept_tokens_only():
    torch.manual_seed(0)
    config = TransformerConfig(vocab_size=50, length=30, width=16, layers=1)
    toy = Transformer(config).requires_grad_(False)
    whole = toy(TOKENS)
    with streaming(toy, window=5, kept=[3]):
        assert torch.equal(toy(TOKENS)[:, :5], whole[:, :5])
        changed = TOKENS.clone()
        changed[:, [0, 1, 2, *range(4, 20)]] = 7  # out of the window of the last five
        torch.testing.assert_close(toy(changed)[:, 25:], toy(TOKENS)[:, 25:])
        changed[:, 3] = (TOKENS[:, 3] + 1) % 50
        assert not torch.allclose(toy(changed)[:, 25:], toy(TOKENS)[:, 25:])
    assert torch.equal(toy(TOKENS), whole)


def toy_under(kernel: str) -> Transformer:
    torch.manual_seed(0)
    config = TransformerConfig(vocab_size=50, length=30, width=16, layers=2, attention=kernel)
    return Transformer(config).eval().requires_grad_(False)


READERS = {
    "measure": lambda model: measure(model, TOKENS, ("loss",)),
    "attention_weights": lambda model: attention_weights(model, TOKENS, layer=0),
    "writes": lambda model: components.writes(model, TOKENS),
    "head_orders": lambda model: head_orders(model, TOKENS),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("kernel", [None, *(name for name in KERNELS if name != "softmax")])
def test_what_reads_attention_is_refused_inside_streaming_by_its_name(llama, kernel, reader):
    model = llama if kernel is None else toy_under(kernel)
    refused = pytest.raises(SinkbookError, match="is measured inside `streaming`.*before the body")
    with streaming(model, window=6), refused:
        READERS[reader](model)
    READERS[reader](model)


@pytest.mark.parametrize("kept", [0, 2])
def test_a_toy_under_softmax_is_measured_as_it_streams(kept):
    toy = toy_under("softmax")
    seen = visible_keys(30, 6, torch.arange(kept))
    logits = attention_logits(toy, TOKENS, layer=0).double()
    expected = logits.masked_fill(~seen, float("-inf")).softmax(-1)
    with streaming(toy, window=6, kept=kept):
        assert_close(attention_weights(toy, TOKENS, layer=0), expected.float())
        found = measure(toy, TOKENS, ("sink_attention", "sink_logit")).isel(layer=0, head=0)
    asked = seen[1:, 0]
    assert_close(torch.tensor(found.sink_attention.values), expected[:, 0, 1:, 0][:, asked].mean(1))
    others = seen[1:, 1:].double()
    contrasts = logits[:, 0, 1:, 0] - (logits[:, 0, 1:, 1:].nan_to_num(neginf=0) * others).sum(
        -1
    ) / others.sum(-1)
    assert_close(torch.tensor(found.sink_logit.values), contrasts[:, asked].mean(1))


def test_of_bodies_inside_each_other_the_innermost_decides(model):
    for each in (model, toy_under("softmax"), toy_under("relu")):
        with streaming(each, window=4, kept=1):
            inner = logits_of(each, TOKENS)
        with streaming(each, window=7, kept=2):
            outer = logits_of(each, TOKENS)
            with streaming(each, window=4, kept=1):
                assert torch.equal(logits_of(each, TOKENS), inner)
            assert torch.equal(logits_of(each, TOKENS), outer)


@pytest.mark.parametrize("part", ["attention", "mlp"])
def test_a_model_that_is_cut_can_be_streamed_whichever_comes_first(model, part):
    with zero(model, part, layer=1), streaming(model, window=4, kept=1):
        cut_first = logits_of(model, TOKENS)
    with streaming(model, window=4, kept=1), zero(model, part, layer=1):
        assert torch.equal(logits_of(model, TOKENS), cut_first)
    with zero(model, part, layer=1):
        assert not torch.allclose(logits_of(model, TOKENS), cut_first)


def test_a_model_that_only_shares_the_configuration_is_no_streaming_one(llama):
    other = type(llama)(llama.config).double()
    expected = other(TOKENS, use_cache=False).logits
    with streaming(llama, window=4), pytest.raises(SinkbookError, match="shares the configuration"):
        other(TOKENS, use_cache=False)
    assert torch.equal(other(TOKENS, use_cache=False).logits, expected)


def test_the_twin_leaves_the_model_as_it_was_also_after_an_exception(model):
    before, whole = model.config._attn_implementation, model(TOKENS).logits
    with pytest.raises(ZeroDivisionError), streaming(model, window=5):
        assert model.config._attn_implementation != before
        raise ZeroDivisionError
    assert model.config._attn_implementation == before
    assert torch.equal(model(TOKENS).logits, whole)


def test_what_cannot_be_streamed_is_refused_with_the_reason(llama):
    gpt2 = GPT2LMHeadModel(
        GPT2Config(vocab_size=50, n_positions=16, n_embd=16, n_layer=1, n_head=4)
    )
    with pytest.raises(SinkbookError, match="GPT2LMHeadModel has no rotary positions"):
        SinkCache(gpt2, window=4)
    mask = torch.ones_like(TOKENS)
    mask[0, :3] = 0
    with pytest.raises(SinkbookError, match="no padding"), streaming(llama, window=4):
        llama(TOKENS, attention_mask=mask, use_cache=False)
    mistral = MistralForCausalLM(MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=8))
    with pytest.raises(SinkbookError, match="no window of the model's own"):
        in_one_pass(mistral, window=4)
    with pytest.raises(
        SinkbookError, match="sees 8 tokens back, so 4 first ones and a window of 5"
    ):
        SinkCache(mistral, sinks=4, window=5)
    gemma = Gemma2ForCausalLM(Gemma2Config(**SIZES, num_key_value_heads=2, head_dim=8))
    with pytest.raises(SinkbookError, match="Gemma2Attention has a softcap"):
        in_one_pass(gemma, window=4)
    with pytest.raises(SinkbookError, match="cannot go back"):
        SinkCache(llama, window=4).crop(-1)


@pytest.fixture
def as_for_a_reader(monkeypatch):
    """Without the types that are checked while tests run."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.mark.usefixtures("as_for_a_reader")
@pytest.mark.parametrize(
    ("refused", "says"),
    [
        ({"window": 0}, "`window=0` is too small. Give 1 or more"),
        ({"window": 4.0}, "`window=4.0` is no whole number. Give one from 1 on"),
        ({"window": None}, "`window=None` is no whole number"),
        ({"window": 4, "kept": -1}, "`kept=-1` is too small. Give 0 or more"),
        ({"window": 4, "kept": 1.5}, "`kept=1.5` is no whole number"),
        ({"window": 4, "kept": True}, "`kept=True` is no whole number"),
        ({"window": 4, "kept": "first"}, "`kept='first'` is no whole number"),
        ({"window": 4, "kept": [0, -2]}, "`kept=-2` is too small"),
        ({"window": 4, "kept": [0.5]}, "`kept=0.5` is no whole number"),
    ],
)
def test_arguments_are_checked_where_they_enter(llama, refused, says):
    with pytest.raises(SinkbookError, match=re.escape(says)):
        streaming(llama, **refused).__enter__()
    of_cache = {name.replace("kept", "sinks"): value for name, value in refused.items()}
    if not isinstance(of_cache.get("sinks"), list):
        with pytest.raises(SinkbookError, match=re.escape(says.replace("kept", "sinks"))):
            SinkCache(llama, **of_cache)


@pytest.mark.usefixtures("as_for_a_reader")
def test_kept_positions_may_be_numpys_or_torchs(llama):
    expected = in_one_pass(llama, window=5, kept=[0, 3])
    for kept in (np.array([3, 0]), torch.tensor([0, 3]), (0, 3, 3)):
        assert torch.equal(in_one_pass(llama, window=np.int64(5), kept=kept), expected)


@pytest.mark.usefixtures("as_for_a_reader")
@pytest.mark.parametrize(
    ("module", "says"),
    [
        (nn.Linear(2, 2), "^Linear is no model of transformers.* toys of `sinkbook.toy"),
        (nn.Sequential(), "^Sequential is no model of transformers.* toys of `sinkbook.toy"),
        (None, "^a NoneType is no model"),
        ("a name", "^'a name' is no model"),
    ],
)
def test_modules_that_are_none_of_transformers_are_refused_by_name(module, says):
    for stream in (streaming, SinkCache):
        with pytest.raises(SinkbookError, match=says), nullcontext(stream(module, window=4)) as way:
            way.__enter__()


@pytest.fixture
def loud():
    return loud_llama()


def test_losses_under_a_window_are_those_of_the_cache(loud):
    losses = sink_cache.streaming_losses(
        loud, LOUD_TOKENS, window=9, sinks=(0, 2), random=3, stride=4
    )
    assert losses.layout.values.tolist() == ["dense", "0", "2", "random", "recompute"]
    assert losses.dims == ("layout", "text", "position") and losses.position[0] == 1
    for sinks in (0, 2):
        cache = SinkCache(loud, sinks=sinks, window=9)
        steps = [loud(LOUD_TOKENS[:, i : i + 1], past_key_values=cache).logits for i in range(40)]
        assert_close(losses.sel(layout=str(sinks)), losses_of(torch.cat(steps, 1), LOUD_TOKENS))
    same = losses.sel(layout=["dense", "0", "2", "random"], position=slice(1, 9))
    assert float((same.max("layout") - same.min("layout")).max()) < 1e-4
    later = losses.sel(position=slice(14, None))
    assert float(abs(later.sel(layout="0") - later.sel(layout="dense")).max()) > 0.1


def test_random_tokens_are_drawn_after_the_sinks_and_within_the_first_window(loud, monkeypatch):
    drawn, own = [], sink_cache._streaming

    def watched(model, window, kept, turns):
        drawn.append(kept)
        return own(model, window, kept, turns)

    monkeypatch.setattr(sink_cache, "_streaming", watched)
    run = partial(sink_cache.streaming_losses, loud, LOUD_TOKENS, window=12, sinks=(0, 4), stride=4)
    first, again, other = (run(seed=seed).sel(layout="random") for seed in (0, 0, 1))
    draws = [kept for kept in drawn if kept and 0 not in kept]
    assert len(draws) == 9 and all(len(set(kept)) == 4 for kept in draws)
    assert {p for kept in draws for p in kept} <= set(range(4, 12))
    assert draws[0] != draws[1]  # texts have draws of their own
    assert first.equals(again) and not first.equals(other)


def test_reading_afresh_is_reading_a_text_that_begins_a_window_before(loud):
    found = sink_cache.recomputed_losses(loud, LOUD_TOKENS, window=9, stride=3)
    assert np.isnan(found[:, :8]).all() and not np.isnan(found[:, 8:38]).any()
    for position in (9, 10, 11, 12, 38):
        seen = 9 - 2 + (position - 9) % 3  # as far as its window has been filled
        alone = LOUD_TOKENS[:, position - seen : position + 1]
        assert_close(found[:, position - 1], token_losses(loud, alone)[:, -1])
    with pytest.raises(SinkbookError, match="steps of 10 with a window of 9"):
        sink_cache.recomputed_losses(loud, LOUD_TOKENS, window=9, stride=10)


def test_a_window_that_leaves_no_room_is_refused(loud):
    with pytest.raises(SinkbookError, match="a window of 10, texts of 40 tokens, 8 kept, 4 drawn"):
        sink_cache.streaming_losses(loud, LOUD_TOKENS, window=10)
    with pytest.raises(SinkbookError, match="longer than window"):
        sink_cache.streaming_losses(loud, LOUD_TOKENS[:, :20], window=12)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"position_ids": torch.tensor([[5]])}, "has read 20 tokens got position_ids from 5"),
        ({"position_ids": torch.tensor([[21]])}, "the next token of the text is at 20"),
        ({"attention_mask": torch.arange(21)[None] > 0}, "attention_mask that hides tokens"),
        ({"attention_mask": torch.ones(1, 1, 1, 21, dtype=torch.bool)}, "without padding and mask"),
    ],
)
def test_padding_and_positions_of_ones_own_are_refused_by_the_cache(llama, given, says):
    text = TOKENS[:1]
    cache = SinkCache(llama, sinks=2, window=6)
    llama(text[:, :20], past_key_values=cache, attention_mask=torch.ones(1, 20))
    for part in (llama, llama.model):
        with pytest.raises(SinkbookError, match=says):
            part(text[:, 20:21], past_key_values=cache, **given)
    llama(text[:, 20:21], past_key_values=cache, position_ids=torch.tensor([[20]]))
    assert cache.get_seq_length() == 21


def test_padded_prompts_are_not_generated_from(llama):
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), TOKENS[:1, :6]], 1)
    cache, mask = SinkCache(llama, sinks=2, window=6), (torch.arange(9) > 2).long()[None]
    with pytest.raises(SinkbookError, match="without padding"):
        llama.generate(padded, attention_mask=mask, past_key_values=cache, max_new_tokens=3)


def test_a_cache_leaves_no_trace_on_its_model(llama):
    before = len(llama.model._forward_pre_hooks)
    cache = SinkCache(llama, sinks=2, window=6)
    del cache
    gc.collect()
    assert len(llama.model._forward_pre_hooks) == before
