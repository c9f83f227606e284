"""The look of the book: colours by role, and a matplotlib style for whoever asks for it.

Importing changes no figure of yours. A chapter applies the style with `use`, once; a report draws
inside `applied`. The colours are Okabe and Ito's, which the colour-blind can tell apart.
"""

from contextlib import AbstractContextManager

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import ListedColormap, to_hex

SINK, DRAIN, PEAK, OTHER = "#0072B2", "#D55E00", "#009E73", "#777777"
TRIGGER, BACKCOPY, BIGRAM = "#CC79A7", "#CC79A7", "#E69F00"
LAYERS = ("#005C43", PEAK, "#7DD3B8")  # of the peak after the first, second and third layer
LARGEST = "#56B4E9"  # of the largest other token
SEEDS = ("#000000", "#7A5BC7", "#7A8B00", "#B0305C", "#777777")  # one after the other: no roles

MAP = "Blues"  # of attention and other shares: darker is more
ON_MAP = "#010101"  # of letters on its middle, which is light on a light page and on a dark one
# Of dots by layer. Its ends are left out: they vanish on a light page, or are alike on a dark one.
BY_LAYER = ListedColormap(plt.get_cmap("viridis_r")(np.linspace(0.06, 0.85, 256)))
DIFFERENCES = "RdBu"  # of what is more, in blue, and less, in red

_STYLE = "sinkbook.figures.sinkbook"


def layer_colours(count: int) -> list[str]:
    """Colours of layers from the first, which is the lightest, to the last; none is a role's."""
    shades = plt.get_cmap("viridis_r")((np.arange(count) + 1) / (count + 0.5))
    return [to_hex(shade) for shade in shades]


def on_map(share: float) -> str:
    """The colour of letters on the cell of a map from 0 to 1; at its ends it turns in the dark."""
    return ON_MAP if 0.43 < share < 0.72 else "black" if share < 0.5 else "white"


def use() -> None:
    """Draw all figures from now on in the style of the book."""
    plt.style.use(_STYLE)


def applied() -> AbstractContextManager:
    """The style of the book for what the body draws and saves."""
    return plt.style.context(_STYLE)
