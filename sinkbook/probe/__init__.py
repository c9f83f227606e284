"""The probe: sinks, value drains and residual peaks of any causal language model, in one pass.

`measure` is a function and the name of the module that defines it: here it is the function.
"""

from sinkbook.probe.measure import DEFAULT, VARIABLES, measure, measure_texts
from sinkbook.probe.metrics import (
    above_null,
    kurtosis_of_dimensions,
    kurtosis_of_text,
    kurtosis_of_tokens,
    massive_activations,
    residual_peak_height,
    residual_peak_ratio,
    sink_rate,
    value_drain_ratio,
)

__all__ = [
    "DEFAULT",
    "VARIABLES",
    "above_null",
    "kurtosis_of_dimensions",
    "kurtosis_of_text",
    "kurtosis_of_tokens",
    "massive_activations",
    "measure",
    "measure_texts",
    "residual_peak_height",
    "residual_peak_ratio",
    "sink_rate",
    "value_drain_ratio",
]
