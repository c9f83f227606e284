"""One function per figure type: it takes data and an axes, draws, and returns the axes.

The basic ones stand here too; those of one subject lie in the modules.
"""

from sinkbook.figures.basic import (
    attention_map,
    axes_or_new,
    by_layer,
    dot_rows,
    grouped_bars,
    head_differences,
    head_map,
    head_scatter,
    key_bars,
    layer_maps,
    map_beside_keys,
    paired,
    share_map,
    token_bars,
    token_strip,
    transition_map,
)
from sinkbook.figures.style import (
    BACKCOPY,
    BIGRAM,
    DRAIN,
    LAYERS,
    OTHER,
    PEAK,
    SINK,
    TRIGGER,
    layer_colours,
)

__all__ = [
    "BACKCOPY",
    "BIGRAM",
    "DRAIN",
    "LAYERS",
    "OTHER",
    "PEAK",
    "SINK",
    "TRIGGER",
    "attention_map",
    "axes_or_new",
    "by_layer",
    "dot_rows",
    "grouped_bars",
    "head_differences",
    "head_map",
    "head_scatter",
    "key_bars",
    "layer_colours",
    "layer_maps",
    "map_beside_keys",
    "paired",
    "share_map",
    "token_bars",
    "token_strip",
    "transition_map",
]
