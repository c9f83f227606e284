"""Mitigations of extreme tokens, one league table of them, and what sinks cost and buy."""
