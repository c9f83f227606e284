"""sinkbook: attention sinks, value-state drains and residual-state peaks, measured and explained.

Three lines measure any causal language model:

    from sinkbook import load, measure_texts, sink_rate
    result = measure_texts(load("smollm2-135m"), ["Summer is warm. Winter is cold."])
    sink_rate(result)

The names that stand here are imported, and torch with them, when they are first used. The chapters
of the book live in `book/`; `sinkbook --help` lists what the command line does.
"""

import lazy_loader

__version__ = "0.1.0"

# The names and where they come from are listed in __init__.pyi, which editors read too.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
__all__ += ["__version__"]
