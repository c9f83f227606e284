"""The optimizers that toys are trained with, by name: `OPTIMIZERS[name](parameters, config)`.

`config` gives `learning_rate` and `weight_decay`. AdamW and SGD are set as in the official code of
arXiv 2410.13835.
"""

from functools import partial

import torch
from torch import Tensor


def _adamw(parameters, config, epsilon: float = 1e-8) -> torch.optim.Optimizer:
    return torch.optim.AdamW(
        parameters,
        lr=config.learning_rate,
        betas=(0.9, 0.99),
        eps=epsilon,
        weight_decay=config.weight_decay,
        fused=True,
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

    @property
    def state(self) -> dict[Tensor, dict[str, Tensor]]:
        groups = ((part, group) for part in self.parts for group in part.param_groups)
        return {p: part.state[p] for part, group in groups for p in group["params"]}

    def zero_grad(self) -> None:
        for part in self.parts:
            part.zero_grad()

    def step(self) -> None:
        for part in self.parts:
            part.step()


OPTIMIZERS = {
    "adamw": _adamw,
    "adamw-large-epsilon": partial(_adamw, epsilon=1e-4),
    "sgd": _sgd,
    "sgd-without-momentum": partial(_sgd, momentum=0.0),
    "rmsprop": _rmsprop,
    "signsgd": partial(_rmsprop, alpha=0.0),  # the mean square is the last square: step * sign(g)
    "muon": _MuonAndAdamW,
}
