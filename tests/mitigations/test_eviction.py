"""What is evicted is hidden, and nothing else."""

from contextlib import nullcontext

import pytest
import torch

from sinkbook.errors import SinkbookError
from sinkbook.mitigations import eviction
from sinkbook.models.losses import token_losses
from tiny import LOUD_TOKENS, assert_close, losses_of, loud_llama, tiny_model, tiny_toy

PROMPT, BUDGET = 24, 8
LOUD = {"vocab_size": 50, "initializer_range": 0.3, "head_dim": 8, "pad_token_id": None}
LOUD |= {"bos_token_id": 1, "eos_token_id": None, "max_position_embeddings": 64}


@pytest.fixture
def model():
    return loud_llama()


def test_what_is_evicted_is_hidden_and_nothing_else():
    """In one layer an evicted key is a masked one: positions stay, heads choose for themselves."""
    model, prompt, budget = loud_llama(layers=1, attn_implementation="eager"), 24, 6
    losses = eviction.eviction_losses(
        model, LOUD_TOKENS, prompt=prompt, budgets=(budget, 9), sinks=4
    )
    attention = model(LOUD_TOKENS[:, :prompt], output_attentions=True).attentions[0]
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
        expected = losses_of(model(LOUD_TOKENS, attention_mask=mask).logits, LOUD_TOKENS)[
            :, prompt:
        ]
        assert_close(losses.sel(policy=policy, budget=budget), expected.mean(1))


def test_with_nothing_evicted_the_text_goes_on_as_it_was(model):
    losses = eviction.eviction_losses(model, LOUD_TOKENS, prompt=24, budgets=(8,))
    whole = token_losses(model, LOUD_TOKENS)[:, 24:].mean(1)
    assert_close(losses.sel(policy="all", budget=8), whole)
    assert float(abs(losses.sel(policy="window", budget=8) - whole).max()) > 0.01


def test_budgets_that_do_not_fit_the_prompt_are_refused(model):
    for budgets, prompt in (((4,), 24), ((24,), 24), ((8,), 39)):
        with pytest.raises(SinkbookError, match="Give budgets from 5 to"):
            eviction.eviction_losses(model, LOUD_TOKENS, prompt=prompt, budgets=budgets)


def hidden_by_a_mask(model, kept: list[int], window: int = 40):
    """The losses after the prompt with the whole text before them, all but `kept` masked."""
    visible = torch.ones(40, 40, dtype=torch.bool).tril().triu(1 - window)
    dropped = [key for key in range(PROMPT) if key not in kept]
    visible[PROMPT:, dropped] = False
    mask = torch.zeros(40, 40).masked_fill(~visible, torch.finfo(torch.float32).min)
    mask = mask[None, None].expand(len(LOUD_TOKENS), 1, -1, -1)
    given = {"position_ids": torch.arange(40)[None].expand(len(LOUD_TOKENS), -1)}
    logits = model(LOUD_TOKENS, attention_mask=mask, use_cache=False, **given).logits
    return losses_of(logits, LOUD_TOKENS)[:, PROMPT:].mean(1)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("llama", {}),
        ("gpt2", {}),  # learned positions
        ("opt", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
        ("phi", {}),
        ("cohere", {}),
        ("smollm3", {"no_rope_layers": [1, 0]}),
        ("mistral", {"sliding_window": 40}),
    ],
)
def test_what_is_evicted_is_what_a_mask_would_hide_in_every_layer(kind, changes):
    model = tiny_model(kind, **LOUD | changes).requires_grad_(False)
    found = eviction.eviction_losses(model, LOUD_TOKENS, prompt=PROMPT, budgets=[BUDGET])
    kept = {
        "all": list(range(PROMPT)),
        "window": list(range(PROMPT - BUDGET, PROMPT)),
        "sinks + window": [*range(4), *range(PROMPT - BUDGET + 4, PROMPT)],
    }
    for policy, keys in kept.items():
        assert_close(found.sel(policy=policy)[0], hidden_by_a_mask(model, keys))


@pytest.mark.parametrize(
    ("kind", "changes", "says"),
    [
        ("bloom", {"n_head": 4, "n_layer": 2}, "from the key alone"),
        ("mpt", {"d_model": 32, "n_heads": 4, "n_layers": 2}, "from the key alone"),
        ("falcon", {"alibi": True}, "from the key alone"),
        (
            "gpt_neo",
            {
                **{"attention_types": [[["global", "local"], 1]], "num_layers": 2},
                **{"num_heads": 4, "window_size": 33},
            },
            "from the key alone",
        ),
        ("mistral", {"sliding_window": 30}, "a window shorter than the text"),
        ("mistral", {"sliding_window": 39}, "a window shorter than the text"),
        ("mistral", {"sliding_window": 16}, "a window shorter than the prompt"),
        (
            "gemma3_text",
            {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]},
            "a window shorter than the prompt",
        ),
        ("lfm2", {"layer_types": ["conv", "full_attention"]}, "mixes kinds of layers"),
    ],
)
def test_models_whose_keys_are_elsewhere_without_the_others_are_refused(kind, changes, says):
    sizes = {name: size for name, size in LOUD.items() if name != "head_dim" or kind != "falcon"}
    model = tiny_model(kind, **sizes | changes).requires_grad_(False)
    with pytest.raises(SinkbookError, match=says):
        eviction.eviction_losses(model, LOUD_TOKENS, prompt=PROMPT, budgets=[BUDGET])


def test_a_module_without_a_cache_is_refused():
    with pytest.raises(SinkbookError, match="Transformer is no model of transformers"):
        eviction.eviction_losses(tiny_toy(), LOUD_TOKENS, prompt=PROMPT, budgets=[BUDGET])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_keys_that_turn_with_the_length_of_the_text_are_told_in_every_precision(dtype):
    dynamic = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    for longest, refused in ((30, True), (40, False)):
        model = loud_llama(max_position_embeddings=longest, rope_parameters=dynamic).to(dtype)
        says = pytest.raises(SinkbookError, match="other keys .* dynamic")
        with says if refused else nullcontext():
            eviction.eviction_losses(model, LOUD_TOKENS, prompt=PROMPT, budgets=[BUDGET])


def test_what_is_evicted_does_not_depend_on_dropout():
    model = loud_llama(attention_dropout=0.5)
    expected = eviction.eviction_losses(model, LOUD_TOKENS, prompt=PROMPT, budgets=[BUDGET])
    found = eviction.eviction_losses(model.train(), LOUD_TOKENS, prompt=PROMPT, budgets=[BUDGET])
    assert_close(found, expected)
    assert model.training
