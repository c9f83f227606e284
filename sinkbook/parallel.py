"""Independent work, on all CPU cores or on many machines.

Here: one process a core, each computing with one thread. Elsewhere: the executor of a Dask cluster.
Either way a failure is that of one item, whatever raised it: the others go on to their end, and
then all that failed are named in one error.
"""

import os
import pickle
import signal
import textwrap
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import BrokenExecutor, Executor, Future, as_completed
from contextlib import contextmanager
from functools import partial
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import TypeVar

from sinkbook.errors import SinkbookError
from sinkbook.files import NOTICES, reason_of
from sinkbook.progress import progress

Item = TypeVar("Item")
Made = TypeVar("Made")

KILLED = "as processes are when the memory is full: make room, or work on fewer at once"
SECONDS_TO_END = 5  # that a process is given between being told to end and being killed


def in_processes(
    work: Callable[[Item], Made],
    items: Sequence[Item],
    *,
    label: str,
    most: int | None = None,
) -> list[Made]:
    """What `work` makes of every item, in as many processes as there are cores; shows progress.

    There are at most `most` processes. They end with this one, too, however that ends; after an
    interruption what is waiting never begins, and what is running is ended.
    Raises `SinkbookError` when all others are done, with every item whose work raised an error, or
    whose process died, and why; the first error is its cause.
    """
    processes = _Processes(work, items)
    made, failures = processes.made, processes.failures
    with progress(label, len(items)) as show:
        try:
            for _ in range(min(len(items), os.cpu_count() or 1, most or len(items))):
                processes.begin()
            while processes.working:
                for here in wait(list(processes.working)):
                    processes.go_on(here)
                    show(len(made) + len(failures))
        finally:
            _end(processes.workers)
    if failures:
        raise _failed(label, len(items), [(items[p], failures[p]) for p in sorted(failures)])
    return [made[place] for place in range(len(items))]


class _Processes:
    """Processes at work, which item each works on, and what became of the others."""

    def __init__(self, work: Callable[[Item], Made], items: Sequence[Item]):
        # Not forked from here: a process that has used torch's threads can hang in its fork. The
        # server imports torch once, for this call and for later ones, and what torch imports when
        # the first optimizer is made, which takes as long.
        self._context = get_context("forkserver")
        self._context.set_forkserver_preload([_function(work).__module__, "torch._dynamo"])
        self._work, self._items = work, items
        self._waiting = iter(enumerate(items))
        self.workers: dict[Connection, BaseProcess] = {}
        self.working: dict[Connection, int] = {}
        self.made: dict[int, Made] = {}
        self.failures: dict[int, Exception] = {}

    def begin(self) -> None:
        """Start one more process, on the next item that waits."""
        here, process = _start(self._context, self._work)
        self.workers[here] = process
        self._hand_out(here)

    def go_on(self, here: Connection) -> None:
        """Take what a process has made, and give it, or its successor, the next item."""
        place = self.working.pop(here)
        try:
            self.made[place] = _result(here, self.workers[here])
        except Exception as error:
            self._fail(place, error)
            if isinstance(error, _DiedError):
                _end({here: self.workers.pop(here)})
                if len(self.made) + len(self.failures) + len(self.working) < len(self._items):
                    self.begin()
                return
        self._hand_out(here)

    def _hand_out(self, here: Connection) -> None:
        for place, item in self._waiting:
            try:
                here.send(item)
            except Exception as error:  # the item cannot be pickled, or the process is gone
                self._fail(place, error)
            else:
                self.working[here] = place
                return

    def _fail(self, place: int, error: Exception) -> None:
        self.failures[place] = error
        _tell(self._items[place], error)


class _DiedError(SinkbookError):
    """A process is no more; another one has to take its place."""


def _named(item: object) -> str:
    return textwrap.shorten(repr(item), 400)


def _tell(item: object, error: BaseException) -> None:
    """Say at once what will be raised at the end, which may be long after."""
    NOTICES.warning("%s failed, the others go on: %s", _named(item), in_words(error))


def in_words(error: BaseException) -> str:
    """An error as it stands in a list of failures: without its class, if it is meant for users."""
    said = _said_by(error)
    if isinstance(error, SinkbookError):
        return said
    words = f"{type(error).__name__}: {said}" if said else type(error).__name__
    if isinstance(error, BrokenExecutor) or type(error).__name__ == "KilledWorker":
        words += f" ({KILLED})"
    return words


def _said_by(error: BaseException) -> str:
    try:
        return str(error)
    except Exception:  # whatever its class does when it is asked
        return ""


def _failed(label: str, count: int, failures: list[tuple[object, Exception]]) -> SinkbookError:
    return all_failures(
        f"{label}: {len(failures)} of {count} failed. The others are done; what they keep in the "
        "store is kept, and the same call goes on with the rest.",
        {_named(item): error for item, error in failures},
    )


def all_failures(happened: str, failures: dict[str, BaseException]) -> SinkbookError:
    """One error for all items of some work that failed, by their names; the first is its cause."""
    told = "".join(f"\n  {name}: {in_words(error)}" for name, error in failures.items())
    error = SinkbookError(f"{happened}{told}")
    error.__cause__ = next(iter(failures.values()))
    return error


def _function(work: Callable) -> Callable:
    while isinstance(work, partial):
        work = work.func
    return work


def _start(context, work: Callable) -> tuple[Connection, BaseProcess]:
    here, there = context.Pipe()
    settings = {name: value for name, value in os.environ.items() if name.startswith("SINKBOOK_")}
    process = context.Process(target=_work, args=(there, work, settings))
    process.start()
    there.close()  # so that the pipe ends with the process
    return here, process


def _result(here: Connection, process: BaseProcess) -> Made:
    try:
        made, error = here.recv()
    except (EOFError, ConnectionError) as ended:
        process.join(SECONDS_TO_END)
        killed = process.exitcode == -signal.SIGKILL
        why = f"killed: {KILLED}" if killed else f"exit status {process.exitcode}"
        raise _DiedError(f"its process ended before it was done ({why}).") from ended
    if error is not None:
        raise error
    return made


def _end(workers: dict[Connection, BaseProcess]) -> None:
    """End all processes, and wait until they have."""
    for here, process in workers.items():
        here.close()
        process.terminate()
    for process in workers.values():
        process.join(SECONDS_TO_END)
        if process.is_alive():
            process.kill()
            process.join()


def _work(there: Connection, work: Callable, settings: dict[str, str]) -> None:
    """What a process does: one item after the other, until there is no more or it is told to end.

    Its files are whole at any time, so it may be ended at any.
    """
    import torch  # here, because the command line asks for a cluster without it

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all; the caller ends this one
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # The caller shows the progress of all.
    os.environ.update(settings | {"SINKBOOK_PROGRESS": "0"})
    torch.set_num_threads(1)
    while True:
        try:
            item = there.recv()
        except (EOFError, ConnectionError):
            return
        try:
            made, error = work(item), None
        except Exception as raised:
            made, error = None, _sendable(raised)
        try:
            there.send((made, error))
        except Exception as raised:  # what was made cannot be pickled
            there.send((None, _sendable(raised)))


def _end_with_parent() -> None:
    wait([parent_process().sentinel])
    os._exit(1)


def _sendable(error: Exception) -> Exception:
    """The error with the lines that raised it; in words, if it cannot be sent as it is."""
    lines = traceback.format_exc()
    try:
        error = pickle.loads(pickle.dumps(error))  # nosec B301: our own
    except Exception:  # whatever its class does when it is made again
        error = RuntimeError(_said_by(error))
    error.add_note(f"In another process:\n{lines}")
    return error


def on_executor(
    executor: Executor,
    work: Callable[..., Made],
    calls: dict[Item, tuple],
    *,
    label: str,
    stop: tuple[type[Exception], ...] = (),
    failures: dict[Item, Exception] | None = None,
) -> Iterator[tuple[Item, Made]]:
    """Items and what `work` makes of the arguments of each, as they come; shows progress.

    Whatever a call raises, or the executor for it, is a failure of that item. They are put into
    `failures`, if it is given; else `SinkbookError` is raised when all others are done, with every
    item that failed and why. Errors of the classes in `stop` are raised at once. After one of them,
    or an interruption, no call begins that has not begun.
    """
    failed: dict[Item, Exception] = {} if failures is None else failures
    futures: dict[Future, Item] = {}
    with progress(label, len(calls)) as show:
        try:
            for item, arguments in calls.items():
                try:
                    future = executor.submit(work, *arguments)
                except Exception as error:  # its workers have died, or an argument is not sent
                    failed[item] = error
                    continue
                futures[future] = item
                if future.done() and not future.cancelled():
                    if isinstance(future.exception(), stop):
                        break
                    show(sum(future.done() for future in futures))
            for future in as_completed(futures):
                try:
                    made = future.result()
                except stop:
                    raise
                except Exception as error:
                    failed[futures[future]] = error
                    _tell(futures[future], error)
                else:
                    yield futures[future], made
                show(sum(future.done() for future in futures))
        finally:
            for future in futures:
                future.cancel()
    if failed and failures is None:
        raise _failed(label, len(calls), list(failed.items()))


# The environment variable that names the cluster's scheduler; `sinkbook run --dask` sets it.
ADDRESS = "SINKBOOK_DASK"


@contextmanager
def cluster(address: str, *, patience: str = "10s") -> Iterator[Executor]:
    """The executor of the Dask cluster at an address, for the body.

    Who can reach a scheduler can have its workers run anything: it takes what it is sent for
    Python's pickles. It listens on every interface, unless it is told to keep to this machine:

        dask scheduler --host 127.0.0.1

    Across machines let it ask for certificates, as the workers and this process then do, too, by
    `DASK_DISTRIBUTED__COMM__TLS__CLIENT__CERT` and its like:

        dask scheduler --protocol tls --tls-ca-file ca.pem --tls-cert cert.pem --tls-key key.pem
        dask worker tls://HOST:8786 --tls-ca-file ca.pem --tls-cert cert.pem --tls-key key.pem

    Raises `SinkbookError` if Dask is not installed or nothing answers at the address.
    """
    try:
        from distributed import Client
    except ImportError as error:
        raise SinkbookError(
            "Dask is not installed here. Install it on every machine: pip install 'sinkbook[dask]'"
        ) from error
    try:
        client = Client(address, timeout=patience)
    except Exception as error:  # each kind of address has its own, and certificates have others
        raise SinkbookError(
            f"no Dask scheduler answers at {address!r} ({reason_of(error)}). Start one with: dask "
            "scheduler, for this machine alone or protected by TLS, since who reaches it can run "
            "code; and on every machine: dask worker ADDRESS"
        ) from error
    with client:
        yield client.get_executor(pure=False)


@contextmanager
def asked_for() -> Iterator[Executor | None]:
    """The executor of the cluster that `SINKBOOK_DASK` names; None where it names none."""
    address = os.environ.get(ADDRESS)
    if not address:
        yield None
        return
    with cluster(address) as executor:
        yield executor
