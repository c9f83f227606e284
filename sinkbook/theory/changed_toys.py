"""Toys with one thing changed that a claim of others is about, and what they do while they learn.

A change is a function of a model before its first step; what it adds starts so that the other
weights of a seed stay what they are. All changed toys compute attention outright and under one
code path, `as_it_is` included, so that they differ in their change alone. Where a block is visited
twice each visit is watched on its own, which no measurement by layer could do.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import xarray as xr
from jaxtyping import Float, Int
from torch import Tensor, nn

from sinkbook.annotations import check_arguments
from sinkbook.arguments import check_token_ids
from sinkbook.theory.alternatives import changed_training, excess_risk
from sinkbook.toy.attention import scores_and_mask
from sinkbook.toy.runs import TrainingConfig
from sinkbook.toy.tasks import Task, task
from sinkbook.toy.training_loop import schedule, train_measured
from sinkbook.toy.transformer import Block, SelfAttention, Transformer

Scores = Float[Tensor, "batch head query key"]
Queries = Float[Tensor, "batch head query width"]
Change = Callable[[Transformer], Transformer]


class _Visit(NamedTuple):
    """What a visit of a layer shows: its head's weights, the norms of what it writes."""

    weights: Float[Tensor, "text query key"]
    values: Float[Tensor, "text position"]  # of each value, as W_O writes it
    written: Float[Tensor, "text position"]
    form: Float[Tensor, ""]  # of the scaled W_Q^T W_K


def as_it_is(model: Transformer) -> Transformer:
    """The same model, its softmax attention computed outright."""
    return _attending(model, lambda _, __, scores: scores.softmax(dim=-1))


@check_arguments
def without_oneself(model: Transformer) -> Transformer:
    """No query sees its own position, but for the first, which sees nothing else."""

    def weights(_, __, scores: Scores) -> Scores:
        own = torch.eye(scores.shape[-1], dtype=torch.bool)
        own[0, 0] = False
        return scores.masked_fill(own, -torch.inf).softmax(dim=-1)

    return _attending(model, weights)


@check_arguments
def without_first(model: Transformer) -> Transformer:
    """No query sees the first position, but for the first itself."""

    def weights(_, __, scores: Scores) -> Scores:
        first = torch.zeros(scores.shape[-2:], dtype=torch.bool)
        first[1:, 0] = True
        return scores.masked_fill(first, -torch.inf).softmax(dim=-1)

    return _attending(model, weights)


@check_arguments
def with_own_logit(model: Transformer) -> Transformer:
    """A learned number for each head is added to the logit of every query on its own position."""
    for block in model.layers:
        block.attention.own_logit = nn.Parameter(torch.zeros(block.attention.heads))

    def weights(module: SelfAttention, _, scores: Scores) -> Scores:
        own = module.own_logit[:, None].expand(-1, scores.shape[-1])
        return (scores + torch.diag_embed(own)).softmax(dim=-1)

    return _attending(model, weights)


@check_arguments
def with_own_key(model: Transformer) -> Transformer:
    """A learned key for each head, seen by every query at its own position beside the key there.

    A query can then ask for itself by one direction, as it asks for the first position, without
    queries and keys agreeing token by token.
    """
    for block in model.layers:
        own = torch.zeros(block.attention.heads, block.attention.head_dim)
        block.attention.own_key = nn.Parameter(own)

    def weights(module: SelfAttention, query: Queries, scores: Scores) -> Scores:
        own = module.scaling * (query @ module.own_key[:, :, None]).squeeze(-1)
        return (scores + torch.diag_embed(own)).softmax(dim=-1)

    return _attending(model, weights)


@check_arguments
def visited(model: Transformer, times: int) -> Transformer:
    """All layers in a loop: the same blocks, with the same weights, one round after the other."""
    model = as_it_is(model)
    model.layers = nn.ModuleList([*model.layers] * times)
    return model


@check_arguments
def with_linear_layers(model: Transformer, layers: tuple[int, ...]) -> Transformer:
    """Linear attention in some of the layers: `A[n, i] = phi(q_n) . phi(k_i) / (n + 1)`.

    `phi` is `elu + 1` (Katharopoulos et al., arXiv 2006.16236), without their normalisation by the
    row's own sum: like ReLU attention such a layer need not look anywhere.
    """
    model = as_it_is(model)
    for number in layers:
        model.layers[number].attention.attention_function = _linear_attention
    return model


def _attending(model: Transformer, weights_of: Callable[..., Scores]) -> Transformer:
    """The model with attention weights that are a function of module, queries and scores."""

    def attention(module, query, key, value, attention_mask=None, scaling=None, **_):
        scores = scores_and_mask(query, key, attention_mask, scaling)
        weights = weights_of(module, query, scores)
        return (weights @ value).transpose(1, 2), weights

    for block in model.layers:
        block.attention.attention_function = attention
    return model


def _linear_attention(module, query, key, value, attention_mask=None, scaling=None, **_):
    query, key = (F.elu(scaling**0.5 * states) + 1 for states in (query, key))
    weights = (query @ key.mT).tril()
    seen = torch.arange(1, weights.shape[-1] + 1)
    weights = weights / (seen[:, None] * query.shape[-1])
    return (weights @ value).transpose(1, 2), weights


@check_arguments
@torch.no_grad()
def watched(model: Transformer, made: Task, tokens: Int[Tensor, "text position"]) -> xr.Dataset:
    """What a changed toy of one head a layer does on given texts, by `visit` of a layer.

    Queries at rest are those that are no triggers and not the first.

    - `first_attention`, `own_attention`: what queries at rest give to the first position, and to
      their own; mean.
    - `value_drain_ratio`: norm of what the head writes of the first value, over the mean of those
      at rest.
    - `silence`: mean norm of what the head writes at rest, over that at triggers.
    - `query_key_norm`: Frobenius norm of the scaled `W_Q^T W_K`.
    - `residual_norm`, `other_residual_norm`: of the first token, and the median of the others, over
      `residual_visit`, which begins before the first visit.
    - `excess_risk`, `backcopy_excess`, `bigram_excess`: nats; the first is the mean over positions.
    """
    check_token_ids("tokens", tokens)
    with _watching(model) as (seen, states):
        risks = made.risks(model(tokens), tokens)
    triggers = made.at_triggers(tokens)
    rests = ~triggers
    rests[:, 0] = False
    found: dict[str, list[float]] = {
        "first_attention": [v.weights[..., 0][rests].mean() for v in seen],
        "own_attention": [v.weights.diagonal(dim1=-2, dim2=-1)[rests].mean() for v in seen],
        "value_drain_ratio": [v.values[:, 0].mean() / v.values[rests].mean() for v in seen],
        "silence": [v.written[rests].mean() / v.written[triggers].mean() for v in seen],
        "query_key_norm": [v.form for v in seen],
    }
    norms = [state.norm(dim=-1) for state in states]
    return xr.Dataset(
        {
            **{name: ("visit", [float(v) for v in values]) for name, values in found.items()},
            "residual_norm": ("residual_visit", [n[:, 0].mean().item() for n in norms]),
            "other_residual_norm": ("residual_visit", [n[:, 1:].median().item() for n in norms]),
            "excess_risk": excess_risk(risks, triggers),
            "backcopy_excess": risks.backcopy_excess.item(),
            "bigram_excess": risks.bigram_excess.item(),
        }
    )


@contextmanager
def _watching(model: Transformer) -> Iterator[tuple[list[_Visit], list[Tensor]]]:
    """Keep what every visit of a layer shows, and the residual states before it and at the end."""
    seen: list[_Visit] = []
    states: list[Tensor] = []
    hooks, functions = [], {}

    def look(block: Block) -> None:
        attention = block.attention
        functions[attention] = original = attention.attention_function

        def looked_at(module, query, key, value, *rest, **keywords):
            output, weights = original(module, query, key, value, *rest, **keywords)
            form = module.scaling * module.wq.weight.T @ module.wk.weight
            values, written = (module.wo(x).norm(dim=-1) for x in (value[:, 0], output.flatten(-2)))
            seen.append(_Visit(weights[:, 0], values, written, form.norm()))
            return output, weights

        attention.attention_function = looked_at
        hooks.append(block.register_forward_pre_hook(lambda _, given: states.append(given[0])))

    for block in dict.fromkeys(model.layers):
        look(block)
    hooks.append(model.final_norm.register_forward_pre_hook(lambda _, x: states.append(x[0])))
    try:
        yield seen, states
    finally:
        for attention, original in functions.items():
            attention.attention_function = original
        for hook in hooks:
            hook.remove()


def train_watched(config: TrainingConfig, change: Change) -> xr.Dataset:
    """The training of a config with one thing changed, and what is `watched` along `step`.

    Initial weights, batches and optimizer are those of `training.train`; it runs in memory, on the
    CPU.
    """
    model, step, batches = changed_training(config, change)
    return train_measured(
        step,
        batches,
        partial(watched, model, task(config.task), config.evaluation_tokens),
        measured=schedule(config.steps, config.measurements),
    )


@check_arguments
def at_equal_loss(found: xr.Dataset) -> xr.Dataset:
    """Trainings over (training, seed) when each first has the excess risk that all of them reach.

    That is the lowest of the one whose lowest is highest. Between measurements all is interpolated
    by the logarithm of the risk. `steps` says when that was, and `loss` is the risk, in nats.
    """
    loss = found.excess_risk.min("step").max().item()
    rows = []
    for training in found.training.values:
        whole = [found.sel(training=training, seed=seed) for seed in found.seed.values]
        rows.append(xr.concat([_when(one, loss) for one in whole], "seed"))
    return xr.concat(rows, "training").assign(loss=loss)


def _when(one: xr.Dataset, loss: float) -> xr.Dataset:
    one = one.assign(steps=("step", one.step.values.astype(float))).drop_vars("step")
    risks = one.excess_risk.values
    after = int(np.flatnonzero(risks <= loss)[0])
    if after == 0:
        return one.isel(step=0)
    before, then = one.isel(step=after - 1), one.isel(step=after)
    share = np.log(risks[after - 1] / loss) / np.log(risks[after - 1] / risks[after])
    return before + share * (then - before)
