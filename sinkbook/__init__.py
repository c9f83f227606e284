"""sinkbook: attention sinks, value-state drains and residual-state peaks, measured and explained.

Three lines measure any causal language model:

    from sinkbook import measure
    from sinkbook.models import load
    result = measure(load("smollm2-135m").model, input_ids)

The chapters of the book live in `book/`; `sinkbook --help` lists what the command line does.
"""

__all__ = ["measure"]


def __getattr__(name: str) -> object:
    """Import the probe, and torch with it, only when it is asked for."""
    if name == "measure":
        from sinkbook.probe.measure import measure

        return measure
    raise AttributeError(f"module 'sinkbook' has no attribute {name!r}")
