"""The one exception that sinkbook raises for what a user can put right."""


class SinkbookError(Exception):
    """An expected failure: its message says what was wrong, the value, and what to do next.

    It speaks to whoever calls from Python, and names arguments as `length=9`, in backticks. The
    command line prints it after `sinkbook: `, with `--length 9` instead, and exits with status 1.
    """
