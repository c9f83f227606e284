"""Malformed inputs: each ends with a message of ours, that says what is wrong, and never otherwise.

The tables are beside this file, a line each. They are tried without the type checks of the other
tests, which would refuse before we do, in `trying.py`.
"""

import ast
import importlib.util
import re
from pathlib import Path

import pytest

import sinkbook

HERE = Path(__file__).parent
TABLES = ("arguments", "files")


def rows(table: str) -> list[tuple[str, str]]:
    """The inputs of a table, and what is said of each."""
    spec = importlib.util.spec_from_file_location(table, HERE / f"{table}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return [row for group in module.TABLE.values() for row in group]


# How their types are written: over (text, position), in torch.
TOKEN_IDS = r"TokenTable|Tokens|(token_windows\.)?Windows|Int\[Tensor, ' ?(text|batch) position'\]"

ALL = {table: rows(table) for table in TABLES}
INPUTS = {table: [row[0] for row in of_table] for table, of_table in ALL.items()}
EACH = [(table, *row) for table, of_table in ALL.items() for row in of_table]


@pytest.mark.xdist_group("faults")
@pytest.mark.parametrize(
    ("table", "given", "said"), EACH, ids=[f"{table}: {given}" for table, given, _ in EACH]
)
def test_a_malformed_input_is_told_in_a_sentence(outcomes, table, given, said):
    outcome = outcomes(INPUTS)[table][given]
    assert outcome["ours"], f"{outcome['kind']}: {outcome['said']} ({outcome['where']})"
    assert said in outcome["said"]


def test_the_tables_hold_several_hundred_inputs_and_none_twice():
    inputs = [given for _, given, _ in EACH]
    assert len(inputs) == len(set(inputs)) > 400


# What takes token ids and hands them to one of those, or is given what was made of them.
NOT_TRIED = {
    "add_gradients": "of a training",
    "by_token": "of what was measured on them",
    "check_by_text": "in the place of a layer",
    "check_ids": "refuses",
    "compute_by_text": "in the place of a layer",
    "next_token_losses": "of a training",
    "taking": "refuses",
    "value_gradients": "of a training",
}


def test_whatever_takes_token_ids_is_tried():
    """By the annotations of the sources: a new function is missed here, and named."""
    listed = {re.match(r"\w+", given)[0] for given in INPUTS["arguments"]}
    found = set()
    for path in Path(sinkbook.__file__).parent.rglob("*.py"):
        for function in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(function, ast.FunctionDef) and not function.name.startswith("_"):
                arguments = function.args.args + function.args.kwonlyargs
                shown = (ast.unparse(each.annotation) for each in arguments if each.annotation)
                if any(re.fullmatch(TOKEN_IDS, kind) for kind in shown):
                    found.add(function.name)
    assert len(found) > 40
    assert found - listed == set(NOT_TRIED)
