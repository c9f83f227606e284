"""The toy transformer starts where the paper's does, and its switches do what they say."""

import pytest
import torch

from sinkbook.errors import SinkbookError
from sinkbook.toy.attention import KERNELS
from sinkbook.toy.norms import NORMS, DynamicTanh, GatedNorm, SingleScaleNorm
from sinkbook.toy.tasks import TaskConfig, task
from sinkbook.toy.transformer import (
    GATES,
    NORM_PLACES,
    SelfAttention,
    Transformer,
    TransformerConfig,
)

SWITCHES = [
    *({"attention": name} for name in KERNELS),
    *({"gate": name} for name in GATES[1:]),
    *({"norm": name} for name in NORMS),
    *({"norm_place": name} for name in NORM_PLACES[1:]),
    {"qk_norm": True},
    {"head_norm": True},
]


@pytest.fixture(scope="module")
def paper_tokens():
    return task(TaskConfig()).batch_at(2, 0, 0)[:, :-1]


def residuals(model, tokens):
    """Residual states after the embedding and after each layer, by hooks as a reader would."""
    states = []
    hooks = [
        model.layers[0].register_forward_pre_hook(lambda _, inputs: states.append(inputs[0])),
        *(layer.register_forward_hook(lambda *a: states.append(a[2])) for layer in model.layers),
    ]
    with torch.no_grad():
        model(tokens)
    for hook in hooks:
        hook.remove()
    return states


@pytest.mark.parametrize(("kernel", "norm"), [("softmax", 24.346817), ("relu", 23.368813)])
def test_golden_residual_norm_of_the_start_token_at_step_0(kernel, norm, paper_tokens):
    torch.manual_seed(42)
    model = Transformer(TransformerConfig(attention=kernel))
    after = residuals(model, paper_tokens)[1][0, 0].norm().item()
    assert after == pytest.approx(norm, abs=1e-5)


@pytest.mark.parametrize("kernel", ["softmax", "relu"])
def test_golden_value_norm_of_the_start_token_at_step_0(kernel, paper_tokens):
    torch.manual_seed(42)
    model = Transformer(TransformerConfig(attention=kernel))
    block = model.layers[0]
    embedding = residuals(model, paper_tokens)[0]
    with torch.no_grad():
        value = block.attention.wo(block.attention.wv(block.attention_norm(embedding)))
    assert value[0, 0].norm().item() == pytest.approx(5.19937, abs=1e-5)


def disturbed(model, seed=0):
    """The same model with other weights, so that nothing is still at its start of zeros or ones."""
    torch.manual_seed(seed)
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize("switch", SWITCHES, ids=str)
def test_no_position_sees_a_later_one(switch, paper_tokens):
    model = disturbed(Transformer(TransformerConfig(width=32, layers=2, heads=2, **switch)))
    tokens = paper_tokens[:, :40]
    changed = tokens.clone()
    changed[:, 20:] = changed[:, 20:].roll(1, dims=1)
    difference = (model(tokens) - model(changed)).abs().amax(dim=(0, 2))
    assert difference[:20].max() < 1e-5
    assert difference[20:].max() > 1e-3


@pytest.mark.parametrize("switch", SWITCHES, ids=str)
def test_a_text_is_read_the_same_whatever_else_is_in_its_batch(switch, paper_tokens):
    model = disturbed(Transformer(TransformerConfig(width=32, layers=2, heads=2, **switch)))
    together = model(paper_tokens[:, :40])
    torch.testing.assert_close(model(paper_tokens[1:, :40]), together[1:], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("switch", SWITCHES, ids=str)
def test_a_seed_gives_every_mitigation_the_same_other_weights(switch):
    torch.manual_seed(3)
    plain = Transformer(TransformerConfig(width=32, layers=2, heads=2)).state_dict()
    torch.manual_seed(3)
    model = Transformer(TransformerConfig(width=32, layers=2, heads=2, **switch))
    weights = model.state_dict()
    shared = [n for n in plain if n in weights and "norm" not in n]
    assert len(shared) == 15
    if switch != {"norm": "gated"}:
        assert all(torch.equal(weights[name], plain[name]) for name in shared)


@pytest.mark.parametrize("switch", SWITCHES, ids=str)
def test_every_weight_has_a_part_in_the_output(switch, paper_tokens):
    model = disturbed(Transformer(TransformerConfig(width=32, layers=1, heads=2, **switch)))
    model.requires_grad_(True)
    model(paper_tokens[:, :40]).square().sum().backward()
    # The bias of a layer norm on keys would have none; ours have no such bias.
    assert all(parameter.grad.abs().max() > 0 for parameter in model.parameters())


def attention_module(**switches):
    torch.manual_seed(0)
    config = TransformerConfig(width=16, heads=2, **switches)
    return SelfAttention(config, layer_idx=0).requires_grad_(False)


@pytest.mark.parametrize("gate", ["head", "element"])
def test_a_gate_begins_half_open_and_can_close(gate):
    x = torch.randn(2, 5, 16)
    plain, gated = attention_module(), attention_module(gate=gate)
    torch.testing.assert_close(gated(x), plain(x) / 2)
    gated.output_gate.bias.fill_(-50.0)
    assert gated(x).abs().max() < 1e-6
    gated.output_gate.bias.fill_(50.0)
    torch.testing.assert_close(gated(x), plain(x))


def test_a_head_gate_scales_each_head_by_what_its_query_reads():
    x = torch.randn(1, 5, 16)
    gated = attention_module(gate="head")
    gated.output_gate.weight[1].normal_()
    heads = {}
    gated.wo.register_forward_pre_hook(lambda _, inputs: heads.update(gated=inputs[0]))
    gated(x)
    plain = attention_module()
    plain.wo.register_forward_pre_hook(lambda _, inputs: heads.update(plain=inputs[0]))
    plain(x)
    ratio = (heads["gated"] / heads["plain"]).unflatten(-1, (2, 8))
    torch.testing.assert_close(ratio[..., 0, :], torch.full((1, 5, 8), 0.5))
    expected = torch.sigmoid(x @ gated.output_gate.weight[1])
    torch.testing.assert_close(ratio[..., 1, :], expected[..., None].expand(1, 5, 8))


def test_a_value_gate_scales_values_by_what_they_are():
    x = torch.randn(1, 5, 16)
    gated = attention_module(gate="value")
    gated.value_gate.weight.normal_()
    values = []
    kernel = gated.attention_function
    gated.attention_function = lambda *a, **k: values.append(a[3]) or kernel(*a, **k)
    gated(x)
    value = gated.wv(x).unflatten(-1, (2, 8)).transpose(1, 2)
    gates = torch.sigmoid(value @ gated.value_gate.weight.T)
    torch.testing.assert_close(values[0], value * gates)


def test_a_head_norm_gives_every_heads_output_unit_mean_square():
    heads = []
    module = attention_module(head_norm=True)
    module.wo.register_forward_pre_hook(lambda _, inputs: heads.append(inputs[0]))
    module(torch.randn(2, 5, 16))
    mean_square = heads[0].unflatten(-1, (2, 8)).square().mean(-1)
    torch.testing.assert_close(mean_square, torch.ones(2, 5, 2), atol=1e-4, rtol=1e-4)


def test_qk_norm_bounds_the_logits():
    module = attention_module(qk_norm=True)
    module.wq.weight *= 1_000
    states = []
    kernel = module.attention_function
    module.attention_function = lambda *a, **k: states.append(a[1:3]) or kernel(*a, **k)
    module(torch.randn(2, 5, 16))
    query, key = states[0]
    assert (query @ key.mT * module.scaling).abs().max() <= 8**0.5 + 1e-4


def test_a_null_slot_with_speed_moves_its_logit_as_many_times_as_far():
    x = torch.randn(1, 5, 16)
    for name in ("sink-logit", "key-bias"):
        slow, fast = (attention_module(attention=name, null_slot_speed=s) for s in (1.0, 10.0))
        parameter = "null_logit" if name == "sink-logit" else "null_key"
        getattr(slow, parameter).fill_(1.0)
        getattr(fast, parameter).fill_(0.1)
        torch.testing.assert_close(fast(x), slow(x))


def test_norms_by_hand():
    x = torch.tensor([[3.0, -4.0, 0.0, 0.0]])  # a root mean square of 2.5
    with torch.no_grad():
        single, gated, tanh = SingleScaleNorm(4), GatedNorm(4, rank=2), DynamicTanh(4)
        single.gain.fill_(10.0)
        torch.testing.assert_close(single(x), x * 4)
        torch.testing.assert_close(gated(x), x / 2.5 / 2)
        gated.up.weight.fill_(-1e3)
        gated.down.weight.copy_(torch.eye(2, 4))
        kept = gated(torch.tensor([[3.0, 4.0, 0.0, 0.0]]))
        assert kept.abs().max() < 1e-6, "a gate that is pushed down closes"
        tanh.bias.fill_(1.0)
        torch.testing.assert_close(tanh(x), torch.tanh(x / 2) + 1)
    assert sum(p.numel() for p in single.parameters()) == 1


@pytest.mark.parametrize("place", NORM_PLACES)
def test_norms_stand_where_they_are_put(place, paper_tokens):
    config = TransformerConfig(width=16, norm_place=place, without_mlp=(0,))
    model = disturbed(Transformer(config))
    before, after = residuals(model, paper_tokens[:, :20])
    block = model.layers[0]
    expected = {
        "pre": lambda x: x + block.attention(block.attention_norm(x)),
        "post": lambda x: block.attention_norm(x + block.attention(x)),
        "sandwich": lambda x: (
            x + block.after_attention_norm(block.attention(block.attention_norm(x)))
        ),
    }[place](before)
    torch.testing.assert_close(after, expected)


def test_switched_off_parts_are_absent_and_linear_ones_are_one_map():
    config = TransformerConfig(
        width=16, layers=3, without_attention=(0,), without_mlp=(1,), linear_mlp=(2,)
    )
    first, second, third = Transformer(config).layers
    assert first.attention is None
    assert first.mlp is not None
    assert second.mlp is None
    assert isinstance(third.mlp, torch.nn.Linear)
    assert third.mlp.bias is None


def test_a_model_of_nothing_but_switched_off_layers_is_its_embedding(paper_tokens):
    config = TransformerConfig(width=16, without_attention=(0,), without_mlp=(0,))
    states = residuals(Transformer(config), paper_tokens)
    assert torch.equal(states[0], states[1])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"attention": "sofmax"}, "no attention kernel named 'sofmax'. Known: softmax"),
        ({"gate": "garden"}, "Known: none, head"),
        ({"norm": "batch"}, "Known: layer"),
        ({"norm_place": "between"}, "Known: pre, post"),
        ({"heads": 3}, "not a multiple of 3"),
    ],
)
def test_an_impossible_model_is_refused(changes, said):
    with pytest.raises(SinkbookError, match=said):
        TransformerConfig(**changes)


def test_a_text_longer_than_the_model_is_refused():
    model = Transformer(TransformerConfig(width=16, length=8))
    with pytest.raises(SinkbookError, match="9 positions"):
        model(torch.zeros(1, 9, dtype=torch.long))
