"""Norms of the toy transformer: layer norm, and those that are said to keep outliers away.

`NORMS[name](width)` makes one; adding a norm is one class and one line.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

States = Float[Tensor, "*batch width"]


class SingleScaleNorm(nn.Module):
    """SSNorm: `gamma * x / rms(x)` with one gain for all dimensions, so that none can be favoured.

    The gain starts at 1 for states of unit root mean square, as those of the layer norm. Source:
    Park et al., "Outlier-Safe Pre-Training" (arXiv 2506.19697).
    """

    def __init__(self, width: int):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(1))

    def forward(self, x: States) -> States:
        return self.gain * F.rms_norm(x, x.shape[-1:])


class GatedNorm(nn.Module):
    """GatedNorm: `n * sigmoid(U silu(D n))` with `n = rms_norm(x)` and a gate of low rank.

    The gate can scale a state down by itself, which otherwise takes a large residual state under
    the norm. `U` starts at zero: the gate begins half open. Source: arXiv 2601.22966, rank 16.
    """

    def __init__(self, width: int, rank: int = 16):
        super().__init__()
        self.norm = nn.RMSNorm(width)
        self.down = nn.Linear(width, rank, bias=False)
        self.up = nn.Linear(rank, width, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: States) -> States:
        normed = self.norm(x)
        return normed * torch.sigmoid(self.up(F.silu(self.down(normed))))


class DynamicTanh(nn.Module):
    """DyT: `gain * tanh(a x) + bias`, no norm at all. Large states saturate.

    `a` starts at 0.5. Source: Zhu et al., "Transformers without Normalization" (arXiv 2503.10622).
    """

    def __init__(self, width: int):
        super().__init__()
        self.slope = nn.Parameter(torch.full((1,), 0.5))
        self.gain = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: States) -> States:
        return self.gain * torch.tanh(self.slope * x) + self.bias


NORMS: dict[str, Callable[[int], nn.Module]] = {
    "layer": nn.LayerNorm,
    "single-scale": SingleScaleNorm,
    "gated": GatedNorm,
    "tanh": DynamicTanh,
}
