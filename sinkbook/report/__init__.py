"""What `sinkbook probe` and `compare` say: tables and pages that open offline."""

import lazy_loader

# Imported when it is first used, with all that a report draws.
__getattr__, __dir__, __all__ = lazy_loader.attach(__name__, submod_attrs={"report": ["probe"]})
