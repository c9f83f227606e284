"""Eight-bit mixtures against a slow reference: each text, each expert, each matrix by itself."""

import pytest
import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from sinkbook.errors import SinkbookError
from sinkbook.mitigations.experts import expert_matrices
from sinkbook.mitigations.quantization import RANGES, quantized
from sinkbook.models.layout import blocks
from tiny import tiny_model

IDS = torch.randint(3, 97, (3, 14), generator=torch.Generator().manual_seed(1))
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
MIXTURES = {
    "mixtral": {"num_local_experts": 4},
    "qwen2_moe": {**EXPERTS, "shared_expert_intermediate_size": 16},
    "qwen3_moe": EXPERTS,
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "gpt_oss": {"num_local_experts": 4},  # transposed, with biases and a gate of its own
}


def made(kind: str) -> PreTrainedModel:
    sizes = {"initializer_range": 0.3, "head_dim": 8, "pad_token_id": None}
    model = tiny_model(kind, **sizes | MIXTURES.get(kind, {})).double().requires_grad_(False)
    if kind in MIXTURES:
        model.set_experts_implementation("eager")  # the grouped kernels take no float64
    return model


def rounded(states: torch.Tensor, largest: torch.Tensor | float) -> torch.Tensor:
    step = torch.as_tensor(largest) / 127
    return (states / torch.where(step == 0, 1, step)).round().clamp(-127, 127) * step


def slowly(states: torch.Tensor, ranges: str, first: bool) -> torch.Tensor:
    """The inputs of a map that are of one text, (token, width)."""
    later = states[1:] if first else states
    if ranges == "tensor":
        return rounded(states, states.abs().max())
    if ranges == "token":
        return torch.stack([rounded(token, token.abs().max()) for token in states])
    if ranges == "sink apart":
        others = rounded(later, later.abs().max()) if len(later) else later
        return torch.cat([states[:1], others]) if first else others
    scale = later.abs().amax(0) if len(later) else torch.zeros(states.shape[1])
    scale = torch.where(scale == 0, states.abs().amax(0), scale)
    scale = torch.where(scale == 0, 1, scale)
    return torch.stack([rounded(t / scale, (t / scale).abs().max()) * scale for t in states])


def experts_slowly(module, hidden, index, weights, ranges):
    """What experts give, token by token, when what each gets of a text is rounded."""
    into, out = expert_matrices(module)
    biases = getattr(module, "gate_up_proj_bias", None), getattr(module, "down_proj_bias", None)

    def mapped(states, matrices, bias, expert):
        matrix = matrices[expert].T if module.is_transposed else matrices[expert]
        return F.linear(states, matrix, None if bias is None else bias[expert])

    output = torch.zeros_like(hidden)
    for text in range(len(IDS)):
        span = range(text * IDS.shape[1], (text + 1) * IDS.shape[1])
        for expert in range(len(into)):
            sent = [token for token in span if expert in index[token]]
            if not sent:
                continue
            first = sent[0] == span[0]
            inner = mapped(slowly(hidden[sent], ranges, first), into, biases[0], expert)
            inner = slowly(module._apply_gate(inner), ranges, first)
            given = mapped(inner, out, biases[1], expert)
            for row, token in enumerate(sent):
                share = weights[token][index[token] == expert].sum()
                output[token] += share * given[row]
    return output


@pytest.mark.parametrize("ranges", RANGES)
@pytest.mark.parametrize("kind", MIXTURES)
def test_rounded_experts_are_those_of_a_slow_reference(kind, ranges):
    model = made(kind)
    module = next(m for m in blocks(model)[1].modules() if expert_matrices(m))
    called = []
    with quantized(model, ranges):
        handle = module.register_forward_hook(lambda _, inputs, out: called.append((inputs, out)))
        model(IDS)
        handle.remove()
        for inputs, found in called:
            expected = experts_slowly(module, *inputs, ranges)
            torch.testing.assert_close(found, expected, atol=1e-9, rtol=1e-9)
    exact = module(*called[0][0])
    assert (exact - called[0][1]).abs().max() > 1e-4


@pytest.mark.parametrize("kind", MIXTURES)
def test_each_experts_matrix_has_a_range_of_its_own_and_is_put_back(kind):
    model = made(kind)
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    own = [vars(module).get("forward") for module in model.modules()]
    with pytest.raises(ZeroDivisionError), quantized(model):
        for block in blocks(model):
            for module in block.modules():
                for matrices in expert_matrices(module):
                    for matrix in matrices:
                        steps = matrix / (matrix.abs().max() / 127)
                        assert len(steps.round().unique()) <= 255
                        torch.testing.assert_close(steps, steps.round(), atol=1e-3, rtol=0)
        raise ZeroDivisionError
    assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters())
    assert [vars(module).get("forward") for module in model.modules()] == own


@pytest.mark.parametrize("ranges", RANGES)
@pytest.mark.parametrize("kind", ["llama", "opt", *MIXTURES])
def test_a_text_is_rounded_alike_alone_and_beside_others(kind, ranges):
    model = made(kind)
    exact = model(IDS).logits
    with quantized(model, ranges):
        together = model(IDS).logits
        alone = torch.cat([model(text).logits for text in IDS.split(1)])
    # The last digit of a sum may tip one number over to the next step.
    assert (alone - together).norm() < 0.05 * (together - exact).norm()


def test_experts_that_compute_in_a_way_of_their_own_are_refused(monkeypatch):
    model = made("qwen3_moe")
    module = next(m for m in blocks(model)[0].modules() if expert_matrices(m))
    own = module.forward
    monkeypatch.setattr(module, "forward", lambda *called: 1.01 * own(*called), raising=False)
    with pytest.raises(SinkbookError, match="in a way of its own"), quantized(model, "token"):
        model(IDS)
    with quantized(model, None):  # weights alone need no computation of ours
        model(IDS)


def test_layers_with_matrices_of_another_kind_are_refused_by_name():
    model = tiny_model("llama4_text", num_local_experts=4, head_dim=8, intermediate_size_mlp=64)
    with pytest.raises(SinkbookError, match=r"would stay exact: .*experts\.gate_up_proj"):
        quantized(model, None).__enter__()


def test_weights_that_are_no_plain_numbers_are_refused():
    model = made("llama")
    output = blocks(model)[1].self_attn.o_proj
    exact = output.weight
    for held in (exact.data.to(torch.int8), exact.to("meta")):
        output.weight = torch.nn.Parameter(held, requires_grad=False)
        with pytest.raises(SinkbookError, match=r"layers\[1\].self_attn.o_proj are torch"):
            quantized(model).__enter__()
    output.weight = exact
    torch.nn.utils.parametrizations.weight_norm(output)
    with pytest.raises(SinkbookError, match="o_proj.* are computed"):
        quantized(model).__enter__()
