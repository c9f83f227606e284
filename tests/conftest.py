"""What all tests share: their order, a run store of their own, each chapter executed once.

Folders mirror the package. `repository` checks the repository and the pipeline on tiny notebooks,
`chapters` executes the book (marked `book`), `site` opens its pages in a browser, and `pages` what
lives on them, without the book. What loads models of transformers is marked `weights`.

Limits of time end what would never end, and nothing else: a machine a fifth as fast stays below.
"""

import gc
import importlib
import json
import os
import random
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import filelock
import numpy as np
import pytest

from tiny_book import Repository

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported

# Before the package: while one of its modules is imported under the hook of jaxtyping, whatever
# that imports is looked for under the hook's own name for bytecode, and compiled from source.
for _library in (
    "beartype",
    "matplotlib.pyplot",
    "peft",
    "scipy.optimize",
    "scipy.stats",
    "transformers.modeling_utils",
    "xarray",
):
    importlib.import_module(_library)

ROOT = Path(__file__).resolve().parent.parent
# While two chapters compute, beside them what mostly waits, for kernels and for commands; then what
# computes itself, and the book's pages last: each may be opened by any process, so that none waits.
LAYERS = ("chapters", "repository", "faults", "doctests", "package", "weights", "site")
CHAPTER_SECONDS = 3600.0
BOOK_SECONDS = 3 * 3600  # the first test of the book waits for all chapters


def pytest_configure(config: pytest.Config) -> None:
    """Everything is trained afresh: the session's run store starts empty and ends with it.

    Downloads stay in the user's cache folder. A store that the environment names is used as it is.
    """
    if "SINKBOOK_RUNS" not in os.environ:  # with pytest-xdist, workers inherit the first one's
        (ROOT / "build" / "test").mkdir(parents=True, exist_ok=True)
        store = tempfile.mkdtemp(dir=ROOT / "build" / "test", prefix="runs-")
        os.environ["SINKBOOK_RUNS"] = store
        config.add_cleanup(lambda: shutil.rmtree(store, ignore_errors=True))


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The chapters first and in one process, since they take longest; a page's tests in one."""

    def layer(item: pytest.Item) -> int:
        if not item.path.is_relative_to(ROOT / "tests"):
            return LAYERS.index("doctests")
        folder = item.path.parent.name
        if folder not in LAYERS:
            folder = "weights" if item.get_closest_marker("weights") else "package"
        return LAYERS.index(folder)

    items.sort(key=layer)
    for item in items:
        if item.path.parent.name in ("chapters", "site"):
            item.add_marker(pytest.mark.book)
            item.add_marker(pytest.mark.timeout(BOOK_SECONDS))
        if item.path.parent.name == "chapters":
            item.add_marker(pytest.mark.xdist_group("chapters"))
        elif item.path.parent.name == "site" and hasattr(item, "callspec"):
            item.add_marker(pytest.mark.xdist_group(f"page {item.callspec.params['name']}"))
        if item.path.parent.name in ("pages", "site"):
            item.add_marker(pytest.mark.site)


def pytest_collection_finish() -> None:
    """What is there now, stays: the garbage collector need not look through it again and again."""
    gc.collect()
    gc.freeze()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """List the claims whose verdict depends on the machine: measured, and no reason to be red.

    And count the kills.
    """
    properties = [
        known
        for found in terminalreporter.stats.values()
        for report in found
        if getattr(report, "when", "") == "call"
        for known in report.user_properties
    ]
    if kills := sum(number for name, number in properties if name == "kills"):
        terminalreporter.write_line(f"{kills} kills struck a command that had not ended.")
    lines = [text for name, text in properties if name == "sensitive claim"]
    if lines:
        terminalreporter.section("claims whose verdict depends on the machine: a debt")
        for line in lines:
            terminalreporter.line(line)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test draws the same numbers each time, alone or among others."""
    import torch

    random.seed(0)
    np.random.seed(0)  # noqa: NPY002, for libraries that draw from it
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def once(tmp_path_factory, worker_id) -> Callable[[str, Callable[[], dict]], dict]:
    """Does something in one process of the session; the others wait for what came of it."""
    base = tmp_path_factory.getbasetemp()
    folder = base if worker_id == "master" else base.parent

    def made(name: str, make: Callable[[], dict]) -> dict:
        path = folder / f"{name}.json"
        with filelock.FileLock(f"{path}.lock"):
            if not path.exists():
                path.write_text(json.dumps(make()), encoding="utf-8")
            return json.loads(path.read_text(encoding="utf-8"))

    return made


@pytest.fixture(scope="session")
def place():
    """The repository at the quick profile, with a build folder of the tests' own."""
    from sinkbook.book import build

    return build.Workplace(ROOT, ROOT / "build" / "test" / "book", "quick")


class Executions(dict):
    """Executed chapters by name; asking for one that stopped fails the test with its message."""

    def __init__(self):
        self.failures: dict[str, str] = {}

    def __missing__(self, name: str):
        pytest.fail(self.failures.get(name, f"no chapter {name}"), pytrace=False)


@pytest.fixture(scope="session")
def executions(place, once) -> Executions:
    """Every chapter of the book, executed once, by name. One that stops takes no other along."""
    from sinkbook.book import build
    from sinkbook.book.notebooks import Execution

    def run() -> dict:
        shutil.rmtree(place.output, ignore_errors=True)
        failures = {}
        done = build.run_chapters(
            place=place,
            jobs=min(2, os.cpu_count() or 1),
            limit=CHAPTER_SECONDS,
            failed=lambda name, error: failures.update({name: str(error)}),
        )
        return {"done": [(str(e.path), e.seconds) for e in done], "failures": failures}

    made, found = once("executions", run), Executions()
    found.failures = made["failures"]
    for path, seconds in made["done"]:
        execution = Execution(Path(path), seconds)
        found[execution.chapter] = execution
    return found


@pytest.fixture(scope="session")
def pages(place, executions, once) -> Path:
    """The folder of the rendered book, made from the chapters that the tests executed.

    A chapter that stopped has a page that says so, for the others to link to.
    """
    from sinkbook.book import build
    from sinkbook.errors import SinkbookError

    def render() -> dict:
        try:
            build.install_scripts(ROOT)
            build.stage(executions.values(), place)
            for name in executions.failures:
                path = place.staged / "book" / f"{name}.md"
                path.write_text(f"# {name}\n\nIt did not run.\n")
            return {"pages": str(build.render(place).parent)}
        except SinkbookError as error:
            return {"problem": str(error)}

    made = once("pages", render)
    if "problem" in made:
        pytest.fail(made["problem"], pytrace=False)
    return Path(made["pages"])


@pytest.fixture(scope="session")
def browser():
    """Chromium; tests that open pages are skipped where there is none."""
    names = ("chromium", "chromium-browser", "google-chrome")
    found = next((path for path in map(shutil.which, names) if path), None)
    if found is None:
        if os.environ.get("SINKBOOK_REQUIRE_BROWSER") == "1":
            pytest.fail("SINKBOOK_REQUIRE_BROWSER=1, and there is no Chromium to open the pages in")
        pytest.skip("no Chromium here: install one to check the pages (Debian: chromium)")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def asking(browser, tmp_path):
    """A function that opens a page with some HTML as a file, with the script of its questions.

    Whatever the page complains of, and every request to another file, fails the test.
    """
    from sinkbook.pages.scripts import question_scripts

    contexts, complaints = [], []
    (name,) = scripts = question_scripts(ROOT)
    (tmp_path / name).write_text(scripts[name], encoding="utf-8")
    style = (ROOT / "_static" / "questions" / "questions.css").read_text(encoding="utf-8")
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    head += f"<title>asking</title><style>{style}</style>"

    def open_page(html: str, **view):
        page = tmp_path / f"asking-{len(contexts)}.html"
        page.write_text(
            f'<!doctype html><html lang="en"><head>{head}</head>'
            f'<body>{html}<script src="{name}"></script></body></html>',
            encoding="utf-8",
        )
        contexts.append(browser.new_context(**view))
        tab = contexts[-1].new_page()
        tab.on("console", lambda m: complaints.append(m.text) if m.type == "error" else None)
        tab.on("pageerror", lambda error: complaints.append(str(error)))
        known = (page.as_uri(), (tmp_path / name).as_uri())
        tab.on("request", lambda r: None if r.url in known else complaints.append(r.url))
        tab.goto(page.as_uri())
        return tab

    yield open_page
    for context in contexts:
        context.close()
    assert complaints == []


@pytest.fixture
def repository(tmp_path, monkeypatch) -> Repository:
    """An empty repository, which is the working directory; with a cache of its own."""
    repository = Repository(tmp_path / "repository")
    monkeypatch.chdir(repository.root)
    monkeypatch.setenv("SINKBOOK_CACHE", str(tmp_path / "cache"))
    return repository


@pytest.fixture
def no_renderer(monkeypatch) -> None:
    """Stand in for jupyter-book, and for the scripts that npm installs: one page, at once."""
    from sinkbook.book import build

    def render(place):
        shutil.rmtree(place.pages, ignore_errors=True)
        place.pages.mkdir(parents=True)
        (place.pages / "index.html").write_text("new")
        return place.pages / "index.html"

    monkeypatch.setattr(build, "render", render)
    monkeypatch.setattr(build, "install_scripts", lambda root: None)
    monkeypatch.setattr(build.vendor, "copy", lambda root, folder: None)


@pytest.fixture
def sinkbook(monkeypatch, capfd) -> Callable[..., tuple[int, str, str]]:
    """Run the command line in this process: exit status, stdout, stderr."""

    from sinkbook import cli

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["sinkbook", *map(str, arguments)])
        status = 0
        try:
            cli.main()
        except SystemExit as end:
            status = end.code or 0
        captured = capfd.readouterr()
        return status, captured.out, captured.err

    return run
