"""Odd values in the place of every argument: taken for what they mean, or refused by its name."""

import importlib.util
import re
from pathlib import Path

import pytest

import sinkbook

PATH = Path(__file__).with_name("odd_values.py")
SPEC = importlib.util.spec_from_file_location(PATH.stem, PATH)
table = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(table)

TRIED = {call: table.with_values(call) for call in table.CALLS}
INPUTS = [
    given
    for places in TRIED.values()
    for of_values in places.values()
    for given in of_values.values()
]
# By name: what is no function that takes arguments, and what the table of `load` tries.
NOT_TRIED = {"SinkbookError", "__version__", "load", "measure_checkpoints"}


@pytest.mark.xdist_group("faults")
@pytest.mark.parametrize("call", TRIED)
def test_an_odd_value_is_taken_for_what_it_means_or_refused_by_name(outcomes, call):
    found = outcomes({PATH.stem: INPUTS})[PATH.stem]
    takes, seen = table.takes(table.CALLS[call]), set()
    for of_values in TRIED[call].values():
        taken = set()
        for value, given in of_values.items():
            outcome = found[given]
            name, _, said = outcome["said"].partition(": ")
            told = f"{name}={value}: {outcome['kind']}: {said} ({outcome['where']})"
            assert outcome["kind"] == "TakenError" or outcome["ours"], told
            if outcome["ours"]:
                assert name in said or table.CALLED.get(name, name) in said, told
                assert "\n" not in said and len(said) > len(name) + 20, told
            else:
                taken.add(value)
        assert taken == takes.get(name, set()), name
        seen.add(name)
    assert takes.keys() <= seen


def test_what_is_public_is_tried():
    tried = {re.match(r"\w+", call)[0] for call in table.CALLS}
    assert set(sinkbook.__all__) - tried == NOT_TRIED


def test_several_thousand_calls_are_tried():
    assert len(INPUTS) == len(set(INPUTS)) > 5000
