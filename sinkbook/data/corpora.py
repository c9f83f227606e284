"""The texts of the book, domain by domain: encyclopaedic prose, code, plays and others.

They come from the pinned downloads in `sources.py`, so they are the same on every machine.
"""

import hashlib
import itertools
import json
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from sinkbook.annotations import check_arguments
from sinkbook.arguments import check_whole_number
from sinkbook.data import shakespeare
from sinkbook.data.sources import SOURCES, fetch_source, wheel_path
from sinkbook.errors import SinkbookError
from sinkbook.files import cache_folder


@dataclass(frozen=True)
class Domain:
    """Texts of one kind."""

    name: str
    about: str
    licence: str
    source: str | None  # a name in SOURCES; None: needs no download
    passages: Callable[[int], Iterable[str]]  # given the least number of characters wanted


@check_arguments
def texts(domain: str, count: int | None = None, minimum_characters: int = 600) -> list[str]:
    """The first `count` texts of a domain that are long enough; all of them if None.

    The order is the same on every machine and mixes subjects. Text i of `repeated-prose` repeats
    the beginning of text i of `prose-en`, so the two can be compared text by text.

    Raises SinkbookError if there is no such domain or it has fewer such texts.

    >>> [text.splitlines()[0] for text in texts("prose-en", count=3)]
    ['Conscience', 'Chemical kinetics', 'Greco-Persian Wars']
    """
    if domain not in DOMAINS:
        raise SinkbookError(f"no domain named {domain!r}. Known: {', '.join(DOMAINS)}")
    check_whole_number("count", 1 if count is None else count, 1)
    check_whole_number("minimum_characters", minimum_characters, 0, 10_000_000)
    passages = DOMAINS[domain].passages(minimum_characters)
    long_enough = (text for text in passages if len(text) >= minimum_characters)
    found = list(itertools.islice(long_enough, count))
    if count is not None and len(found) < count:
        raise SinkbookError(
            f"{domain!r} has {len(found)} texts of at least {minimum_characters} characters, and "
            f"{count} were asked for. Ask for fewer texts, or for shorter ones."
        )
    return found


def one_by_one(domain: str, minimum_characters: int) -> Iterator[str]:
    """The texts of `texts`, one after the other, none of which is made before it is asked for."""
    texts(domain, 1, minimum_characters)  # refuses what it refuses
    made = DOMAINS[domain].passages(minimum_characters)
    return (text for text in made if len(text) >= minimum_characters)


@check_arguments
def fetch(name: str, accept_license: bool = False) -> Path:
    """Make sure that a source, or what a domain needs, is in the cache and whole.

    Returns the folder that holds it (for a domain that needs no download, the cache folder).
    Raises SinkbookError as `sources.fetch_source` does, and if the name is unknown.
    """
    if name not in SOURCES and name not in DOMAINS:
        known = ", ".join(dict.fromkeys([*SOURCES, *DOMAINS]))
        raise SinkbookError(f"nothing named {name!r} to fetch. Known: {known}")
    source = DOMAINS[name].source if name in DOMAINS else name
    if source is None:
        return cache_folder()
    fetch_source(SOURCES[source], accept_license, asked=name)
    return SOURCES[source].folder


def _mixed(titles: Iterable[str]) -> list[str]:
    """Titles in an order that has nothing to do with the alphabet, the same on every machine."""
    return sorted(titles, key=lambda title: hashlib.sha256(title.encode()).digest())


def _articles(language: str, asked: str) -> dict[str, dict[str, str]]:
    """Wikipedia's articles by title: each has `title`, `extract`, `description`, `topic`."""
    source = SOURCES["wikipedia"]
    (wheel,) = source.wheels
    with zipfile.ZipFile(wheel_path(source, wheel, asked)) as archive:
        entries = json.loads(archive.read(f"{wheel.data}summaries_{language}.json"))
    return {entry["title"]: entry for entry in entries.values()}


def _prose(asked: str, language: str, minimum: int) -> Iterator[str]:
    """The title and the lead of each article."""
    articles = _articles(language, asked)
    for title in _mixed(articles):
        yield f"{title}\n\n{articles[title]['extract']}"


def _repeated_prose(minimum: int) -> Iterator[str]:
    """A little more than the first `minimum / 2` characters of a lead, to a word's end, twice."""
    for text in _prose("repeated-prose", "en-us", minimum):
        if len(text) >= minimum:
            first, rest = text[: minimum // 2 + 1], text[minimum // 2 + 1 :]
            first += re.match(r"\S*", rest)[0]
            yield f"{first}\n\n{first}"


def _json(minimum: int) -> Iterator[str]:
    """Lists of catalogue entries of Wikipedia's articles: title, description and topic."""
    articles = _articles("en-us", "json")
    entries: list[dict[str, str]] = []
    for title in _mixed(articles):
        entries.append({key: articles[title][key] for key in ("title", "description", "topic")})
        text = json.dumps(entries, indent=2, ensure_ascii=False)
        if len(text) >= minimum:
            yield text
            entries = []


def _numbers(minimum: int) -> Iterator[str]:
    """Tables of random integers: the one domain that nobody wrote."""
    for seed in range(1000):
        generator = np.random.default_rng(seed)
        text = ""
        while len(text) < minimum:
            row = 10 ** generator.uniform(0, 5, size=6)
            text += ", ".join(str(int(number)) for number in row) + "\n"
        yield text


def _code(minimum: int) -> Iterator[str]:
    """Twisted's modules, each from its first class or function on; tests are left out.

    What comes before is a licence and a description in English.
    """
    source = SOURCES["twisted"]
    (wheel,) = source.wheels
    with zipfile.ZipFile(wheel_path(source, wheel, asked="code")) as archive:
        modules = [
            member
            for member in archive.namelist()
            if member.startswith(wheel.data) and member.endswith(".py") and "/test/" not in member
        ]
        for module in _mixed(modules):
            text = archive.read(module).decode()
            if start := re.search(r"^(class |def |async def |@)", text, flags=re.MULTILINE):
                yield text[start.start() :]


def _shakespeare(minimum: int) -> Iterator[str]:
    """Scenes of all plays, spoken text only."""
    scenes = {
        f"{play} {number}": scene
        for play, markdown in shakespeare.plays().items()
        for number, scene in enumerate(shakespeare.scenes(markdown))
    }
    for title in _mixed(scenes):
        yield scenes[title]


_WIKIPEDIA = SOURCES["wikipedia"].licence
_DOMAINS = (
    Domain(
        "prose-en",
        "encyclopaedic prose in English: title and lead of Wikipedia articles",
        _WIKIPEDIA,
        "wikipedia",
        partial(_prose, "prose-en", "en-us"),
    ),
    Domain(
        "prose-fr",
        "the same in French",
        _WIKIPEDIA,
        "wikipedia",
        partial(_prose, "prose-fr", "fr-fr"),
    ),
    Domain(
        "prose-es",
        "the same in Spanish",
        _WIKIPEDIA,
        "wikipedia",
        partial(_prose, "prose-es", "es-es"),
    ),
    Domain(
        "repeated-prose",
        "the beginning of each text of prose-en, twice",
        _WIKIPEDIA,
        "wikipedia",
        _repeated_prose,
    ),
    Domain(
        "json",
        "lists of catalogue entries (title, description, topic) of Wikipedia articles",
        _WIKIPEDIA,
        "wikipedia",
        _json,
    ),
    Domain(
        "code",
        "modules of Twisted, a library of Python, from the first class or function on",
        SOURCES["twisted"].licence,
        "twisted",
        _code,
    ),
    Domain(
        "shakespeare",
        "scenes of Shakespeare's plays, spoken text only",
        SOURCES["shakespeare"].licence,
        "shakespeare",
        _shakespeare,
    ),
    Domain("numbers", "tables of random integers, generated", "none", None, _numbers),
)
DOMAINS: dict[str, Domain] = {domain.name: domain for domain in _DOMAINS}
