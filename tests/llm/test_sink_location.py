"""Where sinks are: in texts changed as their names say, and at any position."""

import numpy as np
import pytest
import torch
import xarray as xr

from sinkbook.errors import SinkbookError
from sinkbook.llm import sink_location
from sinkbook.probe.attention_maps import attention_weights
from sinkbook.toy.transformer import Transformer, TransformerConfig
from tiny import LETTER_TEXTS, LETTERS, letter_reader


def test_a_text_is_changed_as_the_name_of_its_condition_says():
    found = sink_location.changed_texts(letter_reader(), LETTER_TEXTS, length=8, seed=3)
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
        language_model = letter_reader(first_token)
        tokens = next(
            iter(sink_location.changed_texts(language_model, LETTER_TEXTS, length=8).values())
        ).tokens
        assert torch.equal(tokens, language_model.encode(LETTER_TEXTS, 8))


def test_without_a_first_token_no_condition_speaks_of_it():
    found = sink_location.changed_texts(letter_reader(None), LETTER_TEXTS, length=8)
    assert not [name for name in found if name.startswith("first token")]


def test_texts_that_are_too_short_are_refused():
    with pytest.raises(SinkbookError, match="shorter than 20 tokens"):
        sink_location.changed_texts(letter_reader(), LETTER_TEXTS, length=20)


def test_where_all_tokens_are_the_same_no_position_stands_out():
    language_model = letter_reader()
    conditions = sink_location.changed_texts(language_model, LETTER_TEXTS, length=8)
    everywhere = xr.DataArray([True] * 3, dims="layer", coords={"layer": range(3)})
    found = sink_location.sinks_under_change(language_model, conditions, everywhere)
    peaks = found.peak_at_0.sel(condition="one token repeated")
    np.testing.assert_allclose(peaks, 1, rtol=1e-4)
    assert abs(found.peak_at_0.sel(condition="the text alone") - 1).min() > 1e-3


def test_sinks_under_change_are_read_where_the_first_token_stands():
    language_model = letter_reader()
    conditions = sink_location.changed_texts(language_model, LETTER_TEXTS, length=8)
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
    found = sink_location.by_token(values, tokens, letter_reader(), least=1)
    # The last quarter of a text does not count.
    assert found.token.values.tolist() == [LETTERS[9], LETTERS[5], LETTERS[6], LETTERS[7]]
    assert found.sel(layer=4).values.tolist() == [8, 4, 2, 2]
    assert sink_location.by_token(
        values, tokens, letter_reader(), least=2
    ).token.values.tolist() == [LETTERS[6]]


def test_labels_show_spaces_and_line_breaks():
    assert sink_location.labels(letter_reader(), torch.tensor([2, 4])) == ["⏎", "a"]
