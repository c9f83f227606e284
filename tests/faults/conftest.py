"""What became of every malformed input: a table is tried as a whole, in one process, once."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def outcomes(tmp_path_factory) -> Callable[[str], dict[str, dict[str, str]]]:
    """By a table's module, what each of its inputs ended with; see `trying.py`."""
    known: dict[str, dict[str, dict[str, str]]] = {}

    def tried(table: str, inputs: list[str]) -> dict[str, dict[str, str]]:
        if table not in known:
            folder = tmp_path_factory.mktemp("faults")
            environment = os.environ | {
                "HF_HUB_OFFLINE": "1",
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": str(HERE.parents[1]),
                "SINKBOOK_RUNS": str(folder / "runs"),
            }
            done = subprocess.run(
                [sys.executable, HERE / "trying.py", table, folder / "outcomes.json"],
                input=json.dumps(inputs),
                capture_output=True,
                text=True,
                env=environment,
                cwd=folder,
            )
            assert done.returncode == 0, done.stderr
            found = json.loads((folder / "outcomes.json").read_text())
            known[table] = dict(zip(inputs, found, strict=True))
        return known[table]

    return tried
