"""A reader's own transformer is read as toys and transformers' models are, or told what it lacks.

The model is the example in the docstring of `models/layout.py`; what is expected of it comes from
plain formulas in float64.
"""

import doctest
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from sinkbook import measure, probe
from sinkbook.errors import SinkbookError
from sinkbook.models import layout
from sinkbook.models.interventions import replace, zero
from sinkbook.models.partial_forward import logits_of, residual_states
from sinkbook.probe.attention_maps import attention_logits, attention_weights
from tiny import EACH_LAYOUT, tiny_toy

TOKENS = torch.randint(0, 9, (3, 7), generator=torch.Generator().manual_seed(0))
CAUSAL = torch.ones(7, 7, dtype=torch.bool).tril()
NAN = float("nan")


def softmax_of_scores(module, query, key, value, attention_mask, scaling, **_):
    weights = (scaling * query @ key.mT).masked_fill(~CAUSAL, -torch.inf).softmax(-1)
    return (weights @ value).transpose(1, 2), weights


def capped(module, query, key, value, attention_mask, scaling, **_):
    scores = torch.tanh(scaling * query @ key.mT)
    weights = scores.masked_fill(~CAUSAL, -torch.inf).softmax(-1)
    return (weights @ value).transpose(1, 2), weights


def sigmoid(module, query, key, value, attention_mask, scaling, **_):
    weights = (scaling * query @ key.mT).sigmoid() * CAUSAL
    return (weights @ value).transpose(1, 2), weights


@pytest.fixture
def own() -> nn.Module:
    """The model of the docstring, in float64, with attention that is far from even."""
    names: dict = {}
    for example in doctest.DocTestParser().get_examples(layout.__doc__):
        if not example.want:
            exec(example.source, names)
    torch.manual_seed(0)
    model = names["OwnModel"]().double().requires_grad_(False)
    for parameter in model.layers.parameters():
        parameter.mul_(2)
    return model


def attend_by(model: nn.Module, function) -> nn.Module:
    for block in model.layers:
        block.attention.attention_function = function
    return model


def by_hand(model: nn.Module, tokens: torch.Tensor) -> tuple[list[dict], list, torch.Tensor]:
    """What each layer computes, the residual states and the logits, in the plainest way."""
    x = model.embedding(tokens)
    layers, states = [], [x]
    for block in model.layers:
        attention = block.attention
        query, key, value = (
            w(x).unflatten(-1, (2, 4)).transpose(1, 2)
            for w in (attention.wq, attention.wk, attention.wv)
        )
        scores = 0.5 * query @ key.mT
        weights = scores.masked_fill(~CAUSAL, -torch.inf).softmax(-1)
        written = attention.wo.weight.T.unflatten(0, (2, 4))
        layers.append({"scores": scores, "weights": weights, "value": value})
        layers[-1] |= {"write": value @ written}
        x = x + (weights @ value @ written).sum(1) + attention.wo.bias
        x = x + block.mlp(x)
        states.append(x)
    return layers, states, model.head(x)


def every_variable(model: nn.Module, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """All that `measure` can be asked for, from the matrices of weights."""
    layers, states, logits = by_hand(model, tokens)
    weights, scores, value, write = (
        torch.stack([layer[name] for layer in layers], 1)
        for name in ("weights", "scores", "value", "write")
    )
    others = scores.masked_fill(~CAUSAL, NAN)[..., 1:].nanmean(-1)
    contrast = scores[..., 0] - others
    on_sink = weights[..., 0].clone()
    on_sink[..., 0] = contrast[..., 0] = NAN  # the sink's own query does not count
    even = CAUSAL / CAUSAL.sum(1, keepdim=True)
    stacked = torch.stack(states, 1)
    losses = nn.functional.cross_entropy(logits[:, :-1].mT, tokens[:, 1:], reduction="none")
    return {
        "sink_attention": on_sink.nanmean(-1),
        "sink_share": on_sink.nanmean(-1),
        "sink_logit": contrast.nanmean(-1),
        "attention_entropy": torch.special.entr(weights).sum(-1).mean(-1),
        "attention_row_sum": torch.ones(3, 2, 2),
        "head_output_norm": (weights @ write).norm(dim=-1).mean(-1),
        "sink_attention_by_query": on_sink,
        "sink_logit_by_query": contrast,
        "key_importance": weights.sum(3) / CAUSAL.sum(0),
        "even_importance": (even.sum(0) / CAUSAL.sum(0)).expand(weights.shape[:-1]),
        "value_norm": write.norm(dim=-1),
        "raw_value_norm": value.norm(dim=-1),
        "residual_norm": stacked.norm(dim=-1),
        "residual_max_abs": stacked.abs().amax(-1),
        "loss": losses.mean(-1),
    }


@pytest.mark.parametrize("function", [None, softmax_of_scores], ids=["fused", "formed"])
def test_every_variable_of_an_own_model_is_that_of_the_plain_formulas(own, function):
    if function is not None:
        attend_by(own, function)
    result = measure(own, TOKENS, tuple(probe.VARIABLES))
    expected = every_variable(own, TOKENS)
    assert set(expected) == set(probe.VARIABLES)
    for name, values in expected.items():
        np.testing.assert_allclose(result[name], values, rtol=1e-6, atol=1e-6, err_msg=name)
    assert result.attrs["route"] == ("chunked" if function else "fused")


def test_logits_of_an_own_model_are_what_its_softmax_is_given(own):
    attend_by(own, capped)
    logits = attention_logits(own, TOKENS, layer=0)
    layers, _, _ = by_hand(own, TOKENS)
    expected = torch.tanh(layers[0]["scores"]).masked_fill(~CAUSAL, -torch.inf)
    torch.testing.assert_close(logits, expected)
    others = expected.masked_fill(~CAUSAL, NAN)[..., 1:].nanmean(-1)
    contrast = (expected[..., 0] - others)[..., 1:].mean(-1)
    measured = measure(own, TOKENS, ("sink_logit",)).sink_logit.isel(layer=0)
    np.testing.assert_allclose(measured, contrast, rtol=1e-6)


def test_weights_that_do_not_add_up_to_one_are_measured_as_they_are(own):
    attend_by(own, sigmoid)
    weights = (by_hand(own, TOKENS)[0][0]["scores"].sigmoid() * CAUSAL).double()
    torch.testing.assert_close(attention_weights(own, TOKENS, layer=0), weights)
    result = measure(own, TOKENS, ("attention_row_sum", "sink_attention")).isel(layer=0)
    np.testing.assert_allclose(result.attention_row_sum, weights.sum(-1).mean(-1), rtol=1e-6)
    np.testing.assert_allclose(result.sink_attention, weights[:, :, 1:, 0].mean(-1), rtol=1e-6)


def test_the_attention_map_of_an_own_model_is_that_of_its_layer(own):
    layers, _, _ = by_hand(own, TOKENS)
    for number, layer in enumerate(layers):
        torch.testing.assert_close(attention_weights(own, TOKENS, layer=number), layer["weights"])
        expected = layer["scores"].masked_fill(~CAUSAL, -torch.inf)
        torch.testing.assert_close(attention_logits(own, TOKENS, layer=number), expected)


def test_the_parts_of_an_own_model_can_be_cut(own):
    _, states, logits = by_hand(own, TOKENS)
    bias = own.layers[1].attention.wo.bias
    with zero(own, "attention", layer=1), zero(own, "mlp", layer=1), residual_states(own) as found:
        logits_of(own, TOKENS)
    torch.testing.assert_close(found[2], states[1])
    with zero(own, "head", layer=1, head=[0, 1]), zero(own, "mlp", layer=1):
        torch.testing.assert_close(logits_of(own, TOKENS), own.head(states[1] + bias))
    with zero(own, "value", layer=1, head=1, position=0):
        norms = measure(own, TOKENS, ("value_norm",)).value_norm.isel(layer=1)
    assert (norms == 0).sum() == 3 and (norms.isel(head=1, position=0) == 0).all()
    with replace(own, "residual", states[2], layer=0), zero(own, "attention", layer=1):
        cut = logits_of(own, TOKENS)
    torch.testing.assert_close(cut, own.head(states[2] + own.layers[1].mlp(states[2])))
    torch.testing.assert_close(logits_of(own, TOKENS), logits)


def test_an_own_model_is_left_as_it_was_found(own):
    before = [dict(vars(module)) for module in own.modules()]
    function = own.layers[0].attention.attention_function
    measure(own, TOKENS)
    attention_weights(own, TOKENS, layer=0)
    assert [dict(vars(module)) for module in own.modules()] == before
    assert own.layers[0].attention.attention_function is function


def test_a_function_that_belongs_to_the_class_is_put_back_there(own):
    attention = own.layers[0].attention
    kind = type(attention)
    kind.attention_function = staticmethod(softmax_of_scores)
    for block in own.layers:
        del block.attention.attention_function
    measure(own, TOKENS)
    assert "attention_function" not in vars(attention)
    assert attention.attention_function is softmax_of_scores


class AsModule(nn.Module):
    def forward(self, module, query, key, value, attention_mask, scaling, **_):
        return softmax_of_scores(module, query, key, value, attention_mask, scaling)


def test_the_attention_function_may_be_a_module(own):
    expected = measure(own, TOKENS).sink_attention
    function = AsModule()
    for block in own.layers:
        del block.attention.attention_function
        block.attention.attention_function = function
    np.testing.assert_allclose(measure(own, TOKENS).sink_attention, expected, rtol=1e-6)
    assert own.layers[0].attention.attention_function is function
    assert "attention_function" not in vars(own.layers[0].attention)


def test_layers_without_attention_stay_blank(own):
    own.layers[0].attention = None
    own.layers[0].forward = lambda x: x + own.layers[0].mlp(x)
    result = measure(own, TOKENS)
    assert result.sink_attention.isel(layer=0).isnull().all()
    assert result.sink_attention.isel(layer=1).notnull().all()
    with pytest.raises(SinkbookError, match="no softmax attention in layer 0.*that attend: 1"):
        attention_weights(own, TOKENS, layer=0)


def test_logits_may_come_with_other_things(own):
    forward = own.forward
    expected = measure(own, TOKENS, ("loss",)).loss
    for wrap in (lambda x: (x, None), lambda x: SimpleNamespace(logits=x)):
        own.forward = lambda tokens, wrap=wrap: wrap(forward(tokens))
        np.testing.assert_array_equal(measure(own, TOKENS, ("loss",)).loss, expected)


@pytest.mark.parametrize("name", ["attention_function", "heads", "head_dim", "wv", "wo"])
def test_a_member_that_an_attention_lacks_is_named(own, name):
    delattr(own.layers[1].attention, name)
    for read in (lambda: measure(own, TOKENS), lambda: zero(own, "mlp", layer=0).__enter__()):
        with pytest.raises(SinkbookError, match=rf"OwnModel.*layers\[1\]\.attention\.{name} \(a"):
            read()


@pytest.mark.parametrize("name", ["attention", "mlp"])
def test_a_member_that_a_block_lacks_is_named(own, name):
    delattr(own.layers[0], name)
    with pytest.raises(SinkbookError, match=rf"layers\[0\]\.{name} \(an nn.Module or None\)"):
        attention_weights(own, TOKENS, layer=0)


def test_a_model_without_layers_is_told_what_to_carry_and_where_it_is_shown():
    with pytest.raises(
        SinkbookError, match=r"Linear.*layers \(a list.*help\(sinkbook.models.layou"
    ):
        measure(nn.Linear(2, 2), TOKENS)


def test_all_that_is_missing_is_named_at_once_and_a_wrong_type_with_what_it_is(own):
    del own.layers[0].mlp, own.layers[1].attention.wo
    own.layers[1].attention.heads = "two"
    with pytest.raises(SinkbookError) as refusal:
        measure(own, TOKENS)
    for missing in (
        "layers[0].mlp (an nn.Module or None)",
        "layers[1].attention.wo (an nn.Module)",
        "layers[1].attention.heads (a number, not str)",
    ):
        assert missing in str(refusal.value)


def not_causal(module, query, key, value, attention_mask, scaling, **_):
    weights = (scaling * query @ key.mT).softmax(-1)
    return (weights @ value).transpose(1, 2), weights


def says_nothing(module, query, key, value, attention_mask, scaling, **_):
    return softmax_of_scores(module, query, key, value, attention_mask, scaling)[0], None


def calls_twice(module, query, key, value, attention_mask, scaling, **_):
    attend = nn.functional.scaled_dot_product_attention
    first, second = (attend(query, k, value, is_causal=True) for k in (key, -key))
    return (first - second).transpose(1, 2), None


@pytest.mark.parametrize(
    "function, said",
    [
        (not_causal, "OwnModel lets tokens attend to later ones"),
        (says_nothing, "layer 0 returns no weights and calls .* 0 times"),
        (calls_twice, "layer 0 returns no weights and calls .* 2 times"),
    ],
)
def test_attention_that_cannot_be_read_is_refused(own, function, said):
    with pytest.raises(SinkbookError, match=said):
        measure(attend_by(own, function), TOKENS)


def test_attention_that_passes_its_function_by_is_refused(own):
    own.layers[1].attention.forward = lambda x: x
    with pytest.raises(SinkbookError, match="never called the attention_function of layer 1"):
        measure(own, TOKENS)


@pytest.mark.parametrize(
    "inputs", [{"position_ids": TOKENS}, {"attention_mask": CAUSAL.expand(3, 1, 7, 7)}]
)
def test_inputs_that_an_own_model_would_ignore_are_refused(own, inputs):
    with pytest.raises(SinkbookError, match="OwnModel takes whole texts"):
        measure(own, TOKENS, **inputs)


def test_a_mask_that_a_wrapper_gives_to_a_kernel_is_followed():
    """Whoever wraps the function of a toy, to hide keys say, is measured as it then attends."""
    toy = tiny_toy(vocab_size=9).requires_grad_(False)
    window = CAUSAL & ~CAUSAL.tril(-3)
    mask = torch.zeros(1, 1, 7, 7).masked_fill(~window, -torch.inf)
    kernel = toy.layers[0].attention.attention_function
    attend_by(toy, lambda m, q, k, v, _, scaling, **rest: kernel(m, q, k, v, mask, scaling=scaling))
    weights = attention_weights(toy, TOKENS, layer=1)
    assert (weights[:, :, ~window] == 0).all()
    torch.testing.assert_close(weights.sum(-1), torch.ones(3, 4, 7))


@pytest.mark.parametrize("kind", EACH_LAYOUT)
def test_every_layout_tells_its_heads(kind):
    counts = [(layer.heads, layer.value_heads) for layer in layout.layers(EACH_LAYOUT[kind]())]
    assert counts == [(4, 2 if kind == "llama" else 4)] * 3
