"""What `sinkbook probe` and `compare` say: tables, pages that open offline, explorers of heads."""
