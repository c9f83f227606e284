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


def test_levers_have_a_row_each_and_a_marker_a_domain():
    ends = xr.Dataset(
        {
            "strongest_sink": ("lever", [0.2, 0.4]),
            "highest_peak": ("lever", [2.0, 3.0]),
            "loss": (("lever", "domain"), [[4.0, 5.0], [3.0, 2.0]]),
        },
        coords={"lever": ["as it is", "packed"], "domain": ["prose-en", "code"]},
    )
    sink, peak, loss = levers(ends)
    assert sink.lines[0].get_xdata().tolist() == [0.2, 0.4]
    assert peak.lines[0].get_xdata().tolist() == [2.0, 3.0]
    assert [line.get_xdata().tolist() for line in loss.lines] == [[4.0, 3.0], [5.0, 2.0]]
    assert [text.get_text() for text in loss.get_legend().get_texts()] == ["prose-en", "code"]
    assert [tick.get_text() for tick in sink.get_yticklabels()] == ["as it is", "packed"]
