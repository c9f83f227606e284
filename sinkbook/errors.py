"""The one exception that sinkbook raises for what a user can put right."""

from operator import index


class SinkbookError(Exception):
    """An expected failure: its message says what was wrong, the value, and what to do next.

    It speaks to whoever calls from Python, and names arguments as `length=9`, in backticks. The
    command line prints it after `sinkbook: `, with `--length 9` instead, and exits with status 1.
    """


def whole_number(name: str, value: object, least: int = 0) -> int:
    """The value of an argument that must be a whole number, `least` or more.

    >>> whole_number("window", 4.0, 1)
    Traceback (most recent call last):
    ...
    sinkbook.errors.SinkbookError: `window=4.0` is no whole number. Give one from 1 on.
    """
    try:
        if isinstance(value, bool):
            raise TypeError
        number = index(value)
    except TypeError:
        raise SinkbookError(
            f"`{name}={value!r}` is no whole number. Give one from {least} on."
        ) from None
    if number < least:
        raise SinkbookError(f"`{name}={value!r}` is too small. Give {least} or more.")
    return number


class NotFiniteError(SinkbookError):
    """A number that counts is NaN or infinite, so that there is nothing to be said of the model."""
