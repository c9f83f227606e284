"""Losses are the model's own, token by token."""

import numpy as np
import pytest
import torch
import xarray as xr
from transformers import LlamaForTokenClassification, LlamaModel

from sinkbook.errors import SinkbookError
from sinkbook.models.losses import next_token_loss, next_token_losses, perplexity, token_losses
from sinkbook.probe import measure
from sinkbook.toy.transformer import Transformer, TransformerConfig
from tiny import LOUD_TOKENS, assert_close, losses_of, loud_llama, tiny_model


def test_the_loss_of_a_batch_is_the_mean_over_all_its_tokens():
    logits = torch.randn(3, 39, 50, generator=torch.Generator().manual_seed(0))
    loss = next_token_loss(logits, LOUD_TOKENS)
    by_hand = -logits.log_softmax(-1).gather(2, LOUD_TOKENS[:, 1:, None]).mean()
    torch.testing.assert_close(loss, by_hand)


def test_the_loss_of_each_token_needs_logits_at_every_position():
    logits = torch.randn(3, 40, 50, generator=torch.Generator().manual_seed(0))
    by_hand = losses_of(logits, LOUD_TOKENS)
    assert_close(next_token_losses(logits, LOUD_TOKENS), by_hand)
    assert_close(next_token_losses(logits[:, :-1], LOUD_TOKENS), by_hand)
    with pytest.raises(SinkbookError, match="1 positions of logits .* texts of 40 tokens"):
        next_token_losses(logits[:, -1:], LOUD_TOKENS)


def test_token_losses_are_the_models_own():
    model = loud_llama()
    losses = token_losses(model, LOUD_TOKENS)
    assert_close(losses, losses_of(model(LOUD_TOKENS).logits, LOUD_TOKENS))
    assert_close(losses.mean(), model(LOUD_TOKENS, labels=LOUD_TOKENS).loss)
    assert_close(token_losses(model, LOUD_TOKENS, last=7), losses[:, -7:])
    toy = Transformer(TransformerConfig(vocab_size=50, length=40, width=16)).requires_grad_(False)
    assert_close(
        token_losses(toy, LOUD_TOKENS, last=7), losses_of(toy(LOUD_TOKENS), LOUD_TOKENS)[:, -7:]
    )


def test_perplexity_is_over_the_tokens_past_a_position():
    losses = xr.DataArray(
        np.log([[9.0, 2.0, 8.0]]), dims=("text", "position"), coords={"position": [1, 2, 3]}
    )
    assert_close(perplexity(losses, after=2), [4.0])


@pytest.mark.parametrize("labels", [None, 2, 120])
def test_a_model_that_predicts_no_token_has_no_loss(labels):
    config = loud_llama().config
    config.num_labels = labels or 2
    model = LlamaModel(config) if labels is None else LlamaForTokenClassification(config)
    for loss in (token_losses, lambda *given: measure(*given, ("loss",))):
        with pytest.raises(SinkbookError, match="no head that predicts the next token"):
            loss(model, LOUD_TOKENS)
    assert measure(model, LOUD_TOKENS).sink_attention.notnull().all()


def test_losses_are_without_dropout_and_the_mode_stays_as_it_was():
    model = tiny_model("opt", dropout=0.5, ffn_dim=48, word_embed_proj_dim=32)
    expected = token_losses(model, LOUD_TOKENS)
    model.train().model.decoder.layers[0].eval()
    assert_close(token_losses(model, LOUD_TOKENS), expected)
    assert model.training and not model.model.decoder.layers[0].training
