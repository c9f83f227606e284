"""What the largest residual entry leaves: in float16, in eight bits, with the first token apart."""

from contextlib import ExitStack
from html import escape

import numpy as np
import pytest
import torch
import xarray as xr

from sinkbook.errors import NotFiniteError
from sinkbook.mitigations.quantization import round_int8
from sinkbook.models import token_windows
from sinkbook.models.layout import blocks
from sinkbook.report import report
from sinkbook.report.headroom import Headroom, advice, headroom, sentence
from sinkbook.report.html import html_page
from tiny import HAMLET, tiny_model, tiny_reader

pytestmark = pytest.mark.weights


def measured(model, count: int = 3) -> tuple[xr.Dataset, torch.Tensor]:
    """The dataset of a report on a model, and the tokens that it has read."""
    reader = tiny_reader(model)
    tokens = token_windows.of_document(reader, HAMLET, count=count, length=12)
    result = report.measure_windows(reader, tokens)
    result.attrs |= {"weights": "a tiny one", "texts": "Hamlet", "command": "sinkbook probe tiny"}
    return result, tokens


def with_sizes(sizes: dict[tuple[int, int, int], float]) -> xr.Dataset:
    """A measurement in which every token's largest entry is 1 but those at (text, layer, token)."""
    result, _ = measured(tiny_model())
    result["residual_max_abs"] = xr.ones_like(result.residual_max_abs)
    for (text, layer, position), size in sizes.items():
        result.residual_max_abs[text, layer, position] = size
    return result


@torch.no_grad()
def states_of(model, tokens: torch.Tensor) -> np.ndarray:
    """All residual states in float64: (text, residual layer, position, width)."""
    states = []
    with ExitStack() as hooks:
        first, *_ = found = blocks(model)
        hook = first.register_forward_pre_hook(
            lambda _, given, named: states.append(given[0] if given else named["hidden_states"]),
            with_kwargs=True,
        )
        hooks.callback(hook.remove)
        for block in found:
            hook = block.register_forward_hook(
                lambda _, __, out: states.append(out[0] if isinstance(out, tuple) else out)
            )
            hooks.callback(hook.remove)
        model(tokens)
    return np.stack([state.double().numpy() for state in states], axis=1)


def by_loops(states: np.ndarray, left_out: set[int]) -> tuple[float, tuple[int, ...], float]:
    """The largest magnitude, its text, layer and position, and the median other token's steps."""
    largest, where = -1.0, ()
    for text, layer, position in np.ndindex(states.shape[:3]):
        if position not in left_out:
            size = max(abs(float(entry)) for entry in states[text, layer, position])
            if size > largest:
                largest, where = size, (text, layer, position)
    text, layer, holder = where
    others = [
        max(abs(float(entry)) for entry in states[text, layer, position])
        for position in range(states.shape[2])
        if position not in left_out | {holder}
    ]
    return largest, where, 127 * sorted(others)[len(others) // 2] / largest


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_neox"])
def test_headroom_is_that_of_the_slow_formula_in_float64(kind):
    model = tiny_model(kind)
    result, tokens = measured(model)
    states = states_of(model, tokens)
    np.testing.assert_allclose(result.residual_max_abs, np.abs(states).max(-1), rtol=1e-6)
    room = headroom(result)
    # An odd number of other tokens has one in the middle: 12 tokens, 1 or 2 apart.
    for found, left_out in ((room.all_tokens, set()), (room.first_token_apart, {0})):
        largest, where, steps = by_loops(states, left_out)
        assert (found.text, found.residual_layer, found.position) == where
        assert found.magnitude == pytest.approx(largest, rel=1e-6)
        assert found.float16_factor == pytest.approx(65504 / largest, rel=1e-6)
        if left_out:  # ten others: the mean of the two in the middle
            assert 0 < found.int8_steps <= 127
        else:
            assert found.int8_steps == pytest.approx(steps, rel=1e-6)
        assert found.token == result.token.values[where[0], where[2]]
        assert found.is_first == (where[2] == 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_largest_entry_of_half_precision_is_exact_in_float32(dtype):
    model = tiny_model().to(dtype)
    result, tokens = measured(model)
    assert result.residual_max_abs.dtype == np.float32
    expected = np.abs(states_of(model, tokens)).max(-1)
    np.testing.assert_array_equal(result.residual_max_abs.values.astype(np.float64), expected)


def test_a_planted_peak_is_found_with_its_layer_its_token_and_its_steps():
    result = with_sizes({(1, 2, 0): 254.0, (2, 1, 5): 4.0})
    room = headroom(result)
    peak, apart = room.all_tokens, room.first_token_apart
    assert (peak.magnitude, peak.text, peak.residual_layer, peak.position) == (254, 1, 2, 0)
    assert peak.is_first and peak.token == "<s>"
    assert peak.int8_steps == 0.5 and peak.float16_factor == 65504 / 254
    assert (apart.magnitude, apart.text, apart.residual_layer, apart.position) == (4, 2, 1, 5)
    assert apart.int8_steps == 127 / 4 and not apart.is_first
    assert room.int8_steps_there == 127
    said = sentence(room)
    assert "is 254, after layer 1, token '<s>' (0): 258 times below float16's limit" in said
    assert "0.5 of 127 steps of an int8 range, with the first token apart 127." in said
    assert said.endswith(
        f"{str(result.token.values[2, 5])!r} (5), which leaves the others 31.8 steps."
    )
    page = html_page(result)
    token = escape(repr(str(result.token.values[2, 5])))
    assert f"after layer 0, token {token} (5)" in page and "31.8 of 127" in page


def test_half_a_step_is_what_int8_rounds_the_others_to_nothing_at():
    """What the number of steps means: at less than one half, rounding leaves nothing."""
    for steps, left in ((0.49, 0.0), (0.51, 1.0)):
        others = torch.full((4,), 1.0)
        step = round_int8(others, torch.tensor(127 / steps)) / (1 / steps)
        assert step.tolist() == [left] * 4


def test_a_peak_elsewhere_is_not_helped_by_keeping_the_first_token_apart():
    room = headroom(with_sizes({(0, 1, 7): 1000.0}))
    assert not room.all_tokens.is_first
    assert room.int8_steps_there == room.all_tokens.int8_steps == 0.127
    assert "one range per token" in advice(room, has_sinks=False)


def test_what_to_do_follows_from_what_was_measured():
    flat, tight = headroom(with_sizes({})), headroom(with_sizes({(0, 0, 0): 40_000.0}))
    assert advice(flat, False).startswith("Nothing that was measured")
    assert advice(flat, True) == (
        "What to do (chapter 11): keep one first token in a cache that drops old ones, and do not "
        "cut heads of the first layers because they write little."
    )
    assert advice(tight, False) == (
        "What to do (chapter 11): compute in bfloat16 or float32 rather than in float16, and give "
        "int8 activations one range per token."
    )
    beyond = headroom(with_sizes({(0, 0, 0): 70_000.0}))
    assert "beyond float16" in sentence(beyond) and beyond.all_tokens.float16_factor < 1
    assert "overflows" in html_page(with_sizes({(0, 0, 0): 70_000.0}))


def test_headroom_that_cannot_be_known_is_called_unknown():
    result, _ = measured(tiny_model())
    for lost in (slice(None), slice(1, 2)):  # no layer has one residual state, or one has not
        result.residual_max_abs[:, lost] = np.nan
        assert headroom(result) is None
        assert sentence(None).startswith("Headroom is unknown") and sentence(None) in html_page(
            result
        )
        result, _ = measured(tiny_model())
    assert "int8" not in advice(None, has_sinks=True)


def overflown(model) -> None:
    model.half().model.layers[0].mlp.down_proj.weight.data.fill_(60_000.0)


def damaged(name: str, value: float = float("nan")):
    """Puts a number into the last row, or entry, of a parameter."""

    def damage(model) -> None:
        dict(model.named_parameters())[name].data.view(-1)[-1] = value

    return damage


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (overflown, "after layer 0 is infinite"),
        (damaged("model.layers.1.mlp.down_proj.weight"), "after layer 1 is NaN, first at position"),
        (damaged("model.norm.weight"), "loss of the token at position 1 of text 0"),
        (damaged("lm_head.weight"), "loss of the token at position 1 of text 0"),
        (damaged("lm_head.weight", float("inf")), "What reads the last layer is damaged"),
    ],
)
def test_a_model_that_is_damaged_anywhere_on_the_way_gets_no_report(damage, told):
    model = tiny_model(initializer_range=0.3)
    damage(model)
    with pytest.raises(NotFiniteError, match=told):
        measured(model)


def test_a_damaged_embedding_that_no_text_reads_is_nobodys_business():
    model = tiny_model()
    expected, _ = measured(model)
    damaged("model.embed_tokens.weight")(model)
    xr.testing.assert_equal(measured(model)[0].residual_max_abs, expected.residual_max_abs)


def test_two_tokens_leave_one_other_and_the_rest_is_unknown():
    reader = tiny_reader(tiny_model())
    room = headroom(report.measure_windows(reader, torch.tensor([[1, 2]])))
    assert isinstance(room, Headroom) and np.isfinite(room.all_tokens.int8_steps)
    assert np.isnan(room.first_token_apart.int8_steps) and "nan" not in sentence(room)
    assert "nan" not in str(room.row()["all_tokens"])
