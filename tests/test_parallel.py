"""Work in several processes: its results, and how it ends when something goes wrong."""

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import Executor, Future
from functools import partial
from pathlib import Path

import pytest

from sinkbook import parallel
from sinkbook.errors import SinkbookError
from sinkbook.parallel import in_processes, on_executor

LONG = 1_000  # seconds: longer than a test may take


def double(number):
    return 2 * number


def until(condition):
    while not condition():
        time.sleep(0.01)


def is_running(pid):
    """Whether there is such a process; one that ended and waits to be collected is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def started(folder):
    return {int(path.name): int(path.read_text()) for path in folder.iterdir() if path.suffix == ""}


def mark(folder, item):
    (folder / f"{item}.part").write_text(str(os.getpid()))
    (folder / f"{item}.part").rename(folder / str(item))


def fail_first(folder, item):
    """The first item fails once the second one runs; all others run for long."""
    mark(folder, item)
    if item == 0:
        until(lambda: len(started(folder)) == 2)
        raise ValueError("the first one fails")
    time.sleep(LONG)


def test_results_come_in_the_order_of_the_items():
    assert in_processes(double, range(7), label="doubling", most=2) == [0, 2, 4, 6, 8, 10, 12]
    assert in_processes(double, [], label="doubling") == []


def test_an_error_is_raised_while_the_others_run_and_ends_them(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    with pytest.raises(ValueError, match="the first one fails") as failure:
        in_processes(partial(fail_first, tmp_path), range(8), label="failing")
    assert "in fail_first" in failure.value.__notes__[0]
    assert started(tmp_path).keys() == {0, 1}
    assert not any(is_running(pid) for pid in started(tmp_path).values())


def test_an_interruption_ends_what_runs_and_what_waits_never_begins(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 2)

    def interrupted(connections):
        until(lambda: len(started(tmp_path)) == 2)
        raise KeyboardInterrupt

    monkeypatch.setattr(parallel, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        in_processes(partial(mark_and_stay, tmp_path), range(8), label="interrupted")
    assert started(tmp_path).keys() == {0, 1}
    assert not any(is_running(pid) for pid in started(tmp_path).values())


def mark_and_stay(folder, item):
    mark(folder, item)
    time.sleep(LONG)


def die(item):
    if item == "the second":
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_process_that_was_killed_is_an_error_that_names_its_item():
    with pytest.raises(SinkbookError, match="worked on 'the second' .*killed.* memory is full"):
        in_processes(die, ["the first", "the second", "the third"], label="dying", most=1)


class UnsendableError(Exception):
    def __init__(self, first, second):
        super().__init__(f"{first} and {second}")


def raise_unsendable(item):
    raise UnsendableError("this", "that")


def test_an_error_that_cannot_be_sent_arrives_in_words():
    with pytest.raises(RuntimeError, match="this and that"):
        in_processes(raise_unsendable, [1], label="failing")


def test_processes_end_when_the_one_that_started_them_is_killed(tmp_path):
    code = (
        "import sys; from pathlib import Path; from functools import partial\n"
        "import test_parallel as t\n"
        "t.in_processes(partial(t.mark_and_stay, Path(sys.argv[1])), range(2), label='', most=2)\n"
    )
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    parent = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], env=os.environ | {"PYTHONPATH": path}
    )
    wanted = min(2, os.cpu_count() or 1)
    until(lambda: len(started(tmp_path)) == wanted or parent.poll() is not None)
    parent.kill()
    parent.wait()
    assert len(started(tmp_path)) == wanted
    until(lambda: not any(is_running(pid) for pid in started(tmp_path).values()))


class Queue(Executor):
    """Takes calls and runs none; the test ends them."""

    def __init__(self):
        self.futures = []

    def submit(self, work, /, *arguments):
        self.futures.append(Future())
        if len(self.futures) == 1:
            self.futures[0].set_exception(ValueError("the first one fails"))
        return self.futures[-1]


def test_after_an_error_no_call_waits_in_an_executor_from_outside():
    queue = Queue()
    with pytest.raises(ValueError, match="the first one fails"):
        list(on_executor(queue, double, {n: (n,) for n in range(4)}, label="failing"))
    assert [future.cancelled() for future in queue.futures] == [False, True, True, True]
