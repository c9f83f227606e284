"""Independent work, on all CPU cores or on many machines.

Here: one process a core, each computing with one thread. Elsewhere: the executor of a Dask cluster.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from multiprocessing import get_context
from typing import TypeVar

from sinkbook.errors import SinkbookError
from sinkbook.progress import progress

Item = TypeVar("Item")
Made = TypeVar("Made")


def in_processes(
    work: Callable[[Item], Made],
    items: Sequence[Item],
    *,
    label: str,
    preload: str,
    most: int | None = None,
) -> list[Made]:
    """What `work` makes of every item, in as many processes as there are cores; shows progress.

    There are at most `most` processes. `preload` names the module that defines `work`. What it
    raises is raised here.
    """
    # Not forked from here: a process that has used torch's threads can hang in its fork. The
    # server imports torch once, for this call and for later ones.
    context = get_context("forkserver")
    context.set_forkserver_preload([preload])
    settings = {name: value for name, value in os.environ.items() if name.startswith("SINKBOOK_")}
    workers = min(len(items), os.cpu_count() or 1, most or len(items))
    pool = ProcessPoolExecutor(workers, context, initializer=_set_up, initargs=(settings,))
    with pool, progress(label, len(items)) as show:
        futures = [pool.submit(work, item) for item in items]
        for done, future in enumerate(as_completed(futures), start=1):
            future.result()
            show(done)
    return [future.result() for future in futures]


def _set_up(settings: dict[str, str]) -> None:
    import torch  # here, because the command line asks for a cluster without it

    # The caller shows the progress of all.
    os.environ.update(settings | {"SINKBOOK_PROGRESS": "0"})
    torch.set_num_threads(1)


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
