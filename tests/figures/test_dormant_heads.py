"""Detectors are drawn with the agreement that they are given."""

import matplotlib.pyplot as plt
import pandas as pd
import xarray as xr

from sinkbook.figures.dormant_heads import detectors, effects_by_way
from sinkbook.llm.dormant_head_tests import DETECTORS


def test_each_detector_has_a_panel_with_its_agreement_and_a_dot_a_head_and_domain():
    found = pd.DataFrame(
        {
            "candidate": [0, 0, 1, 1],
            "side": ["active", "dormant"] * 2,
            "sink_attention": [0.1, 0.9, 0.2, 0.8],
            "head_output_norm": [4.0, 1.0, 3.0, 2.0],
            "output_share": [2.0, 0.5, 1.5, 1.0],
            "effect": [0.4, 0.01, 0.3, 0.02],
        }
    )
    names = list(DETECTORS)
    draws = xr.DataArray(
        [[0.5, 0.4, 0.6], [0.7, 0.7, 0.7], [0.9, 0.8, 1.0]],
        dims=("detector", "draw"),
        coords={"detector": names, "draw": range(3)},
    )
    panels = detectors(found, draws)
    assert [panel.get_xlabel() for panel in panels] == names
    assert panels[0].get_title().startswith("ρ = 0.50 (0.41 to 0.59")
    assert panels[1].lines[0].get_xdata().tolist() == [4.0, 3.0]
    assert panels[1].lines[0].get_ydata().tolist() == [0.4, 0.3]
    plt.close("all")


def test_the_ways_of_a_head_stand_together_and_each_dot_is_its_change():
    heads = pd.DataFrame({"name": ["L0H1", "L2H3"], "active": "code", "dormant": "prose"})
    found = {}
    for place, way in enumerate(("zero", "mean", "shuffled")):
        table = heads.copy()
        for side, start in (("active", 0.1), ("dormant", 0.0)):
            change = start + 0.01 * place + 0.2 * table.index.to_numpy()
            table[f"{side}_change"] = change
            table[f"{side}_low"], table[f"{side}_high"] = change - 0.02, change + 0.02
        found[way] = table
    axes = effects_by_way(found)
    labels = [label.get_text() for label in axes.get_yticklabels()]
    names = ["nothing", "its mean", "another text's"]
    assert labels == ["L0H1: nothing", *names[1:], "L2H3: nothing", *names[1:]]
    active = next(line for line in axes.lines if len(line.get_xdata()) == 6)
    assert [round(x, 2) for x in active.get_xdata()] == [0.1, 0.11, 0.12, 0.3, 0.31, 0.32]
    plt.close("all")
