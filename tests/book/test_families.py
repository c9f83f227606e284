"""The record of families means what its names say, and its files are those that were measured."""

import json
from dataclasses import asdict, replace

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
import xarray as xr

from sinkbook.book.records import families, kept
from sinkbook.errors import SinkbookError
from sinkbook.figures.components import sinks_by_beginning
from sinkbook.mitigations.quantization import largest_and_error
from tiny import LETTER_TEXTS, assert_close, letter_reader, losses_of

SMALL = {"texts": 2, "length": 12, "inside": 3, "ordinary": 6, "after": 5}


@pytest.fixture
def small(monkeypatch):
    """A tiny reader of letters, and sizes for it."""
    for name, size in SMALL.items():
        monkeypatch.setitem(families.SIZES, name, size)
    monkeypatch.setattr(families, "passages", lambda domain: LETTER_TEXTS)
    return replace(letter_reader(), name="smollm2-135m")


@pytest.fixture
def made(small, monkeypatch, tmp_path):
    """The record of two families of which one has fewer layers."""
    monkeypatch.setenv("SINKBOOK_CACHE", str(tmp_path))
    (tmp_path / "families").mkdir()
    known = {}
    for name, sha256 in (
        ("SmolLM2", "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"),
        ("other", "cb8379ac2098aa165029e3938a51da0bcecfc008fd6795f401178647f96c5b34"),
    ):
        known[name] = families.Family(f"{name}.gguf", sha256, "<s>", f"the weights of {name}")
    (tmp_path / "families" / "SmolLM2.gguf").write_text("abc")
    (tmp_path / "families" / "other.gguf").write_text("def")
    shorter = replace(small, model=letter_reader().model)
    del shorter.model.model.layers[2:]
    shorter.model.config.num_hidden_layers = 2
    read = {"SmolLM2.gguf": small, "other.gguf": shorter}
    monkeypatch.setattr(families, "FAMILIES", known)
    monkeypatch.setattr(families, "load", lambda path, device: read[path.name])
    return families.record()


def test_each_beginning_has_the_same_words_and_knows_where_the_own_token_is(small):
    begun = families.begin(small, 0, LETTER_TEXTS)
    assert [*begun] == list(families.BEGINNINGS)
    (first, at_0), (alone, also_0), (inside, at_3) = begun.values()
    assert (at_0, also_0, at_3) == (0, 0, 3)
    assert (first[:, 0] == 0).all() and torch.equal(first[:, 1:], alone) and (alone != 0).all()
    assert (inside[:, 3] == 0).all()
    assert torch.equal(torch.cat([inside[:, :3], inside[:, 4:]], 1), alone)


def test_the_loss_is_that_of_the_last_words_and_shares_of_the_peak_add_up(small):
    tokens, sink = families.begin(small, 0, LETTER_TEXTS)["text alone"]
    found = families.measured_at(small.model, tokens, sink)
    with torch.no_grad():
        output = small.model(tokens, output_hidden_states=True)
    assert_close(found.loss, losses_of(output.logits, tokens)[:, -5:].mean(1))
    # The state at the top is the embedding and what was written below: by a way of its own.
    states = torch.stack(output.hidden_states[:-1])[:, :, sink]
    for text, top in enumerate(found.peak_layer.values):
        if top == 3:  # transformers gives the last state behind the final norm
            continue
        peak = states[top, text]
        embedded = (states[0, text] @ peak / (peak @ peak)).item()
        written = np.nansum(found.written.isel(text=text))
        assert_close(embedded + written, 1.0)
    assert found.remainder.max() < 1e-5


def test_sinks_are_those_of_the_token_whose_position_is_given(small):
    tokens, sink = families.begin(small, 0, LETTER_TEXTS)["own token inside"]
    small.model.set_attn_implementation("eager")
    with torch.no_grad():
        attention = torch.stack(small.model(tokens, output_attentions=True).attentions)
    found = families.measured_at(small.model, tokens, sink)
    on_sink = attention[..., sink + 1 :, sink].mean(-1)  # over layer, text, head
    assert_close(found.sink_attention, on_sink.mean(-1).T)
    assert_close(found.sink_rate, (on_sink > families.THRESHOLD).float().mean(-1).T)
    ordinary = attention[..., 6:, 6].mean(-1)
    assert_close(found.elsewhere, (ordinary > families.THRESHOLD).float().mean(-1).T)


def test_a_record_has_every_family_beginning_domain_and_text(made):
    assert made.sink_rate.dims == ("model", "domain", "beginning", "text", "layer")
    assert made.model.values.tolist() == ["SmolLM2", "other"]
    assert made.sink_rate.sel(model="other").isel(layer=2).isnull().all()
    assert np.isfinite(made.sink_rate.sel(model="SmolLM2")).all() and (made.loss > 0).all()
    config = json.loads(made.attrs["config"])
    assert config["other"]["weights"] == "the weights of other" and config["length"] == 12
    shown = families.table(made)
    assert len(shown) == 6 and shown["loss (nats)"].str.contains("–").all()


@pytest.mark.parametrize("damage", ["missing", "another"])
def test_a_file_that_is_not_the_one_that_was_measured_is_refused(made, tmp_path, damage):
    path = tmp_path / "families" / "other.gguf"
    path.unlink() if damage == "missing" else path.write_text("something else")
    with pytest.raises(SinkbookError, match="the weights of other.*sha256 is cb8379ac"):
        families.record()


def test_eight_bits_are_asked_of_every_family_in_groups_of_texts(made, small, monkeypatch):
    monkeypatch.setattr(families, "texts", lambda domain, count: LETTER_TEXTS)
    for name, size in {"texts": 2, "length": 8, "groups": 2}.items():
        monkeypatch.setitem(families.EIGHT_BITS, name, size)
    found = families.in_eight_bits()
    assert found.model.values.tolist() == ["SmolLM2", "other"] and found.sizes["seed"] == 2
    assert np.isfinite(found.error.sel(model="SmolLM2")).all()
    assert found.error.sel(model="other").notnull().all(("seed", "ranges")).sum() == 2  # layers
    (second,) = families.eight_bits_windows(small)[1:]
    alone = largest_and_error(small.model, second)
    assert_close(found.largest.sel(model="SmolLM2", seed=1), alone.largest)
    assert json.loads(found.attrs["config"])["other"]["file"] == "other.gguf"
    again = [largest_and_error(small.model, w) for w in families.eight_bits_windows(small)]
    assert "of these numbers are" in families.eight_bits_again(found, again)
    again[1]["outlier"] = again[1].outlier * 1.01
    with pytest.raises(SinkbookError, match="outlier differs by"):
        families.eight_bits_again(found, again)


def test_what_is_measured_again_meets_the_record_and_an_altered_number_is_found(made, small):
    assert "of these numbers are" in families.again(made, small)
    assert "another model" in families.again(made, replace(small, name="other"))
    for name in families.STEADY:
        altered = made.copy(deep=True)
        place = {"model": 0, "domain": 0, "beginning": 0, "text": 1}
        altered[name][place] = altered[name][place] * 1.01 + 0.001
        with pytest.raises(SinkbookError, match="differs by"):
            families.again(altered, small)


def test_a_peak_is_ascribed_to_the_part_and_to_the_layer_with_most_of_it():
    parts = np.zeros((2, 2, 4))  # text, part, layer
    parts[0, 0, 3], parts[0, 1, 2], parts[0, 1, 3] = 0.3, 0.4, 0.2
    parts[1, 0, 1], parts[1, 1, 1], parts[1, 1, 0] = 0.6, -0.5, np.nan
    written = (("text", "part", "layer"), parts)
    coords = {"part": ["attention", "mlp"], "layer": range(4)}
    by = families.peak_written_by(xr.Dataset({"written": written}, coords=coords))
    assert by.writer.values.tolist() == ["mlp", "attention"]
    assert by.writing_layer.values.tolist() == [2, 1]
    assert_close(by.share, [0.4, 0.6])
    assert_close(by.one_layer, [0.5, 0.1])
    assert_close(by.attention / by.mlp.where(by.mlp > 0), [0.75, np.nan])


def test_a_model_is_looked_at_under_the_beginning_that_gives_it_more_sinks(made):
    altered = made.copy(deep=True)
    altered["sink_rate"] = xr.zeros_like(made.sink_rate) + [[[[[0.2]]]], [[[[0.1]]]]]
    altered.sink_rate.loc[{"model": "other", "beginning": "text alone"}] = 0.3
    altered.sink_rate.loc[{"model": "SmolLM2", "beginning": "own token inside"}] = 0.9
    best = families.where_the_sink_is(families.each_text(altered))
    assert best.beginning.values.tolist() == ["own token first", "text alone"]
    assert (best.sink_rate.sel(model="other").mean("layer") == 0.3).all()


def test_the_figure_has_a_panel_a_model_as_long_as_it_is_deep_and_a_curve_a_beginning(made):
    labels = {name: name for name in families.BEGINNINGS}
    panels = sinks_by_beginning(families.each_text(made).sink_attention, labels)
    assert [ax.get_title(loc="left") or ax.get_title() for ax in panels] == ["SmolLM2", "other"]
    for ax, depth in zip(panels, (3, 2), strict=True):
        model = ax.get_title(loc="left") or ax.get_title()
        for line in ax.lines:
            of = made.sink_attention.sel(model=model, beginning=line.get_label())
            expected = of.median(("domain", "text")).values[:depth]
            assert_close(line.get_ydata(), expected)
        assert len(ax.lines) == 3
    plt.close("all")


def test_the_record_is_of_the_files_and_sizes_of_today():
    config = json.loads(kept.whole_file("families").attrs["config"])
    of_files = {name: asdict(family) for name, family in families.FAMILIES.items()}
    assert config == families.SIZES | of_files
    of_eight_bits = json.loads(kept.whole_file("families-in-eight-bits").attrs["config"])
    assert of_eight_bits == families.EIGHT_BITS | of_files
