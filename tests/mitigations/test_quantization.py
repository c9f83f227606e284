"""Int8 errors are those of known cases, and a quantised model is one in fact, and put back."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import xarray as xr
from torch import nn

from sinkbook.book import experiments
from sinkbook.book.settings import Settings
from sinkbook.errors import SinkbookError
from sinkbook.mitigations.quantization import (
    RANGES,
    int8_error,
    largest_and_error,
    layer_errors,
    quantized,
    round_int8,
    rounding_losses,
    split_error,
    toy_rounding_errors,
)
from sinkbook.models.layout import layers
from sinkbook.models.losses import token_losses
from sinkbook.models.partial_forward import logits_of
from sinkbook.toy.runs import Run
from sinkbook.toy.transformer import Transformer
from tiny import EACH_LAYOUT, LOUD_TOKENS, assert_close, loud_llama, tiny_model

TOKENS = torch.randint(0, 50, (3, 9), generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=EACH_LAYOUT)
def model(request):
    return EACH_LAYOUT[request.param]().requires_grad_(False)


def hidden(positions=64, width=96):
    return torch.randn(2, positions, width, generator=torch.Generator().manual_seed(1))


def test_even_numbers_lose_one_part_in_254():
    """Uniform up to a: the step is a / 127, the error step / sqrt(12), the norm a / sqrt(3)."""
    even = torch.rand(4, 500, 500, generator=torch.Generator().manual_seed(0)) * 2 - 1
    torch.testing.assert_close(int8_error(even), torch.full((4,), 1 / 254), rtol=0.01, atol=0)


def test_the_error_does_not_depend_on_the_scale_of_a_text_nor_on_its_neighbours():
    states = hidden()
    scaled = torch.stack([states[0], 1000 * states[1]])
    torch.testing.assert_close(int8_error(scaled), int8_error(states), rtol=1e-4, atol=0)
    torch.testing.assert_close(int8_error(scaled[:1]), int8_error(scaled)[:1])


def test_a_peak_at_the_first_token_rounds_all_others_to_zero_unless_it_is_kept_apart():
    states = hidden()
    undisturbed = int8_error(states, first=1)
    states[:, 0] *= 1e4
    torch.testing.assert_close(int8_error(states, first=1), torch.ones(2))
    apart = int8_error(states, ranges="sink apart", first=1)
    torch.testing.assert_close(apart, undisturbed, rtol=0.05, atol=0)
    assert (int8_error(states, ranges="token", first=1) < undisturbed).all()


def test_a_peak_at_another_token_is_cured_by_a_range_for_every_token_only():
    states = hidden()
    states[:, 20] *= 1e4
    others = torch.cat([states[:, 1:20], states[:, 21:]], dim=1)
    spoilt = int8_error(states, ranges="sink apart", first=1)
    assert (spoilt > 0.9).all()
    cured = int8_error(states, ranges="token", first=1)
    torch.testing.assert_close(cured, int8_error(others, ranges="token"), rtol=0.05, atol=0)


def test_an_outlier_channel_needs_the_channels_brought_to_one_scale():
    states = hidden()
    states[..., 7] = 30.0
    token = int8_error(states, ranges="token", first=1)
    assert (token > 0.9 * int8_error(states, first=1)).all()
    assert (token > 3 * int8_error(states, ranges="token and channel", first=1)).all()


def error_slowly(states: torch.Tensor, ranges: str, first: int) -> float:
    """The error of one text by its definition, entry by entry, in float64."""
    states = states.double()
    lost = []
    scale = states[1:].abs().amax(0)
    scale = torch.where(scale == 0, states.abs().amax(0), scale)
    scale = torch.where(scale == 0, 1.0, scale)
    for token in states[first:]:
        largest = {
            "tensor": states.abs().max(),
            "sink apart": states[1:].abs().max(),
            "token": token.abs().max(),
            "token and channel": scale * (token / scale).abs().max(),
        }[ranges]
        step = torch.where(largest == 0, 1.0, largest / 127)
        change = (token / step).round().clamp(-127, 127) * step - token
        whole = token.square().sum()
        lost.append(float(change.square().sum() / whole) if whole else 0.0)
    return float(torch.tensor(lost).mean().sqrt())


def silent_but_for_the_first(states):
    states[:, 1:, 5] = 0.0
    states[:, 0, 5] = 40.0


def a_silent_channel(states):
    states[..., 7] = 0.0


def a_silent_token(states):
    states[:, 9] = 0.0


def a_peak(states):
    states[:, 0, 3] = 3000.0


@pytest.mark.parametrize("scale", [2.0**-12, 1.0, 2.0**4])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("ranges", RANGES)
@pytest.mark.parametrize(
    "spoil", [a_peak, silent_but_for_the_first, a_silent_channel, a_silent_token]
)
def test_the_error_is_that_of_a_slow_reference_in_every_precision(spoil, ranges, dtype, scale):
    states = hidden(positions=24, width=300)
    spoil(states)
    states = (scale * states).to(dtype)
    for first in (0, 1):
        found = int8_error(states, ranges=ranges, first=first)
        assert found.dtype == torch.promote_types(dtype, torch.float32)
        expected = [error_slowly(text, ranges, first) for text in states]
        # A last digit may tip a number over to the next step.
        torch.testing.assert_close(
            found.double(), torch.tensor(expected).double(), rtol=0.01, atol=0
        )


def test_squares_beyond_the_range_of_numbers_are_no_loss_and_no_infinity():
    states = hidden()
    expected = int8_error(states)
    for scale in (2.0**-100, 2.0**100):
        torch.testing.assert_close(int8_error(states * scale), expected)
        torch.testing.assert_close(
            int8_error((states * scale).bfloat16()), expected, rtol=0.1, atol=0
        )
    assert int8_error(torch.zeros(2, 5, 4)).tolist() == [0.0, 0.0]
    for ranges in RANGES:
        assert int8_error(hidden(positions=1), ranges=ranges).isfinite().all()


def test_broken_states_have_no_error_rather_than_a_small_one():
    for ranges in RANGES:
        states = hidden()
        states[0, 4, 2] = float("nan")
        assert int8_error(states, ranges=ranges).isnan().tolist() == [True, False]


def test_errors_from_where_no_token_is_are_refused(model):
    for refused in (
        lambda: int8_error(hidden(positions=3), first=3),
        lambda: layer_errors(model, TOKENS, first=9),
    ):
        with pytest.raises(SinkbookError, match="a position that they have"):
            refused()
    with pytest.raises(SinkbookError, match="`batch_size=0` is too small"):
        layer_errors(model, TOKENS, batch_size=0)


def test_a_half_precision_models_errors_are_those_of_its_states_and_its_rounding_is_finite():
    model = loud_llama()
    model.model.embed_tokens.weight.mul_(1000.0)  # squares beyond float16
    exact = layer_errors(model, LOUD_TOKENS)
    half = layer_errors(model.half(), LOUD_TOKENS)
    np.testing.assert_allclose(half, exact, rtol=0.1)
    for ranges in RANGES:
        with quantized(model, ranges):
            assert model(LOUD_TOKENS).logits.isfinite().all()


def test_the_parts_of_the_error_add_up_to_its_square_and_name_the_culprit(model):
    torch.manual_seed(0)
    errors = layer_errors(model, TOKENS)
    parts = split_error(errors)
    torch.testing.assert_close(
        torch.tensor(sum(parts.values()).values),
        torch.tensor(errors.sel(ranges="tensor").values) ** 2,
    )
    states = hidden()
    states[:, 0] *= 1e4
    by_ranges = {r: int8_error(states, ranges=r, first=1) for r in RANGES}
    assert (by_ranges["tensor"] ** 2 - by_ranges["token"] ** 2 > 0.99).all()


def states_read(model):
    """What each layer reads of `TOKENS`, heard at its block."""
    states = []
    hooks = [
        layer.block.register_forward_pre_hook(
            lambda _, arguments, keywords: states.append(
                arguments[0] if arguments else keywords["hidden_states"]
            ),
            with_kwargs=True,
        )
        for layer in layers(model)
    ]
    logits_of(model, TOKENS)
    for hook in hooks:
        hook.remove()
    return states


def test_layer_errors_are_those_of_the_states_that_each_layer_reads(model):
    errors = layer_errors(model, TOKENS, batch_size=2)
    assert errors.dims == ("ranges", "text", "layer") and errors.shape == (4, 3, 3)
    states = states_read(model)
    for ranges in RANGES:
        for layer, state in enumerate(states):
            expected = int8_error(state, ranges=ranges, first=1)
            found = torch.tensor(errors.sel(ranges=ranges, layer=layer).values)
            torch.testing.assert_close(found, expected)


def test_the_largest_magnitude_is_that_of_any_entry_that_a_layer_reads(model):
    found = largest_and_error(model, TOKENS, batch_size=2)
    of_token = torch.stack(states_read(model)).double().abs().amax(-1)  # (layer, text, position)
    assert_close(found.largest, of_token.amax((1, 2)))
    largest = of_token.numpy().max(-1)
    assert_close(found.outlier, (largest / np.median(of_token.numpy(), -1)).mean(-1))
    assert_close(found.error, layer_errors(model, TOKENS).mean("text"))


def test_a_quantised_model_has_255_weights_a_matrix_and_is_put_back_after_an_exception(model):
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    exact = logits_of(model, TOKENS)
    with pytest.raises(ZeroDivisionError), quantized(model):
        for layer in layers(model):
            weight = layer.output.weight
            steps = weight / (weight.abs().max() / 127)
            torch.testing.assert_close(steps, steps.round(), atol=1e-3, rtol=0)
        assert not torch.equal(logits_of(model, TOKENS), exact)
        raise ZeroDivisionError
    after = model.state_dict()
    assert all(torch.equal(after[name], weight) for name, weight in before.items())
    assert torch.equal(logits_of(model, TOKENS), exact)


def test_what_the_linear_maps_get_is_rounded_and_the_first_token_apart_is_not(model):
    seen = []
    output = layers(model)[0].output
    exact = []
    output.register_forward_pre_hook(lambda _, arguments: exact.append(arguments[0].clone()))
    with quantized(model, "sink apart", weights=False):
        output.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0].clone()))
        logits_of(model, TOKENS)
    whole, rounded = exact[0], seen[0]
    assert torch.equal(rounded[:, 0], whole[:, 0])
    assert not torch.equal(rounded[:, 1:], whole[:, 1:])
    largest = whole[:, 1:].abs().amax((1, 2), keepdim=True)
    torch.testing.assert_close(rounded[:, 1:], round_int8(whole[:, 1:], largest))


def test_finer_ranges_come_closer_to_the_exact_model(model):
    def distance(ranges):
        with quantized(model, ranges, weights=False):
            return (logits_of(model, TOKENS) - exact).norm()

    exact = logits_of(model, TOKENS)
    assert 0 < distance("token") < distance("tensor")


def test_unknown_ranges_are_refused_with_the_ones_there_are(model):
    for refused in (
        lambda: int8_error(hidden(), ranges="channel"),
        lambda: quantized(model, "channel").__enter__(),
    ):
        with pytest.raises(SinkbookError, match="no ranges named 'channel'. Known: tensor, sink"):
            refused()


def test_eight_bit_losses_stand_beside_the_exact_ones():
    model = loud_llama()
    losses = rounding_losses(model, LOUD_TOKENS)
    exact = token_losses(model, LOUD_TOKENS)
    assert_close(losses.sel(numbers="exact"), exact, 0)
    with quantized(model, "token"):
        assert_close(losses.sel(numbers="token"), token_losses(model, LOUD_TOKENS), 0)
    assert float(abs(losses.sel(numbers="weights alone") - exact).max()) > 0


def test_a_toys_rounding_errors_are_those_of_its_own_texts_in_one_range():
    config = replace(experiments.one_layer(Settings("quick"))[0], evaluation_size=5)
    runs = []
    for seed in range(2):
        torch.manual_seed(seed)
        made = replace(config, seed=seed)
        runs.append(Run(made, Transformer(made.model).requires_grad_(False), xr.Dataset(), {}))
    found = toy_rounding_errors(runs)
    assert found.shape == (2, 1)
    embedded = [
        run.model.token_embedding(run.evaluation_tokens) + run.model.position_embedding.weight
        for run in runs
    ]
    assert_close(found[:, 0], [int8_error(states, first=1).mean() for states in embedded], 1e-6)


class Coded(nn.Module):
    """A linear map as tools for quantisation make them: integers and a scale, no parameter."""

    def __init__(self, linear: nn.Linear, dtype: torch.dtype):
        super().__init__()
        self.scale = linear.weight.abs().max() / 127
        self.register_buffer("codes", (linear.weight / self.scale).round().to(dtype))

    def forward(self, states):
        return states @ (self.codes.to(states) * self.scale).T


class Wrapping(torch.Tensor):
    """Stands for a tensor that keeps its numbers in another form."""


def packed(linear: nn.Linear) -> nn.Module:
    form = torch.ao.quantization.quantize_dynamic
    return form(nn.Sequential(linear), {nn.Linear}, dtype=torch.qint8)[0]


def wrapping(linear: nn.Linear) -> nn.Module:
    linear.weight = nn.Parameter(linear.weight.data.as_subclass(Wrapping), requires_grad=False)
    return linear


CODED = {
    "int8": lambda linear: Coded(linear, torch.int8),
    "int32": lambda linear: Coded(linear, torch.int32),
    "packed": packed,
    "in another form": wrapping,
}


@pytest.mark.parametrize("where", ["one", "all"])
@pytest.mark.parametrize("form", CODED)
def test_maps_that_are_quantised_already_are_refused_and_not_left_as_they_are(form, where):
    model = loud_llama()
    for layer in model.model.layers[: 1 if where == "one" else None]:
        for part in (layer.mlp, layer.self_attn):
            for name, module in list(part.named_children()):
                if isinstance(module, nn.Linear) and (where == "all" or name == "up_proj"):
                    setattr(part, name, CODED[form](module))
    with pytest.raises(SinkbookError, match=r"layers\[0\].*quantised already"):
        quantized(model).__enter__()


@pytest.mark.parametrize("ranges", [*RANGES, None])
@pytest.mark.parametrize("side", [1, -1])
def test_padding_and_caches_have_no_part_in_a_texts_range(ranges, side):
    model, tokens = loud_llama().double(), LOUD_TOKENS[:, :12]
    cut, mask = tokens[:, :8], (torch.arange(12) < 8).long().expand(3, -1)
    padded = tokens
    if side < 0:
        mask, padded = mask.flip(1), torch.cat([tokens[:, 8:], cut], 1)
    kept = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    with quantized(model, ranges):
        alone = model(cut, use_cache=False).logits
        begun = model(cut[:, :5], use_cache=True).past_key_values
        if ranges in ("token", None):
            with_padding = model(padded, **kept, use_cache=False).logits[mask.bool()]
            torch.testing.assert_close(with_padding, alone.flatten(0, 1))
            going_on = model(cut[:, 5:], past_key_values=begun).logits
            torch.testing.assert_close(going_on, alone[:, 5:])
            return
        with pytest.raises(SinkbookError, match="called with texts with padding"):
            model(padded, **kept, use_cache=False)
        with pytest.raises(SinkbookError, match="beginning lies in a cache"):
            model(cut[:, 5:], past_key_values=begun)
    model(padded, **kept)  # outside of the body nobody minds


def test_errors_of_layers_are_without_dropout():
    model = tiny_model("opt", dropout=0.5, ffn_dim=48, word_embed_proj_dim=32)
    expected = layer_errors(model, LOUD_TOKENS)
    assert_close(layer_errors(model.train(), LOUD_TOKENS), expected)
