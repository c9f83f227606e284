"""Executing notebooks through papermill: one process each, several at once, stopped by an error.

A copy is executed under another name and takes its place only once every cell has run, without an
error and without a word on stderr.
"""

import copy
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory

from sinkbook.book.notebooks import (
    assigned,
    check_parameters,
    first_complaint,
    place_of,
    read_notebook,
    sources,
    tags,
)
from sinkbook.errors import SinkbookError
from sinkbook.files import write_json
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


@dataclass(frozen=True)
class Execution:
    """A chapter's executed copy, how long it took, and whether it was taken from the cache."""

    path: Path
    seconds: float
    from_cache: bool = False

    @classmethod
    def kept(cls, path: Path, content_hash: str) -> "Execution | None":
        """The copy at `path` if it was executed from sources with this hash, else None."""
        if not path.exists():
            return None
        about = read_notebook(path)["metadata"].get("sinkbook", {})
        if about.get("hash") != content_hash:
            return None
        return cls(path, about["seconds"], from_cache=True)

    @property
    def chapter(self) -> str:
        return self.path.stem

    @cached_property
    def notebook(self) -> dict:
        return read_notebook(self.path)

    def outputs(self, key: str) -> list[dict]:
        """What the chapter's outputs carry in their metadata under `key`, in order."""
        return [
            output["metadata"][key]
            for cell in self.notebook["cells"]
            for output in cell.get("outputs", [])
            if key in output.get("metadata", {})
        ]

    def page(self) -> str:
        """The notebook to render: the parameters as they were run, the seconds, no traces.

        Papermill's injected cell is folded into the parameters cell, and what it notes down
        (this machine's paths, times) is left out.
        """
        notebook = copy.deepcopy(self.notebook)
        cells = notebook["cells"]
        injected = next((cell for cell in cells if "injected-parameters" in tags(cell)), None)
        if injected:
            cells.remove(injected)
            declared = next(cell for cell in cells if "parameters" in tags(cell))
            values = assigned(injected["source"])
            if values.items() - assigned(declared["source"]).items():
                declared["source"] = "\n".join(f"{k} = {v!r}" for k, v in values.items())
        for cell in cells:
            cell["metadata"].pop("papermill", None)
            cell["metadata"].pop("execution", None)
        notebook["metadata"].pop("papermill", None)
        if self.outputs("sinkbook.facts"):
            text = f'<p class="sinkbook-facts">Computed in {self.seconds:.0f} seconds.</p>'
            cells.append({"cell_type": "markdown", "id": "seconds", "metadata": {}, "source": text})
        return json.dumps(notebook)


# The name of the kernel that is the Python at work. Others may have one named "python3" anywhere
# on Jupyter's path, with other packages than those whose versions a copy is kept under.
KERNEL = "sinkbook-this-python"


@contextmanager
def _kernel_of_this_python() -> Iterator[dict[str, str]]:
    """The environment in which `KERNEL` is the Python that runs this, for the body."""
    spec = {
        "argv": [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"],
        "display_name": "Python 3",
        "language": "python",
    }
    with TemporaryDirectory(prefix="sinkbook-kernel-") as folder:
        path = Path(folder) / "kernels" / KERNEL / "kernel.json"
        write_json(path, spec, otherwise="name another folder for such files in TMPDIR")
        places = [folder, os.environ.get("JUPYTER_PATH")]
        yield {"JUPYTER_PATH": os.pathsep.join(filter(None, places))}


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
        notebook: Path,
        folder: Path,
        logs: Path,
        parameters: Mapping[str, object],
        limit: float,
        kernels: Mapping[str, str],
    ):
        self.notebook = notebook
        self.limit = limit  # in seconds
        self.overdue = False
        self.target = folder / notebook.name
        self.draft = logs / notebook.name
        self.log = logs / f"{notebook.stem}.log"
        paths = [_unformatted(notebook), _unformatted(self.draft)]
        command = [sys.executable, "-m", "papermill", *paths]
        command += ["--no-progress-bar", "--cwd", str(notebook.parent)]
        command += ["--kernel", KERNEL, "--language", "python"]  # whatever editor saved it last
        for name, value in parameters.items():
            command += ["-p", name, str(value)]
        self.draft.unlink(missing_ok=True)
        self.started = time.monotonic()
        with self.log.open("w", encoding="utf-8") as log:
            self.process = subprocess.Popen(
                command,
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                env={**_ENVIRONMENT, **os.environ, **_folders(), **kernels},
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
        except (OSError, SinkbookError):  # not there yet, or being written
            return 0
        return sum(cell.get("execution_count") is not None for cell in cells)

    def finish(self, content_hash: str) -> Execution:
        """Move the executed copy into place; raise `SinkbookError` if the run failed."""
        if self.overdue:
            raise SinkbookError(
                f"{self.notebook.stem} was stopped: it had not ended after {self.limit:.0f} "
                f"seconds.\nThe copy with its outputs so far: {self.draft}"
            )
        notebook = read_notebook(self.draft) if self.draft.exists() else {"cells": []}
        if complaint := first_complaint(notebook):
            raise SinkbookError(
                f"{self.notebook.stem} stopped in {complaint}\nThe copy with its outputs so far: "
                f"{self.draft}"
            )
        if self.process.returncode:
            if died := self._died(notebook):
                raise SinkbookError(died)
            words = self.log.read_text(encoding="utf-8").strip().splitlines()
            last = words[-1] if words else f"papermill ended with status {self.process.returncode}"
            raise SinkbookError(f"{self.notebook.stem} could not be run: {last}\nSee {self.log}.")
        seconds = self.seconds
        notebook["metadata"]["sinkbook"] = {"hash": content_hash, "seconds": seconds}
        self.draft.write_text(json.dumps(notebook), encoding="utf-8")
        self.target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(self.draft, self.target)
        return Execution(self.target, seconds)

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
            f"{self.notebook.stem} stopped {where}: its {'kernel' if kernel else 'process'} died. "
            "Mostly that is for lack of memory: close other programs, or run fewer chapters at "
            f"once with `jobs`.\nThe copy with its outputs so far: {self.draft}\nSee {self.log}."
        )

    def stop(self) -> None:
        """Interrupt papermill, which shuts its kernel down, and wait for it."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            try:
                self.process.wait(timeout=15)
            except subprocess.TimeoutExpired:
                self.process.kill()


def execute(
    notebooks: list[Path],
    *,
    folder: Path,
    logs: Path,
    parameters: Mapping[str, object],
    hashes: Mapping[str, str],
    kept: Mapping[str, Execution],
    last: Collection[str] = (),
    jobs: int = 1,
    after: Callable[[Execution], None] = lambda execution: None,
    failed: Callable[[str, SinkbookError], None] | None = None,
    limit: float = math.inf,
) -> dict[str, Execution]:
    """Execute notebooks, `jobs` at a time and those named in `last` at the end; by name.

    `kept` are copies that need not run again. `after` is called with each execution as it ends.
    The first failure stops the others and raises `SinkbookError`, unless there is `failed`, which
    then gets the chapter's name and the error. A chapter that has not ended after `limit` seconds
    has failed. An interruption stops all.
    """
    sound = []
    for path in notebooks:
        with _told(failed, path.stem):
            check_parameters(path, list(parameters))
            sound.append(path)
    logs.mkdir(parents=True, exist_ok=True)
    done = dict(kept)
    waiting = [path for path in sound if path.stem not in kept]
    running: list[_Run] = []
    with (
        Progress(kept.values()) as progress,
        _terminated_like_interrupted(),
        _kernel_of_this_python() as kernels,
    ):
        try:
            while waiting or running:
                while waiting and len(running) < jobs and not (running and waiting[0].stem in last):
                    path = waiting.pop(0)
                    with _told(failed, path.stem):
                        running.append(_Run(path, folder, logs, parameters, limit, kernels))
                for run in list(running):
                    if not run.ended():
                        progress.show(run)
                        continue
                    running.remove(run)
                    with _told(failed, run.notebook.stem):
                        execution = run.finish(hashes[run.notebook.stem])
                        after(execution)
                        done[execution.chapter] = execution
                        progress.finished(execution)
                time.sleep(0.1)
        finally:
            for run in running:
                run.stop()
    return done


@contextmanager
def _told(failed: Callable[[str, SinkbookError], None] | None, chapter: str):
    """Tell `failed` of a chapter's error, whatever it is, and go on; without it, raise."""
    try:
        yield
    except Exception as error:
        if failed is None:
            raise
        known = isinstance(error, SinkbookError)
        failed(chapter, error if known else SinkbookError(f"{chapter}: {in_words(error)}"))


@contextmanager
def _terminated_like_interrupted():
    """Let a `kill` stop the chapters that run, as Ctrl-C does, instead of leaving them behind."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


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
        name = run.notebook.stem
        if not self.console.is_terminal:
            return
        if name not in self.tasks:
            cells = read_notebook(run.notebook)["cells"]
            total = sum(cell["cell_type"] == "code" for cell in cells) + 1  # and the injected one
            self.tasks[name] = self.bars.add_task(name, total=total)
        if time.monotonic() - self.looked.get(name, 0) > 1:
            self.looked[name] = time.monotonic()
            self.bars.update(self.tasks[name], completed=run.cells_done())

    def finished(self, execution: Execution) -> None:
        """A chapter's last line: its name and seconds."""
        if execution.chapter in self.tasks:
            self.bars.remove_task(self.tasks.pop(execution.chapter))
        self.console.print(f"{execution.chapter:24} {execution.seconds:5.0f} s")
