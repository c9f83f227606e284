"""Attention kernels: what every one of them must do, and what each does."""

import math

import pytest
import torch

from sinkbook.toy.attention import (
    KERNELS,
    capped_softmax_weights,
    clipped_softmax_weights,
    null_slot_weights,
    relu_weights,
    sigmoid_weights,
    softpick_weights,
)
from sinkbook.toy.transformer import SelfAttention, TransformerConfig

GENERATOR = torch.Generator().manual_seed(0)
HIDDEN = float("-inf")


@pytest.fixture(autouse=True)
def _same_numbers_in_any_order_of_the_tests():
    GENERATOR.manual_seed(0)


def states(batch=2, heads=4, length=7, width=8, dtype=torch.float64):
    shape = (3, batch, heads, length, width)
    return torch.randn(shape, dtype=dtype, generator=GENERATOR).unbind()


def causal_mask(length, padded=0):
    mask = torch.full((length, length), torch.finfo(torch.float64).min, dtype=torch.float64)
    mask = mask.triu(1)
    mask[:, :padded] = torch.finfo(torch.float64).min
    return mask.expand(1, 1, length, length)


def caller(name, heads=4, width=8, dtype=torch.float64):
    """The module that calls a kernel, with random values for what the kernel learns."""
    config = TransformerConfig(width=heads * width, heads=heads, attention=name)
    module = SelfAttention(config, layer_idx=1).to(dtype)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.5, generator=GENERATOR)
    return module


def attend(name, query, key, value, mask=None, scaling=0.4, module=None):
    module = module or caller(name, query.shape[1], query.shape[-1], query.dtype)
    return KERNELS[name](module, query, key, value, mask, scaling=scaling)[0]


@pytest.mark.parametrize("name", KERNELS)
def test_no_query_sees_a_later_key(name):
    module = caller(name)
    query, key, value = states()
    before = attend(name, query, key, value, module=module)
    key, value = key.clone(), value.clone()
    key[:, :, 4:] += 1
    value[:, :, 4:] += 1
    after = attend(name, query, key, value, module=module)
    torch.testing.assert_close(before[:, :4], after[:, :4])
    assert (before[:, 4:] - after[:, 4:]).abs().max() > 1e-3


@pytest.mark.parametrize("name", KERNELS)
def test_a_text_is_read_the_same_whatever_else_is_in_its_batch(name):
    module = caller(name)
    batch = states(batch=3)
    together = attend(name, *batch, module=module)
    order = torch.tensor([2, 0, 1])
    shuffled = attend(name, *(s[order] for s in batch), module=module)
    torch.testing.assert_close(shuffled, together[order])
    alone = attend(name, *(s[1:2] for s in batch), module=module)
    torch.testing.assert_close(alone, together[1:2])


@pytest.mark.parametrize("name", KERNELS)
def test_heads_do_not_know_their_number(name):
    module = caller(name)
    heads = states()
    outputs = attend(name, *heads, module=module)
    order = torch.tensor([3, 1, 0, 2])
    for parameter_name in ("null_logit", "null_key", "cancelled"):
        if hasattr(module, parameter_name):
            parameter = getattr(module, parameter_name)
            parameter.data = parameter.data[order]
    permuted = attend(name, *(s[:, order] for s in heads), module=module)
    torch.testing.assert_close(permuted, outputs[:, :, order])


@pytest.mark.parametrize("name", KERNELS)
def test_an_explicit_causal_mask_is_the_same_as_none(name):
    module = caller(name)
    query, key, value = states()
    without = attend(name, query, key, value, module=module)
    with_mask = attend(name, query, key, value, causal_mask(7), module=module)
    torch.testing.assert_close(without, with_mask)


@pytest.mark.parametrize("name", KERNELS)
def test_masked_keys_do_not_count(name):
    module = caller(name)
    query, key, value = states()
    output = attend(name, query, key, value, causal_mask(7, padded=2), module=module)
    cut = attend(name, *(s[:, :, 2:] for s in (query, key, value)), module=module)
    torch.testing.assert_close(output[:, 2:], cut)
    assert torch.isfinite(output).all(), "padding, which sees no key, has to stay finite"


@pytest.mark.parametrize("name", KERNELS)
def test_grouped_heads_share_their_keys_and_values(name):
    module = caller(name)
    query, key, value = states()
    grouped = attend(name, query, key[:, :2], value[:, :2], module=module)
    repeated = attend(
        name,
        query,
        key[:, :2].repeat_interleave(2, dim=1),
        value[:, :2].repeat_interleave(2, dim=1),
        module=module,
    )
    torch.testing.assert_close(grouped, repeated)


@pytest.mark.parametrize("name", KERNELS)
def test_gradients_are_right_in_float64(name):
    module = caller(name, heads=1, width=4)
    learned = [p for n, p in module.named_parameters() if not n.startswith("w")]
    inputs = [s.requires_grad_() for s in states(1, 1, 4, 4)]

    def outputs(query, key, value, *_learned):
        return attend(name, query, key, value, module=module, scaling=0.9)

    assert torch.autograd.gradcheck(outputs, (*inputs, *learned))


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("scale", [1e4, -1e4])
def test_huge_logits_give_no_nan_and_no_infinite_gradient(name, scale):
    query, key, value = (s.float() for s in states())
    query = (query * scale).requires_grad_()
    output = attend(name, query, key, value, scaling=1.0)
    output.sum().backward()
    assert torch.isfinite(output).all()
    assert torch.isfinite(query.grad).all()


def row_by_hand(name, logits, length, null=0.0):
    """One row of weights, number by number, as the formulas are printed."""
    powers = [math.exp(s) for s in logits]
    if name == "softmax":
        return [p / sum(powers) for p in powers]
    if name == "relu":
        return [max(s, 0) / len(logits) for s in logits]
    if name == "sigmoid":
        return [1 / (1 + math.exp(math.log(len(logits)) - s)) for s in logits]
    if name in ("softmax-1", "sink-logit", "key-bias"):
        return [p / (math.exp(null) + sum(powers)) for p in powers]
    if name == "softpick":
        total = sum(abs(q - 1) for q in powers) + 1e-6 * max(1.0, *powers)
        return [max(p - 1, 0) / total for p in powers]
    if name == "capped-softmax":
        first = powers[0] / sum(powers)
        first = first if len(logits) == 1 else min(first, 0.1)
        return [first, *((1 - first) * p / sum(powers[1:]) for p in powers[1:])]
    assert name == "clipped-softmax"
    gamma = -4 / length
    return [min(max((1 - gamma) * p / sum(powers) + gamma, 0), 1) for p in powers]


@pytest.mark.parametrize("name", KERNELS)
def test_every_kernel_agrees_with_its_formula_written_out_slowly(name):
    module = caller(name).requires_grad_(False)
    query, key, value = states(batch=1)
    output = attend(name, query, key, value, module=module, scaling=0.8)
    for head in range(4):
        for n in range(7):

            def logits(at=slice(None), head=head, n=n):
                return [
                    0.8 * float(query[0, head, n, at] @ key[0, head, i, at]) for i in range(n + 1)
                ]

            if name == "differential":
                halves = [
                    row_by_hand("softmax", [2**0.5 * s for s in logits(at)], 7)
                    for at in (slice(0, 4), slice(4, 8))
                ]
                share = float(module.cancelled[head])
                weights = [first - share * second for first, second in zip(*halves, strict=True)]
            else:
                null = 0.0
                if name == "sink-logit":
                    null = float(module.null_logit[head])
                if name == "key-bias":
                    null = 0.8 * float(query[0, head, n] @ module.null_key[head])
                weights = row_by_hand(name, logits(), 7, null)
            written = sum(w * value[0, head, i] for i, w in enumerate(weights))
            torch.testing.assert_close(output[0, n, head], written, rtol=1e-5, atol=1e-6)


def test_the_fused_kernel_returns_no_weights_and_the_others_theirs():
    query, key, value = states()
    for name, kernel in KERNELS.items():
        output, weights = kernel(caller(name), query, key, value, None, scaling=0.4)
        if name == "softmax":
            assert weights is None
        else:
            torch.testing.assert_close((weights @ value).transpose(1, 2), output)


SCORES = torch.tensor([[3.0, HIDDEN, HIDDEN], [-1.0, 4.0, HIDDEN], [-1.0, -2.0, -3.0]])


def test_relu_attention_divides_by_the_number_of_visible_keys_and_does_not_renormalise():
    expected = torch.tensor([[3.0, 0, 0], [0, 2.0, 0], [0, 0, 0]])
    torch.testing.assert_close(relu_weights(SCORES), expected)


def test_sigmoid_attention_to_equal_logits_of_zero_sums_to_about_one():
    scores = torch.zeros(1, 100)
    assert sigmoid_weights(scores).sum().item() == pytest.approx(100 / 101)
    assert sigmoid_weights(scores - 20).sum().item() < 1e-6


def test_a_null_slot_takes_what_no_key_wants():
    scores = torch.tensor([[0.0, HIDDEN], [math.log(2), math.log(3)]])
    expected = torch.tensor([[1 / 2, 0], [2 / 6, 3 / 6]])
    torch.testing.assert_close(null_slot_weights(scores), expected)
    torch.testing.assert_close(null_slot_weights(scores - 30), torch.zeros(2, 2))
    below = null_slot_weights(scores, float("-inf"))
    torch.testing.assert_close(below, scores.softmax(-1))


def test_softpick_gives_nothing_to_logits_below_zero_and_counts_them():
    scores = torch.tensor([[math.log(2), math.log(0.5), HIDDEN], [-1.0, -2.0, -3.0]])
    expected = torch.tensor([[1 / 1.5, 0, 0], [0, 0, 0]])
    torch.testing.assert_close(softpick_weights(scores), expected, rtol=1e-5, atol=0)


def test_clipped_softmax_is_zero_for_small_weights_and_one_for_a_weight_of_one():
    scores = torch.tensor([[0.0, 0.0, 0.0, 0.0], [50.0, 0.0, 0.0, 0.0], [math.log(9), 0, -50, -50]])
    expected = torch.tensor([[0.0, 0, 0, 0], [1, 0, 0, 0], [0.8, 0, 0, 0]])
    torch.testing.assert_close(clipped_softmax_weights(scores), expected)


def test_capped_softmax_caps_the_first_key_that_is_seen_wherever_padding_ends():
    padded = [HIDDEN, 9.0, 0.0, 0.0]
    scores = torch.tensor([[9.0, 0.0, 0.0, HIDDEN], padded, [-9.0, 0.0, 0.0, HIDDEN]])
    low = math.exp(-9) / (math.exp(-9) + 2)
    expected = [[0.1, 0.45, 0.45, 0], [0, 0.1, 0.45, 0.45], [low, (1 - low) / 2, (1 - low) / 2, 0]]
    torch.testing.assert_close(capped_softmax_weights(scores), torch.tensor(expected))


def test_differential_attention_cancels_what_both_maps_attend_to():
    module = caller("differential", heads=1)
    module.cancelled.data.fill_(1.0)
    query, key, value = states(heads=1)
    twice = torch.cat([query[..., :4]] * 2, dim=-1), torch.cat([key[..., :4]] * 2, dim=-1)
    output = attend("differential", *twice, value, module=module)
    torch.testing.assert_close(output, torch.zeros_like(output))
