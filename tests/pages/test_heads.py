"""Every head in one picture: what is measured, what a page carries, how the book's one opens."""

import json
import re
import zlib
from base64 import b64decode

import numpy as np
import pytest

from sinkbook import load, measure
from sinkbook.book import llm_experiments
from sinkbook.errors import SinkbookError
from sinkbook.pages import heads
from sinkbook.pages.heads import Reading, Viewer, read, waking
from sinkbook.probe.attention_maps import attention_maps, attention_weights
from sinkbook.probe.metrics import value_drain_ratio
from tiny import tiny_model, tiny_reader

TEXTS = {"once": "to be or not to be", "marks": "the <script> $x$ or"}


@pytest.fixture(scope="module")
def reader():
    return tiny_reader(tiny_model(num_hidden_layers=3))


@pytest.fixture(scope="module")
def readings(reader) -> list[Reading]:
    return read(reader, TEXTS)


def carried(viewer: Viewer) -> dict:
    """What the page's script reads."""
    html = viewer._repr_html_()
    return json.loads(re.search('<script type="application/json">(.*?)</script>', html)[1])


def unpacked(text: dict, heads: int) -> tuple[np.ndarray, np.ndarray]:
    """Weights over (head, query, key) and value norms over (head, key), as the page has them."""
    count = len(text["tokens"])
    content = np.frombuffer(zlib.decompress(b64decode(text["packed"])), dtype=np.uint8) / 255
    rows, columns = np.tril_indices(count)
    weights = np.zeros((heads, count, count))
    weights[:, rows, columns] = content[: heads * len(rows)].reshape(heads, -1)
    values = content[heads * len(rows) :].reshape(len(text["scales"]), count)
    return weights, values * np.array(text["scales"])[:, None]


def made_up(ids: list[int], attention: np.ndarray) -> Reading:
    values = np.ones(attention.shape[:3], dtype=np.float32)
    return Reading(
        "made up", tuple(ids), tuple(map(str, ids)), attention.astype(np.float32), values
    )


def test_the_page_carries_what_the_probe_measures_within_half_a_step(reader, readings):
    data = carried(Viewer(readings, ("once", 0, 0)))
    for name, text in zip(TEXTS, data["texts"], strict=True):
        ids = reader.encode([TEXTS[name]], len(text["tokens"]))
        weights, values = unpacked(text, len(data["heads"]))
        norms = measure(reader.model, ids, ("value_norm",))
        drain = value_drain_ratio(norms).isel(batch=0)
        for (layer, head), shown, norm in zip(data["heads"], weights, values, strict=True):
            measured = attention_weights(reader.model, ids, layer=layer)[0, head].numpy()
            assert np.abs(shown - measured).max() <= 0.5 / 255 + 1e-6
            assert abs(norm[0] - drain.sel(layer=layer, head=head).item()) <= norm.max() / 255


def test_a_long_text_is_cut_and_one_without_words_refused(reader):
    (cut,) = read(reader, {"long": "to be " * 40})
    assert len(cut.tokens) == heads.LONGEST and cut.attention.shape[-1] == heads.LONGEST
    with pytest.raises(SinkbookError, match="nothing to look at in the text 'blank'"):
        read(reader, {"blank": "  "})


def test_layers_that_do_not_attend_have_no_tiles(reader, monkeypatch):
    def without_the_first(model, ids):
        return [None, *attention_maps(model, ids)[1:]]

    monkeypatch.setattr(heads, "attention_maps", without_the_first)
    (reading,) = read(reader, {"once": "to be or not"})
    assert not reading.present[0].any() and reading.present[1:].all()
    data = carried(Viewer([reading], ("once", *heads.strongest(reading))))
    assert {layer for layer, _ in data["heads"]} == {1, 2}
    monkeypatch.setattr(heads, "attention_maps", lambda model, ids: [None] * 3)
    with pytest.raises(SinkbookError, match="no layer of tiny attends"):
        read(reader, {"once": "to be or not"})


def test_a_model_without_value_norms_has_maps_all_the_same(reader, monkeypatch):
    def refusing(*_):
        raise SinkbookError("no W_O")

    monkeypatch.setattr(heads, "measure", refusing)
    readings = read(reader, {"once": "to be or not"})
    assert np.isnan(readings[0].values).all()
    (text,) = carried(Viewer(readings, ("once", 0, 0)))["texts"]
    assert text["scales"] == []
    weights, _ = unpacked(text, 12)
    assert np.abs(weights.sum(-1) - 1).max() < 0.02


def test_weights_that_are_no_shares_are_refused(reader, monkeypatch):
    def doubled(model, ids):
        return [found._replace(weights=2 * found.weights) for found in attention_maps(model, ids)]

    monkeypatch.setattr(heads, "attention_maps", doubled)
    with pytest.raises(SinkbookError, match="from 0 to 2, and only shares"):
        read(reader, {"once": "to be or not"})


def test_the_head_that_wakes_rests_on_what_is_new_and_copies_what_repeats():
    """Of three heads one only rests, one only copies, and one does both."""
    ids = [9, 1, 2, 3, 1, 2, 3]
    maps = np.zeros((3, 1, 7, 7))
    maps[0, 0, :, 0] = maps[2, 0, :, 0] = 1
    for head in (1, 2):
        maps[head, 0, 4:6] = 0
        maps[head, 0, [4, 5], [2, 3]] = 0.75
    found = waking(made_up(ids, maps))
    assert (found.layer, found.head) == (2, 0)
    assert (found.resting, found.copying) == (1.0, 0.75)


def test_a_text_that_says_nothing_twice_wakes_nobody():
    with pytest.raises(SinkbookError, match="said a second time"):
        waking(made_up([9, 1, 2, 1, 3], np.zeros((1, 1, 5, 5))))


def test_a_text_or_a_head_that_is_not_there_is_refused(readings):
    with pytest.raises(SinkbookError, match="no text is called 'twice'. There are once, marks"):
        Viewer(readings, ("twice", 0, 0))
    with pytest.raises(SinkbookError, match="no head 9 in layer 1"):
        Viewer(readings, ("once", 1, 9))


def test_what_a_text_spells_is_never_taken_for_markup(readings):
    html = Viewer(readings, ("marks", 0, 0))._repr_html_()
    assert html.count("<script") == html.count("</script") == 2
    assert "<s>" not in html and "&lt;script&gt;" in html


def test_where_scripts_do_not_run_a_picture_says_what_it_shows(readings):
    html = Viewer(readings, ("once", 2, 1))._repr_html_()
    still = html.partition('<div class="still">')[2].partition("</div>")[0]
    assert 'role="img" aria-label="Attention map of layer 2, head 1' in still
    weights = readings[0].attention[2, 1]
    assert still.count("<rect") == (weights >= heads.FAINTEST).sum()


def test_a_viewer_asks_no_other_machine(readings):
    html = Viewer(readings, ("once", 0, 0))._repr_html_()
    assert not re.search(r"https?://|\bfetch\(|\bimport\b", html)


@pytest.mark.weights
def test_the_books_picture_opens_at_head_4_of_layer_17_and_is_light_enough_for_a_phone():
    """It rests on the first token, and jumps to a second diagonal when the sentence repeats."""
    reader = load()
    readings = read(reader, llm_experiments.short_texts(reader))
    twice, turning = readings[0], readings[3]
    found = waking(twice)
    assert (found.layer, found.head) == (17, 4)
    weights = twice.attention[17, 4]
    again = twice.ids.index(twice.ids[-1]) + 1  # where the sentence begins again
    copied = weights[range(again, len(weights) - 1), range(2, again)]
    assert weights[1:again, 0].min() > 0.9 and copied.min() > 0.6 and weights[-1, 0] > 0.8
    # What the text of chapter 12 shows in Python, and that of chapter 13 at the border.
    python = readings[2]
    for name in ("width", "height"):
        place = [token.strip() for token in python.tokens].index(name)
        second = [token.strip() for token in python.tokens].index(name, place + 1)
        assert python.attention[17, 4, second, 0] < 0.3 < 0.9 < python.attention[17, 4, place, 0]
    border = [token.strip() for token in turning.tokens].index(".") + 1
    language = turning.attention[23, 4, :, 0]
    assert language[2:border].mean() > 0.8 and language[border + 2 :].mean() < 0.2
    assert len(Viewer(readings, ("said twice", 17, 4))._repr_html_()) < 700_000
