"""Commands that end with the process that started them, however that ends, and take theirs along.

    with lifeline(folder) as tied:
        subprocess.run(tied(["npm", "ci"]))

The process holds a pipe open that has a name in the folder. Each command leads a group of its own,
with a watcher in it that reads from the pipe: when the pipe ends, or the command does, it kills the
group. So nothing has to be inherited, and a command may be started by another child, as a kernel is
by papermill. On Linux a death signal does the same where a watcher was killed.

This file is also run as a script, which becomes the command: it imports next to nothing.
"""

import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

SET_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG in Linux's prctl.h
SECONDS_BETWEEN_LOOKS = 0.2  # of a watcher at its command


@contextmanager
def lifeline(folder: Path) -> Iterator[Callable[[Sequence[str]], list[str]]]:
    """What turns a command into one that ends with this process, and with the body at the latest.

    Raises `OSError` where the folder cannot hold a named pipe.
    """
    pipe = folder / f".alive-{os.getpid()}-{os.urandom(4).hex()}"
    os.mkfifo(pipe, 0o600)
    try:
        # To write is refused while nobody reads.
        reading = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
        writing = os.open(pipe, os.O_WRONLY)
        os.close(reading)
        try:
            yield lambda command: [sys.executable, "-I", "-S", __file__, str(pipe), *command]
        finally:
            os.close(writing)
    finally:
        pipe.unlink(missing_ok=True)


def _become(pipe: str, command: list[str]) -> None:
    """Leave a watcher behind and become the command."""
    if os.getpgid(0) != os.getpid():
        os.setsid()
    here = os.getpid()
    if os.fork() == 0:
        _watch(pipe, here)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # which background jobs would inherit as ignored
    _ask_for_death_signal()
    os.execvp(command[0], command)


def _watch(pipe: str, command: int) -> None:
    """Wait for the end of the pipe or of the command, then kill their group and this watcher."""
    import select

    for asked in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # which may ask the command alone
        signal.signal(asked, signal.SIG_IGN)
    nothing = os.open(os.devnull, os.O_RDWR)
    for number in range(3):  # whoever reads what the command says waits until all have closed it
        os.dup2(nothing, number)
    with suppress(OSError):  # no such pipe any more
        lifeline = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
        ended = not _is_held(lifeline)
        while not ended and os.getppid() == command:
            ended, _, _ = select.select([lifeline], [], [], SECONDS_BETWEEN_LOOKS)
    os.killpg(0, signal.SIGKILL)


def _is_held(lifeline: int) -> bool:
    """Whether there is still a process that may write."""
    try:
        return os.read(lifeline, 1) != b""
    except BlockingIOError:
        return True


def _ask_for_death_signal() -> None:
    if sys.platform == "linux":
        import ctypes

        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(SET_DEATH_SIGNAL, signal.SIGKILL)


if __name__ == "__main__":
    _become(sys.argv[1], sys.argv[2:])
