"""Cards of claims and the page of all of them: what is drawn, what is said, what is counted."""

import math
import re
import shutil
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from sinkbook.book import claims
from sinkbook.pages import claim_ledger
from sinkbook.pages.claim_cards import card, described, number_line

ROOT = Path(__file__).resolve().parents[2]
TITLES = {"01_sums": "Sums & more"}


def of(criterion: str, values: list[float], **fields):
    """The card of numbers that are held against a criterion."""
    known = {"id": "sum", "chapter": "01_sums", "source": "Figure 1", "statement": "It adds up."}
    claim = claims.Claim(
        **known | {"quantity": "a sum", "criterion": {"quick": criterion}} | fields
    )
    return claims.Verdict(claim, "quick", tuple(map(float, values))).card()


def percent(element: ElementTree.Element, name: str) -> float:
    return float(element.get(name).removesuffix("%"))


def drawn(a_card) -> tuple[tuple[float, float], dict[str, list[float]]]:
    """Where the band of a card's line reaches, and where its full dots and its rings lie."""
    root = ElementTree.fromstring(number_line(a_card))
    band = root.find("rect[@class='band']")
    start = percent(band, "x")
    dots = {
        kind: [percent(dot, "cx") for dot in root.findall(f"circle[@class='{kind}']")]
        for kind in ("met", "missed")
    }
    return (start, start + percent(band, "width")), dots


@pytest.mark.parametrize("criterion", [">= 0.7", "< 20", "in [-0.02, 0.02]", "<= 1e-6", "> 0"])
def test_full_dots_lie_on_the_band_and_rings_beside_it(criterion):
    rng = np.random.default_rng(1)
    for scale in (1e-7, 0.01, 1, 100):
        signs = rng.choice([-1, 1], 6) if rng.random() < 0.5 else 1
        values = (signs * scale * rng.lognormal(size=6, sigma=3)).tolist()
        (start, end), dots = drawn(of(criterion, values))
        met = [claims.satisfies(criterion, value) for value in values]
        assert (len(dots["met"]), len(dots["missed"])) == (sum(met), len(met) - sum(met))
        assert all(start - 0.02 <= x <= end + 0.02 for x in dots["met"])
        assert all(x <= start + 0.02 or x >= end - 0.02 for x in dots["missed"])
        places = [None] * len(values)
        for kind, wanted in (("met", True), ("missed", False)):
            for x, i in zip(dots[kind], [i for i, m in enumerate(met) if m is wanted], strict=True):
                places[i] = x
        in_order = np.array(places)[np.argsort(values)]
        assert np.all(np.diff(in_order) >= -0.011) and in_order.min() >= 0 and in_order.max() <= 100


def test_a_line_of_many_decades_says_that_it_is_logarithmic():
    assert "log scale" in number_line(of("<= 1e-3", [1e-8, 1e-2]))
    assert "log scale" not in number_line(of("<= 1e-3", [1e-4, 1e-2]))
    assert "log scale" not in number_line(of(">= 0", [1e-8, 1.0]))


def test_no_two_words_of_a_line_stand_at_the_same_end():
    for paper, free in ((5e-3, "0"), (2e-8, "100%")):
        line = ElementTree.fromstring(number_line(of("<= 1e-3", [1e-8, 1e-2], paper=paper)))
        (log,) = [text for text in line.findall("text") if text.text == "log scale"]
        assert log.get("x") == free


def test_numbers_at_the_ends_of_a_line_stay_on_the_card():
    line = ElementTree.fromstring(number_line(of("in [0, 1]", [0.5])))
    sides = {text.text: text.get("text-anchor") for text in line.findall("text")}
    assert sides == {"0": "start", "1": "end"}


def test_the_papers_value_is_a_cross_where_it_is_a_number():
    assert "cross" in number_line(of(">= 0.7", [0.8], paper=0.78))
    for paper in (None, "about three quarters"):
        assert "cross" not in number_line(of(">= 0.7", [0.8], paper=paper))


@pytest.mark.parametrize("values", [[math.nan, 0.8], [0.8, math.inf]])
def test_what_is_no_number_is_counted_and_not_drawn(values):
    _, dots = drawn(of(">= 0.7", values))
    assert dots == {"met": dots["met"], "missed": []} and len(dots["met"]) == 1
    assert f"1 of {len(values)} within the rule" in described(of(">= 0.7", values))


def test_nothing_is_drawn_of_what_is_not_measured():
    assert number_line(of(">= 0.7", [])) == "" == number_line(of(">= 0.7", [math.nan]))


@pytest.mark.parametrize(
    ("values", "over", "words"),
    [
        ([0.8], "seeds", "measured 0.8 (one value); rule ≥ 0.7; 1 of 1"),
        ([0.8, 0.6], "texts", "measured 0.7 (2 texts: 0.6 to 0.8); rule ≥ 0.7 in both texts; 1 of"),
        ([0.8] * 3, "seeds", "rule ≥ 0.7 in all 3 seeds; 3 of 3"),
    ],
)
def test_the_rule_is_one_line_and_one_value_is_called_so(values, over, words):
    assert words in described(of(">= 0.7", values, over=over))


def test_a_refuted_rival_or_guess_is_told_apart_from_a_contradiction_of_the_paper():
    style = (ROOT / "_static" / "sinkbook.css").read_text("utf-8")
    (red,) = re.findall(r"([^\s{}]+) \{ --verdict: var\(--pst-color-danger\); \}", style)
    classes = set(red.strip(".").split("."))
    shown = {
        whose: set(re.search('class="(.*?)"', card(of(">= 1", [0], whose=whose)))[1].split())
        for whose in ("paper", "rival", "ours")
    }
    assert classes <= shown["paper"]
    assert not classes <= shown["rival"] and not classes <= shown["ours"]
    assert "somebody else's claim" in card(of(">= 1", [0], whose="rival"))


def test_what_a_claim_spells_is_only_shown():
    html = card(of(">= 1", [2], statement="<script> & `<s>`", source='"><b>'))
    ElementTree.fromstring(html.replace("&#x27;", "'"))  # well formed
    assert "<script>" not in html and "<b>" not in html.replace("<b>measured", "").replace(
        "<b>rule", ""
    )


def test_a_rule_of_one_value_has_one_mark_and_is_called_exact():
    exact = of("in [0, 0]", [0, 1, 2])
    root = ElementTree.fromstring(number_line(exact))
    assert len(root.findall("line[@class='bound']")) == 1
    assert [text.text for text in root.findall("text")] == ["0"]
    assert "exactly 0" in card(exact)


@pytest.fixture
def some() -> list:
    """Claims of two chapters, of all verdicts and owners."""
    return [
        of(">= 1", [2], id="a"),
        of(">= 1", [2, 0], id="b", whose="ours", chapter="02_more"),
        of(">= 1", [0], id="c", whose="rival"),
        of(">= 1", [0], id="d", undecided="a longer run"),
    ]


def test_the_ledger_counts_by_owner_and_leads_to_the_card_in_its_chapter(some):
    html = claim_ledger.page(some, summary="", verdicts=claims.VERDICTS, titles=TITLES)
    table = ElementTree.fromstring(re.search("<table.*?</table>", html)[0])
    rows = [[cell.text for cell in row] for row in table.iter("tr")]
    assert rows == [
        ["whose claim", "holds", "mixed", "contradicts", "undecided"],
        ["the paper’s", "1", "–", "–", "1"],
        ["our own", "–", "1", "–", "–"],
        ["somebody else’s", "–", "–", "1", "–"],
    ]
    for of_claim in some:
        assert f'href="{of_claim.chapter}.html#{of_claim.anchor}"' in html
        assert f'id="{of_claim.anchor}"' in card(of_claim)  # what it leads to


def test_debts_stand_together_with_what_would_decide_them(some):
    html = claim_ledger.page(some, summary="", verdicts=claims.VERDICTS, titles=TITLES)
    debts = re.search('<details class="debts">.*?</details>', html)[0]
    assert "Debts (1)" in debts and "a longer run" in debts and "#claim-d" in debts
    paid = [replace(each, debt="") for each in some]
    assert "Debts" not in claim_ledger.page(
        paid, summary="", verdicts=claims.VERDICTS, titles=TITLES
    )


def test_the_ledger_says_when_its_numbers_were_measured(some):
    dates = ["2026-01-02", "2026-01-01", "", "2026-01-02"]
    dated = [replace(each, date=day) for each, day in zip(some, dates, strict=True)]
    shown = claim_ledger.page(dated, summary="", verdicts=claims.VERDICTS, titles=TITLES)
    assert "ran on 2026-01-01 to 2026-01-02." in shown
    once = claim_ledger.page(dated[:1], summary="", verdicts=claims.VERDICTS, titles=TITLES)
    assert "ran on 2026-01-02." in once


@pytest.fixture
def ledger(some, browser, tmp_path):
    """Opens the ledger as a file, with or without scripts, on a phone."""
    shutil.copy(ROOT / "_static" / "claims.js", tmp_path)
    html = claim_ledger.page(some, summary="", verdicts=claims.VERDICTS, titles=TITLES)
    style = (ROOT / "_static" / "sinkbook.css").read_text("utf-8")
    (tmp_path / "claims.html").write_text(
        '<!DOCTYPE html><meta charset="utf-8"><script src="claims.js"></script>'
        f'<meta name="viewport" content="width=device-width"><style>{style}</style>{html}',
        encoding="utf-8",
    )
    contexts = []

    def open_it(query="", **options):
        contexts.append(browser.new_context(viewport={"width": 390, "height": 844}, **options))
        tab = contexts[-1].new_page()
        tab.goto((tmp_path / "claims.html").as_uri() + query)
        return tab

    yield open_it
    for context in contexts:
        context.close()


def visible(tab) -> list[str]:
    script = "cards => cards.filter(c => c.checkVisibility()).map(c => c.id)"
    return [i.removeprefix("claim-") for i in tab.eval_on_selector_all(".sinkbook-claim", script)]


def test_without_javascript_the_ledger_shows_everything_and_no_filter(ledger):
    tab = ledger(java_script_enabled=False)
    assert tab.locator(".sinkbook-claim:visible").count() == 4
    assert tab.locator("form:visible").count() == 0


def test_the_ledger_is_filtered_by_chapter_verdict_and_owner(ledger):
    tab = ledger()
    for chosen, ids in (
        ({}, ["a", "c", "d", "b"]),
        ({"chapter": "01_sums"}, ["a", "c", "d"]),
        ({"chapter": "01_sums", "whose": "paper"}, ["a", "d"]),
        ({"chapter": "01_sums", "whose": "paper", "verdict": "undecided"}, ["d"]),
        ({"verdict": "mixed"}, ["b"]),
        ({"verdict": "mixed", "whose": "rival"}, []),
    ):
        for name in ("chapter", "verdict", "whose"):
            tab.select_option(f"select[name={name}]", chosen.get(name, ""))
        assert visible(tab) == ids
        assert tab.locator("output").text_content() == f"{len(ids)} of 4 claims"
        assert tab.locator("section:visible").count() == len({i == "b" for i in ids})


def test_what_is_chosen_stands_in_the_address_and_an_address_chooses(ledger):
    tab = ledger()
    tab.select_option("select[name=verdict]", "mixed")
    tab.select_option("select[name=whose]", "ours")
    assert tab.evaluate("location.search") == "?verdict=mixed&whose=ours"
    tab.reload()
    assert visible(tab) == ["b"]
    tab.click("text=show all")
    tab.wait_for_function("location.search === ''")
    assert visible(tab) == ["a", "c", "d", "b"]
    assert visible(ledger("?verdict=undecided")) == ["d"]
    assert visible(ledger("?verdict=nonsense&other=1")) == ["a", "c", "d", "b"]


def test_a_chapter_is_called_by_its_heading_and_one_without_by_its_number(ledger):
    tab = ledger()
    names = tab.locator("select[name=chapter] option").all_text_contents()
    assert names == ["all chapters", "Chapter 1: Sums & more", "Chapter 2"]
    assert tab.locator(".sinkbook-chapter a").all_text_contents() == names[1:]


def test_a_link_to_a_debt_finds_its_card_whatever_is_filtered(ledger):
    tab = ledger()
    tab.select_option("select[name=verdict]", "mixed")
    tab.click("summary")
    tab.click(".debts a")
    assert "d" in visible(tab)


def test_the_ledger_fits_on_a_phone(ledger):
    tab = ledger()
    assert tab.evaluate("document.documentElement.scrollWidth") <= 390
    texts = "texts => texts.map(t => parseFloat(getComputedStyle(t).fontSize))"
    assert min(tab.eval_on_selector_all(".number-line text", texts)) >= 10
