"""Downloads, pinned by checksum, and the texts made of them: plays, prose, code, numbers."""
