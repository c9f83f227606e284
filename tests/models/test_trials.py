"""What layers add, and where their heads are, is what a trial found, in every architecture.

Two things hold wherever a cut is not refused: without attention and MLP a layer passes on its
input, and with a vector in the place of one it adds that vector. Heads are cut as by zeros in W_O.
"""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from architectures import ARCHITECTURES, tiny_with
from references import around, close
from sinkbook.errors import SinkbookError
from sinkbook.models import partial_forward
from sinkbook.models.interventions import reading, replace, zero
from sinkbook.models.layout import layers
from sinkbook.models.trials.heads import heads
from sinkbook.models.trials.writers import writers
from tiny import tiny_model, tiny_toy

pytestmark = pytest.mark.weights

LENGTH = 9
TOKENS = torch.randint(3, 97, (2, LENGTH), generator=torch.Generator().manual_seed(1))
PARTS = ("attention", "mlp")

# Beside the probe's: shared experts, multipliers, mixers, layers that run side by side.
MORE = {
    "aria_text": {},
    "bigbird_pegasus": {},
    "blenderbot": {},
    "falcon_h1": {"mamba_d_ssm": 64},
    "gpt_neox serial": {"use_parallel_residual": False},
    "granite scaled": {"residual_multiplier": 0.22},
    "granitemoeshared": {"shared_intermediate_size": 48},
    "jetmoe": {"num_key_value_heads": 2, "kv_channels": 8},
    "megatron-bert": {},
    "mamba": {},
    "nemotron_h": {},
    "olmo_hybrid": {},
    "qwen3_5_text": {},
    "xlm-roberta-xl": {},
    "zamba2": {"layers_block_type": ["mamba", "hybrid"], "num_mem_blocks": 1, "n_mamba_heads": 4},
}
# Where the sum of a layer is normalised or scaled, nothing can be said to be added to its input.
POST_NORM = {"bart", "bert", "doge", "electra", "minimax", "openai-gpt", "rembert", "roberta"}
POST_NORM |= {"roformer", "trocr"}
# Layers that add more than attention and MLP do, or what no module gives.
OTHERWISE = {"falcon_h1", "gemma4_text", "gpt_neox_japanese", "mamba", "megatron-bert"}
OTHERWISE |= {"nemotron_h", "xlm-roberta-xl", "zamba2"}
KINDS = [*ARCHITECTURES, *(kind for kind in MORE if kind not in ARCHITECTURES)]


def made(kind: str) -> nn.Module:
    return tiny_with(kind.split()[0], **MORE.get(kind, {})).requires_grad_(False)


def cut_both(model: nn.Module, number: int) -> tuple[torch.Tensor, torch.Tensor] | None:
    try:
        with zero(model, "attention", layer=number), zero(model, "mlp", layer=number):
            return around(model, number, TOKENS)
    except SinkbookError as refusal:
        assert f"in layer {number} of {type(model).__name__}: " in str(refusal)
        return None


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_without_parts_passes_on_its_input_and_adds_what_a_part_is_made_to_write(kind):
    model = made(kind)
    generator = torch.Generator().manual_seed(2)
    refused = set()
    for number in range(2):
        silent = cut_both(model, number)
        if silent is None:
            refused.add(number)
            continue
        close(silent[1], silent[0])
        vectors = torch.randn(2, LENGTH, 32, generator=generator)
        for part, other in zip(PARTS, reversed(PARTS), strict=True):
            cut = zero(model, other, layer=number)
            with cut, replace(model, part, vectors, layer=number):
                before, after = around(model, number, TOKENS)
            close(after - before, vectors)
            with zero(model, other, layer=number), zero(model, part, layer=number, position=-1):
                before, after = around(model, number, TOKENS)
            close(after[:, -1], before[:, -1])
            assert ((after - before)[:, :-1].norm(dim=-1) > 1e-6).all()
    assert bool(refused) == (kind in POST_NORM | OTHERWISE)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_read_of_a_part_is_what_it_adds(kind):
    model = made(kind)
    for number in range(2):
        for part, other in zip(PARTS, reversed(PARTS), strict=True):
            try:
                with zero(model, other, layer=number), reading(model, part, layer=number) as read:
                    before, after = around(model, number, TOKENS)
            except SinkbookError:
                assert cut_both(model, number) is None
                continue
            close(after - before, read[0])


@pytest.mark.parametrize("kind", KINDS)
def test_a_head_is_cut_as_by_zeros_in_its_part_of_w_o_or_there_is_none(kind):
    model = made(kind)
    for number, (layer, found) in enumerate(zip(layers(model), heads(model), strict=True)):
        if found.no_heads:
            with pytest.raises(SinkbookError, match=f"layer {number} has no head to replace"):
                zero(model, "head", layer=number, head=0).__enter__()
            continue
        head = found.count - 1
        with torch.no_grad(), zero(model, "head", layer=number, head=head):
            cut = partial_forward.logits_of(model, TOKENS)
        if not hasattr(layer.output, "weight"):  # Moshi's lies one module deeper
            continue
        turned = type(layer.output).__name__ == "Conv1D"
        weight = layer.output.weight if turned else layer.output.weight.T
        kept = weight.clone()
        weight.unflatten(0, (found.count, -1))[head] = 0
        with torch.no_grad():
            close(cut, partial_forward.logits_of(model, TOKENS))
        weight.copy_(kept)


ATTENDING = {  # where that is not in all layers
    "bamba": [1],
    "granitemoehybrid": [1],
    "jamba": [1],
    "jetmoe": [],  # each expert has a W_O of its own
    "mamba": [],
    "minimax": [0],
    "nemotron_h": [2],
    "olmo_hybrid": [1],
    "qwen3_5_text": [1],
    "qwen3_next": [1],
    "zamba2": [1],
}


@pytest.mark.parametrize("kind", KINDS)
def test_heads_are_where_attention_is(kind):
    found = [number for number, layer in enumerate(heads(made(kind))) if not layer.no_heads]
    assert found == ATTENDING.get(kind, [0, 1])


@pytest.mark.parametrize("kind", KINDS)
def test_a_cut_value_leaves_the_attention_as_it_was_or_is_refused(kind):
    model = made(kind)
    found = heads(model)
    for number, layer in enumerate(found):
        if layer.no_values:
            with pytest.raises(SinkbookError, match=f"layer {number} has no value to replace"):
                zero(model, "value", layer=number).__enter__()
            continue
        with torch.no_grad(), zero(model, "value", layer=number):
            silent = partial_forward.logits_of(model, TOKENS)
        if not layer.no_heads:
            with torch.no_grad(), zero(model, "head", layer=number, head=range(layer.count)):
                close(silent, partial_forward.logits_of(model, TOKENS))


# --- The trial itself ------------------------------------------------------------------------


def test_a_model_is_tried_once_and_again_when_its_modules_have_changed():
    model = tiny_model().requires_grad_(False)
    runs = []
    count = model.model.embed_tokens.forward
    model.model.embed_tokens.forward = lambda ids: runs.append(1) or count(ids)
    first = writers(model)
    assert runs and writers(model) is first
    before = len(runs)
    model.model.layers[0].mlp = copy.deepcopy(model.model.layers[0].mlp)
    assert writers(model) is not first and len(runs) > before
    assert writers(model)[0].mlp[0].module is model.model.layers[0].mlp


def test_a_trial_leaves_no_trace_and_disturbs_no_hook():
    model = tiny_model(attention_dropout=0.5).train()
    seen = []
    handle = model.model.layers[0].mlp.register_forward_hook(lambda *call: seen.append(call))
    state = torch.get_rng_state()
    writers(model)
    heads(model)
    assert seen == [] and model.model.layers[1].self_attn.training
    assert torch.equal(torch.get_rng_state(), state)
    assert model.config._attn_implementation == "sdpa"
    model(TOKENS)
    assert len(seen) == 1
    handle.remove()


def test_cuts_may_begin_inside_given_outputs():
    model = tiny_model(num_hidden_layers=3).requires_grad_(False)
    with partial_forward.kept(model) as outputs:
        model(TOKENS)
    with partial_forward.given(model, outputs, below=2), zero(model, "mlp", layer=2):
        spared = model(TOKENS).logits
    with zero(model, "mlp", layer=2):
        torch.testing.assert_close(spared, model(TOKENS).logits)


class Lying(nn.Module):
    """An MLP in a layer that scales, forgets or doubles what it gives."""

    def __init__(self, block: nn.Module, lie):
        super().__init__()
        self.attention, self.mlp, self.lie = block.attention, block.mlp, lie
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, 32))

    def forward(self, x):
        x = x + self.attention(x)
        return self.lie(self, x, self.mlp(x))


LIES = {
    "scaled by dimension": lambda self, x, mlp: x + self.scale * mlp,
    "forgotten": lambda self, x, mlp: x,
    "with a second path": lambda self, x, mlp: x + mlp + self.attention(x),
    "normed sum": lambda self, x, mlp: nn.functional.layer_norm(x + mlp, (32,)),
    "input scaled": lambda self, x, mlp: 0.5 * x + mlp,
    "gated by the state": lambda self, x, mlp: x + mlp * x.sigmoid(),
    "moved along": lambda self, x, mlp: x + mlp.roll(1, 1),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_layer_that_does_not_add_what_its_mlp_gives_is_refused(lie):
    toy = tiny_toy().requires_grad_(False)
    toy.layers[1] = Lying(toy.layers[1], LIES[lie])
    with pytest.raises(SinkbookError, match="no mlp to replace in layer 1"):
        zero(toy, "mlp", layer=1).__enter__()
    with zero(toy, "mlp", layer=0):
        pass


TRUTHS = {
    "a multiplier": lambda self, x, mlp: x + 0.3 * mlp,
    "a divisor": lambda self, x, mlp: mlp / 4 + x,
    "in place": lambda self, x, mlp: mlp.mul_(2).add_(x),
    "flat": lambda self, x, mlp: (x.flatten(0, 1) + mlp.flatten(0, 1)).view_as(x),
    "in double": lambda self, x, mlp: (x.double() + mlp).float(),
}


@pytest.mark.parametrize("truth", TRUTHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sum_is_followed_however_it_is_written(truth, dtype):
    toy = tiny_toy().requires_grad_(False).to(dtype)
    toy.layers[1] = Lying(toy.layers[1], TRUTHS[truth]).to(dtype)
    if truth == "in double" and dtype is torch.bfloat16:
        toy.float()
    with zero(toy, "attention", layer=1), replace(toy, "mlp", torch.ones(32), layer=1):
        before, after = around(toy, 1, TOKENS)
    assert (after - before - 1).abs().max() < 8 * torch.finfo(before.dtype).eps * before.abs().max()


@pytest.mark.parametrize(
    "position, like",
    [
        (torch.tensor([1, 3]), [1, 3]),
        (np.array([1, 3]), [1, 3]),
        (np.int64(2), [2]),
        (torch.tensor(2), [2]),
        (range(1, 3), [1, 2]),
        ([], []),
    ],
)
def test_positions_and_heads_may_come_in_any_list(position, like):
    model = tiny_model().requires_grad_(False)
    with zero(model, "mlp", layer=0, position=position):
        found = model(TOKENS).logits
    with zero(model, "mlp", layer=0, position=like):
        torch.testing.assert_close(found, model(TOKENS).logits)
    with zero(model, "head", layer=0, head=position):
        found = model(TOKENS).logits
    with zero(model, "head", layer=0, head=like):
        torch.testing.assert_close(found, model(TOKENS).logits)


@pytest.mark.parametrize(
    "position", [[True, False], torch.tensor([0.5]), LENGTH, -LENGTH - 1, np.array([0, LENGTH])]
)
def test_what_is_no_position_is_refused(position):
    model = tiny_model().requires_grad_(False)
    with (
        pytest.raises(SinkbookError, match="position"),
        zero(model, "mlp", layer=0, position=position),
    ):
        model(TOKENS)


def test_a_layer_that_leaves_a_part_out_for_longer_texts_is_refused_then():
    toy = tiny_toy().requires_grad_(False)

    class Skipping(Lying):
        def forward(self, x):
            x = x + self.attention(x)
            return x + self.mlp(x) if x.shape[1] < 6 else x

    toy.layers[1] = Skipping(toy.layers[1], None)
    with zero(toy, "mlp", layer=1):
        toy(TOKENS[:, :5])
        with pytest.raises(SinkbookError, match="runs without its"):
            toy(TOKENS)


@pytest.mark.parametrize("part", ["attention", "mlp", "head", "value"])
def test_gradients_through_a_cut_are_the_same_under_gradient_checkpoints(part):
    which = {"head": 1} if part in ("head", "value") else {}
    found = []
    for checkpointing in (False, True):
        model = tiny_model().train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        with zero(model, part, layer=0, **which):
            loss = model(TOKENS, labels=TOKENS, use_cache=False).loss
        loss.backward()  # after the body, as in a training step
        found.append([p.grad for p in model.parameters() if p.grad is not None])
        assert model.is_gradient_checkpointing == checkpointing
    for plain, again in zip(*found, strict=True):
        torch.testing.assert_close(plain, again)
