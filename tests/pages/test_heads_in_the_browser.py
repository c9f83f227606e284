"""Every head in one picture, in Chromium: by mouse, finger and keys, at a desk and on a phone."""

import numpy as np
import pytest
from playwright.sync_api import Page, expect

from sinkbook.pages.heads import Reading, Viewer, read, waking
from tiny import tiny_model, tiny_reader

pytestmark = pytest.mark.site

TEXTS = {
    "said twice": "to be or not the to be or not the",
    "two words": "not be",
    "with marks": "the <script> or <script>",
}
VIEWS = {
    "wide": {"viewport": {"width": 1000, "height": 900}},
    "phone": {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True},
}
WEIGHTS = """root => root.viewer.heads.map((_, head) =>
  root.viewer.text.tokens.map((_, query) =>
    root.viewer.text.tokens.map((_, key) => root.viewer.text.weight(head, query, key))))"""


@pytest.fixture(scope="module")
def readings() -> list[Reading]:
    return read(tiny_reader(tiny_model(num_hidden_layers=5, initializer_range=0.3)), TEXTS)


@pytest.fixture(scope="module")
def opened(readings) -> tuple[int, int]:
    return waking(readings[0])[:2]


@pytest.fixture(scope="module")
def address(readings, opened, tmp_path_factory) -> str:
    """A page with the viewer, opened as a file."""
    html = Viewer(readings, ("said twice", *opened))._repr_html_()
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    dark = '[data-theme="dark"] body { --pst-color-background: #14181e; background: #14181e; }'
    path = tmp_path_factory.mktemp("pages") / "heads.html"
    page = f'<!DOCTYPE html><html lang="en"><head>{head}<title>heads</title><style>{dark}</style>'
    path.write_text(f"{page}</head><body>{html}</body></html>", encoding="utf-8")
    return path.as_uri()


@pytest.fixture
def visit(browser, address):
    """Open the page in a view; whatever it complains of fails the test."""
    contexts, complaints = [], []

    def open_page(view: str = "wide", **options) -> Page:
        context = browser.new_context(**VIEWS[view] | options)
        contexts.append(context)
        tab = context.new_page()
        tab.on("console", lambda m: complaints.append(m.text) if m.type == "error" else None)
        tab.on("pageerror", lambda error: complaints.append(str(error)))
        tab.on("request", lambda r: None if r.url == address else complaints.append(r.url))
        tab.goto(address)
        if options.get("java_script_enabled", True):
            tab.wait_for_selector(".sinkbook-heads[data-layer]")
        return tab

    yield open_page
    for context in contexts:
        context.close()
    assert complaints == []


def tile(tab: Page, layer: int, head: int):
    return tab.get_by_role("gridcell", name=f"layer {layer}, head {head}:")


def title(tab: Page):
    return tab.locator(".sinkbook-heads .title")


def says(tab: Page):
    return tab.locator(".sinkbook-heads .says")


def token(tab: Page, number: int):
    return tab.get_by_role("toolbar").get_by_role("button").nth(number)


@pytest.mark.parametrize("view", VIEWS)
def test_it_opens_at_the_picture_that_tells_the_story(visit, opened, view):
    tab = visit(view)
    layer, head = opened
    expect(title(tab)).to_have_text(f"Layer {layer}, head {head}")
    expect(tab.get_by_role("radio", name="said twice")).to_be_checked()
    chosen = tile(tab, layer, head)
    expect(chosen).to_have_attribute("aria-selected", "true")
    expect(chosen).to_be_in_viewport()
    assert tab.locator(".still").count() == 0


def test_the_maps_that_a_reader_sees_are_the_probes_within_half_a_step(visit, readings):
    tab = visit()
    for reading in readings:
        tab.get_by_role("radio", name=reading.name).check()
        expect(tab.locator(f".sinkbook-heads[data-text='{reading.name}']")).to_be_visible()
        shown = np.array(tab.locator(".sinkbook-heads").evaluate(WEIGHTS))
        measured = reading.attention[reading.present]
        assert shown.shape == measured.shape
        assert np.abs(shown - measured).max() <= 0.5 / 255 + 1e-6


def test_a_cell_under_the_pointer_says_its_number(visit, readings, opened):
    tab = visit()
    box = tab.get_by_role("img").bounding_box()
    reading = readings[0]
    count = len(reading.tokens)
    for query, key in ((count - 1, 0), (5, 3), (7, 7)):
        place = [(key + 0.5) / count * box["width"], (query + 0.5) / count * box["height"]]
        tab.mouse.move(box["x"] + place[0], box["y"] + place[1])
        number = float(says(tab).inner_text().split(" of its attention")[0].split()[-1])
        assert abs(number - reading.attention[*opened, query, key]) <= 0.5 / 255 + 0.005 + 1e-6


def test_a_mouse_shows_a_head_while_it_is_over_it_and_keeps_it_by_a_click(visit, opened):
    tab = visit()
    tile(tab, 4, 2).hover()
    expect(title(tab)).to_have_text("Layer 4, head 2")
    tab.mouse.move(5, 5)
    expect(title(tab)).to_have_text("Layer {}, head {}".format(*opened))
    tile(tab, 4, 2).click()
    tab.mouse.move(5, 5)
    expect(title(tab)).to_have_text("Layer 4, head 2")
    assert tile(tab, 4, 2).get_attribute("aria-selected") == "true"
    assert tab.locator('[role="gridcell"][aria-selected="true"]').count() == 1


def test_a_finger_chooses_a_head_and_a_token(visit):
    tab = visit("phone")
    tile(tab, 3, 1).tap()
    expect(title(tab)).to_have_text("Layer 3, head 1")
    token(tab, 4).tap()
    expect(token(tab, 4)).to_have_attribute("aria-pressed", "true")
    expect(says(tab)).to_contain_text("this head looks most at")
    assert tab.locator('[aria-pressed="true"]').count() == 1
    token(tab, 4).tap()
    expect(token(tab, 4)).to_have_attribute("aria-pressed", "false")
    assert tab.locator('[aria-pressed="true"]').count() == 0


def test_arrow_keys_walk_through_the_heads_and_one_tile_is_in_the_tab_order(visit):
    tab = visit()
    tile(tab, 1, 1).click()
    for key, layer, head in (
        *(("ArrowRight", 2, 1), ("ArrowDown", 2, 2), ("ArrowLeft", 1, 2), ("ArrowUp", 1, 1)),
        *(("End", 4, 1), ("ArrowRight", 4, 1), ("Home", 0, 1)),
    ):
        tab.keyboard.press(key)
        expect(tile(tab, layer, head)).to_be_focused()
        expect(title(tab)).to_have_text(f"Layer {layer}, head {head}")
    assert tab.locator('[role="gridcell"][tabindex="0"]').count() == 1
    expect(tab.get_by_role("status")).to_contain_text("Layer 0, head 1, said twice")


def test_a_token_shows_where_all_heads_look_from_it(visit, readings):
    tab = visit()
    token(tab, 8).focus()
    tab.keyboard.press("End")
    tab.keyboard.press("ArrowLeft")
    count = len(readings[0].tokens)
    expect(token(tab, count - 2)).to_be_focused()
    rows = readings[0].attention[readings[0].present][:, count - 2]
    favourites = np.bincount(np.round(255 * rows).argmax(-1), minlength=count)
    listed = tab.locator(".most dd:nth-of-type(even)").all_inner_texts()
    assert list(map(int, listed)) == sorted(favourites[favourites > 0], reverse=True)[:5]
    expect(tab.get_by_role("status")).to_contain_text(f"{favourites.max()} look most at")
    tab.keyboard.press("Escape")
    assert tab.locator(".most dd").count() == 0


def test_another_text_has_its_own_tokens_and_keeps_the_head(visit, opened):
    tab = visit()
    tab.get_by_role("radio", name="said twice").focus()
    tab.keyboard.press("ArrowRight")
    expect(tab.get_by_role("toolbar").get_by_role("button")).to_have_text(["<s>", "not", "be"])
    expect(title(tab)).to_have_text("Layer {}, head {}".format(*opened))
    assert not tab.get_by_role("radio", name="said twice").is_checked()


def test_tiles_and_map_are_repainted_for_the_dark(visit):
    tab = visit()
    colour = "c => [...c.getContext('2d').getImageData(4, c.height - 4, 1, 1).data].slice(0, 3)"
    canvases = tab.locator(".field canvas, .map canvas[role='img']")
    light = [canvas.evaluate(colour) for canvas in canvases.all()]
    tab.evaluate("document.documentElement.dataset.theme = 'dark'")
    tab.evaluate("() => new Promise(requestAnimationFrame)")
    dark = [canvas.evaluate(colour) for canvas in canvases.all()]
    assert len(light) == 2 and all(a != b for a, b in zip(light, dark, strict=True))


@pytest.mark.parametrize("view", VIEWS)
def test_nothing_is_wider_than_the_page_or_smaller_than_ten_pixels(visit, view):
    tab = visit(view)
    token(tab, 3).click()
    assert tab.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0
    sizes = tab.locator(".sinkbook-heads").evaluate(
        """root => [...root.querySelectorAll("*")].filter(node => node.checkVisibility()
          && [...node.childNodes].some(child => child.nodeType === 3 && child.data.trim()))
          .map(node => parseFloat(getComputedStyle(node).fontSize))"""
    )
    assert min(sizes) >= 10


def test_fingers_have_room_on_a_phone(visit):
    tab = visit("phone")
    for target in (tile(tab, 0, 0), token(tab, 0)):
        box = target.bounding_box()
        assert min(box["width"], box["height"]) >= 24


@pytest.mark.parametrize("missing", ["scripts", "unpacking"])
def test_where_it_cannot_run_the_still_picture_stays(browser, visit, address, missing):
    if missing == "scripts":
        tab = visit(java_script_enabled=False)
    else:
        tab = browser.new_page()
        tab.add_init_script("delete globalThis.DecompressionStream")
        tab.goto(address)
    picture = tab.locator(".still svg")
    expect(picture).to_be_visible()
    assert picture.get_attribute("aria-label").startswith("Attention map of layer")
    tab.close()
