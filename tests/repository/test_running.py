"""The pipeline on tiny chapters: what runs, what is taken from the cache, what a page shows."""

import base64
import json
import os
import re
import subprocess
import sys
from pathlib import Path

from sinkbook import provenance
from sinkbook.book import build, claims
from sinkbook.book.execution import Execution
from sinkbook.book.notebooks import read_notebook

ROOT = Path(__file__).resolve().parents[2]


def test_a_chapter_is_called_by_number_or_name(repository):
    for name in ("01_first", "02_second", "claims"):
        repository.chapter(name, "1 + 1")
    names = [
        path.stem for path in build.select(["claims", "02", "01_first.ipynb"], repository.root)
    ]
    assert names == ["01_first", "02_second", "claims"]


def test_a_chapter_gets_the_profile_and_the_seed(repository, sinkbook):
    repository.chapter("01_good", "print(profile, seed)")
    status, stdout, _ = sinkbook("run", "01", "--profile", "paper", "--seed", "7")
    path = repository.output / "executed" / "paper" / "01_good.ipynb"
    assert status == 0 and str(path) in stdout
    output = read_notebook(path)["cells"][-1]["outputs"][0]
    assert "".join(output["text"]) == "paper 7\n"


def test_a_chapter_keeps_its_runs_where_the_command_line_does(
    repository, sinkbook, monkeypatch, tmp_path
):
    """Paths that begin here, or at home, though a chapter runs in the book's own folder."""
    monkeypatch.chdir(repository.root)
    monkeypatch.setenv("SINKBOOK_CACHE", "here/cache")
    monkeypatch.setenv("SINKBOOK_RUNS", "~/runs")
    repository.chapter(
        "01_good", 'import os; print(os.environ["SINKBOOK_CACHE"], os.environ["SINKBOOK_RUNS"])'
    )
    assert sinkbook("run", "01")[0] == 0
    output = read_notebook(repository.executed("01_good"))["cells"][-1]["outputs"][0]
    folders = f"{repository.root / 'here' / 'cache'} {Path('~/runs').expanduser()}\n"
    assert "".join(output["text"]) == folders


def test_what_a_terminal_cannot_show_is_spelt_out():
    code = "import sinkbook.cli as cli; cli.app = lambda _: print('≥ è'); cli.main()"
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True)
    assert done.returncode == 0 and done.stdout == b"\\u2265 \\xe8\n"


def test_an_unchanged_chapter_is_taken_from_the_cache_and_said_so(
    repository, sinkbook, no_renderer
):
    repository.chapter("01_good", "import os, time\nprint(os.getpid(), time.time())")
    assert sinkbook("build")[0] == 0
    first = repository.executed("01_good").read_text()
    status, stdout, _ = sinkbook("build")
    assert status == 0 and "unchanged: from the cache" in stdout
    assert repository.executed("01_good").read_text() == first
    assert stdout.splitlines()[-1] == str(repository.output / "html-quick" / "index.html")

    sinkbook("build", "--fresh")
    assert repository.executed("01_good").read_text() != first


def test_files_that_a_chapter_offers_lie_beside_its_page_and_in_its_link(
    repository, sinkbook, no_renderer
):
    repository.chapter(
        "01_good",
        "from sinkbook import book",
        'book.chapter(profile, seed).attach({"numbers.csv": b"a,b\\n1,2\\n"})',
    )
    assert sinkbook("build")[0] == 0
    beside = repository.output / "src-quick" / "extra" / "book" / "numbers.csv"
    assert beside.read_bytes() == b"a,b\n1,2\n"
    link = read_notebook(repository.executed("01_good"))["cells"][-1]["outputs"][0]
    html = "".join(link["data"]["text/html"])
    encoded = re.search('download="numbers.csv" href="data:[^,]*base64,([^"]*)"', html)[1]
    assert base64.b64decode(encoded) == beside.read_bytes()


def test_whatever_decides_a_chapters_numbers_decides_its_hash(repository, monkeypatch):
    path = repository.chapter("01_good", "1 + 1")
    place = build.workplace("quick")
    hashes = [build.content_hash(path, place, 0), build.content_hash(path, place, 1)]
    hashes.append(build.content_hash(path, build.workplace("paper"), 0))
    repository.chapter("01_good", "1 + 2")
    hashes.append(build.content_hash(path, place, 0))
    (repository.root / "book" / "claims.yml").write_text("[]")
    hashes.append(build.content_hash(path, place, 0))
    monkeypatch.setattr(provenance, "versions", lambda: {"torch": "0.0"})
    hashes.append(build.content_hash(path, place, 0))
    assert len(set(hashes)) == len(hashes)
    assert build.content_hash(path, place, 0) == hashes[-1]


def test_appendices_run_after_all_chapters(repository, sinkbook):
    repository.chapter("claims", "import pathlib\nprint(pathlib.Path('seen').exists())")
    repository.chapter(
        "01_good", "import pathlib, time\ntime.sleep(1)\npathlib.Path('seen').touch()"
    )
    assert sinkbook("run", "claims", "01", "--jobs", "2")[0] == 0
    output = read_notebook(repository.executed("claims"))["cells"][-1]["outputs"][0]
    assert "".join(output["text"]) == "True\n"


def test_a_checked_claim_reaches_the_ledger_again_from_the_cache(repository, sinkbook, no_renderer):
    repository.chapter(
        "01_good",
        "from sinkbook import book",
        "book.chapter(profile, seed).check('two', [2.0, 2.0])",
    )
    assert sinkbook("build")[0] == 0
    (claims.ledger_folder() / "two.json").unlink()
    assert sinkbook("build")[0] == 0
    (row,) = json.loads(sinkbook("claims", "--json")[1])
    assert row["measured"] == [2.0, 2.0] and row["holds"] is True


def test_a_page_shows_the_parameters_that_it_was_run_with(repository, sinkbook):
    repository.chapter("01_good", "print(seed)")
    sinkbook("run", "01", "--seed", "7")
    staged = json.loads(Execution(repository.executed("01_good"), seconds=1.0).page())
    assert [cell["source"] for cell in staged["cells"]] == [
        "profile = 'quick'\nseed = 7",
        "print(seed)",
    ]
    assert str(repository.root) not in json.dumps(staged)


def test_a_page_run_with_its_own_defaults_keeps_them_as_written(repository, sinkbook):
    repository.chapter("01_good", "print(seed)")
    sinkbook("run", "01")
    staged = json.loads(Execution(repository.executed("01_good"), seconds=1.0).page())
    assert staged["cells"][0]["source"] == 'profile = "quick"  # or "paper"\nseed = 0'


def test_the_command_line_answers_without_importing_torch():
    code = "import sys, sinkbook.cli, sinkbook.book.build; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_version_is_told_with_those_of_what_computes(sinkbook):
    from sinkbook import __version__

    status, said, _ = sinkbook("--version")
    assert status == 0 and f"sinkbook {__version__}" in said and "transformers 5." in said


def test_the_probe_is_one_import_away():
    from sinkbook import measure
    from sinkbook.probe import measure as the_probe

    assert measure is the_probe


def test_a_notebook_runs_by_itself_from_any_folder(tmp_path):
    notebook = ROOT / "book" / "claims.ipynb"
    command = ["papermill", notebook, "out.ipynb", "-p", "profile", "paper", "-p", "seed", "1"]
    outcome = subprocess.run(
        [sys.executable, "-m", *map(str, command)], cwd=tmp_path, capture_output=True, text=True
    )
    assert outcome.returncode == 0, outcome.stderr
    assert "claims: " in (tmp_path / "out.ipynb").read_text()


def test_what_the_renderer_warns_of_stops_the_build_and_the_old_pages_stay(
    repository, sinkbook, monkeypatch
):
    monkeypatch.setattr(build, "install_scripts", lambda root: None)
    monkeypatch.setattr(build.vendor, "copy", lambda root, vendor: None)
    (repository.root / "_toc.yml").write_text(
        "format: jb-book\nroot: book/index\nchapters: [{file: book/01_good}]"
    )
    (repository.root / "book" / "index.md").write_text("# Index\n\nSee {doc}`01_good`.")
    path = repository.chapter("01_good", "1 + 1")
    source = json.loads(path.read_text())
    text = {"cell_type": "markdown", "id": "text", "metadata": {}, "source": "# Good"}
    path.write_text(json.dumps(source | {"cells": [text, *source["cells"]]}))
    status, stdout, _ = sinkbook("build")
    index = repository.output / "html-quick" / "index.html"
    assert status == 0 and stdout.splitlines()[-1] == str(index)
    before = index.stat().st_ino

    text["source"] = "# Good\n\nSee {doc}`nosuch`."
    path.write_text(json.dumps(source | {"cells": [text, *source["cells"]]}))
    status, stdout, stderr = sinkbook("build")
    assert status == 1 and str(index) not in stdout
    assert "book/01_good.ipynb, cell 1, line 3: WARNING: unknown document: 'nosuch'" in stderr
    assert index.stat().st_ino == before
    assert not list(repository.output.glob(".*/"))
