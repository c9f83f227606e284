"""What the command line says, and where: to streams that are closed, full, or know few characters.

Notices, which anything below may log, are printed as `sinkbook: ...` on stderr.
"""

import errno
import logging
import os
import re
import signal
import sys
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from sinkbook.errors import SinkbookError
from sinkbook.files import NO_ROOM, NOTICES, printable, reason_of

# What the system answers where stdout takes no more; such an answer names no file.
REFUSED = {*NO_ROOM, errno.EIO, errno.EPIPE, errno.ENXIO}


def words() -> list[str]:
    """What the command was given.

    Raises `SinkbookError` where there should be something and is nothing, as in the place of a
    shell's variable that is not set: a path without a letter is the folder that one is in.
    """
    given = sys.argv[1:]
    for number, word in enumerate(given):
        name, equals, value = word.partition("=")
        option = name if word.startswith("--") and equals and not value.strip() else ""
        if not word.strip() or option:
            before = option or next(iter(given[number - 1 : number]), "")
            after = f" after {before}" if before else ""
            raise SinkbookError(
                f"an argument{after} is empty. Write it, or leave it out; if a variable of your "
                "shell stands there, it is not set."
            )
    return given


@contextmanager
def speaking() -> Iterator[None]:
    """Make both streams take whatever is printed, for the body, and a `kill` end it as Ctrl-C does.

    Where stdout takes no more, that is the last thing said, and the exit status is 1. So it is of
    an error that nobody expected: the lines that raised it are kept in a file.
    """
    _open_what_is_closed()
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # else it is another's
            stream.reconfigure(errors="backslashreplace")  # what a terminal cannot show
    notices = logging.StreamHandler()
    notices.setFormatter(_Plain("sinkbook: %(message)s"))
    NOTICES.addHandler(notices)
    terminated = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        try:
            yield
        finally:
            NOTICES.removeHandler(notices)
            signal.signal(signal.SIGTERM, terminated)
            sys.stdout.flush()
    except Exception as error:
        if not isinstance(error, OSError) or error.filename or error.errno not in REFUSED:
            say(_unexpected(error))
            raise SystemExit(1) from None
        with suppress(OSError, ValueError):  # Python, when it ends, has no more to complain of
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if error.errno != errno.EPIPE:  # whoever read it has seen enough
            say(f"cannot write: {error.strerror}. Free some space, or send it to another place.")
        raise SystemExit(1) from None


def say(message: str) -> None:
    """A message on stderr; where that takes nothing, nothing is lost but the message."""
    with suppress(OSError):
        print(f"sinkbook: {printable(message)}", file=sys.stderr, flush=True)


class _Plain(logging.Formatter):
    """Notices, whatever names are in them."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


def _unexpected(error: Exception) -> str:
    if isinstance(error, MemoryError):
        return "the memory is full. Ask for fewer or shorter texts, or for a smaller model."
    where = "nowhere, since no file could be written"
    with suppress(OSError):
        number, where = tempfile.mkstemp(prefix="sinkbook-", suffix=".txt")
        with os.fdopen(number, "w", encoding="utf-8", errors="replace") as file:
            traceback.print_exception(error, file=file)
    kind = type(error).__name__
    said = reason_of(error).removeprefix(kind).strip()
    return (
        f"{kind}{': ' if said else ''}{said}. This should have been a sentence that says what to "
        f"do: please report it, with the lines that are kept in {where}."
    )


def _open_what_is_closed() -> None:
    """Else the first files that are opened take the numbers of the streams, and what they are sent.

    What is written to a stream that was closed is lost, as whoever closed it meant it to be.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.dup2(os.open(os.devnull, os.O_RDWR), number)
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, "w" if number else "r", closefd=False))


def with_options(message: str, options: dict[str, str]) -> str:
    """A message with options in the place of arguments.

    >>> with_options("Give `length=9`, or `force`.", {"length": "--length", "force": "--force"})
    'Give --length 9, or --force.'
    """

    def option(found: re.Match) -> str:
        name, value = found.groups()
        if not options.get(name, "").startswith("--"):
            return found.group()
        return options[name] if value in (None, "True") else f"{options[name]} {value}"

    return re.sub(r"`(\w+)(?:=(\w+))?`", option, message)
