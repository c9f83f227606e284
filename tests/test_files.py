"""Files are whole or absent, and what cannot be written says what to do at that place."""

import json
from pathlib import Path

import pytest
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
