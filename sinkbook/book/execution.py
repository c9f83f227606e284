"""Executing notebooks through papermill: one process each, several at once, stopped by an error.

A copy is executed under another name and takes its place only once every cell has run, without an
error and without a word on stderr.
"""

import hashlib
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import gettempdir

from sinkbook.book.notebooks import (
    LOG,
    Execution,
    Source,
    check_parameters,
    first_complaint,
    load_ipython_extension,
    place_of,
    read_notebook,
    sealed,
    sources,
    what_differs,
)
from sinkbook.children import lifeline
from sinkbook.errors import SinkbookError
from sinkbook.files import NOTICES, write_json
from sinkbook.parallel import in_words

# Chapters run side by side, so each computes on one core, unless the environment says otherwise;
# and a progress bar has no place on a page. glibc keeps the memory that tensors free: asking for
# it anew at every step costs a tenth of the time, and more where processes compete.
_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MALLOC_MMAP_THRESHOLD_": "268435456",
    "MALLOC_TRIM_THRESHOLD_": "536870912",
    "TOKENIZERS_PARALLELISM": "false",
    "SINKBOOK_PROGRESS": "0",
}


# The name of the kernel that is the Python at work. Others may have one named "python3" anywhere
# on Jupyter's path, with other packages than those whose versions a copy is kept under.
KERNEL = "sinkbook-this-python"
# The most bytes that the path of a folder may have in which multiprocessing puts its sockets.
LONGEST = 70


@contextmanager
def _workshop(scratch: Path) -> Iterator["_Workshop"]:
    """A fresh folder with all that chapters leave behind as they run, for the body.

    Their processes end with the body, and with this process if that is killed.
    """
    with lifeline(scratch) as tied, _temporary_files(scratch.parent) as elsewhere:
        spec = {
            "argv": tied([sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"])
            + [f"--IPKernelApp.extra_extensions={load_ipython_extension.__module__}"],
            "display_name": "Python 3",
            "language": "python",
        }
        path = scratch / "jupyter" / "kernels" / KERNEL / "kernel.json"
        write_json(path, spec, otherwise="name another build folder with `output`")
        places = [str(scratch / "jupyter"), os.environ.get("JUPYTER_PATH")]
        environment = {
            "JUPYTER_PATH": os.pathsep.join(filter(None, places)),
            "JUPYTER_RUNTIME_DIR": str(scratch / "runtime"),
            "IPYTHONDIR": str(scratch / "ipython"),  # a user's kernels may do things at their start
        }
        yield _Workshop(scratch, tied, environment | elsewhere)


def temporary_folder(output: Path) -> Path:
    """Where chapters have their temporary files, for a build folder.

    One process at a time writes to that, so what is there before a run was left by a kill.
    """
    return Path(gettempdir()) / f"sinkbook-{hashlib.sha256(os.fsencode(output)).hexdigest()[:8]}"


@contextmanager
def _temporary_files(output: Path) -> Iterator[dict[str, str]]:
    """The environment that names a folder for temporary files, for the body; {} if there is none.

    Sockets are among them, whose paths have to be short.
    """
    folder = temporary_folder(output)
    try:
        if len(os.fsencode(folder)) > LONGEST:
            raise OSError
        folder.mkdir(mode=0o700)
    except OSError:  # the user's own place will do, though a kill may leave something there
        yield {}
        return
    try:
        yield {"TMPDIR": str(folder)}
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@dataclass(frozen=True)
class _Workshop:
    """Where chapters are run, what ties a command to this process, and their environment."""

    folder: Path
    tied: Callable[[Sequence[str]], list[str]]
    environment: dict[str, str]


def _folders() -> dict[str, str]:
    """The cache and the store as they lie from here: a chapter runs in the book's own folder."""
    chosen = {name: os.environ.get(name) for name in ("SINKBOOK_CACHE", "SINKBOOK_RUNS")}
    return {name: str(Path(at).expanduser().absolute()) for name, at in chosen.items() if at}


def _unformatted(path: Path) -> str:
    """A path that is itself again when papermill has put parameters where it has braces."""
    return str(path).replace("{", "{{").replace("}", "}}")


class _Run:
    """One chapter being executed: papermill in a process of its own."""

    def __init__(
        self,
        source: Source,
        folder: Path,
        logs: Path,
        parameters: Mapping[str, object],
        limit: float,
        workshop: _Workshop,
    ):
        self.source, self.parameters = source, parameters
        self.limit = limit  # in seconds
        self.overdue = False
        self.target = folder / source.path.name
        self.copy = logs / source.path.name  # of a run that failed
        self.log = logs / f"{source.name}.log"
        self.draft = workshop.folder / source.path.name
        snapshot = workshop.folder / f"{source.name}.source.ipynb"
        snapshot.write_bytes(source.content)
        paths = [_unformatted(snapshot), _unformatted(self.draft)]
        command = [sys.executable, "-m", "papermill", *paths]
        command += ["--no-progress-bar", "--cwd", str(source.path.parent)]
        command += ["--kernel", KERNEL, "--language", "python"]  # whatever editor saved it last
        for name, value in parameters.items():
            command += ["-p", name, str(value)]
        self.copy.unlink(missing_ok=True)
        self.started = time.monotonic()
        ours = {**_folders(), **workshop.environment, LOG: str(self.log)}
        with self.log.open("w", encoding="utf-8") as log:
            self.process = subprocess.Popen(
                workshop.tied(command),
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                env={**_ENVIRONMENT, **os.environ, **ours},
            )

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    def ended(self) -> bool:
        """Whether the process has ended, if need be because it is past its limit."""
        if self.process.poll() is None and self.seconds > self.limit:
            self.overdue = True
            self.stop()
        return self.process.poll() is not None

    def cells_done(self) -> int:
        """How many code cells have run so far; papermill writes the copy after each."""
        try:
            cells = read_notebook(self.draft)["cells"]
        except SinkbookError:  # not there yet, or being written
            return 0
        return sum(cell.get("execution_count") is not None for cell in cells)

    def finish(self) -> Execution:
        """Move the executed copy into place; raise `SinkbookError` if the run failed."""
        seconds, name = self.seconds, self.source.name
        notebook = read_notebook(self.draft) if self.draft.exists() else {"cells": []}
        if failure := self._failure(notebook):
            told = ""
            if self.draft.exists():
                shutil.move(self.draft, self.copy)
                told = f"\nThe copy with its outputs so far: {self.copy}"
            raise SinkbookError(f"{failure}{told}\nSee {self.log}.")
        kept_under = self.source.hash
        if edited := self.source.edited():
            kept_under = None
            NOTICES.warning(
                "%s was run while %s was edited: the copy is used now, and made again next time.",
                name,
                ", ".join(edited),
            )
        self.draft.write_text(sealed(notebook, kept_under, seconds), encoding="utf-8")
        self.target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(self.draft, self.target)
        return Execution(self.target, seconds)

    def _failure(self, notebook: dict) -> str | None:
        """Why the executed copy is not to be kept, in words."""
        name = self.source.name
        if self.overdue:
            return f"{name} was stopped: it had not ended after {self.limit:.0f} seconds."
        if complaint := first_complaint(notebook):
            return f"{name} stopped in {complaint}"
        if self.process.returncode:
            return self._died(notebook) or f"{name} could not be run: {self._last_words()}"
        if differs := what_differs(notebook, self.source.notebook, self.parameters):
            return f"{name} was not run as it was asked to be: {differs}."
        return None

    def _last_words(self) -> str:
        """What papermill's log ends with, but for what underlines a heading."""
        words = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        said = [line.strip() for line in words if re.search(r"\w", line)]
        return said[-1] if said else f"papermill ended with status {self.process.returncode}"

    def _died(self, notebook: dict) -> str | None:
        """Where the kernel, or papermill itself, was ended from outside; None if neither was."""
        words = self.log.read_text(encoding="utf-8", errors="replace")
        kernel = "DeadKernelError" in words
        if not kernel and self.process.returncode != -signal.SIGKILL:
            return None
        unfinished = (
            (number, cell)
            for number, cell in enumerate(sources(notebook), start=1)
            if "shell.execute_reply" not in cell["metadata"].get("execution", {})
        )
        number, cell = next(unfinished, (None, None))
        where = "before its first cell" if cell is None else f"in {place_of(number, cell)}"
        return (
            f"{self.source.name} stopped {where}: its {'kernel' if kernel else 'process'} died. "
            "Mostly that is for lack of memory: close other programs, or run fewer chapters at "
            "once with `jobs`."
        )

    def stop(self) -> None:
        """Interrupt papermill, which shuts its kernel down, and wait for it."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            try:
                self.process.wait(timeout=15)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()


def execute(
    chapters: list[Source],
    *,
    folder: Path,
    scratch: Path,
    logs: Path,
    parameters: Mapping[str, object],
    kept: Mapping[str, Execution],
    last: Collection[str] = (),
    jobs: int = 1,
    after: Callable[[Execution], None] = lambda execution: None,
    failed: Callable[[str, SinkbookError], None] | None = None,
    limit: float = math.inf,
) -> dict[str, Execution]:
    """Execute chapters, `jobs` at a time and those named in `last` at the end; by name.

    `kept` are copies that need not run again; `scratch` is a fresh folder, where the others are
    made. `after` is called with each execution as it ends.
    The first failure stops the others and raises `SinkbookError`, unless there is `failed`, which
    then gets the chapter's name and the error. A chapter that has not ended after `limit` seconds
    has failed. An interruption stops all.
    """
    sound = []
    for source in chapters:
        with told(failed, source.name):
            check_parameters(source.name, source.notebook, list(parameters))
            sound.append(source)
    logs.mkdir(parents=True, exist_ok=True)
    done = dict(kept)
    waiting = [source for source in sound if source.name not in kept]
    running: list[_Run] = []
    with Progress(kept.values()) as progress, _workshop(scratch) as workshop:
        try:
            while waiting or running:
                while waiting and len(running) < jobs and not (running and waiting[0].name in last):
                    source = waiting.pop(0)
                    with told(failed, source.name):
                        running.append(_Run(source, folder, logs, parameters, limit, workshop))
                for run in list(running):
                    if not run.ended():
                        progress.show(run)
                        continue
                    running.remove(run)
                    with told(failed, run.source.name):
                        execution = run.finish()
                        after(execution)
                        done[execution.chapter] = execution
                        progress.finished(execution)
                time.sleep(0.1)
        finally:
            for run in running:
                run.stop()
    return done


@contextmanager
def told(failed: Callable[[str, SinkbookError], None] | None, chapter: str):
    """Tell `failed` of a chapter's error, whatever it is, and go on; without it, raise."""
    try:
        yield
    except Exception as error:
        if failed is None:
            raise
        known = isinstance(error, SinkbookError)
        failed(chapter, error if known else SinkbookError(f"{chapter}: {in_words(error)}"))


class Progress:
    """Chapters as they run: in a terminal a live line each, elsewhere one at the end of each."""

    def __init__(self, kept: Collection[Execution]):
        from rich.console import Console
        from rich.progress import MofNCompleteColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Bars

        self.console = Console(highlight=False, soft_wrap=True)
        self.kept = kept
        self.tasks: dict[str, int] = {}
        self.looked: dict[str, float] = {}
        self.bars = Bars(
            SpinnerColumn(),
            TextColumn("{task.description:24}"),
            TextColumn("cell"),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
        )

    def __enter__(self) -> "Progress":
        for execution in self.kept:
            self.console.print(
                f"{execution.chapter:24} {execution.seconds:5.0f} s, unchanged: from the cache"
            )
        self.bars.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.bars.stop()

    def show(self, run: _Run) -> None:
        """Bring a running chapter's line up to date, at most once a second."""
        name = run.source.name
        if not self.console.is_terminal:
            return
        if name not in self.tasks:
            total = len(sources(run.source.notebook)) + 1  # and the injected one
            self.tasks[name] = self.bars.add_task(name, total=total)
        if time.monotonic() - self.looked.get(name, 0) > 1:
            self.looked[name] = time.monotonic()
            self.bars.update(self.tasks[name], completed=run.cells_done())

    def finished(self, execution: Execution) -> None:
        """A chapter's last line: its name and seconds."""
        if execution.chapter in self.tasks:
            self.bars.remove_task(self.tasks.pop(execution.chapter))
        self.console.print(f"{execution.chapter:24} {execution.seconds:5.0f} s")
