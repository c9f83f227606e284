"""The reduced network: the paper's reparametrised one-layer transformer, run on real texts.

It works on one-hot vectors of the vocabulary (arXiv 2410.13835, section 2.2). Attention has one
free logit a query: a token that is no trigger gives `<s>` the logit α, a trigger gives the token
before it the logit λ, every other key gets 0. The value state of `<s>` is β, that of another token
u is ξ_u in direction u. An MLP reads the query's own token. Theorem 1 says that this is enough.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
import xarray as xr
from jaxtyping import Float, Int
from torch import Tensor, nn

from sinkbook.annotations import check_arguments
from sinkbook.arguments import (
    check_known,
    check_number,
    check_some,
    check_token_ids,
    check_whole_number,
)
from sinkbook.devices import device_of
from sinkbook.errors import SinkbookError
from sinkbook.models.losses import next_token_loss
from sinkbook.parallel import in_processes
from sinkbook.toy.runs import EVALUATION_SEED
from sinkbook.toy.tasks import Task, TaskConfig, task
from sinkbook.toy.training_loop import descend, schedule, train_measured


class ReducedNetwork(nn.Module):
    """`network(tokens)` gives the next-token logits; the names are those of the theory.

    All vectors start from N(0, 1), as in the official code, where β is a vector behind a matrix:
    `sink_value = wo @ sink_source`.
    """

    @check_arguments
    def __init__(self, task: Task, hidden: int = 128):
        super().__init__()
        size = task.vocab_size
        self.register_buffer("is_trigger", task.is_trigger, persistent=False)
        self.sink_logits = nn.Parameter(torch.randn(size))  # α
        self.copy_logits = nn.Parameter(torch.randn(size))  # λ
        self.values = nn.Parameter(torch.randn(size))  # ξ
        self.sink_source = nn.Parameter(torch.randn(size))
        self.wo = nn.Linear(size, size, bias=False)
        self.w1 = nn.Linear(size, hidden, bias=False)
        self.w2 = nn.Linear(hidden, size, bias=False)

    @property
    def sink_value(self) -> Float[Tensor, " vocab"]:
        """β, the value state of `<s>`."""
        return self.wo(self.sink_source)

    def forward(
        self, tokens: Int[Tensor, "batch position"]
    ) -> Float[Tensor, "batch position vocab"]:
        vocabulary = len(self.values)
        states = F.embedding(tokens, self.values.diag())
        states[:, 0] = 0.0  # <s> comes in apart
        others = states.cumsum(dim=1)
        triggers = self.is_trigger[tokens].unsqueeze(-1)
        favoured = torch.where(triggers, states.roll(1, dims=1), self.sink_value)
        # The favoured key against n keys of logit 0: <s> is one of them for a trigger.
        count = torch.arange(tokens.shape[1], device=tokens.device).unsqueeze(-1)
        share = self.favoured_attention(tokens).unsqueeze(-1)
        mean = (self.sink_value + others - favoured) / count.clamp(min=1)
        mlp = self.w2(self.w1(torch.eye(vocabulary).to(self.values)).relu())
        return share * favoured + (1 - share) * mean + mlp[tokens]

    def favoured_attention(
        self, tokens: Int[Tensor, "batch position"]
    ) -> Float[Tensor, "batch position"]:
        """The attention on `<s>` from tokens that are no triggers, on the token before from those
        that are."""
        logits = torch.where(self.is_trigger, self.copy_logits, self.sink_logits)[tokens]
        count = torch.arange(tokens.shape[1], device=tokens.device)
        return torch.sigmoid(logits - count.log())


@check_arguments
def construction(task: Task, logit: float, value: float) -> ReducedNetwork:
    """Theorem 1's network at finite parameters: α = λ = `logit`, ξ = `value`, β = 0.

    The MLP holds log p for tokens that are no triggers (probabilities below 1e-13 are taken for
    that) and nothing for triggers. As `logit` and then `value` grow, both risks go to the oracle's.
    Raises `SinkbookError` for a negative `value`, which would push copies away.
    """
    if value < 0:
        raise SinkbookError(f"the value state ξ is {value:g}; a copy needs ξ >= 0.")
    network = ReducedNetwork(task, hidden=task.vocab_size)
    table = task.transition.clamp(min=1e-13).log()
    table[task.is_trigger] = 0.0
    with torch.no_grad():
        network.sink_logits.fill_(logit)
        network.copy_logits.fill_(logit)
        network.values.fill_(value)
        network.sink_source.zero_()
        network.wo.weight.copy_(torch.eye(task.vocab_size))
        network.w1.weight.copy_(torch.eye(task.vocab_size))
        network.w2.weight.copy_(table.T)
    return network


@check_arguments
def construction_excess(
    task: Task, tokens: Int[Tensor, "batch position"], logit: float, value: float
) -> tuple[float, float]:
    """The construction's excess backcopy and bigram risks on these texts, in nats."""
    check_token_ids("tokens", tokens)
    with torch.no_grad():
        risks = task.risks(construction(task, logit, value).double()(tokens), tokens)
    return risks.backcopy_excess.item(), risks.bigram_excess.item()


@check_arguments
def expected_excess(
    task: Task, tokens: Int[Tensor, "batch position"], logit: float, value: float
) -> tuple[float, float]:
    """The leading terms of the construction's excess backcopy and bigram risks, in nats.

    A copy competes with V - 1 other tokens at a distance of ξ: (V - 1)·e^-ξ. What leaks past the
    sink misleads by half of its variance under the bigram row: ½·e^-2α·mean Var_p(W).
    """
    check_token_ids("tokens", tokens)
    states = F.one_hot(tokens, task.vocab_size).double()
    states[:, 0] = 0.0
    others = value * states.cumsum(dim=1)
    rows = task.transition[tokens]
    variance = (rows * others**2).sum(dim=-1) - (rows * others).sum(dim=-1) ** 2
    spread = variance[~task.at_triggers(tokens)].mean().item()
    return (task.vocab_size - 1) * np.exp(-value), 0.5 * np.exp(-2 * logit) * spread


@check_arguments
def risks_beside_law(
    task: Task,
    tokens: Int[Tensor, "batch position"],
    *,
    sink_logit: float | Float[np.ndarray, " point"],
    length: float | Float[np.ndarray, " point"],
) -> xr.Dataset:
    """Both excess risks of the construction and their leading terms, along `point`, in nats.

    `sink_logit` (α) and `length` (ξ, of the values) are broadcast against each other. Variables:
    `backcopy`, `bigram`, `backcopy_law` and `bigram_law`.
    """
    for each in np.ravel(length).tolist():
        check_number("length", each, 0)
    points = list(zip(*np.atleast_1d(*np.broadcast_arrays(sink_logit, length)), strict=True))
    measured = np.array([construction_excess(task, tokens, *map(float, p)) for p in points]).T
    law = np.array([expected_excess(task, tokens, *map(float, p)) for p in points]).T
    names = ("backcopy", "bigram", "backcopy_law", "bigram_law")
    rows = zip(names, (*measured, *law), strict=True)
    return xr.Dataset({name: ("point", values) for name, values in rows})


# When a training is measured. Not at the start, which has no place on a logarithmic axis.
MEASUREMENTS = 60


def _train(
    network: ReducedNetwork,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[Int[Tensor, "text position"]],
    steps: int,
    measure: Callable[[], dict[str, Float[Tensor, "..."]]],
) -> xr.Dataset:
    """The measurements of a training, vectors over `token`, along the number of steps done."""

    def loss(texts: Int[Tensor, "text position"]) -> Tensor:
        return next_token_loss(network(texts[:, :-1]), texts)

    @torch.no_grad()
    def measured() -> xr.Dataset:
        values = {name: value.cpu().numpy().copy() for name, value in measure().items()}
        return xr.Dataset({name: (("token",) * v.ndim, v) for name, v in values.items()})

    return train_measured(
        descend(optimizer, loss), batches, measured, measured=schedule(steps, MEASUREMENTS)[1:]
    )


@check_arguments
def train_reduced(
    task: Task, *, learning_rate: float, steps: int, batch_size: int, seed: int
) -> xr.Dataset:
    """Train the whole reduced network by AdamW from N(0, 1), as the paper does.

    Measured on 64 texts that it was not trained on: `backcopy_excess` and `bigram_excess` in nats,
    `sink_attention` (mean over tokens that are no triggers), `value_norm` (‖β‖), `sink_value` (β),
    `sink_logits` (α).
    """
    check_number("learning_rate", learning_rate, 0)
    check_whole_number("steps", steps, 1)
    check_whole_number("batch_size", batch_size, 1)
    torch.manual_seed(seed)
    network = ReducedNetwork(task).to(device_of())
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=learning_rate, betas=(0.9, 0.99), weight_decay=1e-4
    )
    tokens = task.batch_at(64, EVALUATION_SEED, 0, device_of())[:, :-1]
    ordinary = ~task.at_triggers(tokens)
    ordinary[:, 0] = False

    def measure():
        risks = task.risks(network(tokens), tokens)
        return {
            "backcopy_excess": risks.backcopy_excess,
            "bigram_excess": risks.bigram_excess,
            "sink_attention": network.favoured_attention(tokens)[ordinary].mean(),
            "value_norm": network.sink_value.norm(),
            "sink_value": network.sink_value,
            "sink_logits": network.sink_logits,
        }

    batches = task.batches(batch_size, seed, range(steps), device_of())
    return _train(network, optimizer, batches, steps, measure)


@check_arguments
def train_sink(
    task: Task,
    optimizer: str,
    *,
    value: float,
    start: float,
    learning_rate: float,
    steps: int,
    batch_size: int,
    seed: int,
    second_beta: float = 0.99,
    moving: tuple[str, ...] = ("sink_logits",),
) -> xr.Dataset:
    """Train what the flow moves, on real texts: the sink logits α, and β if it is named.

    All α begin at `start`. The rest of the network is Theorem 1's, with ξ = `value`; `optimizer`
    is "sgd" or "adam", both plain, without weight decay; `second_beta` is Adam's. The result has
    `sink_logits` over steps, and `sink_value`.
    """
    check_known("optimizer", optimizer, ("sgd", "adam"))
    check_number("learning_rate", learning_rate, 0)
    check_number("second_beta", second_beta, 0, 0.9999)
    check_whole_number("steps", steps, 1)
    check_whole_number("batch_size", batch_size, 1)
    check_some("moving", moving)
    torch.manual_seed(seed)
    network = construction(task, logit=12.0, value=value).requires_grad_(False).to(device_of())
    parameters = {"sink_logits": network.sink_logits, "sink_value": network.sink_source}
    with torch.no_grad():
        network.sink_logits.fill_(start)
    moved = [parameters[name].requires_grad_() for name in moving]
    made = {
        "sgd": lambda: torch.optim.SGD(moved, lr=learning_rate),
        "adam": lambda: torch.optim.Adam(moved, lr=learning_rate, betas=(0.9, second_beta)),
    }[optimizer]()
    batches = task.batches(batch_size, seed, range(steps), device_of())
    return _train(network, made, batches, steps, lambda: parameters)


@check_arguments
def over_seeds(
    config: TaskConfig,
    trainings: dict[str, Callable[..., xr.Dataset]],
    seeds: dict[str, Sequence[int]],
) -> dict[str, xr.Dataset]:
    """Trainings on the texts of a task, by name, each along a first dimension `seed`, its `seeds`.

    A training is `train_sink` or `train_reduced` with its other arguments bound, by
    `functools.partial`. All are one list of work for the CPU cores.
    """
    work = [(trainings[name], config, seed) for name in trainings for seed in seeds[name]]
    found = iter(in_processes(_trained, work, label="reduced networks"))
    return {
        name: xr.concat([next(found) for _ in seeds[name]], xr.Variable("seed", list(seeds[name])))
        for name in trainings
    }


@check_arguments
def train_whole(
    *, length: int, learning_rate: float, steps: int, batch_size: int, seeds: Sequence[int]
) -> xr.Dataset:
    """`train_reduced` on Bigram-Backcopy's texts of some length, along a first dimension `seed`."""
    training = partial(
        train_reduced, learning_rate=learning_rate, steps=steps, batch_size=batch_size
    )
    return over_seeds(TaskConfig(length=length), {"whole": training}, {"whole": seeds})["whole"]


def _trained(work: tuple[Callable[..., xr.Dataset], TaskConfig, int]) -> xr.Dataset:
    training, config, seed = work
    return training(task(config), seed=seed)
