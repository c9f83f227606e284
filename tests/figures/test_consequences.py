"""What heads cost is drawn a panel a domain, on an axis of per cent."""

import matplotlib.pyplot as plt
import xarray as xr

from sinkbook.figures.consequences import pruning_panels


def test_a_panel_a_domain_shows_the_mean_rise_of_each_order():
    def rise(scale):
        return xr.DataArray(
            [[[0.0, 0.0], [1 * scale, 3 * scale]]],
            dims=("order", "removed", "text"),
            coords={"order": ["output norm"], "removed": [0.0, 0.25]},
        )

    panels = pruning_panels({"prose": rise(1), "code": rise(2)}, {"output norm": "black"})
    assert [panel.get_title() for panel in panels] == ["prose", "code"]
    for panel, scale in zip(panels, (1, 2), strict=True):
        assert panel.lines[0].get_xdata().tolist() == [0, 25]
        assert panel.lines[0].get_ydata().tolist() == [0, 2 * scale]
    plt.close("all")
