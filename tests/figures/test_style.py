"""The look of the book is asked for, and nobody else's figures change with an import."""

import subprocess
import sys

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.colors import to_rgb

from colours import contrast
from sinkbook import book, figures
from sinkbook.figures import style


@pytest.fixture(autouse=True)
def _the_style_of_the_caller_comes_back():
    with plt.style.context("default"):
        yield
    plt.close("all")


def test_importing_figures_changes_no_style():
    code = (
        "import matplotlib as m; before = dict(m.rcParams); "
        "import sinkbook.figures, sinkbook.figures.curves, sinkbook.figures.pretraining; "
        "changed = [k for k in before if k != 'backend' and m.rcParams[k] != before[k]]; "
        "assert not changed, changed"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_chapter_draws_in_the_style_of_the_book():
    before = plt.rcParams["axes.spines.top"]
    book.chapter("quick")
    assert before and not plt.rcParams["axes.spines.top"]


def test_a_style_applied_ends_with_its_body():
    with style.applied():
        assert plt.rcParams["image.cmap"] == style.MAP
    assert plt.rcParams["image.cmap"] != style.MAP


def test_more_attention_is_darker_in_any_style():
    weights = np.tril(np.full((2, 2), 0.2))
    weights[1, 1] = 0.9
    image = figures.attention_map(weights, ["a", "b"], colorbar=False).images[0]
    little, much = (sum(image.cmap(image.norm(w))[:3]) for w in (0.2, 0.9))
    assert much < little


@pytest.mark.parametrize("share", np.linspace(0, 1, 51).tolist())
def test_letters_on_a_map_stand_out_on_every_cell(share):
    ground, ink = plt.get_cmap(style.MAP)(share)[:3], to_rgb(style.on_map(share))
    assert contrast(255 * np.array(ink), 255 * np.array(ground)) >= 4.5, share
