"""What hypothesis makes up as an argument is taken as it is, or refused with its name."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sinkbook.arguments import (
    SEEDS,
    check_all,
    check_known,
    check_number,
    check_seed,
    names_of,
    texts_of,
    whole_number,
)
from sinkbook.criteria import satisfies
from sinkbook.errors import SinkbookError
from sinkbook.probe.measure import measure, measure_texts
from sinkbook.report.quantities import condition
from sinkbook.toy.runs import TrainingConfig
from sinkbook.toy.tasks import TaskConfig
from sinkbook.toy.training_loop import schedule
from sinkbook.toy.transformer import TransformerConfig
from tiny import tiny_model, tiny_reader


class Odd:
    """A thing that will not even say what it is."""

    def __repr__(self):
        raise RuntimeError("no")


ANYTHING = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.complex_numbers(),
    st.text(),
    st.binary(),
    st.lists(st.one_of(st.none(), st.integers(), st.text()), max_size=3),
    st.dictionaries(st.text(max_size=2), st.integers(), max_size=2),
    st.sampled_from([Odd(), object(), np.float32(2), np.int64(3), torch.tensor(4), torch.ones(2)]),
)
FEW = settings(max_examples=60, deadline=None, derandomize=True)


def refused(call) -> str | None:
    """The message of a refusal; None if there was none. Any other error fails the test."""
    try:
        call()
    except SinkbookError as error:
        return str(error)
    return None


@given(ANYTHING, st.integers(-3, 3), st.integers(4, 9))
def test_a_whole_number_is_itself_or_refused(value, least, most):
    said = refused(lambda: whole_number("size", value, least, most))
    if said is None:
        assert value == whole_number("size", value, least, most)
        assert least <= value <= most
    else:
        assert said.startswith("`size=") and said.endswith(".")


@given(ANYTHING)
def test_a_number_is_finite_and_within_its_limits_or_refused(value):
    said = refused(lambda: check_number("rate", value, 0, 1))
    real = isinstance(value, int | float | np.number) and not isinstance(value, bool)
    assert (said is None) == (real and math.isfinite(value) and 0 <= value <= 1)


@given(ANYTHING)
def test_seeds_are_those_that_no_held_out_text_is_drawn_with(value):
    whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    taken = refused(lambda: check_seed(value)) is None
    assert taken == (whole and 0 <= value < SEEDS) or torch.is_tensor(value)


@given(ANYTHING)
def test_lists_are_lists_and_names_are_known(value):
    for call in (
        lambda: names_of("variable", value, ("loss",)),
        lambda: check_known("way", value, ("zero",)),
        lambda: check_all("configs", value, TrainingConfig),
    ):
        said = refused(call)
        assert said is None or said.endswith(".")
        assert said is not None or not len(value)
    said = refused(lambda: texts_of(value))
    assert said is not None or all(isinstance(text, str) for text in value)


def test_names_may_come_one_by_one():
    few = measure(tiny_model(), [[1, 2, 3]], (name for name in ["loss", "residual_norm"]))
    assert set(few) == {"loss", "residual_norm"}
    texts = (text for text in ["to be", "or not"])
    assert measure_texts(tiny_reader(tiny_model()), texts, iter(["loss"])).sizes["batch"] == 2


@FEW
@given(
    st.integers(-5, 40),
    st.integers(-5, 2**33),
    st.integers(-5, 40),
    st.floats(),
    st.floats(),
)
def test_a_training_is_described_whole_or_refused(steps, seed, batch, rate, decay):
    made = []

    def describe():
        made.append(
            TrainingConfig(
                task=TaskConfig(length=16),
                model=TransformerConfig(length=16, width=8),
                steps=steps,
                seed=seed,
                batch_size=batch,
                learning_rate=rate,
                weight_decay=decay,
            )
        )

    fits = steps >= 1 and 0 <= seed < 2**31 and batch >= 1
    fits &= all(math.isfinite(x) and x >= 0 for x in (rate, decay))
    assert (refused(describe) is None) == bool(fits)
    if made:
        assert made[0].measured_steps[0] == 0 and made[0].measured_steps[-1] == steps


@FEW
@given(*[st.integers(-3, 5)] * 4)
def test_a_toy_is_described_whole_or_refused(length, width, layers, heads):
    def describe():
        TransformerConfig(length=length, width=width, layers=layers, heads=heads)

    fits = length >= 1 and width >= 1 and layers >= 0 and heads >= 1 and width % max(heads, 1) == 0
    assert (refused(describe) is None) == fits


@FEW
@given(st.integers(-3, 99), st.integers(-3, 9), st.none() | st.integers(-3, 99))
def test_a_schedule_is_in_order_or_refused(steps, count, every):
    fits = steps >= 1 and count >= 0 and (every is None or every >= 1)
    assert (refused(lambda: schedule(steps, count, every=every)) is None) == fits
    if fits:
        found = schedule(steps, count, every=every)
        assert list(found) == sorted(set(found)) and found[0] == 0 and found[-1] == steps


@given(st.text())
def test_criteria_and_conditions_are_read_or_refused(text):
    assert refused(lambda: satisfies(text, 1.0)) or satisfies(text, 1.0) in (True, False)
    assert refused(lambda: condition(text)) is not None or text


@pytest.fixture(scope="module")
def llama():
    return tiny_model()


@FEW
@given(
    st.lists(st.lists(st.integers(-2, 120), max_size=4), max_size=3),
    st.lists(st.lists(st.integers(-1, 2), max_size=4), max_size=3) | st.none(),
    st.integers(-2, 5) | st.none(),
)
def test_whatever_ids_masks_and_sinks_are_given_they_are_measured_or_refused(
    llama, ids, mask, sink
):
    said = refused(lambda: measure(llama, ids, ("loss",), attention_mask=mask, sink=sink))
    assert said is None or said.endswith((".", "?"))
