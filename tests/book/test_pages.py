"""The order in which a chapter is read: its first screen, its guesses, its last three lines."""

import json
import re
from pathlib import Path

import pytest
import yaml

from sinkbook import book
from sinkbook.book import sphinx_ext
from sinkbook.book.chapters import Chapter
from sinkbook.book.execution import Execution
from sinkbook.book.notebooks import read_notebook, tags

ROOT = Path(__file__).resolve().parents[2]
CHAPTERS = sorted((ROOT / "book").glob("[01]*.ipynb"))
chapters = pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)


def prose(path: Path) -> str:
    cells = read_notebook(path)["cells"]
    return "\n\n".join(cell["source"] for cell in cells if cell["cell_type"] == "markdown")


@chapters
def test_a_chapter_begins_with_question_headline_answer_and_what_one_needs(path):
    cells = read_notebook(path)["cells"]
    question, answer = (cell["source"] for cell in cells[:2])
    assert question.startswith("# ") and question.count("\n#") == 0 and "?" in question
    assert answer.index("What you need") > 100
    (headline,) = [cell for cell in cells if "headline" in tags(cell)]
    assert headline["metadata"]["mystnb"]["figure"]["caption"]


@chapters
def test_a_chapter_ends_with_what_we_saw_why_and_how_sure_in_words_of_the_ledger(path):
    last = prose(path).rpartition("\n## ")[2]
    title, saw, why, sure, *question = re.split(r"\n\n", last)
    assert title == "In three lines" and len(question) == 1
    for line, begins in ((saw, "What we saw."), (why, "Why."), (sure, "How sure.")):
        assert line.startswith(f"**{begins}** ")
    claims = {c["id"] for c in yaml.safe_load((ROOT / "book" / "claims.yml").read_text("utf-8"))}
    assert {*re.findall(r"\{glue:text\}`([^`]+)`", sure)} & claims


@chapters
def test_what_hands_in_numbers_and_imports_at_the_beginning_are_folded(path):
    code = [cell for cell in read_notebook(path)["cells"] if cell["cell_type"] == "code"]
    hands_in = re.compile(
        r"^(?:from|import) .*\n(?:.*\n)*\s*chapter = |chapter\.(?:report|check)\("
    )
    open_ones = [c["source"] for c in code if hands_in.search(c["source"]) and not folded(c)]
    assert open_ones == []
    assert any(not folded(cell) and "remove-cell" not in tags(cell) for cell in code)


def folded(cell: dict) -> bool:
    return "hide-input" in tags(cell)


@chapters
def test_other_pages_are_called_by_words_that_fit_the_sentence(path):
    assert re.findall(r"\{doc\}`[^`<]+`", prose(path)) == []


def test_no_page_calls_a_chapter_by_its_title():
    names = "|".join(path.stem for path in CHAPTERS)
    for path in [*(ROOT / "book").glob("*.md"), *(ROOT / "book").glob("*.ipynb")]:
        text = path.read_text("utf-8")
        assert re.findall(rf"\{{doc\}}`(?:[^`]*<)?(?:{names})>?`", text) == [], path.name


def test_a_chapter_has_the_number_that_the_table_of_contents_gives_it():
    numbers = sphinx_ext.chapter_numbers((ROOT / "_toc.yml").read_text("utf-8"))
    assert numbers == {path.stem: int(path.stem[:2]) for path in CHAPTERS}


def test_the_text_has_the_verdict_of_a_claim_by_its_id(tmp_path, monkeypatch):
    monkeypatch.setenv("SINKBOOK_CACHE", str(tmp_path))
    handed = {}
    monkeypatch.setattr(Chapter, "report", lambda self, **numbers: handed.update(numbers))
    book.chapter("quick").check("sink.one-layer", [0.9, 0.1])
    assert handed == {"sink.one-layer": "mixed (1 of 2)"}


def notebook(*cells: dict) -> dict:
    for number, cell in enumerate(cells):
        cell.setdefault("metadata", {})
        cell["id"] = str(number)
        if cell["cell_type"] == "code":
            cell.setdefault("outputs", [])
            cell["execution_count"] = None
    python = {"language_info": {"name": "python", "pygments_lexer": "python"}}
    return {"cells": [*cells], "metadata": python, "nbformat": 4, "nbformat_minor": 5}


def text(source: str) -> dict:
    return {"cell_type": "markdown", "source": source}


def shows(word: str, mime: str = "text/plain", **metadata: object) -> dict:
    output = {"output_type": "display_data", "metadata": {}, "data": {mime: word}}
    return {"cell_type": "code", "source": "x", "metadata": metadata, "outputs": [output]}


def test_on_the_page_the_headline_is_seen_first_and_no_code_moves(tmp_path):
    figure = {"figure": {"caption": "c", "name": "n"}}
    path = tmp_path / "a.ipynb"
    late = shows("late", tags=["headline", "hide-input"], mystnb=figure)
    path.write_text(json.dumps(notebook(text("# A"), shows("early"), late)))
    page = json.loads(Execution(path, 1.0).page())["cells"]
    assert [cell["source"] for cell in page if cell["source"] != page[1]["source"]] == [
        *("# A", "x", "x")
    ]
    assert page[1]["source"].startswith("#")
    assert page[1]["outputs"][0]["data"]["text/plain"] == "late"
    assert page[1]["metadata"] == {"tags": ["remove-input"], "mystnb": figure}
    assert page[3]["outputs"] == [] and "mystnb" not in page[3]["metadata"]
    assert len({cell["id"] for cell in page}) == 4


@pytest.fixture
def rendered(tmp_path):
    """A function that renders cells as the one chapter of a book: its HTML, and the warnings."""
    from io import StringIO

    from sphinx.application import Sphinx
    from sphinx.util.docutils import docutils_namespace, patch_docutils

    def render(*cells: dict, images: dict[str, str] | None = None) -> tuple[str, str]:
        (tmp_path / "book" / "images").mkdir(parents=True)
        for name, drawing in (images or {}).items():
            (tmp_path / "book" / "images" / name).write_text(drawing)
        toc = "parts: [{numbered: true, chapters: [{file: book/01_a}]}]"
        (tmp_path / "_toc.yml").write_text(toc)
        (tmp_path / "book" / "01_a.ipynb").write_text(json.dumps(notebook(*cells)))
        warnings, built = StringIO(), tmp_path / "_build"
        extensions = ["myst_nb", "sphinx.ext.autodoc", "sinkbook.book.sphinx_ext"]
        settings = {
            "extensions": extensions,
            "root_doc": "book/01_a",
            "nb_execution_mode": "off",
            "myst_enable_extensions": ["colon_fence"],
        }
        with patch_docutils(), docutils_namespace():
            app = Sphinx(
                *(str(tmp_path), None, str(built), str(built / "trees"), "html"),
                confoverrides=settings,
                status=None,
                warning=warnings,
            )
            app.build()
        return (built / "book" / "01_a.html").read_text("utf-8"), warnings.getvalue()

    return render


def test_a_chapter_is_a_link_with_its_number_and_a_capital_at_the_start_of_a_sentence(rendered):
    html, warnings = rendered(
        text("# A\n\n{chapter}`01_a`, not {chapter}`01_a`.\n{chapter}`01_a`.")
    )
    words = re.sub("<[^>]+>", "", html)
    assert "Chapter 1, not chapter 1. Chapter 1." in " ".join(words.split())
    assert html.count('class="reference internal" href="#"') >= 3
    assert warnings == ""


def test_a_chapter_that_is_none_is_a_warning(rendered):
    _, warnings = rendered(text("# A\n\nSee {chapter}`02_b`."))
    assert "no chapter '02_b'" in warnings


def test_a_guess_folds_what_answers_it_and_nothing_else(rendered):
    html, warnings = rendered(
        text("# A\n\nBefore.\n\n:::{guess}\nWhich?\n:::\n\nStill."),
        shows("the answer"),
        text("It was this.\n\nAnd so on."),
        shows('<p class="sinkbook-claim">verdict</p>', "text/html"),
        shows("another matter"),
        text("## B\n\n:::{guess}\nAnd this?\n:::"),
        text("No cell follows."),
    )
    (answer,) = re.findall(r'<details class="sinkbook-answer">.*?</details>', html, re.S)
    for folded_away in ("the answer", "It was this.", "And so on.", "verdict"):
        assert folded_away in answer
    for plain in ("Before.", "Which?", "Still.", "another matter", "And this?", "No cell follows."):
        assert plain in html and plain not in answer
    assert warnings == ""


def test_a_guess_that_an_answer_leads_to_waits_within_it(rendered):
    html, _ = rendered(
        text("# A\n\n:::{guess}\nWhich?\n:::"),
        shows("the first"),
        text("It was this. What chose it?\n\n:::{guess}\nWho?\n:::"),
        shows("the second"),
        text("It was you."),
        shows("another matter"),
    )
    first, second = re.split(r'<details class="sinkbook-answer">', html)[1:]
    assert "What chose it?" in first and "Who?" in first and "</details>" not in first
    assert second.index("the second") < second.index("It was you.") < second.index("</details>")
    assert "another matter" in second.rpartition("</details>")[2]


def test_a_drawing_stands_in_the_page_with_what_it_shows_for_those_who_do_not_see_it(rendered):
    drawing = '<svg viewBox="0 0 1 1"><text>a &amp; b</text></svg>'
    figure = "```{figure} images/a.svg\n:name: drawn-a\n:alt: A line from <s>\nWhat it means.\n```"
    html, warnings = rendered(text(f"# A\n\n{figure}"), images={"a.svg": drawing})
    (drawn,) = re.findall(r"<figure.*?</figure>", html, re.S)
    assert '<svg role="img" aria-label="A line from &lt;s&gt;" ' in drawn
    assert "<text>a &amp; b</text>" in drawn and "What it means." in drawn and "<img" not in drawn
    assert warnings == ""


@chapters
def test_every_drawing_of_a_chapter_is_there_and_is_named_and_described(path):
    for name, options in re.findall(r"```\{figure\} images/(\S+)\.svg\n((?::.*\n)*)", prose(path)):
        assert f":name: drawn-{name}\n" in options and ":alt: " in options
        assert (ROOT / "book" / "images" / f"{name}.svg").is_file()


CHOICES = (
    "# A\n\n:::{guess}\n:choices: To copy | Stare at `<s>`\n\nWhich first?\n:::",
    "It was this.",
)


@pytest.fixture
def guessed(rendered, asking):
    """A function that opens the rendered guess in a view."""
    html, warnings = rendered(text(CHOICES[0]), shows("the run"), text(CHOICES[1]))
    assert warnings == ""
    (body,) = re.findall(r'<div class="[^"]*sinkbook-guess.*?</details>', html, re.S)
    return lambda **view: asking(f"<section>{body}</section>", **view)


@pytest.mark.site
@pytest.mark.parametrize("by", ["click", "tap", "Enter"])
def test_a_choice_is_marked_and_said_and_opens_what_was_folded(guessed, by):
    tab = guessed(viewport={"width": 390, "height": 844}, has_touch=True)
    choices = tab.get_by_role("group", name="Your guess").get_by_role("button")
    assert [choice.inner_text() for choice in choices.all()] == ["To copy", "Stare at <s>"]
    assert not tab.get_by_text("the run").is_visible()
    pressed = choices.first
    pressed.press(by) if by == "Enter" else getattr(pressed, by)()
    assert tab.get_by_text("the run").is_visible()
    assert tab.get_by_role("status").inner_text() == "Your guess: To copy. Now look."
    choices.last.click()  # who changes their mind
    assert [choice.get_attribute("aria-pressed") for choice in choices.all()] == ["false", "true"]
    assert "Stare at <s>" in tab.get_by_role("status").inner_text()
    assert all(choice.bounding_box()["height"] >= 36 for choice in choices.all())


@pytest.mark.site
def test_without_a_script_a_guess_has_no_choices_and_opens_all_the_same(guessed):
    tab = guessed(java_script_enabled=False)
    assert tab.get_by_text("Which first?").is_visible()
    assert tab.get_by_role("button").count() == 0
    tab.get_by_text("Look", exact=True).click()
    assert tab.get_by_text("the run").is_visible()


@pytest.mark.parametrize("choices", ["one", "a | b | c | d | e", "a | | b"])
def test_a_guess_offers_two_to_four_choices(rendered, choices):
    _, warnings = rendered(text(f"# A\n\n:::{{guess}}\n:choices: {choices}\n\nWhich?\n:::"))
    assert "a guess offers two to four choices" in warnings


def test_pages_get_the_scripts_of_what_is_on_them(rendered):
    html, _ = rendered(text(CHOICES[0]), shows("the run"))
    assert "questions.js" in html and "lab.js" not in html


def test_a_formula_that_is_none_is_a_warning(rendered):
    _, warnings = rendered(text("# A\n\n```{formula} relu\n```"))
    assert "no formula 'relu'. There are sink-gradient, " in warnings


# Chapters whose guesses a reader can answer by a touch.
@pytest.mark.parametrize("number", ["01", "03", "04", "09", "12", "13"])
def test_guesses_of_the_chapters_that_live_can_be_answered_by_a_touch(number):
    (path,) = [path for path in CHAPTERS if path.stem.startswith(number)]
    assert prose(path).count(":::{guess}\n:choices: ") >= 2
