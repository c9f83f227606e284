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
    assert len(exercises_asked) >= 3
    assert re.findall(solution, PROSE[chapter]) == exercises_asked
    order = re.findall(rf"{exercise}|{solution}", PROSE[chapter])
    assert [bool(first) for first, _ in order] == [True, False] * len(exercises_asked)
    folded = re.findall(
        r"\{solution\} \S+\n:label: solution-\S+\n:class: dropdown\n", PROSE[chapter]
    )
    assert len(folded) == len(exercises_asked)
