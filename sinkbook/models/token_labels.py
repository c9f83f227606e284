"""How a token is written on an axis, in a table, in a page: one way for all."""

BLANKS = str.maketrans({" ": "␣", "\n": "⏎", "\t": "→"})


def token_label(text: str, *, longest: int | None = None) -> str:
    """The text of a token with its blanks made visible, cut to `longest` characters.

    Characters that cannot be printed are written as escapes.

    >>> token_label(" a\\n"), token_label("\\x00"), token_label("unbelievably", longest=5)
    ('␣a⏎', '\\\\x00', 'unbe…')
    """
    shown = text.translate(BLANKS)
    shown = "".join(c if c.isprintable() else repr(c)[1:-1] for c in shown)
    return shown if longest is None or len(shown) <= longest else shown[: longest - 1] + "…"
