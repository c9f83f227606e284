"""What became of every malformed input: those of a test are tried in one process, once."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def outcomes(tmp_path_factory) -> Callable[[dict[str, list[str]]], dict[str, dict[str, dict]]]:
    """What each input of each table ended with, given all its tables: `trying.py` imports once."""
    known: dict[str, dict[str, dict[str, dict]]] = {}

    def tried(tables: dict[str, list[str]]) -> dict[str, dict[str, dict]]:
        asked = json.dumps(tables)
        if asked not in known:
            folder = tmp_path_factory.mktemp("faults")
            environment = os.environ | {
                "HF_HUB_OFFLINE": "1",
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": str(HERE.parents[1]),
                "SINKBOOK_RUNS": str(folder / "runs"),
            }
            done = subprocess.run(
                [sys.executable, HERE / "trying.py", folder / "outcomes.json"],
                input=asked,
                capture_output=True,
                text=True,
                env=environment,
                cwd=folder,
            )
            assert done.returncode == 0, done.stderr
            found = json.loads((folder / "outcomes.json").read_text())
            known[asked] = {
                table: dict(zip(inputs, found[table], strict=True))
                for table, inputs in tables.items()
            }
        return known[asked]

    return tried
