"""Notebooks that are none, that are edited as they run, or whose executed copy is damaged."""

import json
import logging
import os
import subprocess
import sys
from shlex import quote

import pytest

from sinkbook.book import build
from sinkbook.book.notebooks import Execution, what_differs
from tiny_book import notebook

GOOD = notebook("print(seed)")


def with_cell(**changed):
    """A notebook whose second cell has other entries, or not those that are None."""
    cell = {k: v for k, v in (GOOD["cells"][1] | changed).items() if v is not None}
    return GOOD | {"cells": [GOOD["cells"][0], cell]}


def with_parameters(source):
    return notebook("print(seed)", parameters=source)


BROKEN = [
    (b"", "is not a notebook that can be read"),
    (b"\xff\xfe", "is not a notebook that can be read"),
    (b"[" * 100_000, "is not a notebook that can be read"),
    ([], "it has no list of cells"),
    ("a text", "it has no list of cells"),
    (None, "it has no list of cells"),
    ({}, "it has no list of cells"),
    ({"cells": {}}, "it has no list of cells"),
    ({"worksheets": []}, "it has no list of cells"),
    (GOOD | {"cells": []}, "it has no cell"),
    (GOOD | {"cells": [1]}, "cell 1 is no table"),
    (GOOD | {"metadata": []}, "its metadata are no table"),
    (with_cell(metadata=None), "cell 2 has no metadata"),
    (with_cell(metadata=[]), "cell 2 has no metadata"),
    (with_cell(metadata={"tags": 1}), "tags that are no list"),
    (with_cell(source=None), "cell 2 has no source"),
    (with_cell(source=1), "cell 2 has no source"),
    (with_cell(source=[1]), "cell 2 has no source"),
    (with_cell(cell_type=None), "cell 2 is neither code, markdown nor raw"),
    (with_cell(cell_type="heading"), "cell 2 is neither code, markdown nor raw"),
    (with_cell(outputs=None), "cell 2 has no list of outputs"),
    (with_cell(outputs=[1]), "cell 2 has no list of outputs"),
    (with_parameters('profile = "quick'), "cell tagged 'parameters'"),
    (with_parameters("profile seed"), "cell tagged 'parameters'"),
    (with_parameters("seed = 0\0"), "cell tagged 'parameters'"),
    (with_parameters("(" * 10_000), "cell tagged 'parameters'"),
    (with_parameters(""), "declares no 'profile'"),
]


@pytest.mark.parametrize(("content", "says"), BROKEN, ids=range(len(BROKEN)))
def test_what_is_no_notebook_is_named_and_takes_no_other_along(repository, content, says):
    repository.chapter("01_good", "1 + 1")
    encoded = content if isinstance(content, bytes) else json.dumps(content).encode()
    repository.chapter("02_broken").write_bytes(encoded)
    failures, ran = {}, []

    def execute(sources, **options):
        ran.extend(source.name for source in sources)
        return {}

    with pytest.MonkeyPatch.context() as patched:
        if not says.startswith(("cell tagged", "declares")):
            patched.setattr(build, "execute", execute)
        else:  # which checks the parameters; nothing is run for those of the good one
            patched.setattr("sinkbook.book.execution._Run", None)
        build.run_chapters(
            place=build.workplace("quick"),
            failed=lambda name, error: failures.update({name: str(error)}),
        )
    assert "02_broken" in failures["02_broken"] and says in failures["02_broken"]
    assert "02_broken" not in ran


@pytest.mark.parametrize("make", ["mkdir", "symlink"])
def test_what_is_called_a_notebook_and_is_no_file_is_named(repository, sinkbook, make):
    path = repository.root / "book" / "01_odd.ipynb"
    path.mkdir() if make == "mkdir" else path.symlink_to("nowhere")
    status, _, stderr = sinkbook("run", "01")
    assert status == 1 and stderr.startswith(f"sinkbook: {path} cannot be read: ")


def flip(text: str) -> str:
    """An output of 0 becomes one of 8."""
    assert text.count('"0\\n"') == 1
    return text.replace('"0\\n"', '"8\\n"')


DAMAGES = {
    "cut in half": lambda text: text[: len(text) // 2],
    "empty": lambda text: "",
    "another table": lambda text: '{"cells": [{}], "metadata": {"sinkbook": 1}}',
    "without seconds": lambda text: text.replace('"seconds"', '"minutes"'),
    "a digit flipped": flip,
}


def test_a_damaged_copy_counts_as_not_there(repository):
    repository.chapter("01_good", "print(seed)")
    place = build.workplace("quick")
    build.run_chapters(place=place)
    path = repository.executed("01_good")
    whole = path.read_text()
    hashed = build.content_hash(repository.root / "book" / "01_good.ipynb", place, 0)
    for damage in DAMAGES.values():
        path.write_text(whole)
        assert Execution.kept(path, hashed)
        path.write_text(damage(whole))
        assert Execution.kept(path, hashed) is None


def test_an_edit_during_a_run_that_is_put_back_changes_nothing(repository):
    """What is run is what was read, and hashed, before it began."""
    path = repository.chapter("01_edited", "print(seed)")
    content, read = path.read_bytes(), build.execute

    def execute(*arguments, **options):
        path.write_text(json.dumps(notebook("print('another')")))
        try:
            return read(*arguments, **options)
        finally:
            path.write_bytes(content)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(build, "execute", execute)
        build.run_chapters(place=build.workplace("quick"))
    (kept,) = build.run_chapters(place=build.workplace("quick"), fresh=False)
    assert kept.from_cache
    assert "".join(kept.notebook["cells"][-1]["outputs"][0]["text"]) == "0\n"


def test_a_copy_made_while_its_claims_were_edited_is_made_again(repository, caplog):
    claims = repository.root / "book" / "claims.yml"
    edit = f"from pathlib import Path; p = Path({str(claims)!r}); p.write_text(p.read_text())"
    repository.chapter("01_edited", edit)
    with caplog.at_level(logging.WARNING, "sinkbook"):
        build.run_chapters(place=build.workplace("quick"))
    assert "01_edited was run while claims.yml was edited" in caplog.text
    repository.chapter("01_edited", "1 + 1")
    build.run_chapters(place=build.workplace("quick"))
    (kept,) = build.run_chapters(place=build.workplace("quick"), fresh=False)
    assert kept.from_cache


def test_drafts_of_others_are_never_taken(repository):
    """What an orphan of another profile writes, it writes elsewhere."""
    look = "for p in pathlib.Path('../build').rglob('01*.ipynb'): print(p.parts[2])"
    repository.chapter("01_good", "import pathlib", look)
    folders = set()
    for profile in ("quick", "paper"):
        (done,) = build.run_chapters(place=build.workplace(profile))
        said = "".join(done.notebook["cells"][-1]["outputs"][0]["text"]).split()
        folders.add(next(name for name in said if name.startswith(build.SCRATCH)))
    assert len(folders) == 2


@pytest.mark.parametrize(
    ("lie", "differs"),
    [
        (lambda cells: cells[1].update(source="seed = 1"), "it was not run with"),
        (lambda cells: cells.pop(1), "it was not run with"),
        (lambda cells: cells[2].update(source="print('else')"), "not those of the source"),
        (lambda cells: cells.pop(), "not those of the source"),
        (lambda cells: cells[2].update(execution_count=None), "has not run"),
    ],
)
def test_a_copy_that_is_not_what_was_asked_for_is_told(lie, differs):
    cells = [dict(cell, execution_count=1) for cell in GOOD["cells"]]
    injected = {"tags": ["injected-parameters"]}
    cells.insert(1, cells[1] | {"metadata": injected, "source": 'profile = "quick"\nseed = 0'})
    asked = {"profile": "quick", "seed": 0}
    assert what_differs({"cells": cells}, GOOD, asked) is None
    lie(cells)
    assert differs in what_differs({"cells": cells}, GOOD, asked)


@pytest.mark.parametrize("stop", ["import os; os._exit(0)", "raise SystemExit"])
def test_a_chapter_that_ends_before_its_end_is_not_kept(repository, sinkbook, stop):
    repository.chapter("01_short", stop, "print('never')")
    status, _, stderr = sinkbook("run", "01")
    assert status == 1 and "01_short" in stderr and "Traceback" not in stderr
    assert not repository.executed("01_short").exists()


def test_the_cause_is_the_last_line_with_words_and_not_what_underlines_it(
    repository, sinkbook, monkeypatch, tmp_path
):
    said = "print('noise'); print('nothing is as it was'); print('-' * 70); print()"
    (tmp_path / "papermill.py").write_text(f"{said}; raise SystemExit(2)")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    repository.chapter("01_good", "print(seed)")
    status, _, stderr = sinkbook("run", "01")
    assert status == 1 and "01_good could not be run: nothing is as it was\n" in stderr


# Cells, and a word in the log that tells of each.
QUIET = {
    "from sinkbook.files import NOTICES\nNOTICES.warning('damaged')": "damaged",
    "import logging\nlogging.getLogger('matplotlib').warning('font cache')": "font cache",
    "import matplotlib.pyplot": "MPLCONFIGDIR",  # and a home that cannot be written
    # A machine that takes more than a second for what takes milliseconds elsewhere.
    "import itertools, types, matplotlib.legend, matplotlib.pyplot as plt\n"
    "seconds = itertools.count(0, 2)\n"
    "clock = types.SimpleNamespace(perf_counter=lambda: next(seconds))\n"
    "matplotlib.legend.time = clock\n"
    "plt.plot([0, 1], label='a')\n"
    "plt.legend()\n"
    "plt.gcf().canvas.draw()\n"
    "plt.close()": "can be slow",
    # A disk without locks.
    "import errno, fcntl, pathlib, filelock\n"
    "def flock(*_): raise OSError(errno.ENOSYS, 'no locks')\n"
    "fcntl.flock = flock\n"
    "with filelock.FileLock('here.lock'): pass": "flock",
}


def test_what_is_said_of_the_machine_is_in_the_log_and_stops_no_chapter(
    repository, sinkbook, monkeypatch, tmp_path
):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MPLCONFIGDIR", str(tmp_path / "file" / "matplotlib"))
    repository.chapter("01_quiet", *QUIET)
    status, _, stderr = sinkbook("run", "01")
    assert (status, stderr) == (0, "")
    (execution,) = build.run_chapters(place=build.workplace("quick"), fresh=False)
    assert execution.from_cache
    assert not any(cell["outputs"] for cell in execution.notebook["cells"][-len(QUIET) :])
    log = (repository.output / "logs" / "01_quiet.log").read_text()
    assert [word for word in QUIET.values() if word not in log] == []


def test_what_a_user_has_put_at_the_start_of_every_kernel_is_left_out(
    repository, sinkbook, monkeypatch, tmp_path
):
    startup = tmp_path / "ipython" / "profile_default" / "startup"
    startup.mkdir(parents=True)
    (startup / "own.py").write_text("print = None")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    repository.chapter("01_good", "print(seed)")
    assert sinkbook("run", "01")[0] == 0


# --- What the command line says ---

SINKBOOK = [sys.executable, "-m", "sinkbook.cli"]


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp437"])
def test_any_encoding_will_do(encoding):
    environment = os.environ | {"PYTHONIOENCODING": encoding}
    done = subprocess.run([*SINKBOOK, "claims"], env=environment, capture_output=True)
    assert done.returncode == 0 and done.stderr == b""
    done.stdout.decode(encoding)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
@pytest.mark.parametrize("arguments", [["claims"], ["--help"], ["fetch", "--list"]])
def test_a_full_disk_below_stdout_is_one_message(arguments):
    with open("/dev/full", "wb") as full:
        done = subprocess.run([*SINKBOOK, *arguments], stdout=full, stderr=subprocess.PIPE)
    said = done.stderr.decode()
    assert done.returncode == 1
    assert said.startswith("sinkbook: cannot write: No space left") and said.count("\n") == 1


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_stream_that_is_closed_is_no_file_of_ours(repository, closed):
    repository.chapter("01_good", "print(seed)")
    command = f"{quote(sys.executable)} -m sinkbook.cli run 01 {closed}"
    assert subprocess.run(["sh", "-c", command], stdout=subprocess.DEVNULL).returncode == 0
    assert Execution(repository.executed("01_good"), 0.0).page()


def test_whoever_reads_the_first_line_only_hears_no_complaint():
    command = f"{quote(sys.executable)} -m sinkbook.cli claims | head -1"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True)
    assert done.stderr == "" and "claims: " in done.stdout
