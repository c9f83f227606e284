"""What another user keeps where it is shared: read where that may be, else told in one message."""

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from importlib import import_module
from io import StringIO
from pathlib import Path
from tempfile import mkdtemp

import pytest

from sinkbook import cli, files
from sinkbook.book import claims
from sinkbook.errors import SinkbookError
from sinkbook.toy.runs import TrainingConfig
from sinkbook.toy.tasks import TaskConfig
from sinkbook.toy.training import train
from sinkbook.toy.transformer import TransformerConfig
from tiny import tiny_model, tiny_tokenizer
from tiny_book import Repository

NOBODY = 65534
SMALL = {"task": TaskConfig(length=8), "model": TransformerConfig(length=8, width=4)}
CONFIG = TrainingConfig(**SMALL, steps=2, batch_size=2, evaluation_size=2, measurements=2)
FOUND = {"id": "two", "profile": "quick", "measured": [2.0], "date": "2026-01-01"}


def is_open(folder: Path) -> bool:
    """Whether everybody may enter a folder."""
    return all(place.stat().st_mode & 0o001 for place in (folder, *folder.parents))


pytestmark = [
    pytest.mark.skipif(
        not hasattr(os, "geteuid") or os.geteuid() != 0,
        reason="only root becomes another user; where it is another's, modes are tried elsewhere",
    ),
    pytest.mark.skipif(
        not is_open(Path(sys.prefix)), reason="another user may not read the libraries here"
    ),
]


def as_nobody(work: Callable[[], object]) -> tuple[str, str]:
    """Do something as a user without rights: what it came to, and the words that go with it."""
    reading, writing = os.pipe()
    if not (process := os.fork()):
        try:
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
            told = "done", str(work())
        except SinkbookError as error:
            told = "refused", str(error)
        except BaseException as error:
            told = "broken", repr(error)
        os.write(writing, json.dumps(told).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as answers:
        answer = json.loads(answers.read())
    os.waitpid(process, 0)
    return tuple(answer)


def command(*arguments: object) -> str:
    """What the command line prints; raises what it says of a failure."""
    sys.argv = ["sinkbook", *map(str, arguments)]
    with redirect_stdout(StringIO()) as shown, redirect_stderr(StringIO()) as said:
        try:
            cli.main()
        except SystemExit as end:
            if end.code:
                assert "report it" not in said.getvalue(), said.getvalue()
                raise SinkbookError(said.getvalue()) from None
    return shown.getvalue()


@contextmanager
def leaving(umask: int) -> Iterator[None]:
    """In the body files are made with this umask."""
    before = os.umask(umask)
    try:
        yield
    finally:
        os.umask(before)


@pytest.fixture
def shared(monkeypatch) -> Iterator[Path]:
    """A folder that everybody may enter, with a repository, a cache and a store in it."""
    folder = Path(mkdtemp())  # those of pytest are closed to others
    folder.chmod(0o755)
    monkeypatch.setattr(sys, "argv", [])
    monkeypatch.setenv("SINKBOOK_CACHE", str(folder / "cache"))
    monkeypatch.setenv("SINKBOOK_RUNS", str(folder / "runs"))
    with leaving(0o022):
        monkeypatch.chdir(Repository(folder / "repository").root)
    yield folder
    shutil.rmtree(folder)


def fill(folder: Path) -> dict[str, Callable[[], object]]:
    """Keep one of each kind in a shared folder, and say how each is read."""
    (folder / "text").write_text("to be or not to be the " * 20)
    (folder / "text").chmod(0o644)
    tiny_model(max_position_embeddings=48).save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    for path in (folder / "model").iterdir():
        files.readable_by_others(path)
    claims.keep(FOUND)
    train(CONFIG)
    probe = ("probe", folder / "model", "--text", folder / "text", "--length", 9, "--texts", 1)
    return {
        "the claims": lambda: command("claims"),
        "a model": lambda: command(*probe),
        "a run": lambda: len(train(CONFIG).measurements),
    }


def test_what_is_shared_is_read_by_whoever_may(shared):
    with leaving(0o022):
        readers = fill(shared)
    for what, read in readers.items():
        ours = str(read())  # which also imports what nobody may read
        assert as_nobody(read) == ("done", ours), what


def test_what_is_not_shared_is_one_message_that_names_it(shared):
    with leaving(0o077):
        readers = fill(shared)
    for what, read in readers.items():
        read()
        outcome, said = as_nobody(read)
        assert outcome == "refused", (what, said)
        assert str(shared) in said and "ermission" in said, said


def test_a_run_that_may_not_be_read_is_not_taken_for_damaged(shared):
    train(CONFIG)
    CONFIG.folder.chmod(0o777)
    for path in CONFIG.folder.iterdir():
        path.chmod(0o600 if path.name != "lock" else 0o666)
    kept = {path.name: path.read_bytes() for path in CONFIG.folder.iterdir()}
    outcome, said = as_nobody(lambda: train(CONFIG))
    assert outcome == "refused" and str(CONFIG.folder) in said
    assert {path.name: path.read_bytes() for path in CONFIG.folder.iterdir()} == kept


def test_where_another_user_may_not_write_is_one_message_that_names_it(shared):
    (shared / "closed").mkdir(mode=0o755)
    fill(shared)
    out = shared / "closed" / "report"
    probe = ("probe", shared / "model", "--text", shared / "text", "--length", 9, "--texts", 1)
    other = TrainingConfig(**SMALL, steps=1, batch_size=1, evaluation_size=1, measurements=1)
    writers = {
        "a report": lambda: command(*probe, "--out", out),
        "a build folder": lambda: command("run", "01", "--output", shared / "closed" / "build"),
        "a claim": lambda: claims.keep(FOUND),
        "a training": lambda: train(other),
    }
    command(*probe)
    import_module(
        "sinkbook.book.build"
    )  # nobody may not read it where a clone is its owner's alone
    for what, write in writers.items():
        outcome, said = as_nobody(write)
        assert outcome == "refused", (what, said)
        assert str(shared) in said, said
    assert not [*(shared / "closed").iterdir()]
