"""What the command line says, and where: to streams that are closed, full, or know few characters.

Notices, which anything below may log, are printed as `sinkbook: ...` on stderr.
"""

import errno
import logging
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from sinkbook.files import NO_ROOM, NOTICES

# What the system answers where stdout takes no more; such an answer names no file.
REFUSED = {*NO_ROOM, errno.EIO, errno.EPIPE, errno.ENXIO}


@contextmanager
def speaking() -> Iterator[None]:
    """Make both streams take whatever is printed, for the body, and a `kill` end it as Ctrl-C does.

    Where stdout takes no more, that is the last thing said, and the exit status is 1.
    """
    _open_what_is_closed()
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # else it is another's
            stream.reconfigure(errors="backslashreplace")  # what a terminal cannot show
    notices = logging.StreamHandler()
    notices.setFormatter(logging.Formatter("sinkbook: %(message)s"))
    NOTICES.addHandler(notices)
    terminated = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        try:
            yield
        finally:
            NOTICES.removeHandler(notices)
            signal.signal(signal.SIGTERM, terminated)
            sys.stdout.flush()
    except OSError as error:
        if error.filename is not None or error.errno not in REFUSED:
            raise
        with suppress(OSError, ValueError):  # Python, when it ends, has no more to complain of
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if error.errno != errno.EPIPE:  # whoever read it has seen enough
            say(f"cannot write: {error.strerror}. Free some space, or send it to another place.")
        raise SystemExit(1) from None


def say(message: str) -> None:
    """A message on stderr; where that takes nothing, nothing is lost but the message."""
    with suppress(OSError):
        print(f"sinkbook: {message}", file=sys.stderr, flush=True)


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
