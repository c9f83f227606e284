"""Malformed inputs: each ends with a message of ours, that says what is wrong, and never otherwise.

The tables are beside this file, a line each. They are tried without the type checks of the other
tests, which would refuse before we do, in `trying.py`.
"""

import importlib.util
from pathlib import Path

import pytest

HERE = Path(__file__).parent
TABLES = ("arguments", "files")


def rows(table: str) -> list[tuple[str, str]]:
    """The inputs of a table, and what is said of each."""
    spec = importlib.util.spec_from_file_location(table, HERE / f"{table}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return [row for group in module.TABLE.values() for row in group]


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
