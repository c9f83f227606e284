"""What a hash of code depends on: in small packages made for it, and in this one as it stands."""

import re
import shutil
from functools import cache
from pathlib import Path

import pytest

from sinkbook import dependencies
from sinkbook.book import build
from sinkbook.dependencies import closure
from sinkbook.errors import SinkbookError
from sinkbook.llm import checkpoints, peak_recovery, shakespeare_pretraining, small_llama
from sinkbook.toy.runs import TrainingConfig

# --- Packages made for it ---------------------------------------------------------------------


class Package:
    """A package in a folder, and the hashes of its code."""

    def __init__(self, folder: Path, files: dict[str, str]):
        self.folder = folder
        for name, text in files.items():
            self.write(name, text)

    def write(self, name: str, text: str) -> None:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        for parent in path.parents:
            if parent.is_relative_to(self.folder) and not (parent / "__init__.py").exists():
                (parent / "__init__.py").write_text("")

    def hash(self, *roots: str, **options) -> str:
        return closure(*roots, folder=self.folder, **options).hash

    def changed_by(self, name: str, old: str, new: str, *roots: str, **options) -> bool:
        """Whether an edit changes the hash; the edit is undone."""
        before, text = self.hash(*roots, **options), (self.folder / name).read_text()
        assert old in text
        self.write(name, text.replace(old, new))
        after = self.hash(*roots, **options)
        self.write(name, text)
        assert self.hash(*roots, **options) == before
        return after != before


@pytest.fixture
def package(tmp_path):
    return lambda files: Package(tmp_path / "sinkbook", files)


USERS = {
    "by name": "from sinkbook.a import f\ndef use(): return f()",
    "by another name": "from sinkbook.a import f as g\ndef use(): return g()",
    "as a module's attribute": "from sinkbook import a\ndef use(): return a.f()",
    "by the whole path": "import sinkbook.a\ndef use(): return sinkbook.a.f()",
    "by an alias of the path": "import sinkbook.a as b\ndef use(): return b.f()",
    "relatively": "from .a import f\ndef use(): return f()",
    "through a package": "from sinkbook.sub import f\ndef use(): return f()",
    "through a lazy package": "from sinkbook.lazy import f\ndef use(): return f()",
    "through a lazy function": "from sinkbook import getter\ndef use(): return getter.f()",
    "inside a function": "def use():\n    from sinkbook.a import f\n    return f()",
    "inside a method": "class use:\n    def m(self):\n        from sinkbook import a\n"
    "        return a.f()",
    "as a default": "from sinkbook.a import f\ndef use(g=f): return g()",
    "as a class attribute": "from sinkbook.a import f\nclass use:\n    g = f",
    "as a decorator": "from sinkbook.a import f\n@f\ndef use(): ...",
    "as a base": "from sinkbook.a import f\nclass use(f): ...",
    "in a table": "from sinkbook.a import f\nTABLE = {'f': f}\ndef use(n): return TABLE[n]()",
    "in a condition": "try:\n    from sinkbook.a import f\nexcept ImportError:\n    f = None\n"
    "def use(): return f()",
    "with a star": "from sinkbook.a import *\ndef use(): return f()",
    "by a module given away": "from sinkbook import a\ndef use(): return getattr(a, 'f')()",
    "by a name put together": "import importlib\n"
    "def use(n): return importlib.import_module('sinkbook.' + n).f()",
    "as another program": "import subprocess\n"
    "def use(): subprocess.run(['python', '-m', 'sinkbook.a'])",
    "by a registry": "from sinkbook.registry import KERNELS\ndef use(n): return KERNELS[n]()",
    "by a class that keeps its heirs": "from sinkbook.heirs import Base\n"
    "def use(): return Base.all[0]().run()",
}
FILES = {
    "a.py": "def f(): return deep() + 1\ndef deep(): return 10\ndef unused(): return 20\n",
    "sub/__init__.py": "from sinkbook.a import f\nfrom sinkbook.other import g\n",
    "lazy/__init__.py": "import lazy_loader\n"
    "__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)\n",
    "lazy/__init__.pyi": "from sinkbook.a import f\nfrom sinkbook.other import g\n",
    "getter.py": "def __getattr__(name):\n    from sinkbook import a\n"
    "    return getattr(a, name)\n",
    "other.py": "def g(): return 30\n",
    "registry.py": "from sinkbook.a import f\nKERNELS = {}\n"
    "def kernel(function):\n    KERNELS[function.__name__] = function\n    return function\n"
    "@kernel\ndef k(): return f()\n",
    "heirs.py": "from sinkbook.a import f\nclass Base:\n    all = []\n"
    "    def __init_subclass__(cls): Base.all.append(cls)\n"
    "class Heir(Base):\n    def run(self): return f()\n",
}


@pytest.mark.parametrize("way", USERS)
def test_a_hash_reaches_what_is_used_however_it_is_imported(way, package):
    made = package(FILES | {"user.py": USERS[way]})
    assert made.changed_by("a.py", "return 10", "return 11", "sinkbook.user:use")
    if way != "relatively":  # a notebook lies in no package
        assert made.changed_by("a.py", "return 10", "return 11", cells=f"{USERS[way]}\nuse()")


@pytest.mark.parametrize("way", list(USERS)[:17])
def test_a_hash_leaves_out_what_is_not_used(way, package):
    made = package(FILES | {"user.py": USERS[way]})
    whole = way == "by an alias of the path"
    assert not made.changed_by("other.py", "return 30", "return 31", "sinkbook.user:use")
    if "lazy function" not in way:  # where a function looks names up, all of them may be meant
        assert whole or not made.changed_by("a.py", "return 20", "return 21", "sinkbook.user:use")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("def f(): return deep() + 1", "def f():\n    # why\n    return (deep()\n     + 1)"),
        ("def f(): return deep() + 1", 'def f():\n    """What."""\n    return deep() + 1'),
        ("def deep", '"""About this module."""\n\n\ndef deep'),
    ],
)
def test_comments_docstrings_and_formatting_change_nothing(old, new, package):
    made = package(FILES | {"user.py": USERS["by name"]})
    assert not made.changed_by("a.py", old, new, "sinkbook.user")


CHECKED = """
from sinkbook.arguments import check_all, check_number, number

class Config:
    rate = 1

    def use(self):
        return load(self.rate)
"""


@pytest.mark.parametrize(
    ("old", "new", "counts"),
    [
        ("        return", "        check_number(self.rate, 0)\n        return", False),
        (
            "    def use",
            "    def __post_init__(self):\n        check_number(1)\n\n    def use",
            False,
        ),
        ("load(self.rate)", "load(self.rate, weights_only=True)", False),
        ("    def use", "    @check_all\n    def use", False),
        ("    def use", "    @other\n    def use", True),
        ("    def use", "    @check_all(1)\n    def use", True),
        ("        return", "        number(self.rate, 0)\n        return", True),
        ("        return", "        check_number(self.take())\n        return", True),
        ("        return", "        self.x = check_number(1)\n        return", True),
        ("        return", "        check_other(self.rate)\n        return", True),
        ("    def use", "    def __post_init__(self):\n        self.x = 1\n\n    def use", True),
        ("load(self.rate)", "load(self.rate, weights_only=False)", True),
    ],
)
def test_what_can_only_refuse_does_not_count(old, new, counts, package):
    """A stored run is found again after its arguments are looked at more closely."""
    made = package({"a.py": CHECKED, "arguments.py": "def check_number(*_): pass"})
    out = ("sinkbook.arguments",)
    assert made.changed_by("a.py", old, new, "sinkbook.a", without=out) == counts


def test_what_a_module_does_when_it_is_imported_counts_wherever_it_is_imported(package):
    made = package(FILES | {"setup.py": "from sinkbook.a import f\nf()\n"})
    made.write("user.py", "from sinkbook import setup\ndef use(): ...")
    assert made.changed_by("a.py", "return 10", "return 11", "sinkbook.user:use")


def test_constants_other_packages_and_files_beside_the_code_count(package):
    made = package(
        {
            "a.py": "from math import sin as turn\nSIZE = 3\ndef f(): return turn(SIZE)\n",
            "style.css": "red",
        }
    )
    assert made.changed_by("a.py", "SIZE = 3", "SIZE = 4", "sinkbook.a:f")
    assert made.changed_by("a.py", "import sin", "import cos", "sinkbook.a:f")
    assert made.changed_by("style.css", "red", "blue", "sinkbook.a:f")


def test_what_is_left_out_is_not_followed(package):
    made = package(FILES | {"user.py": USERS["by name"]})
    left_out = {"without": ("sinkbook.a",)}
    assert not made.changed_by("a.py", "return 10", "return 11", "sinkbook.user", **left_out)


def test_a_root_that_is_not_there_is_an_error_and_no_hash():
    for root in ("sinkbook.toy.trainign", "sinkbook.toy.training:trian", "torch"):
        with pytest.raises(SinkbookError, match=re.escape(repr(root))):
            closure(root)


# --- This package -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def copied(tmp_path_factory):
    """A copy of the package."""
    folder = tmp_path_factory.mktemp("copy") / "sinkbook"
    shutil.copytree(dependencies.FOLDER, folder, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


@pytest.fixture
def edit(copied, monkeypatch):
    """Edits a copy of the package whose code is hashed in place of it; undone at the end."""
    monkeypatch.setattr(dependencies, "FOLDER", copied)
    dependencies.code_hash.cache_clear()
    before = {}

    def changed(module: str, function: str) -> None:
        """Let a function begin by doing something else."""
        path = copied / f"{module}.py"
        before.setdefault(path, path.read_text())
        text, found = re.subn(
            rf"(?m)^(def {function}\((?:.|\n)*?:\n)(    )", r"\1    id(0)\n\2", path.read_text()
        )
        assert found == 1
        path.write_text(text)
        dependencies.code_hash.cache_clear()

    yield changed
    for path, text in before.items():
        path.write_text(text)
    dependencies.code_hash.cache_clear()


REVISION = checkpoints.Revision("step1", "0123", 1, None)
CHECKPOINT = checkpoints._Job(
    "someone/model", REVISION, ("a text",), 8, 4, 0, "cpu", None, False, False
)
PRETRAINING = shakespeare_pretraining.PretrainingConfig()
# What each user of the hash keeps its results under.
TRAINED = {
    "toy": lambda: TrainingConfig().folder,
    "Shakespeare": lambda: PRETRAINING.folder,
    "small Llama": lambda: small_llama.SmallLlama().folder,
}
MEASURED = {
    "toy": lambda: TrainingConfig().measured_by,
    "Shakespeare": lambda: PRETRAINING.measured_by,
    "checkpoint": lambda: CHECKPOINT.folder,
    "peak recovery": lambda: peak_recovery.Config().folder,
}


def keys(users: dict) -> dict:
    return {name: key() for name, key in users.items()}


@cache
def unedited(copied: Path) -> tuple[dict, dict]:
    """All keys by a copy of the package as it is before each edit, and after it."""
    assert copied == dependencies.FOLDER
    return keys(TRAINED), keys(MEASURED)


@pytest.fixture(autouse=True)
def texts(monkeypatch):
    """Texts for those whose keys count them, without a download."""
    monkeypatch.setattr(
        shakespeare_pretraining.corpora, "texts", lambda *_, **__: ["To be, or not to be"] * 40
    )
    shakespeare_pretraining.character_ids.cache_clear()
    yield
    shakespeare_pretraining.character_ids.cache_clear()


def test_an_edit_of_the_probe_measures_everything_again_and_trains_nothing(edit, copied):
    trained, measured = unedited(copied)
    edit("probe/measure", "measure")
    assert keys(TRAINED) == trained
    now = keys(MEASURED)
    # A fine-tuning keeps no weights on the way; it measures what it cuts, besides.
    assert all(now[name] != measured[name] for name in measured if name != "peak recovery")


@pytest.mark.parametrize(
    ("module", "function", "trained", "measured"),
    [
        ("toy/measurements", "measure_toy", set(), {"toy"}),
        ("toy/optimizers", "_adamw", {"toy", "Shakespeare"}, set()),
        ("llm/checkpoint_metrics", "measure_checkpoint", set(), {"Shakespeare", "checkpoint"}),
        ("llm/peak_recovery", "fine_tune", set(), set()),
        ("llm/peak_recovery", "measure_reemergence", set(), {"peak recovery"}),
        ("llm/small_llama", "tokenizer", {"small Llama"}, set()),
        ("llm/small_llama", "measure", set(), set()),
        ("llm/shakespeare_pretraining", "copying_head", set(), set()),
        ("figures/basic", "head_map", set(), set()),
        ("store", "save_run", set(), set()),
    ],
)
def test_an_edit_changes_the_keys_of_what_it_decides_and_of_nothing_else(
    module, function, trained, measured, edit, copied
):
    before = unedited(copied)
    edit(module, function)
    now = keys(TRAINED), keys(MEASURED)
    assert {name for name in TRAINED if now[0][name] != before[0][name]} >= trained
    assert {name for name in MEASURED if now[1][name] != before[1][name]} >= measured
    if not (trained or measured):
        assert now == before


def test_an_edit_of_a_figure_runs_the_chapters_again_that_draw_with_it_and_no_other(edit):
    place = build.workplace("quick")
    notebooks = build.chapters(place.root)
    before = {name: build.content_hash(path, place, 0) for name, path in notebooks.items()}
    for module, figure in [("basic", "head_scatter"), ("curves", "quantile_band")]:
        edit(f"figures/{module}", figure)
        now = {name: build.content_hash(path, place, 0) for name, path in notebooks.items()}
        again = {name for name in notebooks if now[name] != before[name]}
        drawn = re.compile(rf"\b{figure}\(")
        assert again == {n for n, path in notebooks.items() if drawn.search(path.read_text())}
        before = now
