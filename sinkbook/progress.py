"""One progress bar for long work: description, rate and time left."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)


class _Rate(ProgressColumn):
    """Finished units per second."""

    def render(self, task: Task) -> str:
        return f"{task.speed:.1f}/s" if task.speed else "-/s"


@contextmanager
def progress(description: str, total: int, done: int = 0) -> Iterator[Callable[[int], None]]:
    """Show a bar while the body runs; the body calls what it is given with the units done so far.

    Shown on a terminal and in a live notebook, gone when finished; nothing is printed elsewhere or
    with `SINKBOOK_PROGRESS=0`, which the executed pages are run with.
    """
    console = Console(file=sys.stderr)
    shown = console.is_terminal or console.is_jupyter
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _Rate())
    bar = Progress(
        *columns,
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not shown or os.environ.get("SINKBOOK_PROGRESS") == "0",
    )
    with bar:
        task = bar.add_task(description, total=total, completed=done)
        yield lambda completed: bar.update(task, completed=completed)
