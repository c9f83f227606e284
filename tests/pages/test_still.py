"""Pictures of which a reader chooses one, in Chromium: by keys, by touch, and without a script."""

import re
from pathlib import Path

import numpy as np
import pytest

from sinkbook.errors import SinkbookError
from sinkbook.pages.still import Choice, Heads, Reading

ROOT = Path(__file__).resolve().parents[2]


def reading(on_first: float, *, labels: tuple[str, ...] = ("<s>", "a", "t", "b")) -> Reading:
    """Every later token gives the first one as much, and itself the rest."""
    weights = np.eye(4) * (1 - on_first)
    weights[:, 0] += on_first
    values = np.array([0.5, 2.0, 2.0, 2.0])
    return Reading(weights, values, list(labels), [False, False, True, False])


CHOICE = Choice(
    "Choose <one>.",
    {
        "a sink": reading(0.75),
        "no sink": reading(0.0),
        "no <s>": reading(0.5, labels=tuple("xatb")),
    },
)


@pytest.fixture(params=[True, False], ids=["scripts", "no scripts"])
def tab(request, browser):
    style = (ROOT / "_static/sinkbook.css").read_text(encoding="utf-8")
    context = browser.new_context(
        viewport={"width": 390, "height": 844},
        java_script_enabled=request.param,
        has_touch=True,
    )
    page = context.new_page()
    page.set_content(f"<!doctype html><style>{style}</style><body>{CHOICE._repr_html_()}")
    yield page
    context.close()


def shown(page) -> list[bool]:
    return [picture.is_visible() for picture in page.locator(".chosen").all()]


@pytest.mark.site
def test_one_picture_is_shown_and_a_key_or_a_touch_chooses_another(tab):
    assert shown(tab) == [True, False, False]
    tab.get_by_text("no <s>", exact=True).tap()
    assert shown(tab) == [False, False, True]
    tab.get_by_role("radio", name="no <s>").focus()
    tab.keyboard.press("ArrowLeft")
    assert shown(tab) == [False, True, False]
    assert all(
        b.bounding_box()["x"] + b.bounding_box()["width"] <= 390 for b in tab.locator("label").all()
    )
    assert tab.locator(".chosen svg").nth(1).bounding_box()["width"] <= 390


def test_each_picture_is_told_in_words_to_those_who_do_not_see_it():
    html = CHOICE._repr_html_()
    assert 'aria-label="Choose &lt;one&gt;."' in html
    assert html.count("give &lt;s&gt;, which stands first, 0.75 of their attention") == 2
    assert "a sink: the ordinary characters" in html and "0.25 times as long" in html
    assert (
        "no <s>" not in html and "no &lt;s&gt;: the ordinary characters of this text give x" in html
    )


def test_every_head_has_a_bar_as_high_as_what_it_gives_and_the_strongest_is_named():
    shares = np.array([[0.1, 0.2, 0.05], [0.25, 0.0, 0.9]])
    html = Choice("When?", {"late": Heads(shares, even=0.04), "early": Heads(shares / 10, 0.04)})
    late = html._repr_html_().split('<div class="chosen">')[1]
    assert "late: head 2 of layer 1 gives the first token most, 0.90 of its attention" in late
    drawn = re.findall(r'class="cell"[^>]*height="([\d.e-]+)"', late)
    np.testing.assert_allclose(list(map(float, drawn)), 240 * np.minimum(shares, 0.5).ravel())


def test_who_gets_most_is_named_where_it_is_not_the_first():
    assert "largest share" not in reading(0.75).in_words("<s>")
    weights = np.eye(4)
    weights[2:, :2] = [[0.1, 0.8], [0.1, 0.7]]
    looks = Reading(weights, np.array([1.0, 2.0, 4.0, 5.0]), list("abcd"), [False] * 4)
    said = looks.in_words("a")
    assert "give a 0.07 of their attention; its value is 0.27 times" in said
    assert said.endswith("0.83, goes to b at position 1, whose value is 0.60 times as long.")


def test_one_reading_is_no_choice():
    with pytest.raises(SinkbookError, match="1 readings are no choice"):
        Choice("Choose.", {"alone": reading(0.5)})
