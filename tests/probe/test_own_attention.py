"""Attention that users have put into a model of transformers is measured as it is, or refused.

What is expected are the weights that the user's own function has kept.
"""

import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama import modeling_llama

from sinkbook import measure
from sinkbook.errors import SinkbookError
from sinkbook.models.interventions import zero
from sinkbook.probe.attention_maps import attention_weights
from tiny import loud_llama, tiny_model

pytestmark = pytest.mark.weights

TOKENS = torch.randint(0, 50, (2, 11), generator=torch.Generator().manual_seed(0))
CAUSAL = torch.ones(11, 11, dtype=torch.bool).tril()
READ = ("sink_attention", "attention_row_sum", "loss")


@pytest.fixture
def llama():
    return loud_llama(3)


# --- Forward functions that form their own attention ------------------------------------------

KEPT: dict[int, torch.Tensor] = {}  # weights by layer


def states_of(attention, hidden_states, position_embeddings):
    batch, length, _ = hidden_states.shape
    query, key, value = (
        w(hidden_states).view(batch, length, -1, attention.head_dim).transpose(1, 2)
        for w in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    query, key = modeling_llama.apply_rotary_pos_emb(query, key, *position_embeddings)
    return query, key.repeat_interleave(2, 1), value.repeat_interleave(2, 1)


def scores_of(attention, query, key):
    causal = torch.ones(query.shape[2], query.shape[2], dtype=torch.bool).tril()
    scores = 0.5 * query @ key.mT / attention.head_dim**0.5  # half the temperature
    return scores.masked_fill(~causal, float("-inf"))


def written(attention, weights, value, product):
    KEPT[attention.layer_idx] = weights
    output = product(weights, value).transpose(1, 2).flatten(2)
    return attention.o_proj(output), weights


def by_softmax(self, hidden_states, position_embeddings=None, **_):
    query, key, value = states_of(self, hidden_states, position_embeddings)
    return written(self, scores_of(self, query, key).softmax(-1), value, torch.matmul)


def by_softmax_without_a_head(self, hidden_states, position_embeddings=None, **_):
    query, key, value = states_of(self, hidden_states, position_embeddings)
    weights = F.softmax(scores_of(self, query, key), dim=-1)
    kept = torch.tensor([1.0, 0.0, 1.0, 1.0])[:, None, None]
    return written(self, weights * kept, value, torch.matmul)


def by_fused(self, hidden_states, position_embeddings=None, **_):
    query, key, value = states_of(self, hidden_states, position_embeddings)
    KEPT[self.layer_idx] = scores_of(self, query, key).exp()
    KEPT[self.layer_idx] /= KEPT[self.layer_idx].sum(-1, keepdim=True)
    scale = 0.5 / self.head_dim**0.5
    output = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale)
    return self.o_proj(output.transpose(1, 2).flatten(2)), None


def by_exponentials(self, hidden_states, position_embeddings=None, **_):
    query, key, value = states_of(self, hidden_states, position_embeddings)
    weights = scores_of(self, query, key).exp()
    return written(self, weights / weights.sum(-1, keepdim=True), value, torch.matmul)


def by_einsum(self, hidden_states, position_embeddings=None, **_):
    query, key, value = states_of(self, hidden_states, position_embeddings)
    product = lambda weights, value: torch.einsum("bhqk,bhkd->bhqd", weights, value)  # noqa: E731
    return written(self, scores_of(self, query, key).softmax(-1), value, product)


class Own(nn.Module):
    """Another module in the place of the attention."""

    def __init__(self, attention: nn.Module, forward):
        super().__init__()
        for name in ("q_proj", "k_proj", "v_proj", "o_proj", "head_dim", "layer_idx"):
            setattr(self, name, getattr(attention, name))
        self.own = forward

    def forward(self, *arguments, **keywords):
        return self.own(self, *arguments, **keywords)


def on_the_instance(attention: nn.Module, forward, _monkeypatch) -> None:
    attention.forward = types.MethodType(forward, attention)


def as_a_module(attention: nn.Module, forward, _monkeypatch) -> None:
    OWNERS[attention].self_attn = Own(attention, forward)


OWNERS: dict[nn.Module, nn.Module] = {}


def put(model, layers, place, forward, monkeypatch) -> None:
    KEPT.clear()
    for number in layers:
        block = model.model.layers[number]
        OWNERS[block.self_attn] = block
        place(block.self_attn, forward, monkeypatch)


FORWARDS = [by_softmax, by_softmax_without_a_head, by_fused]
PLACES = [on_the_instance, as_a_module]


@pytest.mark.parametrize("layers", [[0, 1, 2], [1]], ids=["all layers", "one layer"])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("forward", FORWARDS)
def test_attention_in_an_own_forward_is_overheard(llama, layers, place, forward, monkeypatch):
    plain = measure(llama, TOKENS, READ)
    put(llama, layers, place, forward, monkeypatch)
    found = measure(llama, TOKENS, READ)
    for number in layers:
        weights = KEPT[number].detach()
        on_sink = weights[:, :, 1:, 0].mean(-1)
        np.testing.assert_allclose(found.sink_attention[:, number], on_sink, atol=1e-5)
        rows = weights.sum(-1).mean(-1)
        np.testing.assert_allclose(found.attention_row_sum[:, number], rows, atol=1e-5)
        shown = attention_weights(llama, TOKENS, layer=number)
        torch.testing.assert_close(shown, weights, rtol=0, atol=1e-5)
    if 0 not in layers:
        np.testing.assert_array_equal(found.sink_attention[:, 0], plain.sink_attention[:, 0])
    assert (abs(found.loss - plain.loss) > 1e-3).all()
    loss = [llama(row[None], labels=row[None]).loss.item() for row in TOKENS]
    np.testing.assert_allclose(found.loss, loss, rtol=1e-5)


@pytest.mark.parametrize("layers", [[0, 1, 2], [1]], ids=["all layers", "one layer"])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("forward", [by_exponentials, by_einsum])
def test_attention_that_cannot_be_overheard_is_refused(llama, layers, place, forward, monkeypatch):
    put(llama, layers, place, forward, monkeypatch)
    said = f"layer {layers[0]} of LlamaForCausalLM attends past"
    with pytest.raises(SinkbookError, match=said):
        measure(llama, TOKENS)
    measure(llama, TOKENS, ("residual_norm", "loss"))  # of which attention is no part


@pytest.mark.parametrize("forward, refused", [(by_softmax, False), (by_einsum, True)])
def test_a_forward_put_on_the_class_is_seen(llama, forward, refused, monkeypatch):
    monkeypatch.setattr(modeling_llama.LlamaAttention, "forward", forward)
    if refused:
        with pytest.raises(SinkbookError, match="attends past the attention functions"):
            measure(llama, TOKENS)
        return
    found = measure(llama, TOKENS, READ).sink_attention
    for number, weights in KEPT.items():
        np.testing.assert_allclose(found[:, number], weights[:, :, 1:, 0].mean(-1), atol=1e-5)


# --- Attention functions that users have registered ---------------------------------------------


def repeated(query, *states):
    return (state.repeat_interleave(query.shape[1] // state.shape[1], 1) for state in states)


def with_null_slot(module, query, key, value, attention_mask, scaling=None, **_):
    key, value = repeated(query, key, value)
    causal = torch.ones(query.shape[2], query.shape[2], dtype=torch.bool).tril()
    scores = (scaling * query @ key.mT).masked_fill(~causal, float("-inf"))
    weights = F.pad(scores, (0, 1)).softmax(-1)[..., :-1]
    KEPT[module.layer_idx] = weights
    return (weights @ value).transpose(1, 2).contiguous(), weights


def sharpened(module, query, key, value, attention_mask, scaling=None, **keywords):
    attend = F.scaled_dot_product_attention
    keys, values = repeated(query, key, value)
    scores = (3 * scaling * query @ keys.mT).exp().tril()
    KEPT[module.layer_idx] = scores / scores.sum(-1, keepdim=True)
    output = attend(3 * query, keys, values, is_causal=True, scale=scaling)
    return output.transpose(1, 2).contiguous(), None


def silent(module, query, key, value, attention_mask, scaling=None, **keywords):
    return with_null_slot(module, query, key, value, attention_mask, scaling)[0], None


def with_the_slot(module, query, key, value, attention_mask, scaling=None, **keywords):
    output, weights = with_null_slot(module, query, key, value, attention_mask, scaling)
    return output, F.pad(weights, (0, 1))


@pytest.fixture
def implementations():
    before = dict(AttentionInterface._global_mapping), dict(AttentionMaskInterface._global_mapping)
    yield
    for interface, kept in zip((AttentionInterface, AttentionMaskInterface), before, strict=True):
        interface._global_mapping.clear()
        interface._global_mapping.update(kept)
    ALL_ATTENTION_FUNCTIONS._local_mapping.clear()


def register(name: str, function) -> None:
    AttentionInterface.register(name, function)
    AttentionMaskInterface.register(name, sdpa_mask)


def register_here(name: str, function) -> None:
    ALL_ATTENTION_FUNCTIONS[name] = function


@pytest.mark.parametrize("registering", [register, register_here])
@pytest.mark.parametrize("name", ["own", "sdpa", "eager"])
@pytest.mark.parametrize("function", [with_null_slot, sharpened])
def test_a_registered_attention_is_measured(llama, implementations, function, name, registering):
    if (name, function, registering) == ("sdpa", sharpened, register):
        pass
    KEPT.clear()
    plain = measure(llama, TOKENS, READ)
    registering(name, function)
    llama.set_attn_implementation(name)
    found = measure(llama, TOKENS, READ)
    weights = torch.stack([KEPT[number] for number in range(3)], 1)
    assert ALL_ATTENTION_FUNCTIONS[name] is function
    assert llama.config._attn_implementation == name
    np.testing.assert_allclose(found.sink_attention, weights[..., 1:, 0].mean(-1), atol=1e-5)
    np.testing.assert_allclose(found.attention_row_sum, weights.sum(-1).mean(-1), atol=1e-5)
    loss = [llama(row[None], labels=row[None]).loss.item() for row in TOKENS]
    np.testing.assert_allclose(found.loss, loss, rtol=1e-5)
    assert (abs(found.loss - plain.loss) > 1e-3).all()


@pytest.mark.parametrize(
    "function, said",
    [(silent, "returns no weights and calls"), (with_the_slot, "weights of the shape")],
)
def test_a_registered_attention_that_does_not_show_its_weights_is_refused(
    llama, implementations, function, said
):
    register("own", function)
    llama.set_attn_implementation("own")
    with pytest.raises(SinkbookError, match=said):
        measure(llama, TOKENS)
    assert ALL_ATTENTION_FUNCTIONS["own"] is function


def test_an_eager_attention_put_into_the_module_is_measured(llama, monkeypatch):
    monkeypatch.setattr(modeling_llama, "eager_attention_forward", with_null_slot)
    llama.set_attn_implementation("eager")
    found = measure(llama, TOKENS, READ).attention_row_sum
    weights = torch.stack([KEPT[number] for number in range(3)], 1)
    np.testing.assert_allclose(found, weights.sum(-1).mean(-1), atol=1e-5)
    assert "eager" not in ALL_ATTENTION_FUNCTIONS


def test_heads_are_cut_under_a_registered_attention(llama, implementations):
    register("own", with_null_slot)
    llama.set_attn_implementation("own")
    with zero(llama, "head", layer=1, head=2):
        cut = llama(TOKENS).logits
    llama.model.layers[1].self_attn.o_proj.weight[:, 16:24] = 0
    torch.testing.assert_close(cut, llama(TOKENS).logits)


def test_layers_without_attention_are_still_blank():
    hybrid = tiny_model("lfm2", layer_types=["conv", "full_attention"]).requires_grad_(False)
    found = measure(hybrid, TOKENS, READ).sink_attention
    assert found[:, 0].isnull().all() and found[:, 1].notnull().all()
