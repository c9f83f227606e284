"""Mitigations are drawn in the order, under the names and at the values that they are given."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
import xarray as xr

from sinkbook.figures.mitigations import (
    destination_bars,
    league_board,
    maps_of_methods,
    marks_by_layer,
)


@pytest.fixture(autouse=True)
def _no_figure_stays_open():
    yield
    plt.close("all")


def a_table(scale=1.0):
    values = xr.DataArray(
        [[0.9, 0.8], [0.1, 0.2]],
        dims=("mitigation", "seed"),
        coords={
            "mitigation": ["softmax", "relu"],
            "label": ("mitigation", ["softmax", "ReLU"]),
            "family": ("mitigation", ["control", "no normalisation"]),
        },
    )
    named = {"sink_attention": "strongest sink", "steps_to_loss": "steps to the common loss"}
    columns = {n: (scale * values).assign_attrs(long_name=label) for n, label in named.items()}
    return xr.Dataset(columns)


def rows_of(panel):
    dots = [line for line in panel.lines if line.get_marker() == "o"]
    return {int(line.get_ydata()[0]): line.get_xdata().tolist() for line in dots}


def test_the_board_has_a_panel_a_criterion_and_a_row_a_mitigation_in_the_given_order():
    panels = league_board(a_table(), order=["ReLU", "softmax"])
    assert [panel.get_xlabel() for panel in panels] == [
        "strongest\nsink",
        "steps\nto the common loss",
    ]
    assert [tick.get_text() for tick in panels[0].get_yticklabels()] == ["ReLU", "softmax"]
    assert rows_of(panels[0]) == {0: [0.1, 0.2], 1: [0.9, 0.8]}


def test_another_table_is_laid_over_the_board_without_its_steps():
    (panel,) = league_board(a_table(), order=["ReLU", "softmax"], over=a_table(2.0))
    means = [line.get_xdata()[0] for line in panel.lines if line.get_marker() == "D"]
    assert means == pytest.approx([0.3, 1.7])


def test_rows_that_the_other_table_lacks_have_no_mark_of_it():
    other = a_table(2.0).sel(mitigation=["relu"])
    (panel,) = league_board(a_table(), order=["ReLU", "softmax"], over=other)
    marks = [line for line in panel.lines if line.get_marker() == "D"]
    assert [(line.get_xdata()[0], line.get_ydata()[0]) for line in marks] == [
        (pytest.approx(0.3), 0)
    ]


def test_maps_of_methods_show_what_each_was_given():
    weights = {"softmax": np.tril(np.full((2, 2), 0.5)), "ReLU": np.zeros((2, 2))}
    triggers = np.array([False, True])
    panels = maps_of_methods({t: (w, ["<s>", "a"], triggers) for t, w in weights.items()})
    assert [panel.get_title() for panel in panels] == list(weights)
    for panel, shown in zip(panels, weights.values(), strict=True):
        drawn = panel.images[0].get_array()
        assert np.array_equal(drawn.data, shown)
        assert drawn.mask[0, 1] and not drawn.mask[1, 0]  # keys that come later are left out


def test_destinations_are_stacked_up_to_one_under_their_labels():
    shares = xr.DataArray(
        [[[[0.5, 0.3, 0.2]]]],
        dims=("control", "mitigation", "seed", "destination"),
        coords={
            "control": ["as it is"],
            "mitigation": ["sink-logit"],
            "label": ("mitigation", ["sink logit"]),
            "destination": ["<s>", "other tokens", "null slot"],
        },
    )
    ax = destination_bars(shares)
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["sink logit"]
    assert [bar.get_height() for bar in ax.patches] == pytest.approx([0.5, 0.3, 0.2])
    assert [bar.get_y() for bar in ax.patches] == pytest.approx([0, 0.5, 0.8])
    (dots,) = ax.lines
    assert dots.get_ydata() == pytest.approx([0.5]), "what the seed gives to <s>"


def test_marks_are_drawn_as_they_were_measured():
    of_heads = {"dims": ("seed", "layer", "head"), "coords": {"layer": [0, 1]}}
    end = xr.Dataset(
        {
            "sink_attention": xr.DataArray([[[0.7], [0.6]]], **of_heads),
            "value_norm": xr.DataArray([[[0.4], [0.25]]], **of_heads),
            "other_value_norm": xr.DataArray([[[2.0], [2.5]]], **of_heads),
            "residual_peak_height": xr.DataArray(
                [[0.0, 5.0, 9.0]],
                dims=("seed", "residual_layer"),
                coords={"residual_layer": range(3)},
            ),
        }
    )
    panels = marks_by_layer({"ours": end}, colours={"ours": "black"})
    drawn = [panel.lines[0].get_ydata().tolist() for panel in panels]
    assert drawn == [[0.7, 0.6], [0.2, 0.1], [0.0, 5.0, 9.0]]
