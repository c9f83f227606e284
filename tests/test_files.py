"""Files are whole or absent, and what cannot be written says what to do at that place."""

import errno
import fcntl
import json
import os
import resource
import signal
from pathlib import Path

import pytest
import torch
import xarray as xr

from sinkbook import cli, files, store
from sinkbook.errors import SinkbookError
from sinkbook.llm import checkpoint_metrics, checkpoints


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "folder" / "record.json"
    files.write_json(path, {"a": 1})

    def fails_halfway(part: Path) -> None:
        part.write_text("half of")
        raise ValueError

    with pytest.raises(ValueError):
        files.write(path, fails_halfway, otherwise="")
    assert list(path.parent.iterdir()) == [path]
    assert json.loads(path.read_text()) == {"a": 1}


def test_what_others_may_read_they_may_still_read_when_it_was_replaced(tmp_path):
    plain = tmp_path / "plain"
    plain.write_text("")
    files.write_json(tmp_path / "record.json", {})
    assert (tmp_path / "record.json").stat().st_mode == plain.stat().st_mode


@pytest.mark.parametrize(
    ("write", "advice"),
    [
        (lambda f: cli.checkpoints("someone/model", out=f / "found.nc"), "with --out"),
        (lambda f: files.write_json(f / "facts.json", {}), "SINKBOOK_CACHE"),
        (lambda f: store.save_run(f / "0123", {}, xr.Dataset(), {}), "SINKBOOK_RUNS"),
    ],
)
def test_a_place_that_cannot_be_written_is_told_with_the_advice_of_that_place(
    tmp_path, monkeypatch, write, advice
):
    monkeypatch.setattr(checkpoints, "measure_checkpoints", lambda *_, **__: xr.Dataset())
    monkeypatch.setattr(checkpoint_metrics, "table", lambda dataset: "a table")
    monkeypatch.setattr(cli, "_texts_to_measure", lambda *_, **__: ["a text"])
    folder = tmp_path / "a file and no folder"
    folder.write_text("")
    with pytest.raises(SinkbookError) as failure:
        write(folder)
    known = {"with --out", "SINKBOOK_CACHE", "SINKBOOK_RUNS"}
    assert {words for words in known if words in str(failure.value)} == {advice}


@pytest.fixture
def small_disk():
    """No file may grow beyond 50 kB, as where a disk or a quota ends."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignoring = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, ignoring)


LARGE = {"weights": torch.zeros(100_000)}
DATASET = xr.Dataset({"x": ("y", torch.rand(100_000).numpy())})


@pytest.mark.parametrize(
    "write",
    [
        lambda f: store.save_checkpoint(f, LARGE, step=3),
        lambda f: store.save_run(f, LARGE, xr.Dataset(), {}),
        lambda f: store.save_run(f, {}, DATASET, {}),
        lambda f: store.save_run(f, {}, xr.Dataset(), {}, {0: LARGE}),
        lambda f: files.write_json(f / "facts.json", "x" * 100_000),
        lambda f: files.write_netcdf(f / "x.nc", DATASET, otherwise="wait"),
    ],
)
def test_a_disk_that_is_full_is_told_whichever_library_writes(tmp_path, small_disk, write):
    with pytest.raises(SinkbookError, match="^cannot write .*Free some space, or ") as failure:
        write(tmp_path)
    assert not list(tmp_path.glob("*.part")) and not list(tmp_path.glob(".*.part"))
    assert files.no_room(failure.value)


def test_an_error_that_is_none_of_the_file_system_is_not_taken_for_one():
    assert not files.no_room(ValueError("28 of 30"))
    assert files.no_room(RuntimeError("unable to write (file write failed: errno = 28, error)"))
    assert files.no_room(RuntimeError("I/O error: quota (os error 122)"))
    assert not files.no_room(RuntimeError("I/O error: Permission denied (os error 13)"))


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.EIO])
def test_a_store_where_nothing_can_be_locked_says_where_it_may_be(tmp_path, monkeypatch, number):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with (
        pytest.raises(SinkbookError, match=f"{tmp_path}.*Set SINKBOOK_RUNS to a folder"),
        store.locked(tmp_path / "run"),
    ):
        pass


def test_a_folder_that_cannot_be_made_is_no_store(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(SinkbookError, match="Not a directory.*SINKBOOK_RUNS"),
        store.locked(tmp_path / "file" / "run"),
    ):
        pass


@pytest.mark.parametrize(
    ("name", "folder"),
    [("SINKBOOK_RUNS", store.runs_folder), ("SINKBOOK_CACHE", files.cache_folder)],
)
def test_a_chosen_folder_may_begin_at_home(name, folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv(name, "~/kept")
    assert folder() == tmp_path / "kept"
