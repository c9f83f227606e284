"""The texts are real, in a fixed order, of the length asked for, and free of markup."""

import hashlib
import json

import pytest

from sinkbook.data import corpora
from sinkbook.data.corpora import DOMAINS, texts
from sinkbook.errors import SinkbookError

FIRST_TEXTS = {  # the beginning of their sha256
    "prose-en": "78ad4def2c6a269d",
    "prose-fr": "d90ac2bb44116c67",
    "prose-es": "910f2539fa402bdc",
    "repeated-prose": "45ae1b850efdbf66",
    "json": "fabb79caa8f30e9d",
    "code": "298f0aefdddbc143",
    "shakespeare": "ee03f684aaad25bb",
    "numbers": "ac7542ba65ce540d",
}


@pytest.mark.parametrize("domain", DOMAINS)
def test_every_domain_has_many_texts_of_the_length_asked_for(domain):
    found = texts(domain, count=64, minimum_characters=700)
    assert len(found) == 64
    assert min(map(len, found)) >= 700
    assert len(set(found)) == 64


@pytest.mark.parametrize("domain", DOMAINS)
def test_the_first_texts_do_not_depend_on_how_many_are_taken(domain):
    assert texts(domain, count=3) == texts(domain, count=5)[:3]


def test_the_order_of_texts_mixes_subjects():
    titles = [text.splitlines()[0] for text in texts("prose-en", count=40)]
    assert titles != sorted(titles)
    assert len({title[0] for title in titles}) > 10


def test_count_none_gives_all_texts_that_are_long_enough():
    assert len(texts("prose-en", minimum_characters=900)) > 400


def test_repeated_prose_repeats_the_beginning_of_the_prose_text_of_the_same_number():
    pairs = zip(texts("prose-en", count=20), texts("repeated-prose", count=20), strict=True)
    for prose, repeated in pairs:
        half = (len(repeated) - 2) // 2
        assert repeated == f"{prose[:half]}\n\n{prose[:half]}"
        assert prose[half : half + 1].strip() == ""  # it stops at a word's end


def test_code_begins_with_code_and_not_with_a_licence():
    for module in texts("code", count=50):
        assert module.startswith(("class ", "def ", "async def ", "@"))


@pytest.mark.parametrize("domain", DOMAINS)
def test_texts_are_the_same_on_every_machine(domain):
    """What a Python ships differs from machine to machine: no text may come from it."""
    found = "\0".join(texts(domain, count=16, minimum_characters=700))
    assert hashlib.sha256(found.encode()).hexdigest()[:16] == FIRST_TEXTS[domain]


def test_json_is_json():
    entries = json.loads(texts("json", count=1)[0])
    assert set(entries[0]) == {"title", "description", "topic"}


def test_numbers_hold_nothing_but_numbers():
    rows = texts("numbers", count=1)[0].strip().splitlines()
    assert all(number.strip().isdigit() for row in rows for number in row.split(","))


def test_an_unknown_domain_is_answered_with_the_known_ones():
    with pytest.raises(
        SinkbookError, match="no domain named 'prose-de'. Known: prose-en, prose-fr"
    ):
        texts("prose-de")


def test_asking_for_more_texts_than_there_are_says_how_many_there_are():
    with pytest.raises(
        SinkbookError, match=r"'prose-en' has \d+ texts of at least 1500 characters"
    ):
        texts("prose-en", count=1000, minimum_characters=1500)


def test_every_domain_says_what_it_is_and_on_what_licence():
    for domain in DOMAINS.values():
        assert domain.about and domain.licence
        assert domain.source is None or domain.source in corpora.SOURCES


def test_fetching_an_unknown_name_lists_what_can_be_fetched():
    with pytest.raises(SinkbookError, match="nothing named 'nosuch' to fetch. Known: shakespeare"):
        corpora.fetch("nosuch")


def test_fetching_a_domain_fetches_its_source():
    folder = corpora.fetch("prose-fr")
    assert [path.suffix for path in folder.glob("*.whl")] == [".whl"]


def test_a_domain_that_needs_no_download_is_fetched_at_once(monkeypatch, tmp_path):
    monkeypatch.setenv("SINKBOOK_CACHE", str(tmp_path / "empty"))
    assert corpora.fetch("numbers") == tmp_path / "empty"
    assert texts("numbers", count=1)
