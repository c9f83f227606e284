"""Interventions do what they say, to toys and to transformers' models, and leave no trace."""

import numpy as np
import pytest
import torch

from sinkbook.errors import SinkbookError
from sinkbook.models.interventions import WAYS, reading, replace, stand_in, zero
from sinkbook.models.layout import layers
from sinkbook.models.partial_forward import logits_of
from sinkbook.probe import measure
from sinkbook.toy.transformer import Transformer, TransformerConfig
from tiny import EACH_LAYOUT

TOKENS = torch.randint(0, 50, (2, 9), generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=EACH_LAYOUT)
def model(request):
    return EACH_LAYOUT[request.param]().requires_grad_(False)


def residuals(model):
    """Residual states: before the first layer and after every layer."""
    states, found = [], layers(model)
    first = lambda output: output[0] if isinstance(output, tuple) else output  # noqa: E731
    hooks = [
        found[0].block.register_forward_pre_hook(lambda _, inputs: states.append(inputs[0])),
        *(
            layer.block.register_forward_hook(lambda *a: states.append(first(a[2])))
            for layer in found
        ),
    ]
    model(TOKENS)
    for hook in hooks:
        hook.remove()
    return states


def test_without_attention_and_mlp_a_layer_passes_its_input_on(model):
    with zero(model, "attention", layer=1), zero(model, "mlp", layer=1):
        states = residuals(model)
    torch.testing.assert_close(states[1], states[2])
    assert not torch.allclose(states[0], states[1])


def test_zeroing_every_head_is_zeroing_the_attention(model):
    with zero(model, "head", layer=1, head=range(4)):
        by_heads = residuals(model)[2]
    with zero(model, "attention", layer=1):
        at_once = residuals(model)[2]
    # GPT-2's W_O has a bias, which is no head's.
    bias = getattr(layers(model)[1].output, "bias", None)
    if bias is None or not bias.any():
        torch.testing.assert_close(by_heads, at_once)


def test_a_head_at_one_position_leaves_earlier_positions_alone(model):
    plain = residuals(model)[3]
    with zero(model, "head", layer=1, head=2, position=4):
        cut = residuals(model)[3]
    torch.testing.assert_close(plain[:, :4], cut[:, :4])
    assert (plain[:, 4] - cut[:, 4]).abs().max() > 1e-5


def test_negative_positions_count_from_the_end(model):
    with zero(model, "mlp", layer=0, position=-1):
        last = logits_of(model, TOKENS)
    with zero(model, "mlp", layer=0, position=8):
        torch.testing.assert_close(last, logits_of(model, TOKENS))


def test_a_replaced_residual_is_what_the_next_layer_sees(model):
    state = torch.full((16,), 0.5)
    with replace(model, "residual", state, layer=0, position=[0, 3]):
        after = residuals(model)[1]
    assert torch.equal(after[:, [0, 3]], state.expand(2, 2, 16))
    with replace(model, "residual", residuals(model)[1], layer=0):
        patched = logits_of(model, TOKENS)
    torch.testing.assert_close(patched, logits_of(model, TOKENS))


def test_without_values_a_layer_attends_for_nothing(model):
    with zero(model, "value", layer=1):
        silent = residuals(model)[2]
    with zero(model, "head", layer=1, head=range(4)):
        torch.testing.assert_close(silent, residuals(model)[2])


def test_the_value_of_one_token_is_cut_for_all_who_look_at_it(model):
    before = measure(model, TOKENS, ("value_norm", "sink_attention"))
    with zero(model, "value", layer=1, position=0):
        after = measure(model, TOKENS, ("value_norm", "sink_attention"))
    drained = after.value_norm.isel(layer=1)
    assert drained.isel(position=0).max() == 0
    assert drained.isel(position=slice(1, None)).min() > 0
    same = after.sink_attention.isel(layer=1) - before.sink_attention.isel(layer=1)
    assert abs(same).max() < 1e-6


def test_one_value_head_is_cut_for_its_own_group(model):
    with zero(model, "value", layer=1, head=1):
        norms = measure(model, TOKENS, ("value_norm",)).value_norm.isel(layer=1)
    silent = (norms == 0).all(("batch", "position"))
    # Llama's two key-value heads serve two heads each.
    expected = [2, 3] if layers(model)[1].value_heads == 2 else [1]
    assert (len(expected) == 2) == (type(model).__name__ == "LlamaForCausalLM")
    assert np.flatnonzero(silent).tolist() == expected


def test_several_layers_are_cut_at_once(model):
    with zero(model, "mlp", layer=[0, 2]):
        together = logits_of(model, TOKENS)
    with zero(model, "mlp", layer=0), zero(model, "mlp", layer=2):
        torch.testing.assert_close(together, logits_of(model, TOKENS))


def test_the_model_is_as_before_even_after_an_exception(model):
    before = logits_of(model, TOKENS)
    with pytest.raises(RuntimeError, match="midway"), zero(model, "mlp", layer=1):
        assert not torch.allclose(logits_of(model, TOKENS), before)
        raise RuntimeError("midway")
    assert torch.equal(logits_of(model, TOKENS), before)


@pytest.mark.parametrize(
    ("part", "where", "said"),
    [
        ("mpl", {"layer": 0}, "no part named 'mpl'"),
        ("mlp", {"layer": 3}, "layer 3 is not there; 0 to 2 are"),
        ("head", {"layer": 0, "head": 4}, "head 4 is not there; 0 to 3 are"),
        ("head", {"layer": 0}, "'head' needs one"),
        ("mlp", {"layer": 0, "head": 1}, "'value' takes one"),
    ],
)
def test_what_is_not_there_cannot_be_cut(model, part, where, said):
    with pytest.raises(SinkbookError, match=said), zero(model, part, **where):
        logits_of(model, TOKENS)


def test_an_absent_part_cannot_be_cut():
    model = Transformer(TransformerConfig(width=16, layers=2, without_mlp=(1,)))
    with pytest.raises(SinkbookError, match="layer 1 has no mlp"), zero(model, "mlp", layer=1):
        pass


# --- What stands in a part's place -----------------------------------------------------------


@pytest.mark.parametrize("part", ["attention", "head", "mlp"])
def test_with_what_it_writes_in_its_place_a_part_is_not_missed_and_with_another_texts_it_is(
    model, part
):
    with reading(model, part, layer=1) as written:
        whole, _ = logits_of(model, TOKENS), logits_of(model, TOKENS[:1])
    assert [len(states) for states in written] == [2, 1]
    where = {"layer": 1, "head": range(4)} if part == "head" else {"layer": 1}
    with replace(model, part, written[0], **where):
        torch.testing.assert_close(logits_of(model, TOKENS), whole)
    with replace(model, part, stand_in(written[0], "shuffled"), **where):
        assert (logits_of(model, TOKENS) - whole).abs().amax((1, 2)).min() > 1e-4


def test_the_mean_of_the_others_and_another_text_are_those_by_hand():
    written = torch.randn(5, 3, 2, generator=torch.Generator().manual_seed(0))
    for text in range(5):
        others = [n for n in range(5) if n != text]
        torch.testing.assert_close(stand_in(written, "mean")[text], written[others].mean(0))
    for seed in range(10):
        drawn = stand_in(written, "shuffled", seed=seed)
        which = [(written == row).flatten(1).all(1).nonzero().item() for row in drawn]
        assert sorted(which) == list(range(5)) and all(n != m for n, m in enumerate(which))
    assert not stand_in(written, "zero").any()


def test_other_ways_other_parts_and_a_single_text_are_refused(model):
    with pytest.raises(SinkbookError, match=f"no way 'noise'.*{', '.join(WAYS)}"):
        stand_in(torch.ones(2, 3, 4), "noise")
    with pytest.raises(SinkbookError, match="needs other texts"):
        stand_in(torch.ones(1, 3, 4), "mean")
    with pytest.raises(SinkbookError, match="no part named 'residual' to read"):
        reading(model, "residual", layer=0).__enter__()
    with pytest.raises(SinkbookError, match="layer 7 is not there"):
        reading(model, "mlp", layer=7).__enter__()
