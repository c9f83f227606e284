"""Attention kernels: what every one of them must do, and what each does."""

import pytest
import torch

from sinkbook.attention import KERNELS, relu_weights

GENERATOR = torch.Generator().manual_seed(0)


def states(batch=2, heads=4, length=7, width=8, dtype=torch.float64):
    shape = (3, batch, heads, length, width)
    return torch.randn(shape, dtype=dtype, generator=GENERATOR).unbind()


def causal_mask(length, padded=0):
    mask = torch.full((length, length), torch.finfo(torch.float64).min, dtype=torch.float64)
    mask = mask.triu(1)
    mask[:, :padded] = torch.finfo(torch.float64).min
    return mask.expand(1, 1, length, length)


@pytest.mark.parametrize("name", KERNELS)
def test_no_query_sees_a_later_key(name):
    query, key, value = states()
    before, _ = KERNELS[name](None, query, key, value, None, scaling=0.4)
    key, value = key.clone(), value.clone()
    key[:, :, 4:] += 1
    value[:, :, 4:] += 1
    after, _ = KERNELS[name](None, query, key, value, None, scaling=0.4)
    torch.testing.assert_close(before[:, :4], after[:, :4])
    assert (before[:, 4:] - after[:, 4:]).abs().max() > 1e-3


@pytest.mark.parametrize("name", KERNELS)
def test_an_explicit_causal_mask_is_the_same_as_none(name):
    query, key, value = states()
    without, _ = KERNELS[name](None, query, key, value, None, scaling=0.4)
    with_mask, _ = KERNELS[name](None, query, key, value, causal_mask(7), scaling=0.4)
    torch.testing.assert_close(without, with_mask)


@pytest.mark.parametrize("name", KERNELS)
def test_masked_keys_do_not_count(name):
    query, key, value = states()
    output, _ = KERNELS[name](None, query, key, value, causal_mask(7, padded=2), scaling=0.4)
    cut, _ = KERNELS[name](None, query[:, :, 2:], key[:, :, 2:], value[:, :, 2:], None, scaling=0.4)
    torch.testing.assert_close(output[:, 2:], cut)


@pytest.mark.parametrize("name", KERNELS)
def test_grouped_heads_share_their_keys_and_values(name):
    query, key, value = states()
    grouped, _ = KERNELS[name](None, query, key[:, :2], value[:, :2], None, scaling=0.4)
    repeated, _ = KERNELS[name](
        None,
        query,
        key[:, :2].repeat_interleave(2, dim=1),
        value[:, :2].repeat_interleave(2, dim=1),
        None,
        scaling=0.4,
    )
    torch.testing.assert_close(grouped, repeated)


@pytest.mark.parametrize("name", KERNELS)
def test_gradients_are_right_in_float64(name):
    query, key, value = (s.requires_grad_() for s in states(1, 1, 4, 3))

    def attend(*qkv):
        return KERNELS[name](None, *qkv, None, scaling=0.7)[0]

    assert torch.autograd.gradcheck(attend, (query, key, value))


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("scale", [1e4, -1e4])
def test_huge_logits_give_no_nan(name, scale):
    query, key, value = (s.float() for s in states())
    output, _ = KERNELS[name](None, query * scale, key, value, None, scaling=1.0)
    assert torch.isfinite(output).all()


def test_softmax_attention_is_softmax_attention():
    query, key, value = states()
    output, weights = KERNELS["softmax"](None, query, key, value, None, scaling=0.4)
    scores = (query @ key.transpose(-2, -1) * 0.4 + causal_mask(7)).softmax(-1)
    torch.testing.assert_close(output, (scores @ value).transpose(1, 2))
    assert weights is None


def test_relu_attention_divides_by_the_number_of_visible_keys_and_does_not_renormalise():
    hidden = float("-inf")
    scores = torch.tensor([[3.0, hidden, hidden], [-1.0, 4.0, hidden], [-1.0, -2.0, -3.0]])
    expected = torch.tensor([[3.0, 0, 0], [0, 2.0, 0], [0, 0, 0]])
    torch.testing.assert_close(relu_weights(scores), expected)
