"""Pretrainings are drawn a line a run and a row a lever, at the values that they are given."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
import xarray as xr

from sinkbook.figures.pretraining import controls, levers


@pytest.fixture(autouse=True)
def _no_figure_stays_open():
    yield
    plt.close("all")


def test_controls_have_a_line_a_run_and_a_name_a_group():
    def head(score, seeds):
        over = ("seed", "step")
        return xr.Dataset(
            {
                "copying": (over, np.full((seeds, 2), score)),
                "sink_attention": (("kind", *over), np.full((1, seeds, 2), score / 2)),
            },
            coords={"step": [1, 10], "kind": ["plain"]},
        )

    left, right = controls({"as it is": head(0.8, 3), "no repeats": head(0.1, 1)})
    assert [line.get_ydata()[0] for line in left.lines] == [0.8, 0.8, 0.8, 0.1]
    assert [line.get_ydata()[0] for line in right.lines] == [0.4, 0.4, 0.4, 0.05]
    assert [text.get_text() for text in left.get_legend().get_texts()] == ["as it is", "no repeats"]


def test_levers_have_a_panel_each_with_a_line_a_seed_and_the_one_that_none_is_moved_from():
    curves = xr.DataArray(
        [[0.0, 0.2], [0.1, 0.3], [0.1, 0.4]],
        {
            "step": [0, 4_000],
            "lever": ("run", ["as it is", "packed", "packed"]),
            "seed": ("run", [0, 0, 1]),
        },
        ("run", "step"),
    )
    plain, packed = levers(curves, even=0.03, counted=0.3)
    assert [ax.get_title() for ax in (plain, packed)] == ["as it is", "packed"]
    ends = [line.get_ydata()[-1] for line in packed.lines]
    assert ends == [0.03, 0.3, 0.2, 0.3, 0.4]
    assert [text.get_text() for text in packed.get_legend().get_texts()] == [
        *("as it is", "seed 0", "seed 1")
    ]
    assert packed.get_ylim() == (0, 0.6)
