"""A text that is typed in a notebook: every head on it, or in words why not."""

import pytest

from sinkbook.pages import heads
from sinkbook.pages.typed_text import TypedText
from tiny import tiny_model, tiny_reader


@pytest.fixture
def typed() -> TypedText:
    return TypedText(tiny_reader(tiny_model()))


def shown(typed: TypedText) -> str:
    (output,) = typed.shown.outputs
    return output["data"]["text/html"]


def test_a_typed_text_is_shown_in_place_of_the_one_before(typed):
    typed.text.value = "to be or not"
    assert 'tokens":["<s>'.replace("<", "\\u003c") in shown(typed)
    assert '"be"' in shown(typed) or '" be"' in shown(typed)
    typed.text.value = "the the the"
    assert '"the"' in shown(typed) or '" the"' in shown(typed)
    assert typed.message.value.count("Reading") == 0


def test_what_cannot_be_shown_is_said_and_the_picture_stays(typed, monkeypatch):
    typed.text.value = "to be or not"
    before = shown(typed)
    typed.text.value = "  "
    assert "Not shown: there is nothing to look at" in typed.message.value

    def failing(*_):
        raise RuntimeError("out of <memory>")

    monkeypatch.setattr(heads, "attention_maps", failing)
    typed.text.value = "the the"
    assert "Not shown: out of &lt;memory&gt;" in typed.message.value
    assert shown(typed) == before
