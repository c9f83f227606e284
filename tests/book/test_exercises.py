"""The checks accept the solutions that the chapters give, and say what is wrong with the rest."""

import re
from pathlib import Path

import numpy as np
import pytest

from sinkbook.book import exercises
from sinkbook.book.exercises import FORMULAS
from sinkbook.book.notebooks import read_notebook, tags

BOOK = Path(__file__).resolve().parents[2] / "book"
CHAPTERS = sorted(BOOK.glob("[01]*.ipynb"))
PROSE = {
    path.stem: "\n\n".join(
        cell["source"] for cell in read_notebook(path)["cells"] if cell["cell_type"] == "markdown"
    )
    for path in CHAPTERS
}
# What the page shows as the solution of an exercise: its formula comes first among what is code.
SOLUTION = r"```\{{solution\}} exercise-{}\n(?:.*\n)*?[^`\n]*`((?!<s>)[^`]+)`"
SOLUTIONS = {
    name: re.search(SOLUTION.format(name), "\n".join(PROSE.values()))[1] for name in FORMULAS
}
# What a notebook's cell begins with, for the reader to put right.
STUB = re.compile(r"return (.*?)  # your formula here(?:.*\n)+exercises\.check_(\w+)")
STUBS = {
    name.replace("_", "-"): stub
    for path in CHAPTERS
    for cell in read_notebook(path)["cells"]
    for stub, name in STUB.findall(cell["source"])
}
# Mistakes that the page recognises by their numbers, as a reader would write them.
WRONG = {
    "sink-gradient": {
        "Moving a by moving alpha is slower at both ends: a = sigmoid(alpha - log n).": (
            "attention * (q - p) @ (beta - mean_value)"
        )
    },
    "null-slot": {"That is what is left for the keys.": "1 - exp(b) / (exp(b) + sum(exp(logits)))"},
    "cache-distance": {
        "The query is one of the window's tokens: count from 0.": "min(n, sinks + window) - i"
    },
}
formulas = pytest.mark.parametrize("name", FORMULAS)


def in_python(name: str, text: str):
    """A function of what a formula is given, in a notebook's Python."""
    return eval(f"lambda {', '.join(FORMULAS[name].names)}: {text}", {"np": np})


@formulas
def test_the_chapters_own_solution_is_accepted(name, capsys):
    FORMULAS[name].check(in_python(name, SOLUTIONS[name]))
    assert capsys.readouterr().out.startswith("Right: ")


@formulas
def test_any_other_formula_is_met_with_the_numbers_that_it_should_give(name, capsys):
    solution = in_python(name, SOLUTIONS[name])
    FORMULAS[name].check(lambda *given: 1.01 * solution(*given))
    told = capsys.readouterr().out
    assert re.match(r"Not yet: for \w+ = .* yours gives .*, it should be ", told)


@formulas
def test_every_mistake_is_wrong_and_recognised(name, capsys):
    for hint, mistake in FORMULAS[name].mistakes.items():
        FORMULAS[name].check(mistake)
        assert capsys.readouterr().out.rstrip().endswith(hint)


@pytest.mark.site
@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_accepts_the_books_solutions_and_refuses_the_notebooks_stubs(asking, width):
    tab = asking(
        "".join(formula.html(name) for name, formula in FORMULAS.items()),
        viewport={"width": width, "height": 844},
    )
    for name, formula in FORMULAS.items():
        host = tab.locator(f"[data-formula={name}]")
        line, says = host.get_by_role("textbox"), host.get_by_role("status")
        for text, begins in ((STUBS[name], "Not yet: for "), (SOLUTIONS[name], "Right: ")):
            line.fill(text)
            line.press("Enter")
            assert says.inner_text().startswith(begins), (name, text)
        for hint, text in WRONG.get(name, {}).items():
            line.fill(text)
            host.get_by_role("button").click()
            assert says.inner_text().endswith(hint)
            assert hint in formula.mistakes
    assert tab.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0


def test_a_number_is_no_list_and_a_list_no_number(capsys):
    FORMULAS["settled-value"].check(lambda start, W, alpha: 0.0)
    FORMULAS["growth-rate"].check(lambda p, W, weight: W)
    assert capsys.readouterr().out.count("Not yet: ") == 2


def test_each_formula_is_asked_for_once_on_the_page_and_once_in_the_notebook(capsys):
    asked = re.findall(r"\{formula\} ([\w-]+)", "\n".join(PROSE.values()))
    assert sorted(asked) == sorted(FORMULAS)
    cells = [cell for path in CHAPTERS for cell in read_notebook(path)["cells"]]
    checks = [cell for cell in cells if "exercises.check_" in cell["source"]]
    assert len(checks) == len(FORMULAS)
    for cell in checks:
        exec(cell["source"], {"np": np, "exercises": exercises})
        assert capsys.readouterr().out.startswith("Not yet: ")
        assert "remove-cell" in tags(cell)  # on the page one types it


@pytest.mark.parametrize("chapter", PROSE)
def test_every_exercise_has_one_solution_which_is_folded_and_comes_behind_it(chapter):
    exercise, solution = (
        r":::\{exercise\}\n:label: exercise-([\w-]+)",
        r"\{solution\} exercise-(\S+)",
    )
    exercises_asked = re.findall(exercise, PROSE[chapter])
    assert len(exercises_asked) >= 2
    assert re.findall(solution, PROSE[chapter]) == exercises_asked
    order = re.findall(rf"{exercise}|{solution}", PROSE[chapter])
    assert [bool(first) for first, _ in order] == [True, False] * len(exercises_asked)
    folded = re.findall(
        r"\{solution\} \S+\n:label: solution-\S+\n:class: dropdown\n", PROSE[chapter]
    )
    assert len(folded) == len(exercises_asked)
