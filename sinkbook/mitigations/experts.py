"""Experts of a mixture, whose matrices lie together in one parameter, computed text by text.

Transformers' experts get the tokens of all texts in one list, and each computes those that are
sent to it. Who treats what a text sends to a matrix as one thing, as rounding in a range does,
computes them here, in the order of the text.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from sinkbook.errors import SinkbookError

Tokens = Float[Tensor, "token width"]
Routed = Int[Tensor, "token choice"]


def expert_matrices(module: nn.Module) -> list[nn.Parameter]:
    """The parameters of a module of experts in which the matrices lie, (expert, ...); else none."""
    names = ("gate_up_proj" if getattr(module, "has_gate", True) else "up_proj", "down_proj")
    held = [module._parameters.get(name) for name in names]
    known = hasattr(module, "_apply_gate") and hasattr(module, "is_transposed")
    return held if known and all(w is not None and w.ndim == 3 for w in held) else []


def compute_by_text(
    module: nn.Module,
    hidden: Tokens,
    index: Routed,
    weights: Float[Tensor, "token choice"],
    *,
    texts: int,
    change: Callable[..., Tokens] | None = None,
) -> Tokens:
    """What a module of experts gives for `texts` texts of one length, one after the other.

    `change(states, first=...)` is applied to what each matrix gets of a text: the tokens that it
    sends to that expert, in their order; `first` says whether its first one is among them.
    """
    into, out = expert_matrices(module)
    biases = [getattr(module, f"{name}_bias", None) for name in _names(module)]
    output = torch.zeros_like(hidden)
    length = len(hidden) // texts
    for start in range(0, len(hidden), length):
        chosen = index[start : start + length]
        for expert in chosen.unique().tolist():
            if expert >= len(into):  # a token that goes nowhere
                continue
            token, choice = torch.where(chosen == expert)
            first, rows = bool(token[0] == 0), token + start
            states = hidden[rows] if change is None else change(hidden[rows], first=first)
            inner = _map(module, states, into, biases[0], expert)
            inner = module._apply_gate(inner) if module.has_gate else module.act_fn(inner)
            inner = inner if change is None else change(inner, first=first)
            given = _map(module, inner, out, biases[1], expert)
            share = weights[start + token, choice, None]
            output.index_add_(0, rows, (given * share).to(output.dtype))
    return output


def check_by_text(module: nn.Module, own: Tokens, *called, texts: int) -> None:
    """Raises `SinkbookError` if `compute_by_text` is not what the experts computed themselves."""
    again = compute_by_text(module, *called, texts=texts)
    tolerance = 1e-3 if own.dtype in (torch.float32, torch.float64) else 0.05
    if not (again - own).float().norm() <= tolerance * own.float().norm():
        raise SinkbookError(
            f"{type(module).__name__} computes its experts in a way of its own, so their inputs "
            "cannot be rounded. Give `activations=None`, or another model."
        )


def _names(module: nn.Module) -> tuple[str, str]:
    return "gate_up_proj" if module.has_gate else "up_proj", "down_proj"


def _map(
    module: nn.Module, states: Tokens, matrices: Tensor, biases: Tensor | None, expert: int
) -> Float[Tensor, "token given"]:
    matrix = matrices[expert].T if module.is_transposed else matrices[expert]
    return F.linear(states, matrix, None if biases is None else biases[expert])
