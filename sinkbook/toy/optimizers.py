"""The optimizers that toys are trained with, by name: `OPTIMIZERS[name](parameters, config)`.

`config` gives `learning_rate` and `weight_decay`. AdamW and SGD are set as in the official code of
arXiv 2410.13835.
"""

from functools import cache, partial

import torch
from torch import Tensor


def _adamw(
    parameters, config, epsilon: float = 1e-8, made: type[torch.optim.AdamW] = torch.optim.AdamW
) -> torch.optim.Optimizer:
    parameters = list(parameters)
    return made(
        parameters,
        lr=config.learning_rate,
        betas=(0.9, 0.99),
        eps=epsilon,
        weight_decay=config.weight_decay,
        fused=True,
        capturable=parameters[0].is_cuda,  # a GPU replays its steps as one graph
    )


def _sgd(parameters, config, momentum: float = 0.9) -> torch.optim.Optimizer:
    return torch.optim.SGD(
        parameters, lr=config.learning_rate, momentum=momentum, weight_decay=config.weight_decay
    )


def _rmsprop(parameters, config, alpha: float = 0.99) -> torch.optim.Optimizer:
    return torch.optim.RMSprop(
        parameters,
        lr=config.learning_rate,
        alpha=alpha,
        eps=1e-12,
        weight_decay=config.weight_decay,
    )


def _soap(parameters, config) -> torch.optim.Optimizer:
    """AdamW in the eigenbases of Shampoo's statistics, for every dimension of every matrix.

    Source: Vyas et al. (arXiv 2409.11321). Betas are those of our AdamW, so that the basis is what
    differs; it is renewed every ten steps, as in the source.
    """
    # Here, as it imports transformers, which takes every process a second.
    from pytorch_optimizer import SOAP

    return SOAP(
        parameters,
        lr=config.learning_rate,
        betas=(0.9, 0.99),
        weight_decay=config.weight_decay,
        precondition_frequency=10,
    )


class _MuonAndAdamW:
    """Muon for the matrices inside the layers and AdamW for the rest, as Muon is meant to be used.

    Muon's steps are scaled to the size of AdamW's, so that one learning rate serves both.
    """

    def __init__(self, parameters, config):
        parameters = list(parameters)
        # The embeddings come first, the output head last.
        matrices = [p for p in parameters[2:-1] if p.ndim == 2]
        rest = [p for p in parameters if all(p is not m for m in matrices)]
        muon = torch.optim.Muon(
            matrices,
            lr=config.learning_rate,
            weight_decay=config.weight_decay,
            adjust_lr_fn="match_rms_adamw",
        )
        self.parts = (muon, _adamw(rest, config))

    def state_dict(self) -> dict[str, list[dict]]:
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state: dict[str, list[dict]]) -> None:
        for part, kept in zip(self.parts, state["parts"], strict=True):
            part.load_state_dict(kept)

    def zero_grad(self) -> None:
        for part in self.parts:
            part.zero_grad()

    def step(self) -> None:
        for part in self.parts:
            part.step()


class _OrthoAdam(torch.optim.AdamW):
    """AdamW in a basis of its own: `g <- Q g`, the step of AdamW, and back by `Q^T`.

    No dimension of the residual stream is then one of Adam's, and none can grow for being so. `Q`
    is random, drawn once for each dimension of each parameter. Source: Kaul et al. (arXiv
    2410.17174), who draw one for a whole parameter.
    """

    @torch.no_grad()
    def step(self) -> None:
        parameters = [p for group in self.param_groups for p in group["params"]]
        for number, p in enumerate(parameters):
            p.copy_(_rotated(p, number))
            p.grad = _rotated(p.grad, number)
        super().step()
        for number, p in enumerate(parameters):
            p.copy_(_rotated(p, number, back=True))


def _rotated(states: Tensor, number: int, back: bool = False) -> Tensor:
    """A parameter or its gradient in the basis of parameter `number`, or back in the usual one."""
    for dim, size in enumerate(states.shape):
        turned = basis(size, number, dim).to(states)
        states = torch.tensordot(states, turned, dims=([dim], [0 if back else 1])).movedim(-1, dim)
    return states


@cache
def basis(size: int, number: int, dim: int) -> Tensor:
    """A random orthogonal matrix, always the same, so that a resumed run goes on in its basis."""
    generator = torch.Generator().manual_seed(8 * number + dim)
    drawn = torch.randn(size, size, dtype=torch.float64, generator=generator)
    return torch.linalg.qr(drawn).Q.float()


OPTIMIZERS = {
    "adamw": _adamw,
    "adamw-large-epsilon": partial(_adamw, epsilon=1e-4),
    "sgd": _sgd,
    "sgd-without-momentum": partial(_sgd, momentum=0.0),
    "rmsprop": _rmsprop,
    "signsgd": partial(_rmsprop, alpha=0.0),  # the mean square is the last square: step * sign(g)
    "muon": _MuonAndAdamW,
    "orthoadam": partial(_adamw, made=_OrthoAdam),
    "soap": _soap,
}

# Those that take a parameter for a matrix: stacked runs are none.
MATRIX_OPTIMIZERS = ("muon", "orthoadam", "soap")
