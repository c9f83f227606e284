"""The optimizers that are our own do what their sources say."""

from dataclasses import dataclass

import pytest
import torch

from sinkbook.toy import optimizers
from sinkbook.toy.optimizers import OPTIMIZERS


@dataclass
class Settings:
    learning_rate: float = 0.01
    weight_decay: float = 0.1


def steps(name, start, gradient, count=5, weight_decay=0.1):
    """A parameter after some steps with gradients that depend on where it is."""
    parameter = start.clone().requires_grad_()
    made = OPTIMIZERS[name]([parameter], Settings(weight_decay=weight_decay))
    for _ in range(count):
        made.zero_grad()
        parameter.grad = gradient(parameter.detach())
        made.step()
    return parameter.detach()


@pytest.mark.parametrize("shape", [(6,), (5, 3)])
def test_orthoadam_is_adamw_in_a_rotated_basis(shape):
    torch.manual_seed(0)
    start, target = torch.randn(shape), torch.randn(shape)
    bases = [optimizers.basis(size, 0, dim) for dim, size in enumerate(shape)]

    def rotate(x, back=False):
        left = bases[0].T if back else bases[0]
        x = left @ x
        return x if len(bases) == 1 else x @ (bases[1] if back else bases[1].T)

    rotated = steps("adamw", rotate(start), lambda x: rotate(rotate(x, back=True) - target))
    expected = rotate(rotated, back=True)
    found = steps("orthoadam", start, lambda x: x - target)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    assert (found - steps("adamw", start, lambda x: x - target)).abs().max() > 1e-3


def test_bases_are_orthogonal_and_differ_between_parameters():
    first, second = optimizers.basis(7, 0, 0), optimizers.basis(7, 1, 0)
    torch.testing.assert_close(first @ first.T, torch.eye(7), atol=1e-6, rtol=0)
    assert (first - second).abs().max() > 0.1


def test_soap_turns_with_the_basis_and_adamw_does_not():
    torch.manual_seed(0)
    start, gradients = torch.randn(4, 4), torch.randn(30, 4, 4)
    basis = optimizers.basis(4, 0, 0)
    for name, turns in (("soap", True), ("adamw", False)):
        given, turned = iter(gradients), iter(basis @ gradients)
        plain = steps(name, start, lambda x, given=given: next(given), count=30)
        found = steps(name, basis @ start, lambda x, turned=turned: next(turned), count=30)
        assert torch.allclose(found, basis @ plain, atol=1e-4) == turns


def test_soap_on_a_vector_is_adamw_one_step_later():
    start, target = torch.randn(6), torch.randn(6)
    found = steps("soap", start, lambda x: x - target, count=6, weight_decay=0.0)
    expected = steps("adamw", start, lambda x: x - target, count=5, weight_decay=0.0)
    torch.testing.assert_close(found, expected)
