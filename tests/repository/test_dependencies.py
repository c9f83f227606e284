"""What is imported is declared, once and with bounds; the probe needs nothing of the book's."""

import ast
import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tiny import tiny_model, tiny_tokenizer

ROOT = Path(__file__).resolve().parents[2]
OURS = {"sinkbook", "benchmarks", *(path.stem for path in (ROOT / "tests").rglob("*.py"))}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CORE, EXTRAS = PROJECT["dependencies"], PROJECT["optional-dependencies"]

# Declared, and imported by others for us, or run as commands.
NOT_IMPORTED = {
    "gguf": "transformers imports it to read GGUF files",
    "h5netcdf": "xarray writes NetCDF with it",
    "h5py": "h5netcdf reads and writes with it",
    "ipykernel": "the kernel of the chapters",
    "jupyter-book": "a command",
    "papermill": "a command",
    "sphinx": "it imports our extension",
    "sphinx-exercise": "an extension that _config.yml names",
    "sphinx-book-theme": "bounded for jupyter-book, which asks for it",
    "beartype": "jaxtyping's plugin of pytest checks shapes with it",
    "import-linter": "a command",
    "nbstripout": "a command",
    "pytest-timeout": "a plugin",
    "pytest-xdist": "a plugin",
    "ruff": "a command",
}


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def names(lines: list[str]) -> set[str]:
    return {canonical(Requirement(line).name) for line in lines}


def imported(*folders: str) -> dict[str, str]:
    """Distributions that modules and notebooks import, and a file that imports each."""
    distributions, found = packages_distributions(), {}
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Import):
                    roots = {alias.name.split(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                    roots = {node.module.split(".")[0]}
                else:
                    continue
                for root in roots - sys.stdlib_module_names - OURS:
                    ours = map(canonical, distributions.get(root, [root]))
                    found |= dict.fromkeys(ours, str(path.relative_to(ROOT)))
    return found


def closure(lines: list[str]) -> set[str]:
    """The distributions that requirements bring with them, themselves included."""
    found, waiting = set(), [Requirement(line) for line in lines]
    while waiting:
        requirement = waiting.pop()
        extras = requirement.extras or {""}
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        if (name := canonical(requirement.name)) in found:
            continue
        found.add(name)
        for line in requires(name) or []:
            needed = Requirement(line)
            if needed.marker is None or any(needed.marker.evaluate({"extra": e}) for e in extras):
                needed.marker = None
                waiting.append(needed)
    return found


@pytest.fixture(scope="module")
def only_the_books() -> set[str]:
    """Distributions that come with the book, and not with the package alone."""
    return closure([*CORE, *EXTRAS["book"]]) - closure(CORE)


def test_what_the_package_imports_is_declared():
    declared = names([*CORE, *EXTRAS["book"], *EXTRAS["dask"]])
    missing = {name: file for name, file in imported("sinkbook").items() if name not in declared}
    assert missing == {}


def test_what_tests_and_benchmarks_import_is_declared():
    declared = names([*CORE, *EXTRAS["book"], *EXTRAS["test"]])
    found = imported("tests", "benchmarks")
    assert {name: file for name, file in found.items() if name not in declared} == {}


def test_what_is_declared_is_imported_or_has_a_reason():
    found = {*imported("sinkbook", "tests", "benchmarks"), *NOT_IMPORTED}
    assert names([*CORE, *EXTRAS["book"], *EXTRAS["dask"], *EXTRAS["test"]]) <= found


@pytest.mark.parametrize("lines", [CORE, *EXTRAS.values()], ids=["core", *EXTRAS])
def test_each_dependency_is_declared_once_and_with_a_least_version(lines):
    requirements = [Requirement(line) for line in lines]
    assert len(names(lines)) == len(lines)
    for requirement in requirements:
        assert any(bound.operator == ">=" for bound in requirement.specifier), str(requirement)
    if lines is not CORE:
        assert not names(lines) & names(CORE)


def test_the_package_alone_brings_nothing_of_the_books(only_the_books):
    expected = {"jupyter-book", "papermill", "sphinx", "ipywidgets", "ipython", "scipy"}
    assert expected | {"pytorch-optimizer", "accelerate"} <= only_the_books


@pytest.mark.weights
def test_the_probe_works_without_the_books_packages(tmp_path, only_the_books):
    tiny_model(max_position_embeddings=48).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "hamlet.txt").write_text("to be or not to be the " * 20)
    # Not those that these bring: others in this environment, dask among them, need some of them.
    # Nor PEFT, which transformers imports where it finds it, and which comes with accelerate.
    blocked = only_the_books & names(EXTRAS["book"]) | {"dask", "distributed", "peft"}
    roots = [
        root
        for root, distributions in packages_distributions().items()
        if blocked.issuperset(map(canonical, distributions))
    ]
    code = f"""
import sys
sys.modules |= dict.fromkeys({roots!r})  # importing one of them is a ModuleNotFoundError
import sinkbook
for name in sinkbook.__all__:
    getattr(sinkbook, name)
import sinkbook.cli
sinkbook.cli.main()
"""
    arguments = ["probe", "model", "--text", "hamlet.txt", "--length", "32", "--out", "report"]
    outcome = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert outcome.returncode == 0, outcome.stderr
    assert (tmp_path / "report" / "report.html").is_file()
    assert outcome.stderr == ""
