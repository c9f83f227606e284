"""Explorers: sliders turn the pictures without a kernel, and a typed text redraws them."""

import re

import ipywidgets as widgets
import numpy as np
import pytest
import xarray as xr

from sinkbook import measure
from sinkbook.errors import SinkbookError
from sinkbook.report import explorers
from sinkbook.report.explorers import Explorer
from tiny import tiny_model, tiny_reader

TEXT = "to be or not to be"


@pytest.fixture(scope="module")
def reader():
    return tiny_reader(tiny_model(num_hidden_layers=4))


@pytest.fixture
def explorer(reader) -> Explorer:
    return explorers.heads(reader, TEXT, layers=3, heads_of_each=2)


@pytest.fixture
def scanned() -> xr.Dataset:
    """Two domains of three texts on 4 x 4 heads. Only one head tells the domains apart."""
    attention = np.full((2, 3, 4, 4), 0.5) + np.linspace(0, 0.01, 96).reshape(2, 3, 4, 4)
    attention[:, :, 3, 1] = [[0.1] * 3, [0.9] * 3]
    sizes = {"domain": ["prose", "code"], "text": range(3), "layer": range(4), "head": range(4)}
    return xr.Dataset({"sink_attention": (tuple(sizes), attention)}, coords=sizes)


def images(explorer: Explorer) -> list[str]:
    return [re.search("base64,([^']+)", picture.value)[1] for picture in explorer.pictures]


def on_the_page(explorer: Explorer, *chosen: int) -> str:
    """What a page without a kernel shows with these choices, from the saved state alone."""
    models = {
        f"IPY_MODEL_{name}": model["state"]
        for name, model in widgets.Widget.get_manager_state()["state"].items()
    }
    sliders = {f"IPY_MODEL_{s.model_id}": n for s, n in zip(explorer.sliders, chosen, strict=True)}
    turned = {}
    for model in models.values():
        if model["_model_name"] == "LinkModel" and model["source"][0] in sliders:
            (source, index), (stack, selected) = model["source"], model["target"]
            assert (index, selected) == ("index", "selected_index")
            turned[stack] = sliders[source]
    place = models[f"IPY_MODEL_{explorer.model_id}"]["children"][-1]
    while "children" in models[place]:
        place = models[place]["children"][turned[place]]
    return models[place]["value"]


def test_every_layer_and_head_that_can_be_chosen_has_a_picture_of_its_own(explorer):
    choices = {slider.description: slider.options for slider in explorer.sliders}
    assert choices == {"layer": (("0", 0), ("2", 1), ("3", 2)), "head": (("0", 0), ("3", 1))}
    assert len(explorer.pictures) == len(set(images(explorer))) == 6
    assert "3 of 4 layers and 2 of 4 heads in each" in explorer.children[0].value


def test_sliders_turn_the_pictures_without_a_kernel(explorer):
    for layer, head in np.ndindex(3, 2):
        shown = on_the_page(explorer, layer, head)
        assert f"Layer {(0, 2, 3)[layer]}, head {(0, 3)[head]}:" in shown


def test_a_picture_tells_its_numbers_in_words_and_has_an_alternative_text(explorer, reader):
    attention = measure(reader.model, reader.encode([TEXT], 7)).sink_attention
    picture = on_the_page(explorer, 1, 1)
    value = attention.sel(batch=0, layer=2, head=3).item()
    assert f"the first one {value:.2f} of their attention" in picture
    assert "alt='Attention map and value norms of head 3 in layer 2.'" in picture


def test_a_typed_text_redraws_every_picture(explorer, reader):
    before = images(explorer)
    explorer.text.value = "the <script> or not"
    after = images(explorer)
    assert not set(before) & set(after)
    assert after == images(explorers.heads(reader, explorer.text.value, layers=3, heads_of_each=2))


@pytest.mark.parametrize(
    "typed, said",
    [("  ", "nothing to look at"), ("to be " * 12, "this text has 25 tokens, and 24 can be shown")],
)
def test_a_text_that_cannot_be_shown_is_refused_in_words_and_the_pictures_stay(
    explorer, typed, said
):
    before = images(explorer)
    explorer.text.value = typed
    assert said in explorer.message.value
    assert images(explorer) == before


def test_after_a_failure_the_next_text_is_drawn(explorer, monkeypatch):
    before = images(explorer)

    def failing(*_, **__):
        raise RuntimeError("out of <memory>")

    with monkeypatch.context() as broken:
        broken.setattr(explorers, "attention_weights", failing)
        explorer.text.value = "the the the"
    assert "Not drawn: out of &lt;memory&gt;" in explorer.message.value
    assert images(explorer) == before
    explorer.text.value = "to be"
    assert "Not drawn" not in explorer.message.value
    assert images(explorer) != before


def test_what_a_text_spells_is_never_taken_for_markup_or_mathematics(explorer):
    explorer.text.value = "<script> <script> $x$ $"
    assert "Not drawn" not in explorer.message.value
    assert all("<script" not in picture.value for picture in explorer.pictures)


def test_what_only_a_kernel_can_answer_is_marked_for_pages_to_hide(explorer):
    marked = [child for child in explorer.children if "sinkbook-needs-kernel" in child._dom_classes]
    assert marked == [explorer.text, explorer.message]


def test_heads_come_in_the_order_of_how_much_their_domains_differ(reader, scanned):
    passages = {"prose": "to be or not to be", "code": "the <script>"}
    explorer = explorers.domains(reader, scanned, passages, count=3)
    assert len(explorer.pictures) == 3
    assert "most sink attention in code, 0.90 on average, and least in prose, 0.10" in on_the_page(
        explorer, 0
    )
    assert explorer.sliders[0].options[0] == ("3, 1", 0)
    assert "The 3 of 16 heads" in explorer.children[0].value


def test_a_typed_text_takes_the_place_of_the_running_one_and_can_be_taken_back(reader, scanned):
    explorer = explorers.domains(reader, scanned, {"prose": "to be or", "code": "the"}, count=2)
    before = images(explorer)
    explorer.text.value = "not to be " * 9
    assert not set(before) & set(images(explorer))
    explorer.text.value = "to be or the"
    assert images(explorer) == before


def test_a_text_that_cannot_be_shown_is_an_error_when_the_explorer_is_made(reader):
    with pytest.raises(SinkbookError, match="nothing to look at"):
        explorers.heads(reader, "")


def test_pictures_are_light_enough_for_a_page(explorer):
    """54 of them, which SmolLM2 has with 6 layers of 9 heads, in 1.2 MB."""
    assert max(len(picture.value) for picture in explorer.pictures) < 1_200_000 / 54
