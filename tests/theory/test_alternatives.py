"""The changed models change one thing, and the averaging task asks for what it says."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from sinkbook.theory import alternatives
from sinkbook.toy.runs import TrainingConfig, seeds_of
from sinkbook.toy.tasks import Task, TaskConfig
from sinkbook.toy.training import train
from sinkbook.toy.transformer import Transformer, TransformerConfig

SMALL = TrainingConfig(
    task=TaskConfig(length=12),
    model=TransformerConfig(length=12, width=8),
    batch_size=4,
    steps=5,
    evaluation_size=4,
)


@pytest.fixture
def task():
    return Task(TaskConfig(length=12))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Transformer(TransformerConfig(length=12, width=16, layers=2))


@pytest.fixture
def texts(task):
    return task.batch_at(4, 0, 0)


def test_damping_changes_the_gradient_of_the_values_and_not_what_the_model_says(model, texts):
    damped = alternatives.with_damped_values(copy.deepcopy(model), 0.1)
    for m in (model, damped):
        m(texts[:, :-1])[..., 5].sum().backward()
    torch.testing.assert_close(damped(texts[:, :-1]), model(texts[:, :-1]))
    whole, part = (m.layers[-1].attention.wv.weight.grad for m in (model, damped))
    torch.testing.assert_close(part, 0.1 * whole)


def test_an_isolated_position_sees_itself_alone_and_is_seen(model, texts):
    isolated = alternatives.with_isolated_position(copy.deepcopy(model), 5)
    tokens = texts[:, :-1]
    other = tokens.clone()
    other[:, 1:5] = (other[:, 1:5] + 1) % 65
    torch.testing.assert_close(isolated(tokens)[:, 5], isolated(other)[:, 5])
    other = tokens.clone()
    other[:, 5] = (other[:, 5] + 1) % 65
    assert not torch.allclose(isolated(tokens)[:, 7], isolated(other)[:, 7])


def test_value_gradients_leave_the_model_without_gradients(model, task, texts):
    model.requires_grad_(False)
    found = alternatives.value_gradients(model, task, texts)
    assert found.shape == (2, 12) and (found > 0).all()
    assert not any(p.requires_grad for p in model.parameters())


def test_averages_are_of_the_symbols_seen_and_silence_is_zero():
    task = alternatives.AveragingTask(length=5)
    texts = torch.tensor([[9, 1, 1, 3, 8]])
    target = task.targets(texts)[0]
    assert (target[:4] == 0).all()
    assert target[4, 1] == pytest.approx(2 / 3) and target[4, 3] == pytest.approx(1 / 3)


def test_announcements_repeat_the_first_token_everywhere_but_after_triggers():
    task = alternatives.AveragingTask(length=4, announce=True)
    target = task.targets(torch.tensor([[10, 1, 8, 3]]))[0]
    assert target.argmax(dim=-1).tolist() == [10, 10, 1, 10]


def test_a_head_learns_to_be_silent_with_a_sink_and_a_drained_value():
    task = alternatives.AveragingTask(length=12)
    head = alternatives.train_averaging(task, "softmax", steps=500, batch_size=32, seed=0)
    facts = alternatives.averaging_facts(task, head)
    assert facts["weight"] > 0.9 and facts["value_drain_ratio"] < 0.3 and facts["error"] < 0.02


def test_a_changed_training_without_a_change_is_the_training():
    unchanged = alternatives.train_changed(SMALL, lambda model: model)
    for ours, theirs in zip(unchanged.parameters(), train(SMALL).model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_an_isolated_position_is_watched_while_it_learns():
    config = replace(SMALL, steps=4, measurements=2)
    found = alternatives.isolated_seeds(seeds_of(config, 2), 5)
    assert found.step.values.tolist() == [0, 1, 4] and found.key.values.tolist() == [5, 0]
    second = replace(config, seed=config.seed + 1)
    trained = alternatives.train_changed(
        second, lambda model: alternatives.with_isolated_position(model, 5)
    )
    made, tokens = Task(config.task), config.evaluation_tokens
    ends = found.sel(seed=second.seed).isel(step=-1)
    np.testing.assert_allclose(
        ends.attention, alternatives.attention_on(trained, made, tokens, (5, 0)), rtol=1e-5
    )
    oracle = made.oracle(tokens)
    surprise = -(oracle * trained(tokens).log_softmax(-1)).sum(-1)
    excess = (surprise - torch.special.entr(oracle).sum(-1)).mean()
    np.testing.assert_allclose(ends.excess_risk, excess, rtol=1e-4)
