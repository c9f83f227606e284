"""Every page of the rendered book in Chromium, as a reader meets it: offline, wide, phone, dark."""

import re
from pathlib import Path
from urllib.parse import unquote

import pytest

from colours import contrast
from sinkbook.figures.style import ON_MAP

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(path.stem for kind in ("*.md", "*.ipynb") for path in (ROOT / "book").glob(kind))
NOTEBOOKS = sorted((ROOT / "book").glob("*.ipynb"))
CHAPTERS = [path.stem for path in NOTEBOOKS if path.stem[0].isdigit()]
VIEWS = {
    "wide": {"viewport": {"width": 1280, "height": 900}, "color_scheme": "light"},
    "phone": {"viewport": {"width": 390, "height": 844}, "color_scheme": "light"},
    "dark": {"viewport": {"width": 1280, "height": 900}, "color_scheme": "dark"},
    "dark phone": {"viewport": {"width": 390, "height": 844}, "color_scheme": "dark"},
}
LOCAL = ("file:", "data:", "blob:")
AXE = ROOT / "node_modules" / "axe-core" / "axe.min.js"  # there since the pages were made

READ_PAGE = """async () => {
  if (window.MathJax?.startup?.promise) await window.MathJax.startup.promise;
  const text = document.querySelector("article").cloneNode(true);
  text.querySelectorAll("pre, code, mjx-container, script, style").forEach(node => node.remove());
  const images = [...document.querySelectorAll("article img")];
  const figures = [...document.querySelectorAll("article svg[role=img]")];
  const fileName = /\\.(png|svg|webp|jpe?g)$/;
  const colours = getComputedStyle(document.body);
  const code = [...document.querySelectorAll(
    "article .cell_input, article :not(.cell_input) > :is(.highlight-python, .highlight-bash)")];
  const height = nodes => nodes.filter(node => node.checkVisibility())
    .reduce((sum, node) => sum + node.getBoundingClientRect().height, 0);
  return {
    text: text.textContent,
    formulas: document.querySelectorAll("article .math").length,
    typeset: document.querySelectorAll("article mjx-container").length,
    overflow: document.documentElement.scrollWidth - document.documentElement.clientWidth,
    unnamed: images.filter(i => !i.alt.trim() || fileName.test(i.alt)).map(i => i.src)
      .concat(figures.filter(svg => !svg.getAttribute("aria-label")?.trim()).map(svg => svg.id)),
    firstFigure: document.querySelector("article figure")?.getBoundingClientRect().top,
    code: height(code) / height([document.querySelector("article")]),
    broken: images.filter(i => !i.naturalWidth).map(i => i.src),
    ink: colours.color, paper: colours.backgroundColor,
  };
}"""


# Rules of axe-core that a page breaks, with the places, where it would keep somebody out. Letters
# of a figure lie on an image, it says, and it cannot tell: their `fill` is tested below.
BARRIERS = """async () => {
  axe.configure({ rules: [{ id: "color-contrast", selector: "*:not(text):not(tspan)" }] });
  document.querySelectorAll("details").forEach(folded => { folded.open = true; });
  // What is opened fades in: half way there its letters are faint.
  document.getAnimations().forEach(animation => animation.cancel());
  const asked = {
    preload: false,  // a file fetches no style sheets
    resultTypes: ["violations"],
    rules: {region: {enabled: false}},  // never more than moderate, and slow
  };
  const found = await axe.run(document, asked);
  return found.violations.filter(rule => ["serious", "critical"].includes(rule.impact))
    .map(rule => [rule.id, ...rule.nodes.map(node => node.target.join(" "))]);
}"""


# The letters of all figures that a view shows, opened or not: pixels, ink and words.
LETTERS = """() => {
  document.querySelectorAll("details").forEach(details => { details.open = true; });
  return [...document.querySelectorAll("article .sinkbook-figure svg text")]
    .filter(text => text.checkVisibility() && text.textContent.trim())
    .map(text => {
      const { a, b, c, d } = text.getScreenCTM(), style = getComputedStyle(text);
      const pixels = Math.sqrt(Math.abs(a * d - b * c)) * parseFloat(style.fontSize);
      return [pixels, style.fill, text.textContent];
    });
}"""


# Each width and each mode is loaded once, and examined by axe-core: seconds a page. Then the page
# is read in the other mode, as where a reader's evening begins.
LOADED = {"wide": "dark", "dark phone": "phone"}
FOLLOWS = "mode => document.documentElement.dataset.theme === mode"


@pytest.fixture(scope="session")
def visit(pages, browser):
    """Open a page in a view; each once. Returns what is on it and what happened meanwhile."""
    seen = {}

    def open_page(name: str, view: str, other: str) -> None:
        context = browser.new_context(**VIEWS[view])
        context.set_default_timeout(0)  # a busy machine takes longer; pytest's own limit is enough
        tab = context.new_page()
        complaints, requests = [], []
        tab.on("console", lambda m: complaints.append(m.text) if m.type == "error" else None)
        tab.on("pageerror", lambda error: complaints.append(str(error)))
        tab.on("requestfailed", lambda request: complaints.append(f"no {request.url}"))
        tab.on("request", lambda request: requests.append(request.url))
        tab.goto((pages / "book" / f"{name}.html").as_uri(), wait_until="load")

        def turn(to: str) -> None:
            tab.emulate_media(color_scheme=VIEWS[to]["color_scheme"])
            tab.wait_for_function(FOLLOWS, arg=VIEWS[to]["color_scheme"])

        for each in (view, other):
            turn(each)
            seen[name, each] = tab.evaluate(READ_PAGE)
        for each in (other, view):  # what is folded is opened once both have been read
            turn(each)
            seen[name, each]["letters"] = tab.evaluate(LETTERS)
        tab.evaluate(AXE.read_text(encoding="utf-8"))
        seen[name, view]["barriers"] = tab.evaluate(BARRIERS)
        context.close()
        outside = [url for url in requests if not url.startswith(LOCAL)]
        for each in (view, other):
            seen[name, each] |= {"complaints": complaints, "outside": outside}

    def page_in(name: str, view: str) -> dict:
        if (name, view) not in seen:
            loaded = next(each for each, other in LOADED.items() if view in (each, other))
            open_page(name, loaded, LOADED[loaded])
        return seen[name, view]

    return page_in


@pytest.fixture(autouse=True)
def chapter_of_the_page(request, executions):
    """A page whose chapter stopped fails with the chapter's own error, and the others do not."""
    name = request.node.callspec.params.get("name") if hasattr(request.node, "callspec") else None
    if name in executions.failures:
        executions[name]


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("name", PAGES)
def test_a_page_loads_without_complaint_or_request_to_another_machine(visit, name, view):
    page = visit(name, view)
    assert page["complaints"] == []
    assert page["outside"] == []
    assert page["broken"] == []


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("name", PAGES)
def test_a_page_does_not_scroll_sideways(visit, name, view):
    assert visit(name, view)["overflow"] <= 0


@pytest.mark.parametrize("name", CHAPTERS)
def test_a_chapter_shows_its_first_figure_on_the_first_screen(visit, name):
    assert visit(name, "wide")["firstFigure"] <= 900


@pytest.mark.parametrize("name", CHAPTERS)
def test_before_anything_is_opened_little_of_a_chapter_is_code(visit, name):
    assert 0 < visit(name, "wide")["code"] < 0.12


# How many figures and tables behind guesses can be seen.
ANSWERS = """() => [...document.querySelectorAll("details.sinkbook-answer .cell_output")]
  .filter(node => node.checkVisibility()).length"""


@pytest.mark.parametrize("name", CHAPTERS)
def test_answers_wait_for_a_click_that_needs_no_script_and_are_all_printed(pages, browser, name):
    context = browser.new_context(**VIEWS["wide"], java_script_enabled=False)
    context.set_default_timeout(0)
    tab = context.new_page()
    tab.goto((pages / "book" / f"{name}.html").as_uri())
    hidden = tab.locator("details.sinkbook-answer .cell_output").count()
    if hidden:
        assert tab.evaluate(ANSWERS) == 0
        tab.emulate_media(media="print")
        assert tab.evaluate(ANSWERS) == hidden
        tab.emulate_media(media="screen")
    for summary in tab.locator("details.sinkbook-answer > summary").all():
        summary.click()
    assert tab.evaluate(ANSWERS) == hidden
    context.close()


@pytest.mark.parametrize("name", PAGES)
def test_formulas_are_typeset_and_none_is_left_as_tex(visit, name):
    page = visit(name, "wide")
    assert page["typeset"] == page["formulas"]
    for raw in ("\\(", "\\[", "$$", "\\frac", "\\begin{", "{glue:"):
        assert raw not in page["text"]


@pytest.mark.parametrize("name", PAGES)
def test_no_start_token_strikes_the_page_out(pages, name):
    html = (pages / "book" / f"{name}.html").read_text(encoding="utf-8")
    assert "<s>" not in html and "<d>" not in html


@pytest.mark.parametrize("name", [name for name in PAGES if name != "api"])  # it names the role
def test_no_role_is_left_as_text(pages, name):
    html = (pages / "book" / f"{name}.html").read_text(encoding="utf-8")
    assert "{glue:" not in html and "{doc}" not in html


@pytest.mark.parametrize("name", PAGES)
def test_every_image_says_what_it_shows(visit, name):
    assert visit(name, "wide")["unnamed"] == []


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("name", CHAPTERS)
def test_the_letters_of_every_figure_are_ten_pixels_high(visit, name, view):
    letters = visit(name, view)["letters"]
    assert letters
    assert [words for pixels, _, words in letters if pixels < 10] == []


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("name", CHAPTERS)
def test_the_letters_of_every_figure_stand_out(visit, name, view):
    page, on_map = visit(name, view), "rgb({}, {}, {})".format(*bytes.fromhex(ON_MAP[1:]))
    faint = {
        words
        for _, ink, words in page["letters"]
        # What has the colour of the page or `ON_MAP` is written on the cells of a map.
        if ink not in (page["paper"], on_map)
        and contrast(channels(ink), channels(page["paper"])) < 4.5
    }
    assert faint == set()


@pytest.mark.parametrize("name", PAGES)
def test_dark_pages_are_dark_and_their_text_is_light(visit, name):
    page = visit(name, "dark")
    assert brightness(page["paper"]) < 60
    assert brightness(page["ink"]) > 150


@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_light_enough_for_a_phone(pages, name):
    """What it alone carries: its HTML, with the data in it, and each picture or script beside it.

    Not counted are scripts, styles and fonts that all pages share, and files that are only linked.
    """
    page = pages / "book" / f"{name}.html"
    html = page.read_text(encoding="utf-8")
    loaded = {
        unquote(path) for path in re.findall(r'<(?:img|script|source)\b[^>]*\bsrc="([^"]+)"', html)
    }
    beside = {
        (page.parent / path.partition("?")[0]).resolve() for path in loaded if "data:" not in path
    }
    shared = [pages.resolve() / name for name in ("_static", "vendor")]
    own = [path for path in beside if not any(path.is_relative_to(folder) for folder in shared)]
    assert page.stat().st_size + sum(path.stat().st_size for path in own) < 1_500_000


@pytest.mark.parametrize("view", LOADED)
@pytest.mark.parametrize("name", PAGES)
def test_nothing_on_a_page_keeps_anybody_out(visit, name, view):
    """No rule of axe-core is broken whose breach it calls serious or critical."""
    assert visit(name, view)["barriers"] == []


def test_the_first_page_leads_to_the_book(pages, browser):
    tab = browser.new_page()
    tab.goto((pages / "index.html").as_uri())
    tab.wait_for_url("**/book/index.html")
    assert "ttention" in tab.title()


def brightness(colour: str) -> float:
    """Mean of the channels of a CSS colour."""
    return sum(channels(colour)) / 3


def channels(colour: str) -> list[float]:
    """The channels of a CSS colour such as `rgb(20, 24, 30)`, 0 to 255."""
    return [float(part) for part in re.findall(r"[\d.]+", colour)[:3]]
