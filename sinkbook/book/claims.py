"""The ledger: what is claimed, what was measured, and whether it holds.

`book/claims.yml` lists every claim once. A chapter hands in its numbers, one a seed:

    chapter.check("sink.one-layer", values)

which shows them on the page beside the paper's value and writes them to the ledger, one JSON file
a claim in the cache folder. A claim holds if every seed meets the criterion of its profile.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, fields
from datetime import date
from functools import lru_cache
from importlib.resources import files
from pathlib import Path

import numpy as np
import yaml

from sinkbook.arguments import check_kind, check_known, names_of
from sinkbook.book.notebooks import titles
from sinkbook.book.settings import check_profile
from sinkbook.criteria import in_words, limits, satisfies
from sinkbook.errors import SinkbookError
from sinkbook.files import cache_folder, is_there, reading, write_json
from sinkbook.pages import claim_cards, claim_ledger
from sinkbook.provenance import repository, versions

SENSITIVE = "Another machine may find otherwise: its rounding leads the training elsewhere."
_ID = re.compile(r"\w[\w.-]{0,99}", re.ASCII)  # it names a file in the ledger
IN_YAML = "Mend it: it is a list in YAML, with an entry for each claim."
DECIDED_BY = ("live", "record")
WHOSE = {"paper": "the paper's", "rival": "somebody else's", "ours": "our own"}
ELSEWHERE = "not so in this model"  # no contradiction: it was said of another one
VERDICTS = ("holds", "mixed", "contradicts", ELSEWHERE, "undecided", "not measured")


@dataclass(frozen=True)
class Claim:
    """One entry of `book/claims.yml`."""

    id: str
    chapter: str  # the notebook's name without .ipynb
    source: str  # section or figure of the paper, or whoever else claims it
    statement: str  # one sentence
    quantity: str  # what the numbers are
    criterion: dict[str, str]  # by profile
    paper: int | float | str | None = None  # the paper's own value
    unit: str = ""
    fails: str = ""  # why it is known not to hold at our scale; empty: it should hold
    over: str = "seeds"  # what there is one number of: seeds, or texts
    sensitive: bool = False  # the verdict is known to depend on the machine: a debt
    decided_by: str = "live"  # by what the chapter trains or reads, or by a "record"
    record: str = ""  # its name, where the claim may still wait for trainings of it
    whose: str = "paper"  # claim it is: a refutation of "ours" or of a "rival" is a result
    undecided: str = ""  # what would decide it, where our size cannot: a debt as well
    said_of: str = ""  # the pretrained model that it was measured on, where ours is another

    def __post_init__(self) -> None:
        check_id(self.id)
        for name in (field.name for field in fields(self) if field.type is str):
            check_kind(name, getattr(self, name), str)
        check_kind("sensitive", self.sensitive, bool)
        check_kind("paper", self.paper, int | float | str | None)
        check_kind("criterion", self.criterion, dict)
        if not self.criterion:
            raise SinkbookError("its criterion is empty. Give one for each profile.")
        for value, known_values in ((self.decided_by, DECIDED_BY), (self.whose, WHOSE)):
            if value not in known_values:
                raise SinkbookError(f"{value!r} is none of {', '.join(known_values)}.")
        for profile, criterion in self.criterion.items():
            check_profile(profile)
            satisfies(criterion, 0.0)


def check_id(claim_id: object) -> None:
    """Refuse an id that is not the name of a file as well: letters, digits, and `.`, `-`, `_`."""
    if not isinstance(claim_id, str) or not _ID.fullmatch(claim_id):
        raise SinkbookError(
            f"{claim_id!r:.80} is no id of a claim. Give one of letters, digits, and . - _ inside."
        )


def claims_file() -> Path:
    """`book/claims.yml` of the repository, or the copy that an installed package carries."""
    root = repository()
    folder = root / "book" if root else Path(str(files("sinkbook.book")))
    return folder / "claims.yml"


@lru_cache(maxsize=2)
def _parsed(text: str) -> list:
    """The entries of a ledger, parsed once a process, in C where PyYAML has it: they are many."""
    return yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader)) or []


def known() -> dict[str, Claim]:
    """Every claim by its id, in the order of `book/claims.yml`.

    An entry with a missing or misspelt field, or an id used twice, raises `SinkbookError`.
    """
    path = claims_file()
    found: dict[str, Claim] = {}
    with reading(path, IN_YAML, named=True):
        entries = _parsed(path.read_text(encoding="utf-8"))
        check_kind("claims", entries, list)
    for entry in entries:
        try:
            claim = Claim(**entry)
        except (TypeError, AttributeError, SinkbookError) as error:
            name = entry.get("id", entry) if isinstance(entry, dict) else entry
            raise SinkbookError(f"{path.name}, entry {name!r}: {error}") from error
        if claim.id in found:
            raise SinkbookError(f"{path.name}: two claims are called {claim.id!r}. Rename one.")
        found[claim.id] = claim
    return found


@dataclass(frozen=True)
class Verdict:
    """A claim, the numbers measured for it (one a seed, or none yet), and whether it holds."""

    claim: Claim
    profile: str
    measured: tuple[float, ...] = ()
    date: str = ""

    @property
    def criterion(self) -> str:
        try:
            return self.claim.criterion[self.profile]
        except KeyError:
            raise SinkbookError(
                f"claim {self.claim.id!r} has no criterion for the profile {self.profile!r}. "
                "Add one to book/claims.yml."
            ) from None

    @property
    def holds(self) -> bool | None:
        """Whether every seed meets the criterion; None while nothing is measured."""
        return self.met == len(self.measured) if self.measured else None

    @property
    def met(self) -> int:
        """How many of the numbers meet the criterion."""
        return sum(satisfies(self.criterion, value) for value in self.measured)

    @property
    def verdict(self) -> str:
        """In a word: it holds in all numbers, in some, in none; or none can decide it."""
        if not self.measured:
            return "not measured"
        if self.holds:
            return "holds"
        if self.claim.undecided:
            return "undecided"
        missed = ELSEWHERE if self.claim.said_of else "contradicts"
        return "mixed" if self.met else missed

    @property
    def in_words(self) -> str:
        """The verdict as a card says it."""
        of_all = f"{self.met} of {len(self.measured)}"
        whose = {"paper": "the paper", "rival": "the claim", "ours": "our guess"}[self.claim.whose]
        return {
            "mixed": f"mixed ({of_all})",
            "contradicts": f"contradicts {whose}",
            "undecided": f"undecided at this size ({of_all})",
            "not measured": "not measured yet",
        }.get(self.verdict, self.verdict)

    def row(self) -> dict:
        """The verdict as plain data: what `sinkbook claims --json` prints."""
        finite = [value if math.isfinite(value) else None for value in self.measured]
        return {
            "id": self.claim.id,
            "chapter": self.claim.chapter,
            "source": self.claim.source,
            "statement": self.claim.statement,
            "paper": self.claim.paper,
            "quantity": self.claim.quantity,
            "unit": self.claim.unit,
            "profile": self.profile,
            "measured": finite if self.measured else None,
            "criterion": self.criterion,
            "holds": self.holds,
            "verdict": self.verdict,
            "decided_by": self.claim.decided_by,
            "whose": self.claim.whose,
            "undecided": self.claim.undecided,
            "fails": self.claim.fails,
            "sensitive": self.claim.sensitive,
            "date": self.date,
        }

    def describe(self) -> dict[str, str]:
        """What a reader sees, label by label."""
        shown = {
            "paper": claim_cards.number(self.claim.paper, self.claim.unit),
            "measured": claim_cards.spread(self.measured, self.claim.unit, self.claim.over),
            "rule": self._rule_in_words(),
        }
        return {label: text for label, text in shown.items() if text}

    def _rule_in_words(self) -> str:
        count = len(self.measured)
        all_of = f" in {'both' if count == 2 else f'all {count}'} {self.claim.over}"
        return in_words(self.criterion) + all_of * (count > 1)

    def __str__(self) -> str:
        details = "; ".join(f"{label} {text}" for label, text in self.describe().items())
        return f"[{self.in_words}] {self.claim.statement} ({self.claim.id}: {details})"

    def card(self) -> claim_cards.Card:
        """What the verdict's card shows."""
        claim = self.claim
        undecided = self.verdict == "undecided"
        of_record = ("decided by a record", "left open by its record")[undecided]
        decided = of_record if claim.decided_by == "record" else "shown live"
        if claim.record and not self.measured:
            decided = f"waits for the record {claim.record}"
        would = f"What would decide it: {claim.undecided}" * undecided
        said_of = f"The claim is about {claim.said_of}." if claim.said_of else ""
        why = claim.fails * (self.holds is False)  # where it holds, there is nothing to explain
        notes = (why, said_of, would, SENSITIVE * claim.sensitive)
        low, high = limits(self.criterion)
        return claim_cards.Card(
            id=claim.id,
            chapter=claim.chapter,
            statement=claim.statement,
            verdict=self.verdict,
            words=self.in_words,
            whose=claim.whose,
            kind=f"{WHOSE[claim.whose]} claim, {decided}",
            source=claim.source,
            quantity=claim.quantity,
            values=self.measured,
            met=tuple(satisfies(self.criterion, value) for value in self.measured),
            low=low,
            high=high,
            paper=float(claim.paper) if isinstance(claim.paper, int | float) else None,
            numbers=self.describe(),
            notes=tuple(note for note in notes if note),
            debt=would or SENSITIVE * claim.sensitive,
            date=self.date,
        )

    def _html(self) -> str:
        return claim_cards.card(self.card())

    def _repr_mimebundle_(self, include=None, exclude=None) -> tuple[dict, dict]:
        # The metadata travels with the executed notebook: `sinkbook build` fills the ledger from
        # it when it takes a chapter from its cache.
        return {"text/html": self._html(), "text/plain": str(self)}, {
            "sinkbook.claim": self.record()
        }

    def record(self) -> dict:
        """What the ledger keeps of a measurement: the claim's own text stays in claims.yml."""
        return {
            "id": self.claim.id,
            "profile": self.profile,
            "measured": list(self.measured),
            "date": self.date,
            "versions": versions(),
        }


def ledger_folder() -> Path:
    """Where the last measurement of each claim lies, one JSON file a claim."""
    return cache_folder() / "ledger"


def judge(claim_id: str, values: Iterable[float], *, profile: str) -> Verdict:
    """Hold measurements, one a seed, against a claim, without showing or keeping them.

    Raises `SinkbookError` for an id that is not in `book/claims.yml`, and for no values at all.
    """
    claims = known()
    if not isinstance(claim_id, str) or claim_id not in claims:
        raise SinkbookError(
            f"no claim is called {claim_id!r}. In {claims_file().name}: {', '.join(claims)}."
        )
    try:
        measured = tuple(float(value) for value in np.atleast_1d(np.asarray(values)).ravel())
    except (TypeError, ValueError) as error:
        raise SinkbookError(
            f"claim {claim_id!r} got {values!r:.60}, which are no numbers. Hand in one a seed."
        ) from error
    if not measured:
        raise SinkbookError(f"claim {claim_id!r} got no values. Hand in one number a seed.")
    return Verdict(claims[claim_id], check_profile(profile), measured, date.today().isoformat())


def check(claim_id: str, values: Iterable[float], *, profile: str) -> Verdict:
    """Show a claim with its measurements, one a seed, and write them to the ledger.

    A claim that fails is shown as failed and raises nothing: that is a result. Unknown ids do.
    """
    from IPython.display import display

    verdict = judge(claim_id, values, profile=profile)
    keep(verdict.record())
    display(verdict)
    return verdict


def keep(record: dict) -> None:
    """Write one measurement, as `Verdict.record` gives it, to the ledger.

    Raises `SinkbookError` for an id that is the name of no file in it.
    """
    check_id(record.get("id"))
    write_json(ledger_folder() / f"{record['id']}.json", record)


def verdicts() -> list[Verdict]:
    """Every claim with the last measurement of it, in the order of `book/claims.yml`."""
    found = []
    for claim in known().values():
        path = ledger_folder() / f"{claim.id}.json"
        if is_there(path):
            with reading(path, f"Delete it, and run {claim.chapter} again.", named=True):
                record = json.loads(path.read_text(encoding="utf-8"))
                check_kind("measured", record["measured"], list)
                check_kind("date", record["date"], str)
                measured = tuple(float(value) for value in record["measured"])
                check_profile(record["profile"])
            found.append(Verdict(claim, record["profile"], measured, record["date"]))
        else:
            found.append(Verdict(claim, next(iter(claim.criterion))))
    return found


@dataclass(frozen=True)
class Ledger:
    """All verdicts, grouped by chapter, those that do not hold in plain view. Made by `ledger`."""

    verdicts: list[Verdict]

    def summary(self) -> str:
        """How many claims hold, do not hold, and wait to be measured."""
        counts = Counter(verdict.verdict for verdict in self.verdicts)
        words = ", ".join(f"{word} {counts[word]}" for word in VERDICTS if counts[word])
        return f"{len(self.verdicts)} claims: {words}" if words else "No claim is among them."

    def debt(self) -> str:
        """The claims whose verdict depends on the machine, as a sentence; empty without any."""
        sensitive = [f"`{v.claim.id}`" for v in self.verdicts if v.claim.sensitive]
        undecided = [f"`{v.claim.id}`" for v in self.verdicts if v.verdict == "undecided"]
        debts = []
        if sensitive:
            debts.append(f"A debt: on another machine another verdict on {', '.join(sensitive)}.")
        if undecided:
            debts.append(f"Another: undecided at our size are {', '.join(undecided)}.")
        return " ".join(debts)

    def by_chapter(self) -> dict[str, list[Verdict]]:
        """The verdicts under the name of the chapter that measures them."""
        grouped: dict[str, list[Verdict]] = {}
        for verdict in self.verdicts:
            grouped.setdefault(verdict.claim.chapter, []).append(verdict)
        return dict(sorted(grouped.items()))

    def __str__(self) -> str:
        lines = [text for text in (self.summary(), self.debt()) if text]
        for chapter, group in self.by_chapter().items():
            lines += ["", chapter, *(f"  {verdict}" for verdict in group)]
        return "\n".join(lines)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        cards = [verdict.card() for verdict in self.verdicts]
        called = titles(claims_file().parent)
        return claim_ledger.page(cards, summary=self.summary(), verdicts=VERDICTS, titles=called)


def ledger(*, chapter: str | None = None, verdict: str | None = None) -> Ledger:
    """The whole ledger as one object that a notebook shows as a page and `print` as text.

    Or what of it belongs to a chapter, by name or number, or got a verdict, a word of `VERDICTS`.
    Raises `SinkbookError` for a chapter without claims and for a verdict that there is not.
    """
    found = verdicts()
    known_chapters = sorted({each.claim.chapter for each in found})
    chapters = [name for name in known_chapters if chapter in (None, name, name.split("_")[0])]
    if chapter is not None and not chapters:
        check_known("chapter with claims", chapter, known_chapters)
    wanted = VERDICTS if verdict is None else names_of("verdict", [verdict], VERDICTS)
    return Ledger([v for v in found if v.claim.chapter in chapters and v.verdict in wanted])
