"""What a page does in the reader's browser: it has no kernel, and asks no other machine."""
