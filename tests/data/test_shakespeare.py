"""The characters are counted as in tiny Shakespeare, and scenes read like it."""

import numpy as np
import pytest

from sinkbook.data import shakespeare
from sinkbook.data.corpora import texts
from sinkbook.data.shakespeare import SYMBOLS, characters


@pytest.fixture(scope="module")
def statistics():
    return characters()


def test_the_three_most_frequent_characters_are_space_e_and_t(statistics):
    order = np.argsort(-statistics.unigrams)
    assert [statistics.symbols[i] for i in order[:3]] == [" ", "e", "t"]
    share = statistics.unigrams[order[:3]] / statistics.unigrams.sum()
    # Tiny Shakespeare's own shares, arXiv 2410.13835's trigger statistics.
    np.testing.assert_allclose(share, [0.1523, 0.0848, 0.0601], atol=5e-4)


def test_every_symbol_occurs_and_is_followed_by_something(statistics):
    assert len(statistics.symbols) == 65
    assert list(statistics.symbols) == sorted(statistics.symbols)
    assert statistics.unigrams.min() > 0
    assert statistics.bigrams.sum(axis=1).min() > 0


def test_there_is_at_most_one_pair_for_each_character(statistics):
    followed = statistics.bigrams.sum(axis=1)
    assert np.all(followed <= statistics.unigrams)
    assert statistics.unigrams.sum() - followed.sum() < 10


def test_characters_that_are_no_symbols_part_their_neighbours():
    counted = shakespeare.count("ab#ba")
    a, b = SYMBOLS.index("a"), SYMBOLS.index("b")
    assert counted.unigrams[a] == counted.unigrams[b] == 2
    assert counted.bigrams[a, b] == counted.bigrams[b, a] == 1
    assert counted.bigrams.sum() == 2


def test_scenes_read_like_tiny_shakespeare():
    play = r"""# A Play

## ACT I

### SCENE I. A street.

_Enter a company, with
clubs_

**First Citizen**
__\[Aside]_
Hear me\--speak.
Speak.

**All**
Speak, speak.

_Exeunt_

### SCENE II. Rome.

*Sound a horn.*

**All**
[Within] We know't.
"""
    assert list(shakespeare.scenes(play.replace("\n", "  \n"))) == [
        "First Citizen:\nHear me--speak.\nSpeak.\n\nAll:\nSpeak, speak.",
        "All:\nWe know't.",
    ]


def test_no_markup_is_left_in_any_play():
    assert not set("*_#[]\\") & set("".join(texts("shakespeare")))
