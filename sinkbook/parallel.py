"""Independent work, on all CPU cores or on many machines.

Here: one process a core, each computing with one thread. Elsewhere: the executor of a Dask cluster.
"""

import os
import pickle
import signal
import textwrap
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, as_completed
from contextlib import contextmanager
from functools import partial
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import TypeVar

from sinkbook.errors import SinkbookError
from sinkbook.progress import progress

Item = TypeVar("Item")
Made = TypeVar("Made")

SECONDS_TO_END = 5  # that a process is given between being told to end and being killed


def in_processes(
    work: Callable[[Item], Made],
    items: Sequence[Item],
    *,
    label: str,
    most: int | None = None,
) -> list[Made]:
    """What `work` makes of every item, in as many processes as there are cores; shows progress.

    There are at most `most` processes. The first error that `work` raises is raised here at once,
    and so is an interruption: what is waiting never begins, what is running is ended. The processes
    end with this one, too, however that ends.
    Raises `SinkbookError` for a process that died, with the item that it worked on.
    """
    # Not forked from here: a process that has used torch's threads can hang in its fork. The
    # server imports torch once, for this call and for later ones.
    context = get_context("forkserver")
    context.set_forkserver_preload([_function(work).__module__])
    made: dict[int, Made] = {}
    waiting = iter(enumerate(items))
    workers: dict[Connection, BaseProcess] = {}
    working: dict[Connection, int] = {}
    with progress(label, len(items)) as show:
        try:
            for _ in range(min(len(items), os.cpu_count() or 1, most or len(items))):
                here, process = _start(context, work)
                workers[here] = process
                working[here] = _hand_out(here, waiting)
            while working:
                for here in wait(list(working)):
                    place = working.pop(here)
                    made[place] = _result(here, workers[here], items[place])
                    show(len(made))
                    if (next_one := _hand_out(here, waiting)) is not None:
                        working[here] = next_one
        finally:
            _end(workers)
    return [made[place] for place in range(len(items))]


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


def _hand_out(to: Connection, waiting: Iterator[tuple[int, Item]]) -> int | None:
    """Give a process the next item that waits; returns the item's place, None if none waits."""
    place, item = next(waiting, (None, None))
    if place is not None:
        to.send(item)
    return place


def _result(here: Connection, process: BaseProcess, item: Item) -> Made:
    try:
        made, error = here.recv()
    except (EOFError, ConnectionError) as ended:
        process.join(SECONDS_TO_END)
        why = f"exit status {process.exitcode}"
        if process.exitcode == -signal.SIGKILL:
            why = "killed, as processes are when the memory is full: make room, or work on fewer"
        raise SinkbookError(
            f"the process that worked on {textwrap.shorten(repr(item), 400)} ended before it was "
            f"done ({why}). What had finished is kept; the same call goes on with the rest."
        ) from ended
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
        there.send((made, error))


def _end_with_parent() -> None:
    wait([parent_process().sentinel])
    os._exit(1)


def _sendable(error: Exception) -> Exception:
    """The error with the lines that raised it; in words, if it cannot be sent as it is."""
    lines = traceback.format_exc()
    try:
        error = pickle.loads(pickle.dumps(error))
    except Exception:  # whatever its class does when it is made again
        error = RuntimeError(str(error))
    error.add_note(f"In another process:\n{lines}")
    return error


def on_executor(
    executor: Executor,
    work: Callable[..., Made],
    calls: dict[Item, tuple],
    *,
    label: str,
) -> Iterator[tuple[Item, Made]]:
    """Items and what `work` makes of the arguments of each, as they come; shows progress.

    After the first error, or an interruption, no call begins that has not begun.
    """
    futures = {}
    with progress(label, len(calls)) as show:
        try:
            for item, arguments in calls.items():
                futures[executor.submit(work, *arguments)] = item
            for done, future in enumerate(as_completed(futures), start=1):
                yield futures[future], future.result()
                show(done)
        finally:
            for future in futures:
                future.cancel()


# The environment variable that names the cluster's scheduler; `sinkbook run --dask` sets it.
ADDRESS = "SINKBOOK_DASK"


@contextmanager
def cluster(address: str, *, patience: str = "10s") -> Iterator[Executor]:
    """The executor of the Dask cluster at an address, for the body.

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
    except (OSError, ValueError) as error:
        raise SinkbookError(
            f"no Dask scheduler answers at {address!r} ({error}). Start one with: dask scheduler, "
            "and on every machine: dask worker ADDRESS"
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
