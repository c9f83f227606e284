"""Work in several processes: its results, and how it ends when something goes wrong."""

import os
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import Executor, Future
from concurrent.futures.process import BrokenProcessPool
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


def test_results_come_in_the_order_of_the_items():
    assert in_processes(double, range(7), label="doubling", most=2) == [0, 2, 4, 6, 8, 10, 12]
    assert in_processes(double, [], label="doubling") == []


def fail_at(folder, failing, item):
    mark(folder, item)
    if item in failing:
        raise ValueError(f"not {item}")
    return item


def test_an_error_is_that_of_one_item_and_the_others_go_on(tmp_path):
    with pytest.raises(SinkbookError, match="^failing: 2 of 6 failed") as failure:
        in_processes(partial(fail_at, tmp_path, (0, 4)), range(6), label="failing", most=2)
    assert str(failure.value).endswith("\n  0: ValueError: not 0\n  4: ValueError: not 4")
    assert "in fail_at" in failure.value.__cause__.__notes__[0]
    assert started(tmp_path).keys() == set(range(6))


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


def die(folder, item):
    mark(folder, item)
    if item == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    if item == 3:
        os._exit(7)


@pytest.mark.parametrize("most", [1, 2])
def test_a_process_that_died_is_an_error_that_names_its_item_and_the_others_go_on(tmp_path, most):
    with pytest.raises(SinkbookError, match="2 of 5 failed") as failure:
        in_processes(partial(die, tmp_path), range(1, 6), label="dying", most=most)
    assert re.search("2: its process .*killed.* memory is full", str(failure.value))
    assert re.search("3: its process .*exit status 7", str(failure.value))
    assert started(tmp_path).keys() == {1, 2, 3, 4, 5}


def unsendable(item):
    return (lambda: item) if item == 1 else item


def test_what_cannot_be_sent_is_the_failure_of_its_item():
    with pytest.raises(SinkbookError, match="(?s)1 of 3 failed.*\n  1: .*pickle"):
        in_processes(unsendable, range(3), label="making", most=1)
    with pytest.raises(SinkbookError, match="(?s)1 of 2 failed.*lambda.*pickle"):
        in_processes(str, [lambda: 0, 1], label="asking", most=1)


class UnsendableError(Exception):
    def __init__(self, first, second):
        super().__init__(f"{first} and {second}")


def raise_unsendable(item):
    raise UnsendableError("this", "that")


class SilentError(Exception):
    def __str__(self):
        raise RuntimeError("no words")


def raise_silent(item):
    raise SilentError


def test_an_error_that_has_no_words_is_named_by_its_class():
    with pytest.raises(SinkbookError, match="1: SilentError$"):
        in_processes(raise_silent, [1], label="failing")


def test_an_error_that_cannot_be_sent_arrives_in_words():
    with pytest.raises(SinkbookError, match="RuntimeError: this and that"):
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


class AtOnce(Executor):
    """Runs each call at once, or raises in the place of the executor."""

    def __init__(self):
        self.futures = []

    def submit(self, work, /, item):
        future = Future()
        self.futures.append(future)
        if item == 0:
            raise BrokenProcessPool("no worker is left")
        try:
            future.set_result(work(item))
        except Exception as error:
            future.set_exception(error)
        return future


def invert(number):
    return 1 / (number - 2)


def test_an_executors_failures_are_those_of_their_items():
    calls = {n: (n,) for n in (0, 1, 2, 4)}
    found = on_executor(AtOnce(), invert, calls, label="inverting")
    assert dict(next(found) for _ in range(2)) == {1: -1.0, 4: 0.5}
    with pytest.raises(SinkbookError, match="2 of 4 failed") as failure:
        next(found)
    assert "\n  0: BrokenProcessPool: no worker is left (as processes are" in str(failure.value)
    assert "\n  2: ZeroDivisionError: " in str(failure.value)


class Queue(Executor):
    """Takes calls and runs none; the first one's ends as it is told."""

    def __init__(self, error):
        self.futures, self.error = [], error

    def submit(self, work, /, *arguments):
        self.futures.append(Future())
        if len(self.futures) == 2:
            self.futures[0].set_exception(self.error)
        return self.futures[-1]


def test_after_an_error_that_stops_all_no_call_waits_in_an_executor_from_outside():
    queue = Queue(OSError("the disk is full"))
    calls = {n: (n,) for n in range(4)}
    with pytest.raises(OSError, match="the disk is full"):
        list(on_executor(queue, double, calls, label="failing", stop=(OSError,)))
    assert [future.cancelled() for future in queue.futures] == [False, True, True, True]


def test_after_an_error_that_stops_all_no_call_is_made():
    executor, calls = AtOnce(), {n: (n,) for n in (1, 2, 4, 5)}
    with pytest.raises(ZeroDivisionError):
        list(on_executor(executor, invert, calls, label="", stop=(ZeroDivisionError,)))
    assert len(executor.futures) == 2
