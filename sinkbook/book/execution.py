"""Executing notebooks through papermill: one process each, several at once, stopped by an error.

A copy is executed under another name and takes its place only once every cell has run, without an
error and without a word on stderr.
"""

import ast
import copy
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from sinkbook.errors import SinkbookError

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


def tags(cell: dict) -> list[str]:
    """A cell's tags."""
    return cell["metadata"].get("tags", [])


def is_code(cell: dict) -> bool:
    """Whether a cell is run."""
    return cell["cell_type"] == "code"


def assigned(source: str) -> dict[str, object]:
    """Names that a parameters cell assigns, with their literal values (None: not a literal).

    >>> assigned('profile = "quick"  # or "paper"\\nseed = 0')
    {'profile': 'quick', 'seed': 0}
    """
    found: dict[str, object] = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            value = node.value.value if isinstance(node.value, ast.Constant) else None
            found.update({target.id: value for target in targets if isinstance(target, ast.Name)})
    return found


def read_notebook(path: Path) -> dict:
    """A notebook as plain data. One that is no notebook raises `SinkbookError`."""
    try:
        notebook = json.loads(path.read_text(encoding="utf-8"))
        notebook["cells"][0]["source"]
    except (ValueError, KeyError, IndexError) as error:
        raise SinkbookError(f"{path} is not a notebook that can be read: {error}.") from error
    for cell in notebook["cells"]:
        cell["source"] = "".join(cell["source"])
    return notebook


def check_parameters(path: Path, names: Collection[str]) -> None:
    """Raise `SinkbookError` unless the notebook declares these parameters.

    Papermill itself only warns about an unknown name, and without a `parameters` cell it injects
    above the defaults, which then win: a run at another profile would silently be a quick one.
    """
    cells = [cell for cell in read_notebook(path)["cells"] if "parameters" in tags(cell)]
    declared = assigned(cells[0]["source"]) if cells else {}
    if missing := [name for name in names if name not in declared]:
        what = "has no cell tagged 'parameters'" if not cells else f"declares no {missing[0]!r}"
        raise SinkbookError(
            f"{path.stem} {what}. Its first code cell carries the tag 'parameters' and assigns "
            f"{' and '.join(names)}, or it cannot be run at another profile."
        )


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


class _Run:
    """One chapter being executed: papermill in a process of its own."""

    def __init__(
        self,
        notebook: Path,
        folder: Path,
        logs: Path,
        parameters: Mapping[str, object],
        limit: float,
    ):
        self.notebook = notebook
        self.limit = limit  # in seconds
        self.overdue = False
        self.target = folder / notebook.name
        self.draft = logs / notebook.name
        self.log = logs / f"{notebook.stem}.log"
        command = [sys.executable, "-m", "papermill", str(notebook), str(self.draft)]
        command += ["--no-progress-bar", "--cwd", str(notebook.parent)]
        command += ["--kernel", "python3", "--language", "python"]  # whatever editor saved it last
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
                env={**_ENVIRONMENT, **os.environ},
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
            words = self.log.read_text(encoding="utf-8").strip().splitlines()
            last = words[-1] if words else f"papermill ended with status {self.process.returncode}"
            raise SinkbookError(f"{self.notebook.stem} could not be run: {last}\nSee {self.log}.")
        seconds = self.seconds
        notebook["metadata"]["sinkbook"] = {"hash": content_hash, "seconds": seconds}
        self.draft.write_text(json.dumps(notebook), encoding="utf-8")
        self.target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(self.draft, self.target)
        return Execution(self.target, seconds)

    def stop(self) -> None:
        """Interrupt papermill, which shuts its kernel down, and wait for it."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            try:
                self.process.wait(timeout=15)
            except subprocess.TimeoutExpired:
                self.process.kill()


def first_complaint(notebook: dict) -> str | None:
    """Where and why an executed notebook failed, in words; None if it did not.

    Cells are counted as in the source: code cells only, papermill's own left out. A warning or
    anything else on stderr counts as a failure, since it would stand on the page.
    """
    sources = [
        cell
        for cell in notebook["cells"]
        if cell["cell_type"] == "code" and "injected-parameters" not in tags(cell)
    ]
    for number, cell in enumerate(sources, start=1):
        first_line = next(iter(cell["source"].strip().splitlines()), "")
        where = f"code cell {number} ({first_line})"
        for output in cell["outputs"]:
            if output["output_type"] == "error":
                return f"{where}: {output['ename']}: {output['evalue']}"
            if output.get("name") == "stderr":
                return f"{where}, which wrote to stderr: {''.join(output['text']).strip()}"
    return None


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
    with Progress(kept.values()) as progress, _terminated_like_interrupted():
        try:
            while waiting or running:
                while waiting and len(running) < jobs and not (running and waiting[0].stem in last):
                    running.append(_Run(waiting.pop(0), folder, logs, parameters, limit))
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
    """Tell `failed` of a chapter's error and go on; without it, raise."""
    try:
        yield
    except SinkbookError as error:
        if failed is None:
            raise
        failed(chapter, error)


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
