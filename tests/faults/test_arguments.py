"""What hypothesis makes up as an argument is taken as it is, or refused with its name."""

import json
import math
from dataclasses import asdict, dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import Float

from sinkbook.annotations import check_arguments, check_fields
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


@check_arguments
def taking(
    *,
    whole: int = 0,
    number: float = 0.0,
    until: float = math.inf,
    flag: bool = False,
    word: str | None = None,
    words: list[str] = (),
    row: Float[np.ndarray, " column"] = (),
    table: Float[np.ndarray, "row column"] = (),
):
    """What a function sees of its arguments."""
    return whole, number, until, flag, word, words, row, table


def is_whole(value) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def is_real(value) -> bool:
    return is_whole(value) or isinstance(value, float | np.floating)


FITTING = {
    "whole": lambda value: (
        torch.is_tensor(value) and not value.ndim or (is_whole(value) and 0 <= value < 2**63)
    ),
    "number": lambda value: is_real(value) and math.isfinite(value),
    "until": lambda value: is_real(value) and not math.isnan(value),
    "flag": lambda value: isinstance(value, bool),
    "word": lambda value: value is None or isinstance(value, str),
    "words": lambda value: (
        isinstance(value, list | dict)
        and all(isinstance(each, str) for each in value)
        and not isinstance(value, dict)
    ),
}


@given(ANYTHING, st.sampled_from(sorted(FITTING)))
def test_an_argument_is_what_its_annotation_says_or_is_refused_by_its_name(value, name):
    said = refused(lambda: taking(**{name: value}))
    assert (said is None) == bool(FITTING[name](value))
    assert said is None or name in said


@pytest.mark.parametrize(
    ("name", "value", "seen"),
    [
        ("whole", np.int64(3), 3),
        ("whole", torch.tensor(3), 3),
        ("number", np.float32(0.5), 0.5),
        ("number", 3, 3.0),
        ("flag", np.True_, True),
    ],
)
def test_numbers_of_others_arrive_as_those_of_python(name, value, seen):
    place = list(FITTING).index(name)
    found = taking(**{name: value})[place]
    assert found == seen and type(found) is type(seen)


def test_lists_and_whole_numbers_arrive_as_an_array_of_floats():
    *_, row, table = taking(row=[1, 2], table=np.array([[1, 2], [3, 4]]))
    assert row.dtype == table.dtype == float and row.tolist() == [1.0, 2.0]


@pytest.mark.parametrize(
    ("row", "table", "named"),
    [
        (np.ones((2, 2)), np.ones((2, 2)), "`row=float64 of shape (2, 2)`"),
        (["a", "b"], np.ones((2, 2)), "`row=['a', 'b']`"),
        ([[1.0], [1.0, 2.0]], np.ones((2, 2)), "`row=[[1.0], [1.0, 2.0]]`"),
    ],
)
def test_arrays_have_the_shapes_that_are_said(row, table, named):
    assert named in refused(lambda: taking(row=row, table=table))


def test_what_python_says_of_a_call_it_says():
    with pytest.raises(TypeError, match="nonsense"):
        taking(nonsense=1)


@dataclass(frozen=True)
class Sizes:
    """A config, as those of trainings are."""

    layers: int = 1
    rate: float = 0.1
    cut: tuple[int, ...] = ()

    def __post_init__(self):
        check_fields(self)


@given(ANYTHING | st.tuples(ANYTHING), st.sampled_from(["layers", "rate", "cut"]))
def test_a_config_is_what_is_read_again_from_its_json(value, name):
    made = []
    said = refused(lambda: made.append(Sizes(**{name: value})))
    if said is None:
        again = json.loads(json.dumps(asdict(made[0])))
        assert Sizes(**again | {"cut": tuple(again["cut"])}) == made[0]
    else:
        assert said.startswith(f"`{name}=")


def test_a_config_takes_no_number_that_json_does_not():
    assert "Give 2." in refused(lambda: Sizes(layers=np.int64(2)))
    assert "Give 2." in refused(lambda: Sizes(cut=(1, np.int64(2))))
    assert "Give 0.5." in refused(lambda: Sizes(rate=np.float32(0.5)))
