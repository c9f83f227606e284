"""Pages and their scripts: the old ones stand until the new ones do, whatever comes in between."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sinkbook import files
from sinkbook.book import build
from sinkbook.errors import SinkbookError
from sinkbook.pages import vendor


@pytest.fixture
def book(repository, monkeypatch):
    """A tiny repository with an index and a chapter, whose pages can be rendered."""
    repository.chapter("01_good", "print(seed)", title="Good")
    repository.can_be_rendered()
    return repository


class Interrupted(BaseException):
    """A kill, as far as a test can survive one."""


def kill_at_rename(monkeypatch, number: int) -> None:
    """The process ends instead of this rename, and cleans nothing up."""
    done = []

    def or_end(move):
        def move_or_end(self, target):
            done.append(target)
            if len(done) == number:
                monkeypatch.setattr(shutil, "rmtree", lambda *_, **__: None)
                raise Interrupted
            return move(self, target)

        return move_or_end

    monkeypatch.setattr(Path, "rename", or_end(Path.rename))
    monkeypatch.setattr(Path, "replace", or_end(Path.replace))


@pytest.mark.parametrize("number", [1, 2])
def test_between_two_renames_nothing_is_lost(tmp_path, monkeypatch, number):
    new, place = tmp_path / "new", tmp_path / "pages"
    for folder, text in ((new, "new"), (place, "old")):
        folder.mkdir()
        (folder / "index.html").write_text(text)
    with monkeypatch.context() as patched, pytest.raises(Interrupted):
        kill_at_rename(patched, number)
        files.replace_folder(new, place)
    files.recover_folder(place)
    assert (place / "index.html").read_text() == "old"
    files.replace_folder(new, place)
    assert (place / "index.html").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["pages"]


NAMES = ("data.csv", "figure.svg", "report.html")


def write_all(folder: Path, text: str) -> None:
    with files.replacing(folder, NAMES, otherwise="name another") as made:
        for name in NAMES:
            files.write(made / name, lambda part: part.write_text(text), otherwise="name another")


@pytest.mark.parametrize("others", [[], ["notes.txt", "of mine/more.txt"]], ids=["alone", "beside"])
@pytest.mark.parametrize("number", range(1, 8))
def test_files_of_two_runs_never_stand_together(tmp_path, monkeypatch, number, others):
    """Whichever move a kill prevents; with files of others, no page stands over what is mixed."""
    folder = tmp_path / "a report"
    write_all(folder, "old")
    for name in others:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("mine")
    ended = False
    with monkeypatch.context() as patched:
        kill_at_rename(patched, number)
        try:
            write_all(folder, "new")
        except Interrupted:
            ended = True
    assert ended or number > len(NAMES) + 2
    files.recover_folder(folder)
    found = {name: (folder / name).read_text() for name in NAMES if (folder / name).exists()}
    if not others or "report.html" in found:
        assert found.keys() == {*NAMES} and len({*found.values()}) == 1
    monkeypatch.setattr(files, "_is_running", lambda process: False)  # it was killed
    write_all(folder, "new")
    assert {(folder / name).read_text() for name in NAMES} == {"new"}
    assert all((folder / name).read_text() == "mine" for name in others)
    assert [path.name for path in tmp_path.iterdir()] == ["a report"]
    assert len([*folder.iterdir()]) == len(NAMES) + len(others)


def test_pages_that_an_interruption_has_set_aside_are_back_at_the_next_start(
    book, sinkbook, no_renderer
):
    assert sinkbook("build")[0] == 0
    pages = book.output / "html-quick"
    (pages / "index.html").write_text("old")
    pages.rename(book.output / ".html-quick.sinkbook-old")
    book.chapter("01_good", "1 / 0")
    assert sinkbook("build")[0] == 1
    assert (pages / "index.html").read_text() == "old"


BROKEN = ["a: [", "- a", "\tb", "é: \x00", b"\xff\xfe\x00"]


@pytest.mark.parametrize(
    ("name", "content"),
    [("_config.yml", None), *((name, c) for name in ("_config.yml", "_toc.yml") for c in BROKEN)],
)
def test_broken_settings_are_named_before_anything_runs(book, sinkbook, name, content):
    path = book.root / name
    path.unlink()  # a folder without _toc.yml is no repository
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    status, _, stderr = sinkbook("build")
    begins = (f"sinkbook: {path}", f"sinkbook: cannot read {path}: ")
    assert status == 1 and stderr.startswith(begins) and "Traceback" not in stderr
    assert not book.executed("01_good").exists()


def test_contents_without_a_first_page_are_named(book, sinkbook):
    (book.root / "_toc.yml").write_text("format: jb-book\n")
    status, _, stderr = sinkbook("build")
    assert status == 1 and "_toc.yml names no 'root'" in stderr


@pytest.mark.parametrize(
    "contents",
    ["root: book/nosuch", "format: nosuch\nroot: book/index", "format: jb-book\nroot: [1]"],
)
def test_contents_that_the_renderer_refuses_are_in_its_words(book, sinkbook, contents):
    (book.root / "book" / "01_good.ipynb").unlink()  # no chapter need run for it
    (book.root / "_toc.yml").write_text(contents)
    status, _, stderr = sinkbook("build")
    assert status == 1 and stderr.startswith("sinkbook: the pages could not be rendered")
    assert "Traceback" not in stderr


# --- Scripts ---


def lock(root: Path, version: str) -> None:
    packages = {"": {}, "node_modules/mathjax": {"version": version, "integrity": "sha512-a"}}
    text = json.dumps({"lockfileVersion": 3, "packages": packages})
    (root / "package-lock.json").write_text(text)


@pytest.fixture
def installed(book, monkeypatch):
    """A repository whose scripts are there; npm reaches no network."""
    monkeypatch.setenv("npm_config_registry", "http://127.0.0.1:9")
    monkeypatch.setenv("npm_config_fetch_retries", "0")
    monkeypatch.setenv("npm_config_cache", str(book.root.parent / "npm"))
    lock(book.root, "1.0.0")
    (book.root / "package-lock.json").rename(book.root / "node_modules" / ".package-lock.json")
    lock(book.root, "1.0.0")
    return book


def test_scripts_that_are_there_are_left_alone_whatever_the_dates(installed):
    script = installed.root / "node_modules" / "mathjax" / "es5" / "tex-chtml.js"
    script.write_text("of the user's")
    os.utime(installed.root / "package-lock.json", (2e9, 2e9))
    build.install_scripts(installed.root)
    assert script.read_text() == "of the user's"


def test_without_a_network_other_scripts_cannot_be_had_and_the_old_ones_stay(installed):
    lock(installed.root, "2.0.0")
    (installed.root / "package.json").write_text('{"dependencies": {"mathjax": "2.0.0"}}')
    with pytest.raises(SinkbookError, match="needs a network"):
        build.install_scripts(installed.root)
    assert (installed.root / "node_modules" / "mathjax" / "es5" / "tex-chtml.js").exists()
    assert not [*installed.root.glob(".node_modules*")]


def test_scripts_of_which_one_is_missing_are_not_there(installed):
    assert vendor._is_installed(installed.root)
    (installed.root / "node_modules" / "mathjax" / "es5" / "tex-chtml.js").unlink()
    assert not vendor._is_installed(installed.root)


@pytest.mark.parametrize("content", [None, "", "[]", '{"packages": [1]}', "{"])
def test_a_broken_lock_file_is_named(installed, content):
    path = installed.root / "package-lock.json"
    path.unlink() if content is None else path.write_text(content)
    with pytest.raises(
        SinkbookError, match=f"cannot read {path}, a lock file of npm: .*repository again"
    ):
        build.install_scripts(installed.root)


# --- A home like those of others ---


def test_both_commands_of_the_readme_work_in_a_home_like_any_other(book, tmp_path, monkeypatch):
    """A space and an accent in its path, its files for nobody else, no locale, no terminal."""
    home = tmp_path / "Zoë Müller"
    repository = home / "mes livres" / "sinkbook"
    repository.parent.mkdir(parents=True)
    book.root.rename(repository)
    code = (
        "import os, sys; os.umask(0o077); import sinkbook.cli as cli\n"
        "sys.argv = ['sinkbook', *sys.argv[1:]]; cli.main()"
    )
    environment = {"PATH": os.environ["PATH"], "LANG": "C", "HOME": str(home)}
    environment["PYTHONPATH"] = str(Path(build.__file__).parents[2])
    for arguments, printed in (
        (["run", "01"], repository / "build" / "executed" / "quick" / "01_good.ipynb"),
        (["build"], repository / "build" / "html-quick" / "index.html"),
    ):
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments],
            cwd=repository,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
        )
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.splitlines()[-1] == str(printed) and printed.exists()
