"""The chapters type no number and no verdict that a run decides: these are glued or left out.

What the paper or another source has found may stand as a number, in a sentence that names it.
"""

import json
import re
from pathlib import Path

import pytest

from sinkbook.book import claims

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "book").glob("*.ipynb"))

COUNT = r"(?:one|two|three|four|five|six|seven|eight|nine|ten|a dozen|\d+)"
OFFENCES = {
    # Layers 0 to 2 are what the layers of a toy are called.
    "a layer's number": r"\blayers? (?:[3-9]|\d\d)\b|\blayers [0-2](?:,| and| to) \d",
    "how many of the seeds": (
        rf"\bin (?:the )?(?:{COUNT}|first|second|third|every|each|no|all \w+) "
        rf"(?:seeds?|networks?|texts)\b"
        rf"|\b{COUNT} (?:\w+ )?of (?:the |our )?{COUNT} (?:seeds|networks|texts|heads|models)\b"
        rf"|\b{COUNT} (?:seeds?|heads?) (?:of {COUNT}|meet|agrees?|holds?|turns?)\b"
    ),
    "a verdict": (
        r"\bclaims? (?:\S+ ){0,12}?(?:holds?|fail(?:s|ed)?)\b|\b(?:holds?|fails?) (?:in|here|by)\b"
    ),
}
# A sentence with one of these speaks of a source, or of what a claim is.
SOURCES = re.compile(
    r"paper|Llama|OLMo|Pythia|Qwen|GPT-2|\{cite|authors|meets the rule|stays on the list"
)


def sentences(notebook: Path, *, described: bool = True) -> list[str]:
    """Sentences of the Markdown cells and captions; no code, no formulas.

    With `described` those of alternative texts as well.
    """
    found = []
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "markdown":
            texts = ["".join(cell["source"])]
        elif figure := cell["metadata"].get("mystnb"):
            texts = [figure["figure"]["caption"], *[figure["image"]["alt"]] * described]
        else:
            texts = []
        for text in texts:
            text = re.sub(r"^```(?:python|bash)\n.*?^```", "", text, flags=re.M | re.S)
            text = re.sub(r"\{glue:text\}`[^`]*`", "NUMBER", text)
            found += re.split(r"(?<=[.!?:;|])\s", re.sub(r"\s+", " ", text))
    return found


def offences(text: str) -> list[str]:
    if SOURCES.search(text):
        return []
    return [what for what, words in OFFENCES.items() if re.search(words, text, re.I)]


@pytest.mark.parametrize(
    "text",
    [
        "It comes between layer 11 and layer 12.",
        "Two of three seeds agree.",
        "It falls in every seed.",
        "In the third the claim fails.",
        "What failed before holds in the longer run.",
    ],
)
def test_what_a_run_decides_is_noticed(text):
    assert offences(text)


def test_what_the_paper_found_and_what_was_glued_may_stand():
    assert not offences("In layer 24 of the paper's Llama the sink is clean.")
    assert not offences("The MLP of layer NUMBER writes it, in NUMBER of NUMBER seeds.")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_no_layer_count_or_verdict_is_typed_in_the_text_of_a_chapter(path):
    assert {text: offences(text) for text in sentences(path) if offences(text)} == {}


def test_no_reason_in_the_ledger_types_a_count_of_seeds_or_a_layer():
    reasons = {claim.id: offences(claim.fails) for claim in claims.known().values()}
    assert {name: found for name, found in reasons.items() if found} == {}


# A phone stacks panels, so that none is left or right of another. The alternative text is of the
# drawing for wide pages.
BESIDE = re.compile(
    r"\b(?:left|right|middle)(?:most)? panels?\b|\bon the (?:left|right)\b"
    r"|^(?:Left|Right|left|right)[,:]|\((?:left|right)\)"
)


@pytest.mark.parametrize(
    "text", ["See the left panel.", "Left, one text.", "Here it falls (right)."]
)
def test_a_place_that_a_phone_does_not_keep_is_noticed(text):
    assert BESIDE.search(text)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_panels_are_called_by_what_they_show_or_by_their_order(path):
    shown = [text for text in sentences(path, described=False) if BESIDE.search(text)]
    assert shown == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_no_table_is_torn_by_an_empty_line(path):
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "markdown":
            blocks = "".join(cell["source"]).split("\n\n")
            tables = [block for block in blocks if block.startswith("|")]
            assert all(re.match(r"\|.*\|\n\|[-:| ]+\|", table) for table in tables), tables
