"""Independent work on all CPU cores: one process a core, each computing with one thread."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from typing import TypeVar

import torch

from sinkbook.progress import progress

Item = TypeVar("Item")
Made = TypeVar("Made")


def in_processes(
    work: Callable[[Item], Made], items: Sequence[Item], *, label: str, preload: str
) -> list[Made]:
    """What `work` makes of every item, in as many processes as there are cores; shows progress.

    `preload` names the module that defines `work`. What it raises is raised here.
    """
    # Not forked from here: a process that has used torch's threads can hang in its fork. The
    # server imports torch once, for this call and for later ones.
    context = get_context("forkserver")
    context.set_forkserver_preload([preload])
    settings = {name: value for name, value in os.environ.items() if name.startswith("SINKBOOK_")}
    workers = min(len(items), os.cpu_count() or 1)
    pool = ProcessPoolExecutor(workers, context, initializer=_set_up, initargs=(settings,))
    with pool, progress(label, len(items)) as show:
        futures = [pool.submit(work, item) for item in items]
        for done, future in enumerate(as_completed(futures), start=1):
            future.result()
            show(done)
    return [future.result() for future in futures]


def _set_up(settings: dict[str, str]) -> None:
    # The caller shows the progress of all.
    os.environ.update(settings | {"SINKBOOK_PROGRESS": "0"})
    torch.set_num_threads(1)
