"""What `sinkbook probe` and `compare` say: tables, pages that open offline, explorers of heads."""

import lazy_loader

# Imported when it is first used: who draws explorers does not depend on what a report draws.
__getattr__, __dir__, __all__ = lazy_loader.attach(__name__, submod_attrs={"report": ["probe"]})
