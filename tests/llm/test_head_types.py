"""What heads look at: scores against maps read by hand, and jobs before places of rest."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import xarray as xr
from transformers import Lfm2Config, Lfm2ForCausalLM

from sinkbook.llm import head_types
from sinkbook.probe.attention_maps import attention_weights
from tiny import LETTER_TEXTS, LETTERS, letter_reader


def scores_by_hand(language_model, row, copies):
    """The four scores of every head of one text, key by key."""
    found = torch.zeros(len(head_types.KINDS), 3, 4)
    marks = [not any(map(str.isalnum, LETTERS[token])) for token in row.tolist()]
    for layer in range(3):
        prose = attention_weights(language_model.model, row[None], layer=layer)[0]
        later = range(1, len(row))
        found[0, layer] = torch.stack([prose[:, q, 0] for q in later]).mean(0)
        found[1, layer] = torch.stack([prose[:, q, q - 1] for q in later if q > 1]).mean(0)
        on_marks = [sum(prose[:, q, k] for k in range(1, q + 1) if marks[k]) for q in later]
        found[3, layer] = torch.stack([m + torch.zeros(4) for m in on_marks]).mean(0)
        weights = attention_weights(language_model.model, copies[None], layer=layer)[0]
        tokens = copies.tolist()
        half = len(tokens) - len(tokens) // 2
        to_copy = [
            weights[:, q, max(k for k in range(q) if tokens[k] == tokens[q]) + 1]
            for q in range(half, len(tokens))
        ]
        found[2, layer] = torch.stack(to_copy).mean(0)
    return found


@pytest.mark.parametrize("first_token", [0, None], ids=["with a first token", "without one"])
def test_head_scores_are_those_that_one_reads_off_the_maps(first_token):
    language_model = letter_reader(first_token)
    tokens = language_model.encode(LETTER_TEXTS, 12)
    repeated = head_types.random_repeated(language_model, count=2, length=5, seed=1)
    scores = head_types.head_scores(language_model, tokens, repeated)
    assert scores.kind.values.tolist() == list(head_types.KINDS)
    for text in range(2):
        by_hand = scores_by_hand(language_model, tokens[text], repeated[text])
        np.testing.assert_allclose(scores.sel(batch=text), by_hand, atol=1e-5)


def test_random_tokens_come_twice_in_the_same_order_and_are_not_special():
    found = head_types.random_repeated(letter_reader(), count=3, length=6)
    assert found.shape == (3, 13) and (found[:, 0] == 0).all()
    first, second = found[:, 1:7], found[:, 7:]
    assert torch.equal(first, second) and (first != 0).all()
    assert all(len(set(row.tolist())) == 6 for row in first)


def test_layers_without_attention_have_no_scores():
    torch.manual_seed(0)
    config = Lfm2Config(
        vocab_size=len(LETTERS),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        layer_types=["conv", "full_attention", "conv"],
    )
    language_model = replace(letter_reader(), model=Lfm2ForCausalLM(config).eval())
    tokens = language_model.encode(LETTER_TEXTS, 11)
    repeated = head_types.random_repeated(language_model, count=2, length=5)
    scores = head_types.head_scores(language_model, tokens, repeated)
    assert scores.sel(layer=[0, 2]).isnull().all() and scores.sel(layer=1).notnull().all()


def test_a_head_with_a_job_is_not_named_for_where_it_rests():
    values = [[0.9, 0.9, 0.1, 0.2], [0.0, 0.4, 0.1, 0.5], [0.1, 0.5, 0.2, 0.1], [0.0] * 4]
    scores = xr.DataArray(
        np.array(values)[:, None, :],
        dims=("kind", "layer", "head"),
        coords={"kind": list(head_types.KINDS)},
    )
    kinds = head_types.kind_of_head(scores)
    assert kinds.values.tolist() == [[0, 2, -1, 1]]


def test_delimiters_hold_no_letter_and_no_digit():
    tokens = torch.tensor([[1, 2, 3, 4, 5]])
    assert head_types.is_delimiter(letter_reader(), tokens).tolist() == [
        [True, True, False, False, False]
    ]
