"""What `sinkbook probe` and `compare` say: tables, pages that open offline, explorers of heads."""

from sinkbook.report.report import probe

__all__ = ["probe"]
