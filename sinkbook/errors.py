"""The one exception that sinkbook raises for what a user can put right."""


class SinkbookError(Exception):
    """An expected failure: its message says what was wrong, the value, and what to do next.

    It speaks to whoever calls from Python, and names arguments as `length=9`, in backticks. The
    command line prints it after `sinkbook: `, with `--length 9` instead, and exits with status 1.
    """


class NotFiniteError(SinkbookError):
    """A number that counts is NaN or infinite, so that there is nothing to be said of the model."""
