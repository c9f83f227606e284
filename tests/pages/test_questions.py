"""A line that takes a formula, in Chromium: it reads what Python reads, and runs nothing else."""

import numpy as np
import pytest
from playwright.sync_api import expect

from sinkbook.pages.formulas import Formula

pytestmark = pytest.mark.site

PHONE = {"viewport": {"width": 390, "height": 844}, "has_touch": True, "is_mobile": True}
NAMES = {"p": "a list", "W": "a list", "t": "a number", "max_age": "a number"}
FUNCTIONS = {
    **{name: getattr(np, name) for name in ("exp", "log", "sqrt", "maximum", "minimum", "dot")},
    **{"mean": np.mean, "sum": np.sum, "abs": np.abs, "var": np.var, "len": len, "pi": np.pi},
    "relu": lambda x: np.maximum(x, 0),
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "max": lambda *x: np.maximum(*x) if len(x) > 1 else np.max(x),
    "min": lambda *x: np.minimum(*x) if len(x) > 1 else np.min(x),
}
# Read alike by Python and on the page: what binds tighter, from which side, lists and numbers.
SAME = """
2 + 3*t - 4/2/t
-t**2 + 2**-t
2**3**.5 - -t
(1 - 2 - 3) * +t
1.5e-2 * t + .25
p @ W**2 - (p @ W)**2
t * p @ W
(p - W) @ p * 2
np.exp(-t) * (W.mean() - W)
np.maximum(W - 3, 0).sum() / len(W)
sum(relu(p - .2)) + sigmoid(t)
min(t, max_age + 2 - 1) - max(p)
max(p, W) + min(1, W)
sqrt(abs(-W)) / p
dot(p, log(W)) + pi
np.var(W) - t * var(p)
""".strip().splitlines()
# What a reader may type, as another reads it.
WRITTEN = {"t^2": "t**2", "t · 3 × t": "t*3*t", "t − 1": "t - 1", " ( ( t ) ) ": "t"}
# What cannot be read, and what its reader is told.
NONSENSE = {
    "": "Type a formula first.",
    "   ": "Type a formula first.",
    "t +": "The formula ends too early.",
    "(t + 1": "A parenthesis is not closed.",
    "t + 1)": "One “)” is too many.",
    "2 t": "What joins “t” to what is before it?",
    "t 2": "What joins “2” to what is before it?",
    "(t t)": "What joins “t” to what is before it?",
    "* t": "A number or a name is missing before “*”.",
    "t $ 2": "“$” is no part of a formula.",
    "t = 2": "“=” is no part of a formula.",
    "p[0]": "“[” is no part of a formula.",
    "x + 1": "There is no “x” here. There is p, W, t, max_age, and there are exp,",
    "log t": "“log” needs parentheses: log(…).",
    "t(2)": "To multiply, write t * (…).",
    "exp(t, 2)": "“exp” takes 1, not 2.",
    "max(1, 2, 3)": "“max” takes 1 or 2, not 3.",
    "exp()": "A number or a name is missing before “)”.",
    "p @ t": "@ and dot need a list on both sides",
    "p + W": "A list of 3 numbers meets one of 4.",
    "W.mean": "Write .mean() at its end.",
    "W.shape": "There is no “shape” here.",
    "t.": "There is no “nothing” here.",
    "(" * 300: "That is too deep",
    "2**" * 99 + "2": "That is too deep",
    "constructor": "There is no “constructor” here.",
    "__proto__": "There is no “__proto__” here.",
    "toString()": "There is no “toString” here.",
    "t.constructor()": "There is no “constructor” here.",
    "np.constructor": "There is no “constructor” here.",
    "alert(1)": "There is no “alert” here.",
    "window.close()": "There is no “window” here.",
    "`${t}`": "“`” is no part of a formula.",
    "'t'": "“'” is no part of a formula.",
}


def formula(truth: str, longer: int = 0) -> Formula:
    """It asks for what a Python formula gives. W is longer than p by `longer`."""

    def case(rng):
        p, W = rng.dirichlet(np.ones(3)), rng.uniform(0.5, 5, 3 + longer)
        given = (p, W, float(rng.uniform(0.5, 2)), float(rng.uniform(0.1, 2)))
        return given, eval(truth, FUNCTIONS | {"np": np}, dict(zip(NAMES, given, strict=True)))

    return Formula("m =", NAMES, case, {}, "so it is.")


def tell(tab, text: str, place: int = 0):
    """Type a formula and press Enter; the line that answers."""
    host = tab.locator(".sinkbook-formula").nth(place)
    host.get_by_role("textbox").fill(text)
    host.get_by_role("textbox").press("Enter")
    return host


def test_what_python_reads_is_read_alike(asking):
    asked = [*SAME, *WRITTEN.values()]
    html = "".join(formula(truth).html(f"n{n}") for n, truth in enumerate(asked))
    tab = asking(html)
    for place, text in enumerate([*SAME, *WRITTEN]):
        host = tell(tab, text, place)
        assert host.get_by_role("status").inner_text() == "Right: so it is.", text


def test_what_cannot_be_read_is_told_and_nothing_else_is_run(asking):
    tab = asking(formula("t", longer=1).html("one"))
    for text, told in NONSENSE.items():
        host = tell(tab, text)
        assert told in host.get_by_role("status").inner_text(), text
        assert host.get_attribute("data-answer") == "unread"
        assert host.get_by_role("textbox").get_attribute("aria-invalid") == "true"


def test_numbers_that_are_none_and_lists_where_one_number_is_asked_for_are_said(asking):
    tab = asking(formula("2 * t").html("one"))
    for text, told in (
        ("log(-t)", "yours gives no number, it should be "),
        ("1 / (t - t)", "yours gives infinity, it should be "),
        ("W", "yours gives ["),
        ("2.0001 * t", "yours gives "),
    ):
        said = tell(tab, text).get_by_role("status").inner_text()
        assert said.startswith("Not yet: for p = [") and told in said
        yours, truth = said.split("yours gives ")[1].rstrip(".").split(", it should be ")
        assert yours != truth
    expect(tell(tab, "2.000001 * t").get_by_role("status")).to_have_text("Right: so it is.")


def test_a_changed_formula_has_no_answer_yet(asking):
    tab = asking(formula("t").html("one"))
    host = tell(tab, "t + 1")
    expect(host).to_have_attribute("data-answer", "wrong")
    host.get_by_role("textbox").press("Backspace")
    expect(host.get_by_role("status")).to_have_text("")
    assert host.get_attribute("data-answer") is None


def test_by_finger_on_a_phone(asking):
    tab = asking(formula("t").html("one"), **PHONE)
    host = tab.locator(".sinkbook-formula")
    button, line = host.get_by_role("button", name="Check"), host.get_by_role("textbox", name="m =")
    for target in (button, line):
        assert target.bounding_box()["height"] >= 36
    line.tap()
    tab.keyboard.type("p @ (W + 1) * t")
    button.tap()
    expect(host.get_by_role("status")).to_contain_text("Not yet: for p = [")
    assert tab.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0


def test_without_a_script_there_is_no_line_that_would_not_answer(asking):
    tab = asking(formula("t").html("one"), java_script_enabled=False)
    assert tab.locator(".sinkbook-formula").count() == 1  # what is not there is hidden as well
    expect(tab.locator(".sinkbook-formula")).to_be_hidden()
