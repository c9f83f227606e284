"""Streaming is its definition, computed afresh in float64, for each architecture; or refused."""

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel, logging

from architectures import ARCHITECTURES, tiny_with
from references import afresh
from sinkbook.errors import SinkbookError
from sinkbook.mitigations import rotation
from sinkbook.mitigations.rotation import Rotation, rotations
from sinkbook.mitigations.sink_cache import SinkCache, streaming
from sinkbook.models.layout import blocks
from tiny import tiny_model

logging.set_verbosity_error()

TOKENS = torch.randint(3, 97, (2, 18), generator=torch.Generator().manual_seed(1))
SINKS, WINDOW = 2, 5
# Of these, what a cache of keys can hold and turn: all others are refused.
STREAMED = (
    "apertus arcee bitnet cohere cohere2 dots1 ernie4_5 exaone4 flex_olmo gemma gemma2 "
    "gemma3_text gemma4_text glm glm4 glm4_moe gpt_neox gpt_oss granite granitemoe helium "
    "hunyuan_v1_dense lfm2 llama llama4_text mimo_v2_flash ministral mistral mixtral moshi "
    "nanochat nemotron olmo olmo2 olmo3 olmoe persimmon phi phi3 phimoe qwen2 qwen2_moe qwen3 "
    "qwen3_moe seed_oss smollm3 stablelm starcoder2 vaultgemma "
)


def one_by_one(model: PreTrainedModel) -> torch.Tensor:
    cache = SinkCache(model, sinks=SINKS, window=WINDOW)
    steps = [model(tokens, past_key_values=cache).logits for tokens in TOKENS.split(1, dim=1)]
    return torch.cat(steps, dim=1)


def at_once(model: PreTrainedModel) -> torch.Tensor:
    with streaming(model, window=WINDOW, kept=SINKS):
        return model(TOKENS, use_cache=False).logits


def assert_streams(model: PreTrainedModel, *, twin: bool = True) -> None:
    """Both ways are the definition; the twin may be refused where `twin` says so."""
    model = model.double().requires_grad_(False)
    expected = afresh(model, TOKENS, sinks=SINKS, window=WINDOW)
    tolerance = 1e-5 * expected.abs().max().item()
    torch.testing.assert_close(one_by_one(model), expected, atol=tolerance, rtol=0)
    try:
        found = at_once(model)
    except SinkbookError:
        assert not twin
    else:
        torch.testing.assert_close(found, expected, atol=tolerance, rtol=0)


@pytest.mark.weights
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_each_architecture_streams_by_definition_or_is_refused(kind):
    model = tiny_with(kind)
    if kind in STREAMED.split():
        assert_streams(model, twin=False)
        return
    for way in (one_by_one, at_once):
        with pytest.raises(SinkbookError, match=f"{type(model).__name__}|takes whole texts"):
            way(model.double().requires_grad_(False))


LOUD = {"initializer_range": 0.3, "head_dim": 8, "pad_token_id": None}
ROPE = {"rope_theta": 10000.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LINEAR = {"rope_type": "linear", "factor": 2.0}
NTK = {"rope_type": "dynamic", "factor": 2.0}
LONG = {
    **{"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [1.5, 2.0, 3.0, 4.0]},
    "original_max_position_embeddings": 16,
}
LLAMA3 = {
    **{"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "original_max_position_embeddings": 16,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}


def made(kind: str, **changes) -> PreTrainedModel:
    model = tiny_model(kind, **LOUD | changes)
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # the grouped kernels take no float64
    return model


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("llama", {"rope_parameters": ROPE | YARN}),
        ("llama", {"rope_parameters": ROPE | LINEAR}),
        ("llama", {"rope_parameters": ROPE | LLAMA3}),
        ("phi", {}),  # half of each head
        ("cohere", {}),  # pairs of neighbours
        ("nanochat", {}),  # turns the other way
        ("smollm3", {"no_rope_layers": [1, 0]}),
        ("exaone4", {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 64}),
        ("qwen2_moe", {"use_sliding_window": False, "sliding_window": 32768, **EXPERTS}),
        ("mistral", {"sliding_window": 64}),
    ],
)
def test_positions_of_each_kind_are_moved_as_the_model_would(kind, changes):
    assert_streams(made(kind, **changes))


@pytest.mark.parametrize(
    ("kind", "changes", "says"),
    [
        ("llama", {"rope_parameters": ROPE | NTK, "max_position_embeddings": 16}, "on the length"),
        ("phi3", {"rope_parameters": ROPE | LONG, "max_position_embeddings": 64}, "on the length"),
        (
            "ministral3",
            {"rope_parameters": ROPE | YARN | {"llama_4_scaling_beta": 0.1}},
            "size of its queries",
        ),
        ("smollm3", {"no_rope_layers": [0, 0]}, "same at every position"),
        ("gpt2", {}, "does not just turn queries and keys"),
        ("bloom", {}, "does not let its attention be replaced"),
        ("lfm2", {"layer_types": ["conv", "full_attention"]}, "a cache of keys and values alone"),
        (
            "qwen3_next",
            {"layer_types": ["linear_attention", "full_attention"], **EXPERTS},
            "a cache of keys and values alone",
        ),
    ],
)
def test_what_a_position_does_beside_turning_is_found_and_named(kind, changes, says):
    model = made(kind, **changes)
    for way in (one_by_one, at_once):
        with pytest.raises(SinkbookError, match=says):
            way(model)


def test_a_norm_after_the_rotation_is_found_by_its_weights():
    """HunYuan normalises turned keys: with equal weights that commutes, with others it does not."""
    model = made("hunyuan_v1_dense")
    assert_streams(model)
    norm = blocks(model)[1].self_attn.key_layernorm
    norm.weight.data = torch.linspace(0.5, 2.0, len(norm.weight)).double()
    with pytest.raises(SinkbookError, match="in layer 1 a position does not just turn"):
        SinkCache(model, sinks=SINKS, window=WINDOW)


def test_an_attention_that_is_more_than_a_softmax_is_found_by_trying_it(monkeypatch):
    model = made("llama")
    module = type(blocks(model)[0].self_attn)
    forward = module.forward

    def gated(self, hidden_states, *arguments, **keywords):
        output, weights = forward(self, hidden_states, *arguments, **keywords)
        is_ours = self.config._attn_implementation == "sinkbook-streaming"
        return (output if is_ours else 1.01 * output), weights

    monkeypatch.setattr(module, "forward", gated)
    with pytest.raises(SinkbookError, match="something else than softmax attention"):
        at_once(model)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_in_half_precision_the_same_rotations_are_found_and_far_logits_do_not_overflow(dtype):
    model = made("llama").requires_grad_(False)
    for block in blocks(model):
        block.self_attn.q_proj.weight.mul_(60)  # products of queries and keys beyond float16
        block.self_attn.k_proj.weight.mul_(60)
    exact = at_once(model)
    found = at_once(model.to(dtype)).float()
    assert found.isfinite().all()
    assert (found - exact).norm() < 0.5 * exact.norm()
    turns = [turn.frequencies for turn in rotations(model).values()]
    assert [len(frequencies) for frequencies in turns] == [4, 4]


def test_a_rotation_by_two_steps_is_two_rotations_and_leaves_the_rest_alone():
    states = torch.randn(1, 2, 3, 10, generator=torch.Generator().manual_seed(0)).double()
    for neighbours in (False, True):
        turn = Rotation(torch.tensor([1.0, 0.1, 0.01]), start=2, neighbours=neighbours)
        torch.testing.assert_close(turn(turn(states, 5), 7), turn(states, 12))
        torch.testing.assert_close(turn(turn(states, 100_000), -100_000), states)
        assert torch.equal(turn(states, 3)[..., [0, 1, 8, 9]], states[..., [0, 1, 8, 9]])
        each = turn(states, torch.tensor([0, 4, 9]))
        assert torch.equal(each[:, :, 1:2], turn(states[:, :, 1:2], 4))
    assert torch.equal(Rotation(torch.empty(0))(states, 9), states)


def test_a_trial_leaves_mode_buffers_and_attention_of_the_model_as_they_were():
    model = made("llama", rope_parameters=ROPE | NTK, max_position_embeddings=16).train()
    blocks(model)[0].mlp.eval()
    modes = [module.training for module in model.modules()]
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    own = model.config._attn_implementation
    with pytest.raises(SinkbookError, match="on the length"):
        SinkCache(model, window=WINDOW)
    assert [module.training for module in model.modules()] == modes
    assert model.config._attn_implementation == own
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in model.named_buffers())


def test_the_longest_length_is_that_of_the_configuration_wherever_it_stands():
    model = made(
        "llama", rope_parameters=ROPE | LLAMA3 | {"original_max_position_embeddings": 9999}
    )
    assert rotation.longest_length(model) == 9999


def test_a_wrapped_model_streams_as_the_model_itself():
    model = made("llama").requires_grad_(False)
    with streaming(nn.DataParallel(model), window=WINDOW, kept=SINKS):
        found = model(TOKENS, use_cache=False).logits
    assert torch.equal(found, at_once(model))
