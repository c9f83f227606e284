"""What heads look at: scores against maps read by hand, and jobs before places of rest."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import xarray as xr
from transformers import Lfm2Config, Lfm2ForCausalLM

from sinkbook.llm import head_types
from sinkbook.probe.attention_maps import attention_weights
from sinkbook.toy.transformer import Transformer, TransformerConfig
from tiny import LETTER_TEXTS, LETTERS, letter_reader, tiny_model


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


def between_convolutions() -> Lfm2ForCausalLM:
    """A model whose second of three layers alone has attention."""
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
    return Lfm2ForCausalLM(config).eval()


def test_layers_without_attention_have_no_scores():
    language_model = replace(letter_reader(), model=between_convolutions())
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


# --- What is written at rest -----------------------------------------------------------------


def three_heads() -> Transformer:
    """Token 0 opens each text. Heads 0 and 1 look at it, head 2 at everything alike.

    All write the words that they see. Of token 0 head 0 writes nothing, head 1 a vector as long as
    those of words.
    """
    config = TransformerConfig(vocab_size=8, length=24, width=24, layers=1, heads=3)
    model = Transformer(config).eval().requires_grad_(False)
    model.layers[0].mlp, attention = None, model.layers[0].attention
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.zero_()
    embedding = model.token_embedding.weight
    embedding[0, 0], embedding[1:, 1] = 10, 10
    embedding[1:, 2:9] = 10 * torch.eye(7)
    for head in (0, 1):
        attention.wq.weight[8 * head, 1] = attention.wk.weight[8 * head, 0] = 1.1
    for head in range(3):
        own = slice(8 * head + 1, 8 * head + 8)
        attention.wv.weight[own, 2:9] = torch.eye(7) - 1 / 7  # blind to what all words share
    attention.wv.weight[9, 0], attention.wv.weight[9, 2:9] = 0.6, 0
    attention.wo.weight.copy_(torch.eye(24))
    return model


def test_a_no_op_writes_nothing_at_rest_and_a_broadcast_one_direction_of_ordinary_length():
    tokens = torch.randint(1, 8, (6, 24), generator=torch.Generator().manual_seed(0))
    tokens[:, 0] = 0
    found = head_types.writes_at_rest(three_heads(), tokens).isel(layer=0)
    no_op, broadcast, busy = (found.isel(head=n) for n in range(3))
    assert no_op.share > 0.9 and broadcast.share > 0.9 and busy.share == 0
    assert no_op.relative_norm < 0.1 and no_op.effective_rank > 1.5
    assert 0.7 < broadcast.relative_norm < 1.4 and broadcast.effective_rank < 1.1
    assert np.isnan(busy.relative_norm) and np.isnan(busy.effective_rank)


def test_what_is_written_at_rest_is_that_of_the_parts_of_w_o_by_hand():
    model = tiny_model(num_hidden_layers=2, initializer_range=0.3)
    tokens = torch.randint(0, 97, (3, 15), generator=torch.Generator().manual_seed(1))
    found = head_types.writes_at_rest(model, tokens, least=0.2)
    kept = []
    projection = model.model.layers[1].self_attn.o_proj
    hook = projection.register_forward_pre_hook(lambda _, inputs: kept.append(inputs[0].detach()))
    model(tokens)
    hook.remove()
    weights = attention_weights(model, tokens, layer=1)
    seen = 0
    for head in range(4):
        own = slice(8 * head, 8 * head + 8)
        written = (kept[0][..., own] @ projection.weight[:, own].T).detach().double()
        resting = written[:, 1:][weights[:, head, 1:, 0] > 0.2]
        there = found.sel(layer=1, head=head)
        assert there.share.item() == pytest.approx(len(resting) / 42)
        spectrum = torch.linalg.svdvals(resting).square()
        expected = (spectrum.sum().square() / spectrum.square().sum()).item()
        assert there.effective_rank.item() == pytest.approx(expected, rel=1e-4)
        seen += len(resting)
    assert 10 < seen < 4 * 42 - 10


def test_heads_that_cannot_be_taken_hold_of_have_no_writes_at_rest():
    tokens = torch.randint(0, len(LETTERS), (2, 9))
    share = head_types.writes_at_rest(between_convolutions(), tokens, least=0.0).share
    assert share.sel(layer=[0, 2]).isnull().all() and (share.sel(layer=1) == 1).all()
