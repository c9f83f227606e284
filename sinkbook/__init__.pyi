"""The public names and where they come from: for `__init__.py`, editors and type checkers."""

from .errors import SinkbookError
from .llm.checkpoints import measure_checkpoints
from .mitigations.quantization import quantized
from .mitigations.sink_cache import SinkCache
from .models.interventions import replace, zero
from .models.pretrained import load
from .probe.attention_maps import attention_weights
from .probe.measure import measure, measure_texts
from .probe.metrics import residual_peak_ratio, sink_rate, value_drain_ratio
from .probe.training_callback import SinkCallback, sink_metrics

__version__: str

__all__ = [
    "SinkCache",
    "SinkCallback",
    "SinkbookError",
    "__version__",
    "attention_weights",
    "load",
    "measure",
    "measure_checkpoints",
    "measure_texts",
    "quantized",
    "replace",
    "residual_peak_ratio",
    "sink_metrics",
    "sink_rate",
    "value_drain_ratio",
    "zero",
]
