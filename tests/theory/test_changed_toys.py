"""Changed toys differ in their change alone, and what is watched of them is what they do."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import xarray as xr

from sinkbook.theory import changed_toys as toys
from sinkbook.theory.two_sinks import ANNOUNCING, HEADS, SinkTask, facts, stable_rank, trained
from sinkbook.toy.runs import TrainingConfig
from sinkbook.toy.tasks import TaskConfig, task
from sinkbook.toy.transformer import SelfAttention, Transformer, TransformerConfig

TASK = TaskConfig(length=12)
TOY = TransformerConfig(vocab_size=task(TASK).vocab_size, length=12, width=16, layers=2)
TEXTS = task(TASK).batch_at(5, 7, 0)[:, :-1]


def made(change=lambda model: model, **changes) -> Transformer:
    torch.manual_seed(3)
    return change(Transformer(replace(TOY, **changes))).double()


def weights_of(model: Transformer) -> list[torch.Tensor]:
    """What each attention function returned besides its output, in a run of the model."""
    found = []
    for block in dict.fromkeys(model.layers):
        original = block.attention.attention_function

        def noted(*given, original=original, **keywords):
            output, weights = original(*given, **keywords)
            found.append(weights[:, 0])
            return output, weights

        block.attention.attention_function = noted
    with torch.no_grad():
        model(TEXTS)
    return found


@pytest.mark.parametrize(
    "change", [toys.as_it_is, toys.with_own_logit, toys.with_own_key], ids=lambda c: c.__name__
)
def test_what_is_added_starts_without_an_effect(change):
    with torch.no_grad():
        torch.testing.assert_close(made(change)(TEXTS), made()(TEXTS))


def test_what_is_hidden_gets_nothing_and_the_rest_is_shared_as_before():
    whole = weights_of(made(toys.as_it_is))[0]
    own, first = (weights_of(made(c))[0] for c in (toys.without_oneself, toys.without_first))
    diagonal = torch.eye(12, dtype=torch.bool)
    diagonal[0, 0] = False
    column = torch.zeros(12, 12, dtype=torch.bool)
    column[1:, 0] = True
    for seen, hidden in ((own, diagonal), (first, column)):
        assert (seen[:, hidden] == 0).all()
        left = whole.masked_fill(hidden, 0)
        torch.testing.assert_close(seen, left / left.sum(-1, keepdim=True))


def test_a_learned_number_and_a_learned_key_change_the_logit_on_oneself_alone():
    number, key = made(toys.with_own_logit), made(toys.with_own_key)
    attention = key.layers[0].attention
    with torch.no_grad():
        number.layers[0].attention.own_logit.fill_(1.5)
        attention.own_key.normal_()
        x = key.layers[0].attention_norm(
            key.token_embedding(TEXTS) + key.position_embedding.weight[:12]
        )
        asked = attention.scaling * attention.wq(x) @ attention.own_key[0]
    before = weights_of(made(toys.as_it_is))[0].log()
    for model, more in ((number, torch.full_like(asked, 1.5)), (key, asked)):
        expected = (before + torch.diag_embed(more)).softmax(-1)
        torch.testing.assert_close(weights_of(model)[0], expected)


def test_a_second_visit_is_the_same_layer_once_more():
    model = made(partial(toys.visited, times=2), layers=1)
    alone = made(layers=1)
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in alone.parameters())
    with torch.no_grad():
        x = alone.token_embedding(TEXTS) + alone.position_embedding.weight[:12]
        twice = alone.layers[0](alone.layers[0](x))
        torch.testing.assert_close(model(TEXTS), alone.output(alone.final_norm(twice)))


def test_linear_attention_is_what_a_slow_loop_gives():
    model = made(partial(toys.with_linear_layers, layers=(0,)))
    attention = model.layers[0].attention
    with torch.no_grad():
        x = model.layers[0].attention_norm(
            model.token_embedding(TEXTS) + model.position_embedding.weight[:12]
        )
        query, key = (F.elu(16**-0.25 * w(x)) + 1 for w in (attention.wq, attention.wk))
        expected = torch.zeros(5, 12, 12, dtype=torch.float64)
        for n in range(12):
            for i in range(n + 1):
                expected[:, n, i] = (query[:, n] * key[:, i]).sum(-1) / (16 * (n + 1))
    linear, full = weights_of(model)
    torch.testing.assert_close(linear, expected)
    torch.testing.assert_close(full.sum(-1), torch.ones_like(full[..., 0]))


def test_what_is_watched_is_what_the_model_does_and_leaves_it_as_it_was():
    model = made(partial(toys.visited, times=2), layers=1).float()
    found = toys.watched(model, task(TASK), TEXTS)
    assert dict(found.sizes) == {"visit": 2, "residual_visit": 3}
    again = toys.watched(model, task(TASK), TEXTS)
    xr.testing.assert_identical(found, again)
    rests = ~task(TASK).at_triggers(TEXTS)
    rests[:, 0] = False
    for visit, weights in enumerate(weights_of(model)):
        at = found.isel(visit=visit)
        assert at.first_attention == pytest.approx(weights[..., 0][rests].mean().item())
        diagonal = weights.diagonal(dim1=-2, dim2=-1)
        assert at.own_attention == pytest.approx(diagonal[rests].mean().item())
    with torch.no_grad():
        start = (model.token_embedding(TEXTS) + model.position_embedding.weight[:12]).norm(dim=-1)
    assert found.residual_norm[0] == pytest.approx(start[:, 0].mean().item())
    assert found.other_residual_norm[0] == pytest.approx(start[:, 1:].median().item())


def test_a_training_begins_alike_and_is_a_function_of_its_config():
    config = TrainingConfig(
        task=TASK, model=TOY, batch_size=4, steps=3, measurements=3, evaluation_size=8
    )
    plain, again = (toys.train_watched(config, toys.as_it_is) for _ in range(2))
    xr.testing.assert_identical(plain, again)
    keyed = toys.train_watched(config, toys.with_own_key)
    assert keyed.excess_risk[0] == pytest.approx(plain.excess_risk[0].item(), rel=1e-6)
    assert (
        plain.step.values.tolist() == [0, 1, 2, 3] and plain.excess_risk[3] < plain.excess_risk[0]
    )


def test_trainings_are_compared_where_each_first_has_the_loss_that_all_reach():
    risks = np.array([[[4.0, 2.0, 1.0, 0.5]], [[4.0, 4.0, 4.0, 1.0]]])
    found = xr.Dataset(
        {
            "excess_risk": (("training", "seed", "step"), risks),
            "sink": (("training", "seed", "step"), [[[0.0, 0.1, 0.3, 0.9]], [[0, 0, 0, 0.6]]]),
        },
        coords={"training": ["fast", "slow"], "seed": [42], "step": [0, 10, 20, 40]},
    )
    equal = toys.at_equal_loss(found)
    assert equal.steps.values.tolist() == [[20], [40]] and (equal.loss == 1).all()
    assert equal.sink.values.tolist() == [[0.3], [0.6]]
    between = toys.at_equal_loss(found.assign(excess_risk=found.excess_risk * [[[1]], [[2**0.5]]]))
    assert between.steps.sel(training="fast").item() == pytest.approx(15)


@pytest.mark.parametrize("register", [False, True])
def test_the_task_of_two_sinks_asks_for_averages_for_the_first_token_and_for_nothing(register):
    made = SinkTask(4, register)
    texts = made.batch_at(16, 0, 0)
    targets, vectors = made.targets(texts), made.vectors(texts)
    assert texts.shape == (16, 32 + register) and vectors.shape[-1] == made.vocab_size
    assert not register or (texts[:, 0] == made.vocab_size - 1).all()
    for text, wanted in zip(texts, targets, strict=True):
        for n in range(made.first, len(text)):
            seen = [int(t) for t in text[: n + 1] if t < 8]
            expected = torch.zeros(made.vocab_size)
            if text[n] == made.trigger and seen:
                expected += F.one_hot(torch.tensor(seen), made.vocab_size).float().mean(0)
            elif text[n] < 4:
                expected[text[made.first]] = 1
            torch.testing.assert_close(wanted[n], expected)
    torch.testing.assert_close(
        made.batch_at(16, 0, 0)[:, int(register) :], SinkTask(4).batch_at(16, 0, 0)
    )


def test_weights_and_errors_of_a_head_are_those_of_its_run():
    made = SinkTask(4, register=True)
    torch.manual_seed(0)
    head = SelfAttention(TransformerConfig(width=made.vocab_size, length=33), 0)
    with torch.no_grad():
        for w in (head.wq, head.wk):
            w.weight.zero_()
        found = facts(made, head)
        seen = torch.arange(1, 34).float()
        texts = made.batch_at(64, 2**31, 0)
        there = made.is_silent(texts)
        assert found["silent_register"] == pytest.approx((1 / seen).expand(64, -1)[there].mean())
        assert found["silent_first"] == pytest.approx(found["silent_register"])
        lost = (head(made.vectors(texts)) ** 2).sum(-1)[there].mean()
        assert found["silent_error"] == pytest.approx(lost.item(), rel=1e-5)


def test_every_task_and_head_of_the_record_trains():
    for asks in ANNOUNCING:
        for kind in HEADS:
            found = trained(asks, kind, steps=2, batch_size=2, seed=0)
            assert np.isfinite(found["trigger_error"])
            assert np.isnan(found["silent_error"]) == (asks == "broadcast")
            assert np.isnan(found["silent_rank_before"]) == (asks == "broadcast")


def test_the_rank_of_what_is_written_is_that_of_each_text_where_it_has_to_be():
    """The head writes the first token everywhere: one direction a text, though many over texts."""
    made = SinkTask(4)
    head = SelfAttention(TransformerConfig(width=made.vocab_size, length=32), 0)
    head.forward = lambda vectors: vectors[:, :1].expand_as(vectors)
    found = facts(made, head)
    assert found["silent_rank"] == pytest.approx(1) == found["announcing_rank"]
    head.forward = lambda vectors: vectors
    texts = made.batch_at(64, 2**31, 0)
    counts = torch.stack([(texts == symbol).sum(1) for symbol in range(4)], 1)
    expected = (counts.sum(1) / counts.max(1).values).mean().item()  # symbols are orthogonal
    assert facts(made, head)["announcing_rank"] == pytest.approx(expected, rel=1e-5)


def test_a_rank_is_that_of_directions_and_not_of_lengths():
    states = torch.randn(3, 20, 5, generator=torch.Generator().manual_seed(0))
    found = stable_rank(states)
    assert ((found > 1) & (found < 5)).all()
    torch.testing.assert_close(stable_rank(1e-4 * states), found)
    torch.testing.assert_close(stable_rank(F.pad(states, (0, 0, 0, 7))), found)
    assert stable_rank(torch.zeros(4, 2)).isnan()


def test_the_rank_before_is_that_of_the_head_before_its_first_step():
    none, some = (trained("both", "gate", steps=n, batch_size=4, seed=1) for n in (0, 20))
    assert none["silent_rank"] == none["silent_rank_before"] == some["silent_rank_before"]
    assert some["silent_rank"] != some["silent_rank_before"]
