"""The law of the house: imports point downwards, rooms stay small, the picture is up to date."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from house import PAGE, page

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "sinkbook"
LINTER = Path(sys.executable).with_name("lint-imports")


def lint(config: Path) -> subprocess.CompletedProcess[str]:
    command = [LINTER, "--no-cache", "--config", config]
    return subprocess.run(command, cwd=config.parent, capture_output=True, text=True)


def test_imports_keep_the_contracts():
    outcome = lint(ROOT / "pyproject.toml")
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr


@pytest.mark.parametrize(
    "module, line",
    [
        ("probe/measure.py", "from sinkbook.figures import basic"),
        ("models/layout.py", "def late():\n    from sinkbook.toy import transformer"),
        ("data/corpora.py", "import matplotlib.pyplot"),
        ("errors.py", "import sinkbook.files"),
        ("upstairs.py", "from sinkbook import cli"),
    ],
)
def test_an_import_upwards_breaks_them(tmp_path, module, line):
    for path in PACKAGE.rglob("*.py"):
        copy = tmp_path / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_text(path.read_text(encoding="utf-8"), encoding="utf-8")
    (tmp_path / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    with (tmp_path / "sinkbook" / module).open("a", encoding="utf-8") as file:
        file.write(f"\n{line}\n")
    outcome = lint(tmp_path / "pyproject.toml")
    assert outcome.returncode and module.split("/")[-1].removesuffix(".py") in outcome.stdout


def test_a_module_is_a_page_or_three_and_a_function_a_screen():
    long = set()
    for path in PACKAGE.rglob("*.py"):
        text, name = path.read_text(encoding="utf-8"), str(path.relative_to(PACKAGE))
        functions = (ast.FunctionDef, ast.AsyncFunctionDef)
        found = [node for node in ast.walk(ast.parse(text)) if isinstance(node, functions)]
        long |= {f"{name}: {f.name}" for f in found if f.end_lineno - f.lineno >= 60}
        long |= {name} if len(text.splitlines()) > 400 else set()
    assert long == set()


def test_a_package_has_twelve_modules_at_most():
    packages = [path for path in PACKAGE.iterdir() if (path / "__init__.py").exists()]
    assert {p.name for p in packages if len([*p.glob("*.py")]) > 13} == set()


def test_the_picture_in_contributing_is_made_from_the_imports_of_today():
    text = PAGE.read_text(encoding="utf-8")
    assert text == page(text), "make house"
