"""The one exception that sinkbook raises for what a user can put right."""


class SinkbookError(Exception):
    """An expected failure: its message says what was wrong, the value, and what to do next.

    The command line prints the message after `sinkbook: ` and exits with status 1.
    """
