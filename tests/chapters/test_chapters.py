"""Every chapter, run end to end at the quick profile: what it claims must hold, or be known not to.

A chapter that stops, or writes to stderr, fails the fixture with the cell and the error.
"""

from pathlib import Path

import pytest

from sinkbook.book import claims
from sinkbook.book.build import APPENDICES, chapters
from sinkbook.book.notebooks import first_complaint
from sinkbook.book.records.kept import is_finished

ROOT = Path(__file__).resolve().parents[2]
BOOK = ROOT / "book"
NAMES = list(chapters(ROOT))
STORIES = [name for name in NAMES if name not in APPENDICES]


@pytest.mark.parametrize("name", NAMES)
def test_a_chapter_runs_to_its_end_without_a_word_on_stderr(executions, name):
    assert first_complaint(executions[name].notebook) is None


@pytest.mark.parametrize("name", STORIES)
def test_a_chapter_shows_what_it_was_run_with(executions, name):
    (facts,) = executions[name].outputs("sinkbook.facts")
    assert (facts["profile"], facts["seed"]) == ("quick", 0)


def may_wait(name: str) -> bool:
    """Whether a claim need not be measured yet: its record lacks trainings, and it says so."""
    claim = claims.known()[name]
    return bool(claim.record and claim.undecided) and not is_finished(claim.record)


@pytest.mark.parametrize("name", STORIES)
def test_a_chapter_checks_each_of_its_claims_once(executions, name):
    checked = [record["id"] for record in executions[name].outputs("sinkbook.claim")]
    known = {claim.id for claim in claims.known().values() if claim.chapter == name}
    assert len(checked) == len(set(checked)) and known.issuperset(checked)
    assert [claim for claim in known.difference(checked) if not may_wait(claim)] == []


@pytest.mark.parametrize("claim", claims.known().values(), ids=lambda claim: claim.id)
def test_a_claim_holds_unless_claims_yml_says_why_not(executions, record_property, claim):
    records = executions[claim.chapter].outputs("sinkbook.claim")
    found = [record for record in records if record["id"] == claim.id]
    if not found and may_wait(claim.id):
        pytest.skip(f"waits for trainings of the record {claim.record}")
    (record,) = found
    verdict = claims.judge(claim.id, record["measured"], profile=record["profile"])
    if claim.sensitive:  # a debt, listed when the tests end
        expected = "" if verdict.holds is not bool(claim.fails) else ", and not what was expected"
        record_property("sensitive claim", f"{claim.id}: {verdict.verdict}{expected}")
    elif claim.fails:
        assert not verdict.holds, f"take the reason out of claims.yml: {verdict}"
    else:
        assert verdict.holds, str(verdict)


def test_the_ledger_is_what_the_chapters_measured(executions):
    measured = {
        record["id"]: record["measured"]
        for execution in executions.values()
        for record in execution.outputs("sinkbook.claim")
    }
    rows = {verdict.claim.id: verdict.row() for verdict in claims.verdicts()}
    assert {name: rows[name]["measured"] for name in measured} == measured


def test_the_chapters_are_rendered_with_all_other_pages(pages):
    """Here, where the chapters have just run: the tests of single pages wait for it."""
    rendered = {path.stem for path in (pages / "book").glob("*.html")}
    assert rendered >= {path.stem for kind in ("*.md", "*.ipynb") for path in BOOK.glob(kind)}
