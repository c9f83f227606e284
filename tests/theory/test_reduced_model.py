"""The reduced model: closed forms against autograd, the flow, sampled texts and bad input."""

from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st

from sinkbook.errors import SinkbookError
from sinkbook.fits import log_slope
from sinkbook.theory.reduced_model import (
    ReducedModel,
    adam_sink_logits,
    asymptotic_sink_logits,
    frequencies,
    gradient_flow,
    reduced_model,
    rows_and_tokens,
    settled_sink_value,
    settling_rate,
    token_shares,
)
from sinkbook.theory.reduced_network import (
    ReducedNetwork,
    construction,
    construction_excess,
    expected_excess,
    over_seeds,
    train_sink,
)
from sinkbook.toy.tasks import Task, TaskConfig

seeds = st.integers(0, 2**32 - 1)
few_examples = settings(max_examples=12, deadline=None)
fewer_examples = settings(max_examples=4, deadline=None)  # stiff flows, a second each


def random_model(seed, contexts=1):
    rng = np.random.default_rng(seed)
    rows, tokens = rng.integers(2, 5), rng.integers(3, 7)
    return ReducedModel(
        transition=rng.dirichlet(np.full(tokens, 2.0), size=rows),
        weights=rng.dirichlet(np.full(rows, 3.0)),
        values=rng.uniform(0.1, 9.0, size=(contexts, tokens)),
        visible=rng.integers(1, 20, size=contexts).astype(float),
    )


def random_state(model, seed):
    rng = np.random.default_rng(seed + 1)
    rows, tokens = model.transition.shape
    return rng.normal(scale=2.0, size=rows), rng.normal(size=tokens)


@pytest.fixture(scope="module")
def task():
    return Task(TaskConfig(length=32))


@given(seeds, st.integers(1, 3))
@few_examples
def test_gradients_are_those_of_the_loss_by_autograd(seed, contexts):
    model = random_model(seed, contexts)
    state = random_state(model, seed)
    alpha, beta = (torch.tensor(part, requires_grad=True) for part in state)
    transition = torch.tensor(model.transition)
    visible = torch.tensor(model.visible)[:, None, None]
    weight = alpha.exp()[None, :, None]
    added = (weight * beta + torch.tensor(model.values)[:, None]) / (weight + visible)
    log_q = (transition.log() + added).log_softmax(dim=-1)
    divergences = (transition * (transition.log() - log_q)).sum(dim=-1).mean(dim=0)
    loss = (torch.tensor(model.weights) * divergences).sum()
    loss.backward()
    assert model.loss(*state) == pytest.approx(loss.item(), rel=1e-9, abs=1e-14)
    by_logit, by_value = model.gradients(*state)
    np.testing.assert_allclose(by_logit, alpha.grad, rtol=1e-7, atol=1e-13)
    np.testing.assert_allclose(by_value, beta.grad, rtol=1e-7, atol=1e-13)


@given(seeds, st.floats(12, 24))
@few_examples
def test_divergences_keep_their_digits_far_below_rounding(seed, sink_logit):
    model = random_model(seed)
    rows, tokens = model.transition.shape
    found = model.divergences(np.full(rows, sink_logit), np.zeros(tokens))
    leading = 0.5 * np.exp(-2 * sink_logit) * model.growth_rates() / model.weights
    np.testing.assert_allclose(found, leading, rtol=1e-3)


@given(seeds)
@few_examples
def test_sink_logits_approach_half_the_log_of_time_while_the_value_is_constant(seed):
    model = random_model(seed)
    start, _ = random_state(model, seed)
    times = np.geomspace(1e6, 1e14, 17)
    tokens = model.transition.shape[1]
    flow = gradient_flow(model, times, start, np.full(tokens, 0.7), moving=["sink_logits"])
    distance = np.abs(flow.sink_logits - asymptotic_sink_logits(model, times)).max("row")
    # The next term of the expansion is of the order of (n + max W)·e^-α.
    assert distance[-1] < 1e-3
    late = times >= 1e10
    slopes = log_slope(times[late], flow.sink_logits.values[late])
    np.testing.assert_allclose(slopes, 0.5, atol=1e-3)


@given(seeds, st.floats(-1, 4))
@few_examples
def test_the_sink_value_settles_where_the_closed_form_says(seed, sink_logit):
    model = random_model(seed)
    rows, tokens = model.transition.shape
    _, start = random_state(model, seed)
    settled = settled_sink_value(model, sink_logit, start)
    horizon = 40 / settling_rate(model, sink_logit)
    times = np.geomspace(1e-3, 1, 9) * horizon
    flow = gradient_flow(model, times, np.full(rows, sink_logit), start, moving=["sink_value"])
    np.testing.assert_allclose(flow.sink_value.values[-1], settled, atol=1e-6)
    np.testing.assert_allclose(flow.sink_value.sum("token"), start.sum(), atol=1e-6)
    deviation = settled - settled.mean()
    expected = np.exp(-sink_logit) * (model.values[0].mean() - model.values[0])
    np.testing.assert_allclose(deviation, expected, atol=1e-12)


@given(seeds)
@few_examples
def test_the_settling_rate_is_that_of_the_flow_linearised_at_its_end(seed):
    model = random_model(seed)
    rows, tokens = model.transition.shape
    sink_logits = np.full(rows, 1.0)
    settled = settled_sink_value(model, 1.0, random_state(model, seed)[1])
    step = 1e-5 * np.eye(tokens)
    slopes = [model.gradients(sink_logits, settled + s)[1] for s in (*step, *-step)]
    hessian = (np.array(slopes[:tokens]) - np.array(slopes[tokens:])) / 2e-5
    eigenvalues = np.linalg.eigvalsh((hessian + hessian.T) / 2)
    assert eigenvalues[0] == pytest.approx(0, abs=1e-8)
    assert eigenvalues[1] == pytest.approx(settling_rate(model, 1.0), rel=1e-4)


@given(seeds, st.floats(-2, 5), st.floats(-3, 3))
@few_examples
def test_equal_sink_logits_with_a_cancelling_value_are_stationary(seed, sink_logit, constant):
    model = random_model(seed)
    value = constant - np.exp(-sink_logit) * model.values[0]
    by_logit, by_value = model.gradients(np.full(len(model.weights), sink_logit), value)
    assert np.abs(by_logit).max() < 1e-12 and np.abs(by_value).max() < 1e-12


@given(seeds)
@fewer_examples
def test_the_joint_flow_ends_with_one_sink_logit_for_all_rows(seed):
    model = random_model(seed)
    start = random_state(model, seed)
    flow = gradient_flow(model, np.array([1e3, 1e7, 1e11]), *start)
    sink_logits, value = flow.sink_logits.values[-1], flow.sink_value.values[-1]
    assert sink_logits.std() < 1e-4
    assert (value + np.exp(-sink_logits.mean()) * model.values[0]).std() < 1e-4
    assert flow.loss[-1] < 1e-12 < model.loss(*start)


@given(seeds)
@fewer_examples
def test_the_loss_falls_all_along_the_flow(seed):
    model = random_model(seed, contexts=2)
    flow = gradient_flow(model, np.geomspace(1e-2, 1e5, 30), *random_state(model, seed))
    assert (np.diff(flow.loss) <= 1e-12).all()


def test_the_flow_gives_the_same_bits_twice():
    model, times = random_model(7), np.geomspace(1e-1, 1e9, 40)
    first, second = (gradient_flow(model, times, *random_state(model, 7)) for _ in range(2))
    assert first.identical(second)


def test_the_flow_tells_when_the_rows_are_half_asleep(task):
    model = reduced_model(task, 5.0)
    rows, tokens = model.transition.shape
    times = np.geomspace(1, 1e7, 8)
    flow = gradient_flow(model, times, np.zeros(rows), np.zeros(tokens), ["sink_logits"])
    again = gradient_flow(
        model, np.array([flow.half_asleep]), np.zeros(rows), np.zeros(tokens), ["sink_logits"]
    )
    attention = model.sink_attention(again.sink_logits.values[0])[0]
    assert model.average(attention) == pytest.approx(0.5, abs=1e-6)


def test_adams_law_solves_its_differential_equation():
    model = random_model(3)
    steps = np.arange(1.0, 4001.0)
    path = adam_sink_logits(model, steps, start=2.0, learning_rate=0.03, positions=512)
    growth = np.gradient(path, steps, axis=0)[5:-5]
    squared = np.exp(2 * path[5:-5]) / (model.growth_rates() * 512)
    np.testing.assert_allclose(growth, 0.03 / np.sqrt(1 + squared), rtol=2e-3)


def test_token_shares_are_those_of_sampled_texts(task):
    texts = task.batch(20_000, torch.Generator().manual_seed(0))[:, 1:-1]
    counted = np.bincount(texts.flatten(), minlength=task.vocab_size) / (20_000 * 32)
    np.testing.assert_allclose(token_shares(task), counted, atol=2e-3)


def test_rows_that_know_their_successor_are_left_out(task):
    rows, tokens = rows_and_tokens(task)
    certain = task.symbols.index("q")  # always followed by u
    assert certain not in rows and certain in tokens
    assert not set(task.triggers) & set(rows)
    assert (reduced_model(task, 5.0).growth_rates() > 0).all()


# --- the reduced network ------------------------------------------------------------------------


def test_the_reduced_network_is_attention_with_the_stated_logits(task):
    torch.manual_seed(0)
    network = ReducedNetwork(task).double()
    tokens = task.batch(4, torch.Generator().manual_seed(1))[:, :-1]
    length, triggers = tokens.shape[1], task.at_triggers(tokens)
    scores = torch.zeros(4, length, length, dtype=torch.double)
    scores[..., 0] = torch.where(triggers, 0.0, network.sink_logits[tokens])
    before = torch.arange(1, length)
    scores[:, before, before - 1] += torch.where(triggers, network.copy_logits[tokens], 0.0)[:, 1:]
    hidden = torch.ones(length, length, dtype=torch.bool).triu(diagonal=1)
    weights = scores.masked_fill(hidden, -torch.inf).softmax(dim=-1)
    values = F.one_hot(tokens, task.vocab_size) * network.values
    values[:, 0] = network.sink_value
    mlp = network.w2(network.w1(torch.eye(task.vocab_size).double()).relu())
    torch.testing.assert_close(network(tokens), weights @ values + mlp[tokens])


@pytest.mark.parametrize(("logit", "value"), [(9.0, 11.0), (8.0, 13.0)])
def test_the_construction_has_the_risks_of_the_leading_terms(task, logit, value):
    tokens = task.batch(64, torch.Generator().manual_seed(0))[:, :-1]
    backcopy, bigram = expected_excess(task, tokens, logit, value)
    found = construction_excess(task, tokens, logit, value)
    assert found == pytest.approx((backcopy, bigram), rel=0.1)
    assert backcopy < 2e-3 and bigram < 1e-3


def test_sgd_on_texts_follows_the_flow(task):
    trained = train_sink(
        task, "sgd", value=5.0, start=4.0, learning_rate=20.0, steps=300, batch_size=32, seed=0
    )
    rows, tokens = rows_and_tokens(task)
    model = reduced_model(task, 5.0, contexts=64)
    times = 20.0 * trained.step.values.astype(float)
    flow = gradient_flow(
        model, times, np.full(len(rows), 4.0), np.zeros(len(tokens)), ["sink_logits"]
    )
    gap = model.average(trained.sink_logits.values[:, rows] - flow.sink_logits.values)
    assert np.abs(gap).max() < 0.1
    assert model.average(flow.sink_logits.values[-1]) > 4.4


def test_trainings_over_seeds_are_those_of_each_seed():
    config = TaskConfig(length=16)
    training = partial(
        train_sink, optimizer="adam", value=5.0, start=4.0, learning_rate=0.1, steps=5, batch_size=8
    )
    found = over_seeds(config, {"adam": training}, {"adam": [0, 3]})["adam"]
    assert found.seed.values.tolist() == [0, 3]
    assert not found.isel(seed=0).equals(found.isel(seed=1))
    for seed in (0, 3):
        alone = training(Task(config), seed=seed)
        xr.testing.assert_allclose(found.sel(seed=seed, drop=True), alone)


# --- what goes wrong ----------------------------------------------------------------------------


def broken(**changes):
    parts = vars(random_model(0)) | changes
    return lambda: ReducedModel(**parts)


MODEL = random_model(0)
TOO_MUCH = MODEL.transition * 1.01
NEVER = MODEL.weights * np.r_[0.0, np.ones(len(MODEL.weights) - 1)]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            broken(transition=TOO_MUCH),
            "row 0 of the transition is no distribution",
        ),
        (broken(weights=NEVER), "row 0 has the weight 0: its token never occurs"),
        (broken(values=-MODEL.values), "the theorems need ξ >= 0"),
        (broken(visible=np.array([0.0])), "a query sees at least itself"),
        (
            lambda: gradient_flow(MODEL, np.array([0.0, 1.0]), *random_state(MODEL, 0)),
            "after t = 0",
        ),
        (lambda: asymptotic_sink_logits(MODEL, np.zeros(1)), "after t = 0"),
        (lambda: settled_sink_value(random_model(0, 2), 1.0, np.zeros(9)), "2 contexts"),
        (
            lambda: frequencies(np.array([[0.9, 0.0], [1.0, 0.0]]), [1], np.array([1.0, 0.0]), 4),
            "row 0 of the transition sums to 0.9",
        ),
        (
            lambda: frequencies(np.eye(2), [1], np.array([1.0, 0.0]), 4),
            "trigger 1 has probability zero after every token",
        ),
    ],
)
def test_bad_input_is_named_with_its_value(make, message):
    with pytest.raises(SinkbookError, match="(?s)" + message.replace("(", r"\(")):
        make()


def test_a_negative_value_state_is_refused(task):
    with pytest.raises(SinkbookError, match="a value state ξ is -1; give ξ >= 0"):
        reduced_model(task, -1.0)
    with pytest.raises(SinkbookError, match="a copy needs ξ >= 0"):
        construction(task, 10.0, -1.0)


def test_a_row_that_cannot_be_misled_has_no_asymptote():
    certain = np.array([[1.0, 0.0, 0.0], [0.2, 0.3, 0.5]])
    model = ReducedModel(certain, np.array([0.5, 0.5]), np.ones((1, 3)) * [[1, 2, 3]], np.ones(1))
    with pytest.raises(SinkbookError, match="row 0 has C = 0"):
        asymptotic_sink_logits(model, np.array([1.0]))
