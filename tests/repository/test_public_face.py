"""What `import sinkbook` gives: the public names, at once, and nothing else changes by it."""

import ast
import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import sinkbook

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("torch", "transformers", "matplotlib", "xarray", "pandas", "numpy", "sympy")

# Imports every module, and prints what was not as before.
SNAPSHOT = """
import json, os, pkgutil, sys, warnings
import matplotlib, torch
from transformers import AutoModel, Trainer
import distributed, ipywidgets, matplotlib.pyplot, pandas, pytorch_optimizer, xarray
import sphinx.transforms.post_transforms, sphinx.util.docutils

def now():
    return {
        "matplotlib's style": dict(matplotlib.rcParams),
        "the environment": dict(os.environ),
        "the streams": [id(sys.stdout), id(sys.stderr), id(sys.excepthook)],
        "the filters of warnings": list(map(str, warnings.filters)),
        "torch's threads": torch.get_num_threads(),
        "torch's gradients": torch.is_grad_enabled(),
        "torch's type": str(torch.get_default_dtype()),
        "torch's precision": torch.get_float32_matmul_precision(),
        "torch's determinism": torch.are_deterministic_algorithms_enabled(),
        "torch's random numbers": torch.random.get_rng_state().tolist(),
        "the working directory": os.getcwd(),
        "the search path": list(sys.path),
    }

before = now()
import sinkbook
for module in sorted(pkgutil.walk_packages(sinkbook.__path__, "sinkbook."), key=lambda m: m.name):
    __import__(module.name)
after = now()
print(json.dumps([what for what in before if before[what] != after[what]]))
"""


def test_every_public_name_is_there_and_comes_from_where_the_stub_says():
    stub = ast.parse((ROOT / "sinkbook" / "__init__.pyi").read_text())
    origins = {
        alias.name: f"sinkbook.{node.module}"
        for node in stub.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    (listed,) = (ast.literal_eval(node.value) for node in stub.body if isinstance(node, ast.Assign))
    assert sorted(sinkbook.__all__) == sorted(listed) == sorted([*origins, "__version__"])
    for name, origin in origins.items():
        assert getattr(sinkbook, name) is getattr(sys.modules[origin], name)
        assert getattr(sinkbook, name).__doc__


def test_a_name_that_is_not_there_is_an_attribute_error():
    with pytest.raises(AttributeError, match="meassure"):
        sinkbook.meassure  # noqa: B018


def test_the_version_is_the_one_that_is_cited():
    cited = (ROOT / "CITATION.cff").read_text().splitlines()
    assert f"version: {sinkbook.__version__}" in cited


@pytest.mark.parametrize("command", ["import sinkbook", "import sinkbook.cli; main(['--help'])"])
def test_what_is_heavy_is_imported_only_when_it_is_used(command):
    command = command.replace("main(['--help'])", "sinkbook.cli.app(['--help'], standalone_mode=0)")
    code = f"{command}\nimport sys, json\nprint(json.dumps(sorted(sys.modules)))"
    outcome = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert outcome.returncode == 0, outcome.stderr
    assert not set(json.loads(outcome.stdout.splitlines()[-1])) & set(HEAVY)


def test_importing_every_module_changes_nothing_else():
    outcome = subprocess.run([sys.executable, "-c", SNAPSHOT], capture_output=True, text=True)
    assert outcome.returncode == 0 and outcome.stderr == ""
    assert json.loads(outcome.stdout) == []


@pytest.mark.weights
def test_the_reference_page_begins_with_every_public_name_and_examples_that_run():
    page = (ROOT / "book" / "api.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| [^|]+ \| `([^`]+)` \|$", page, flags=re.MULTILINE)
    assert [name for name, _ in rows] == sorted(sinkbook.__all__, key=[n for n, _ in rows].index)
    names = {name: getattr(sinkbook, name) for name in sinkbook.__all__}
    # Pythia's checkpoints are not at hand: only that they could be asked for like this.
    signature = inspect.signature(sinkbook.measure_checkpoints)
    names["measure_checkpoints"] = lambda *arguments, **options: signature.bind(
        *arguments, **options
    )
    exec(re.search(r"```python\n(.*?)```", page, flags=re.DOTALL)[1], names)
    for name, example in rows:
        assert name in example
        if example.startswith("except "):
            example = f"try: load('no-such-model-')\n{example}"
        exec(example, names)


def test_editors_are_told_that_the_package_is_typed():
    assert (ROOT / "sinkbook" / "py.typed").is_file()
