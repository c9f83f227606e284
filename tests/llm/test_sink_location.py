"""What heads look at: scores against maps read by hand, and texts changed as their names say."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import xarray as xr
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import Lfm2Config, Lfm2ForCausalLM, PreTrainedTokenizerFast

from sinkbook.errors import SinkbookError
from sinkbook.llm import sink_location
from sinkbook.models import LanguageModel
from sinkbook.probe.attention_maps import attention_weights
from sinkbook.toy.transformer import Transformer, TransformerConfig
from tiny import tiny_model

WORDS = ["<s>", ".", "\n", "a1", *(chr(97 + i) for i in range(26))]


def tiny(first_token: int | None = 0) -> LanguageModel:
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, "a"))
    words.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    model = tiny_model(
        seed=1,
        vocab_size=len(WORDS),
        hidden_size=16,
        num_hidden_layers=3,
        initializer_range=0.3,  # large enough for heads that look somewhere
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>")
    return LanguageModel("tiny", model.requires_grad_(False), tokenizer, first_token, "random")


TEXTS = ["b c . d e \n f g h . i j", "k l m \n n o p . q r s t"]


def test_a_text_is_changed_as_the_name_of_its_condition_says():
    found = sink_location.changed_texts(tiny(), TEXTS, length=8, seed=3)
    assert all(changed.tokens.shape == (2, 8) for changed in found.values())
    alone = found["the text alone"].tokens
    usual, at = found["first token, text"]
    assert at == 0 and (usual[:, 0] == 0).all() and torch.equal(usual[:, 1:], alone[:, :-1])
    another = found["another token, text"].tokens
    assert (another[:, 0] != 0).all() and torch.equal(another[:, 1:], usual[:, 1:])
    inside, at = found["first token inside"]
    assert at == 2 and (inside[:, 2] == 0).all() and torch.equal(inside[:, :2], alone[:, :2])
    shuffled = found["the text shuffled"].tokens
    assert torch.equal(shuffled.sort(1).values, alone.sort(1).values)
    assert not torch.equal(shuffled, alone)
    repeated = found["one token repeated"].tokens
    assert (repeated == repeated[:, :1]).all()


def test_the_first_condition_is_the_text_as_the_model_knows_it():
    for first_token in (0, None):
        language_model = tiny(first_token)
        tokens = next(
            iter(sink_location.changed_texts(language_model, TEXTS, length=8).values())
        ).tokens
        assert torch.equal(tokens, language_model.encode(TEXTS, 8))


def test_without_a_first_token_no_condition_speaks_of_it():
    found = sink_location.changed_texts(tiny(None), TEXTS, length=8)
    assert not [name for name in found if name.startswith("first token")]


def test_texts_that_are_too_short_are_refused():
    with pytest.raises(SinkbookError, match="shorter than 20 tokens"):
        sink_location.changed_texts(tiny(), TEXTS, length=20)


def test_where_all_tokens_are_the_same_no_position_stands_out():
    language_model = tiny()
    conditions = sink_location.changed_texts(language_model, TEXTS, length=8)
    everywhere = xr.DataArray([True] * 3, dims="layer", coords={"layer": range(3)})
    found = sink_location.sinks_under_change(language_model, conditions, everywhere)
    peaks = found.peak_at_0.sel(condition="one token repeated")
    np.testing.assert_allclose(peaks, 1, rtol=1e-4)
    assert abs(found.peak_at_0.sel(condition="the text alone") - 1).min() > 1e-3


def test_sinks_under_change_are_read_where_the_first_token_stands():
    language_model = tiny()
    conditions = sink_location.changed_texts(language_model, TEXTS, length=8)
    second = xr.DataArray([False, True, False], dims="layer", coords={"layer": range(3)})
    found = sink_location.sinks_under_change(language_model, conditions, second)
    tokens, at = conditions["first token inside"]
    weights = attention_weights(language_model.model, tokens, layer=1)
    inside = found.sel(condition="first token inside")
    for values, key in ((inside.attention_at_first_token, at), (inside.attention_at_0, 0)):
        expected = weights[:, :, key + 1 :, key].mean((1, 2))
        np.testing.assert_allclose(values, expected, atol=1e-5)
    absent = found.attention_at_first_token.sel(condition="the text alone")
    assert absent.isnull().all()


def scores_by_hand(language_model, row, copies):
    """The four scores of every head of one text, key by key."""
    found = torch.zeros(len(sink_location.KINDS), 3, 4)
    marks = [not any(map(str.isalnum, WORDS[token])) for token in row.tolist()]
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
    language_model = tiny(first_token)
    tokens = language_model.encode(TEXTS, 12)
    repeated = sink_location.random_repeated(language_model, count=2, length=5, seed=1)
    scores = sink_location.head_scores(language_model, tokens, repeated)
    assert scores.kind.values.tolist() == list(sink_location.KINDS)
    for text in range(2):
        by_hand = scores_by_hand(language_model, tokens[text], repeated[text])
        np.testing.assert_allclose(scores.sel(batch=text), by_hand, atol=1e-5)


def test_random_tokens_come_twice_in_the_same_order_and_are_not_special():
    found = sink_location.random_repeated(tiny(), count=3, length=6)
    assert found.shape == (3, 13) and (found[:, 0] == 0).all()
    first, second = found[:, 1:7], found[:, 7:]
    assert torch.equal(first, second) and (first != 0).all()
    assert all(len(set(row.tolist())) == 6 for row in first)


def test_layers_without_attention_have_no_scores():
    torch.manual_seed(0)
    config = Lfm2Config(
        vocab_size=len(WORDS),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        layer_types=["conv", "full_attention", "conv"],
    )
    language_model = replace(tiny(), model=Lfm2ForCausalLM(config).eval())
    tokens = language_model.encode(TEXTS, 11)
    repeated = sink_location.random_repeated(language_model, count=2, length=5)
    scores = sink_location.head_scores(language_model, tokens, repeated)
    assert scores.sel(layer=[0, 2]).isnull().all() and scores.sel(layer=1).notnull().all()


def test_a_head_with_a_job_is_not_named_for_where_it_rests():
    values = [[0.9, 0.9, 0.1, 0.2], [0.0, 0.4, 0.1, 0.5], [0.1, 0.5, 0.2, 0.1], [0.0] * 4]
    scores = xr.DataArray(
        np.array(values)[:, None, :],
        dims=("kind", "layer", "head"),
        coords={"kind": list(sink_location.KINDS)},
    )
    kinds = sink_location.kind_of_head(scores)
    assert kinds.values.tolist() == [[0, 2, -1, 1]]


def test_delimiters_hold_no_letter_and_no_digit():
    tokens = torch.tensor([[1, 2, 3, 4, 5]])
    assert sink_location.is_delimiter(tiny(), tokens).tolist() == [
        [True, True, False, False, False]
    ]


def test_even_attention_attracts_nowhere():
    model = Transformer(TransformerConfig(vocab_size=30, length=16, width=8, layers=2, heads=2))
    for layer in model.layers:
        torch.nn.init.zeros_(layer.attention.wq.weight)
    tokens = torch.randint(0, 30, (2, 16), generator=torch.Generator().manual_seed(0))
    found = sink_location.seen_by_all(model, tokens)
    np.testing.assert_allclose(found.attraction, 1, rtol=1e-4)


def test_a_token_is_judged_by_all_its_occurrences_but_the_first_position():
    tokens = torch.tensor([[5, 5, 6, 6, 7, 9, 9, 9]])
    values = xr.DataArray(
        np.array([[[99.0, 4, 1, 3, 2, 8, 50, 50]]]),
        dims=("batch", "layer", "position"),
        coords={"layer": [4]},
    )
    found = sink_location.by_token(values, tokens, tiny(), least=1)
    # The last quarter of a text does not count.
    assert found.token.values.tolist() == [WORDS[9], WORDS[5], WORDS[6], WORDS[7]]
    assert found.sel(layer=4).values.tolist() == [8, 4, 2, 2]
    assert sink_location.by_token(values, tokens, tiny(), least=2).token.values.tolist() == [
        WORDS[6]
    ]


def test_labels_show_spaces_and_line_breaks():
    assert sink_location.labels(tiny(), torch.tensor([2, 4])) == ["\\n", "a"]
