"""Two kinds of sinks on one small task: a head that has to be silent, and one that has to repeat.

The task is the averaging of `alternatives.AveragingTask`, which asks for a no-op or for a broadcast
(arXiv 2606.08105). Here it asks for either or for both, and heads may have a gate, or a register in
front of the text.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from sinkbook.annotations import check_arguments
from sinkbook.theory.alternatives import AveragingTask, train_averaging
from sinkbook.toy.attention import scores_and_mask
from sinkbook.toy.runs import EVALUATION_SEED

LENGTH = 32
SYMBOLS = 8
# How many of the symbols ask for what the first token says; after the others the head is silent.
ANNOUNCING = {"silence": 0, "broadcast": SYMBOLS, "both": SYMBOLS // 2}
HEADS = {
    "as it is": {},
    "gate": {"gate": "head"},
    "register": {"register": True},
}


class SinkTask(AveragingTask):
    """Average after triggers, repeat the first token after some symbols, be silent after others.

    With a `register` a token that is always the same stands in front of every text. The first token
    is the one behind it.
    """

    @check_arguments
    def __init__(self, announcing: int, register: bool = False):
        super().__init__(LENGTH, SYMBOLS)
        self.announcing, self.first = announcing, int(register)
        self.vocab_size += self.first

    def batch_at(
        self, size: int, seed: int, step: int, device: torch.device | str = "cpu"
    ) -> Int[Tensor, "text position"]:
        """The texts of a training step, those of `AveragingTask` behind the register."""
        return F.pad(
            super().batch_at(size, seed, step, device), (self.first, 0), value=self.vocab_size - 1
        )

    def targets(self, texts: Int[Tensor, "text position"]) -> Float[Tensor, "text position vocab"]:
        """What to write at each position."""
        averages = super().targets(texts)
        of_first = self.vectors(texts)[:, self.first, None]
        return torch.where(self.announces(texts).unsqueeze(-1), of_first, averages)

    def announces(self, texts: Int[Tensor, "text position"]) -> Bool[Tensor, "text position"]:
        """Where the head has to write what the first token says."""
        return texts < self.announcing

    def is_silent(self, texts: Int[Tensor, "text position"]) -> Bool[Tensor, "text position"]:
        """Where it has to write nothing, though a symbol stands there."""
        return (texts >= self.announcing) & (texts < self.symbols)


def facts(made: SinkTask, head: nn.Module) -> dict[str, float]:
    """What a head does on 64 fresh texts where it has to repeat and where it has to be silent.

    For either role `..._first` and `..._register` are mean weights on these tokens, `..._error` is
    the mean squared distance from what is to be written and `..._norm` the mean norm of what is;
    `..._rank` is the `stable_rank` of what one text has written at these positions, mean over the
    texts. `trigger_error` is the error after triggers. NaN where a task has no such position,
    or no register.
    """
    texts = made.batch_at(64, EVALUATION_SEED, 0)
    vectors = made.vectors(texts)
    query, key = (w(vectors).unsqueeze(1) for w in (head.wq, head.wk))
    weights = scores_and_mask(query, key, None, head.scaling).softmax(dim=-1)[:, 0]
    errors, written = made.errors(head, texts), head(vectors)
    found = {"trigger_error": errors[texts == made.trigger].mean().item()}
    roles = {"announcing": made.announces(texts), "silent": made.is_silent(texts)}
    for role, there in roles.items():
        on_register = weights[..., 0] if made.first else torch.full_like(errors, torch.nan)
        found |= {
            f"{role}_first": weights[..., made.first][there].mean().item(),
            f"{role}_register": on_register[there].mean().item(),
            f"{role}_error": errors[there].mean().item(),
            f"{role}_norm": written[there].norm(dim=-1).mean().item(),
            f"{role}_rank": stable_rank(written * there.unsqueeze(-1)).mean().item(),
        }
    return found


def stable_rank(states: Float[Tensor, "*batch state width"]) -> Float[Tensor, "*batch"]:
    """The sum of the squared singular values over the largest; NaN if there is nothing.

    It is 1 if one direction carries all, whatever the length. The mean is not subtracted, since
    what is always the same counts; states that are zero do not.

    >>> stable_rank(torch.tensor([[3.0, 0.0], [0.0, 3.0], [0.0, 0.0]])).item()
    2.0
    """
    squares = torch.linalg.svdvals(states).square()
    return squares.sum(-1) / squares[..., 0]


@check_arguments
def trained(asks: str, kind: str, *, steps: int, batch_size: int, seed: int) -> dict[str, float]:
    """The `facts` of a head: what is asked of it by a name in `ANNOUNCING`, its kind in `HEADS`.

    `..._rank_before` are the ranks of the same head before its first step.
    """
    made = SinkTask(ANNOUNCING[asks], register=HEADS[kind].get("register", False))
    changes = {"gate": HEADS[kind].get("gate", "none"), "length": LENGTH + made.first}
    sizes = {"batch_size": batch_size, "seed": seed} | changes
    untrained, head = (
        facts(made, train_averaging(made, "softmax", steps=n, **sizes)) for n in (0, steps)
    )
    return head | {f"{name}_before": untrained[name] for name in untrained if "_rank" in name}
