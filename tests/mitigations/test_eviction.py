"""What is evicted is hidden, and nothing else."""

import pytest
import torch

from sinkbook.errors import SinkbookError
from sinkbook.mitigations import eviction
from sinkbook.models.losses import token_losses
from tiny import LOUD_TOKENS, assert_close, losses_of, loud_llama


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
