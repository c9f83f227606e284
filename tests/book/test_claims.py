"""The ledger: how a claim is judged, what is shown, what is kept."""

import json

import numpy as np
import pytest

from sinkbook import book, files
from sinkbook.book import claims
from sinkbook.errors import SinkbookError

ENTRY = """
- id: sum
  chapter: 01_sums
  source: arithmetic
  statement: One and `one` are at least <two>.
  paper: 2
  quantity: their sum
  unit: nats
  criterion: {quick: ">= 2", paper: ">= 2.5"}
"""


@pytest.fixture
def ledger(tmp_path, monkeypatch):
    """A repository with one claim and an empty ledger; gives a function that rewrites the list."""
    (tmp_path / "book").mkdir()
    (tmp_path / "_toc.yml").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SINKBOOK_CACHE", str(tmp_path / "cache"))

    def write(text: str) -> None:
        (tmp_path / "book" / "claims.yml").write_text(text)

    write(ENTRY)
    return write


@pytest.mark.parametrize(
    ("criterion", "inside", "outside"),
    [
        (">= 0.7", 0.7, 0.69),
        ("<= 0.35", 0.35, 0.36),
        ("> 2", 2.01, 2.0),
        ("< 1e-5", 9e-6, 1e-5),
        ("in [-0.02, 0.02]", -0.02, 0.021),
    ],
)
def test_a_criterion_says_where_it_ends(criterion, inside, outside):
    assert claims.satisfies(criterion, inside)
    assert not claims.satisfies(criterion, outside)


@pytest.mark.parametrize("criterion", ["about 3", ">= x", "__import__('os')", ">= 1 or True", ""])
def test_a_criterion_is_read_and_never_evaluated(criterion):
    with pytest.raises(SinkbookError, match="no way to judge"):
        claims.satisfies(criterion, 1.0)


def test_a_claim_holds_only_if_every_seed_meets_it(ledger):
    assert claims.judge("sum", [2.0, 2.5, 3.0], profile="quick").holds
    assert not claims.judge("sum", [2.0, 2.5, 3.0], profile="paper").holds
    assert not claims.judge("sum", [3.0, float("nan")], profile="quick").holds


def test_a_check_shows_the_claim_and_fills_the_ledger(ledger, capsys):
    claims.check("sum", np.array([2.0, 2.25, 2.5]), profile="quick")
    shown = capsys.readouterr().out
    assert "[holds]" in shown
    assert "paper 2 nats" in shown and "measured 2.25 nats (3 seeds: 2 to 2.5)" in shown
    (verdict,) = claims.verdicts()
    assert verdict.row()["measured"] == [2.0, 2.25, 2.5] and verdict.row()["holds"] is True


def test_a_failing_check_is_shown_as_failing_and_raises_nothing(ledger, capsys):
    claims.check("sum", [1.0], profile="quick")
    assert "[contradicts the paper]" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("fields", "values", "verdict", "words"),
    [
        ("", [2, 3], "holds", "holds"),
        ("", [1, 2, 3], "mixed", "mixed (2 of 3)"),
        ("", [1, 0], "contradicts", "contradicts the paper"),
        ("whose: ours", [1, 0], "contradicts", "contradicts our guess"),
        ("whose: rival", [1, 0], "contradicts", "contradicts the claim"),
        ("said_of: Llama-2-7B", [1, 0], claims.ELSEWHERE, "not so in this model"),
        ("said_of: Llama-2-7B", [1, 3], "mixed", "mixed (1 of 2)"),
        ("undecided: a longer run", [1, 2], "undecided", "undecided at this size (1 of 2)"),
        ("undecided: a longer run", [2, 2], "holds", "holds"),
    ],
)
def test_a_verdict_tells_some_from_none_and_too_small_from_wrong(
    ledger, fields, values, verdict, words
):
    ledger(f"{ENTRY}  {fields}\n")
    found = claims.judge("sum", [float(v) for v in values], profile="quick")
    assert found.row()["verdict"] == verdict and f"<strong>{words}</strong>" in found._html()
    if verdict == "undecided":
        claims.keep(found.record())
        assert "What would decide it: a longer run" in found._html()
        assert "undecided at our size are `sum`" in claims.ledger().debt()


def test_a_card_gives_a_reason_and_a_remedy_only_where_its_claim_does_not_hold(ledger):
    ledger(ENTRY + "  fails: It is too small.\n  undecided: a longer run\n")
    for values, said in (([1.0], True), ([2.5], False)):
        html = claims.judge("sum", values, profile="quick")._html()
        assert ("It is too small." in html) == said and ("a longer run" in html) == said


def test_a_card_says_whose_claim_it_is_and_who_decides(ledger):
    ledger(ENTRY + "  decided_by: record\n  whose: rival\n")
    found = claims.judge("sum", [2.0], profile="quick")
    assert "somebody else's claim, decided by a record" in found._html()
    assert (found.row()["decided_by"], found.row()["whose"]) == ("record", "rival")


def test_a_record_that_is_too_short_decides_nothing_and_its_card_says_what_would(ledger):
    ledger(ENTRY + "  decided_by: record\n  undecided: a longer run\n")
    short, enough = (claims.judge("sum", [v], profile="quick")._html() for v in (1.0, 2.0))
    assert "claim, left open by its record" in short and "decided by a record" not in short
    assert "What would decide it: a longer run" in short
    assert "claim, decided by a record" in enough and "would decide it" not in enough


def test_an_unknown_claim_is_answered_with_the_known_ones(ledger):
    with pytest.raises(SinkbookError, match=r"no claim is called 'summ'.*sum"):
        claims.check("summ", [2.0], profile="quick")


def test_a_claim_without_values_is_refused(ledger):
    with pytest.raises(SinkbookError, match="one number a seed"):
        claims.judge("sum", [], profile="quick")


def test_a_verdict_that_depends_on_the_machine_is_shown_and_listed_as_a_debt(ledger):
    assert claims.ledger().debt() == ""
    ledger(ENTRY + "  sensitive: true\n")
    verdict = claims.judge("sum", [1.0], profile="quick")
    assert verdict.holds is False and claims.SENSITIVE.split(":")[0] in verdict._html()
    assert verdict.row()["sensitive"] is True
    assert "A debt" in str(claims.ledger()) and "<code>sum</code>" in claims.ledger()._repr_html_()


def test_before_anything_is_measured_the_ledger_says_so(ledger):
    (verdict,) = claims.verdicts()
    assert verdict.row()["measured"] is None and verdict.row()["holds"] is None
    assert claims.ledger().summary() == "1 claims: not measured 1"


def test_a_number_that_is_none_is_valid_json(ledger):
    row = claims.judge("sum", [float("nan"), 2.0], profile="quick").row()
    assert json.loads(json.dumps(row, allow_nan=False))["measured"] == [None, 2.0]


def test_the_page_escapes_text_and_says_the_verdict_in_words(ledger):
    html = claims.judge("sum", [2.0], profile="quick")._html()
    assert "<strong>holds</strong>" in html
    assert "<code>one</code> are at least &lt;two&gt;" in html


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (ENTRY + ENTRY, "two claims are called 'sum'"),
        (ENTRY.replace("quantity", "quantiti"), "entry 'sum'.*quantit"),
        (ENTRY.replace(">= 2.5", "roughly 2"), "entry 'sum'.*no way to judge by 'roughly 2'"),
        (ENTRY.replace('paper: ">=', 'huge: ">='), "entry 'sum'.*no profile named 'huge'"),
        (ENTRY + "  whose: theirs\n", "entry 'sum'.*'theirs' is none of paper, rival, ours"),
        (ENTRY + "  decided_by: dice\n", "entry 'sum'.*'dice' is none of live, record"),
        ("- just a string", "entry 'just a string'"),
    ],
)
def test_a_mistake_in_claims_yml_is_named(ledger, wrong, message):
    ledger(wrong)
    with pytest.raises(SinkbookError, match=f"(?s){message}"):
        claims.known()


def test_a_profile_without_a_criterion_is_an_error(ledger):
    ledger(ENTRY.replace(', paper: ">= 2.5"', ""))
    with pytest.raises(SinkbookError, match="no criterion for the profile 'paper'"):
        claims.judge("sum", [2.0], profile="paper").row()


def test_the_facts_of_a_run_are_one_line_with_profile_seed_device_and_versions():
    shown, metadata = book.chapter("quick", 3)._repr_mimebundle_()
    line = shown["text/plain"]
    assert metadata["sinkbook.facts"]["seed"] == 3
    assert line.startswith("profile quick · seed 3 · ")
    assert "torch 2" in line and "transformers 5" in line and "\n" not in line


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "folder" / "record.json"
    files.write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        files.write_json(path, {"a": object()})
    assert list(path.parent.iterdir()) == [path]
    assert json.loads(path.read_text()) == {"a": 1}


SECOND = ENTRY.replace("id: sum", "id: other", 1).replace("chapter: ", "chapter: 99_else_", 1)


def test_the_ledger_is_told_apart_by_chapter_and_by_verdict(ledger, sinkbook):
    ledger(ENTRY + SECOND)
    claims.keep(claims.judge("sum", [1.0], profile="quick").record())
    first, second = (claim.chapter for claim in claims.known().values())
    assert first != second and second.startswith("99_else")
    for options, ids in {
        (): ["sum", "other"],
        ("--chapter", second): ["other"],
        ("--chapter", "99"): ["other"],
        ("--verdict", "contradicts"): ["sum"],
        ("--verdict", "not measured"): ["other"],
        ("--chapter", first, "--verdict", "contradicts"): ["sum"],
        ("--chapter", "99", "--verdict", "contradicts"): [],
    }.items():
        status, shown, _ = sinkbook("claims", "--json", *options)
        assert status == 0 and [row["id"] for row in json.loads(shown)] == ids, options
    assert sinkbook("claims", "--chapter", "99", "--verdict", "holds")[1].startswith("No claim")


@pytest.mark.parametrize(
    "option, value, complaint",
    [
        ("--chapter", "98", "no chapter with claims named '98'. Known: "),
        ("--verdict", "fails", "no verdict 'fails'. Known: holds, mixed, contradicts"),
    ],
)
def test_a_chapter_or_a_verdict_that_is_not_there_is_answered_with_those_that_are(
    ledger, sinkbook, option, value, complaint
):
    status, shown, errors = sinkbook("claims", option, value)
    assert status == 1 and shown == "" and complaint in errors


def test_a_card_without_numbers_names_the_record_that_it_waits_for(ledger):
    ledger(ENTRY + "  decided_by: record\n  record: sums\n")
    (waiting,) = claims.verdicts()
    assert "<strong>not measured yet</strong>" in waiting._html()
    assert "claim, waits for the record sums" in waiting._html()
    there = claims.judge("sum", [2.0], profile="quick")._html()
    assert "claim, decided by a record" in there and "waits" not in there


def test_an_interval_is_shown_by_its_ends_and_not_by_a_mean_of_them(ledger):
    ledger(ENTRY + "  over: ends of the 95 % interval\n")
    shown = str(claims.judge("sum", [2.0, 5.0], profile="quick"))
    assert "measured 2 to 5 nats (ends of the 95 % interval)" in shown and "3.5" not in shown
