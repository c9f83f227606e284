"""The Bigram-Backcopy task: texts obey their rule, and the oracle knows how they are made."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sinkbook.data.shakespeare import CharacterStatistics
from sinkbook.errors import SinkbookError
from sinkbook.toy.tasks import STEPS_AT_ONCE, Task, TaskConfig, _Rows, task

tasks = st.builds(
    TaskConfig,
    characters=st.integers(10, 65),
    triggers=st.integers(1, 5),
    length=st.integers(3, 40),
)


@settings(max_examples=25, deadline=None)
@given(config=tasks, seed=st.integers(0, 2**31), step=st.integers(0, 10**6))
def test_every_text_obeys_the_backcopy_rule(config, seed, step):
    made = task(config)
    texts = made.batch_at(8, seed, step)
    triggers = made.at_triggers(texts)
    assert texts.shape == (8, config.length + 1)
    assert (texts[:, 0] == made.start).all()
    assert not triggers[:, 1].any(), "the first character is drawn without the triggers"
    assert not (triggers[:, 1:] & triggers[:, :-1]).any(), "two triggers in a row"
    copied = texts[:, 2:][triggers[:, 1:-1]]
    assert torch.equal(copied, texts[:, :-2][triggers[:, 1:-1]])
    ordinary = ~triggers[:, 1:-1]
    drawn = made.transition[texts[:, 1:-1][ordinary], texts[:, 2:][ordinary]]
    assert (drawn > 0).all(), "a pair of characters that Shakespeare never wrote"


def test_the_batches_of_a_training_are_those_of_its_steps():
    made = task(TaskConfig(length=12))
    steps = range(7, 7 + 2 * STEPS_AT_ONCE + 3)
    drawn = list(made.batches(4, seed=5, steps=steps))
    assert len(drawn) == 2 * STEPS_AT_ONCE + 3
    for step, texts in zip(steps, drawn, strict=True):
        assert torch.equal(texts, made.batch_at(4, seed=5, step=step))


def test_a_random_first_character_goes_before_the_start_token():
    made = task(TaskConfig(length=12, random_first=True))
    texts = made.batch_at(200, seed=0, step=0)
    assert texts.shape == (200, 13)
    assert (texts[:, 1] == made.start).all()
    assert not (texts[:, 0] >= made.start).any() and not made.at_triggers(texts[:, 0]).any()
    assert len(texts[:, 0].unique()) > 10
    plain = task(TaskConfig(length=12)).batch_at(200, seed=0, step=0)
    assert torch.equal(texts[:, 1:], plain[:, :-1]), "the rest is the same text"
    inputs = texts[:, :-1]
    assert made.oracle(inputs)[:, 0, made.start].eq(1).all()
    risks = made.risks(made.oracle(inputs).clamp(min=1e-30).log(), inputs)
    assert risks.bigram_excess.item() == pytest.approx(0, abs=1e-6)
    with pytest.raises(SinkbookError, match="goes before one <s>"):
        TaskConfig(random_first=True, starts=0)


def test_bigram_frequencies_are_within_sampling_error_of_shakespeares():
    made = task(TaskConfig())
    texts = made.batch_at(512, seed=0, step=0)[:, 1:]
    before, after = texts[:, :-1].flatten(), texts[:, 1:].flatten()
    for token in made.encode("hons").flatten()[1:].tolist():
        drawn = torch.bincount(after[before == token], minlength=made.vocab_size)
        expected = made.transition[token] * drawn.sum()
        deviation = (drawn - expected) / (expected * (1 - made.transition[token])).sqrt()
        common = expected > 20
        assert common.sum() > 5
        assert deviation[common].abs().max() < 4.5


def test_triggers_are_the_space_the_e_and_the_t():
    made = task(TaskConfig())
    assert [made.symbols[i] for i in made.triggers] == [" ", "e", "t"]
    assert made.triggers == (1, 43, 58)
    assert (made.start, made.vocab_size) == (65, 67)


def test_a_perfect_model_has_no_excess_risk_at_any_position():
    made = task(TaskConfig(length=64))
    tokens = made.batch_at(64, 1, 0)[:, :-1]
    risks = made.risks(made.oracle(tokens).clamp_min(1e-30).log(), tokens)
    assert risks.backcopy.item() == pytest.approx(0, abs=1e-5)
    assert risks.backcopy_excess.item() == pytest.approx(0, abs=1e-5)
    assert risks.bigram_excess.item() == pytest.approx(0, abs=1e-5)
    assert 2.0 < risks.bigram.item() < 2.4


def test_the_oracle_at_position_0_gives_the_triggers_no_probability():
    made = task(TaskConfig())
    first = made.oracle(torch.tensor([[made.start, 20, 30]]))[0, 0]
    assert first[list(made.triggers)].sum() == 0
    untruncated = made.unigram.clone()
    untruncated[list(made.triggers)] = 0
    np.testing.assert_allclose(first, untruncated / untruncated.sum(), rtol=1e-5)


def test_the_uniform_guess_risks_the_logarithm_of_the_vocabulary():
    made = task(TaskConfig(length=32))
    tokens = made.batch_at(4, 0, 0)[:, :-1]
    risks = made.risks(torch.zeros(4, 32, made.vocab_size), tokens)
    assert risks.backcopy.item() == pytest.approx(math.log(made.vocab_size), rel=1e-5)
    assert risks.bigram.item() == pytest.approx(math.log(made.vocab_size), rel=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {"rule": "in-context"},
        {"rule": "backward"},
        {"rule": "markov"},
        {"starts": 0},
        {"starts": 2},
        {"delimiter_probability": 0.1},
        {"copy_probability": 0.5},
    ],
    ids=str,
)
def test_every_variant_is_drawn_from_its_own_oracle(changes):
    """The negative log-likelihood of the texts must equal the oracle's entropy."""
    made = task(TaskConfig(length=64, **changes))
    texts = made.batch_at(1024, 3, 0)
    oracle = made.oracle(texts[:, :-1])
    np.testing.assert_allclose(oracle.sum(-1), 1, rtol=1e-5)
    surprise = -oracle.gather(-1, texts[:, 1:, None]).squeeze(-1).log()
    entropy = torch.special.entr(oracle).sum(-1)
    difference = (surprise - entropy).mean(dim=1)
    assert difference.mean().abs() < 4.5 * difference.std() / math.sqrt(len(difference))


def test_the_second_sight_of_a_trigger_settles_the_in_context_answer():
    made = task(TaskConfig(rule="in-context", length=256))
    texts = made.batch_at(64, 0, 0)
    space = made.triggers[0]
    for text in texts.tolist():
        answers = {after for token, after in zip(text, text[1:], strict=False) if token == space}
        assert len(answers) <= 1


def test_a_copy_probability_of_one_half_copies_half_of_the_time():
    made = task(TaskConfig(copy_probability=0.5))
    texts = made.batch_at(256, 0, 0)
    after_lone_trigger = made.at_triggers(texts[:, 1:-1]) & ~made.at_triggers(texts[:, :-2])
    copied = (texts[:, 2:] == texts[:, :-2])[after_lone_trigger].double()
    by_chance = made.transition[texts[:, 1:-1], texts[:, :-2]][after_lone_trigger].mean()
    expected = 0.5 + 0.5 * by_chance
    assert copied.mean() == pytest.approx(expected.item(), abs=4.5 / math.sqrt(len(copied)))


def test_a_batch_is_a_function_of_seed_and_step():
    made = task(TaskConfig(length=16))
    first = made.batch_at(4, seed=1, step=7)
    made.batch_at(4, seed=1, step=8)
    assert torch.equal(first, made.batch_at(4, seed=1, step=7))
    assert not torch.equal(first, made.batch_at(4, seed=2, step=7))
    assert not torch.equal(first, made.batch_at(4, seed=1, step=8))


def test_the_guide_table_draws_what_a_search_in_the_cumulative_row_finds():
    generator = torch.Generator().manual_seed(0)
    probabilities = torch.rand(7, 60, dtype=torch.float64, generator=generator) ** 8
    probabilities[2, :59] = 0  # all of it in the last column
    rows = _Rows(probabilities / probabilities.sum(1, keepdim=True))
    row = torch.randint(7, (100_000,), generator=generator)
    uniform = torch.rand(len(row), dtype=torch.float64, generator=generator)
    uniform[:100] = torch.arange(100) / rows.SLICES  # the edges of slices
    searched = rows.guide.reshape(rows.SLICES, 7)[(uniform * rows.SLICES).long(), row] < 0
    assert searched.any() and not searched.all()
    found = torch.searchsorted(rows.cumulative, row + uniform, right=True) - row * 60
    assert torch.equal(rows.draw(row, uniform, rows.slices(uniform)), found)


def test_encoded_text_starts_with_the_start_token_and_reads_back():
    made = task(TaskConfig())
    tokens = made.encode("to be")
    assert tokens.shape == (1, 6)
    assert made.labels(tokens[0]) == ["<s>", "t", "o", "␣", "b", "e"]
    with pytest.raises(SinkbookError, match="no token for"):
        made.encode("naïve")


@pytest.mark.parametrize(
    "changes", [{"length": 2}, {"triggers": 64}, {"copy_probability": 1.5}, {"rule": "copy"}]
)
def test_an_impossible_task_is_refused_with_its_limits(changes):
    with pytest.raises(SinkbookError, match="choose from|Known"):
        TaskConfig(**changes)


def test_a_character_without_a_known_successor_falls_back_to_the_first_row():
    bigrams = np.ones((5, 5), dtype=np.int64)
    bigrams[4] = 0
    statistics = CharacterStatistics("abcde", np.array([9, 5, 4, 3, 1]), bigrams)
    made = Task(TaskConfig(characters=5, triggers=1, length=8), statistics)
    np.testing.assert_allclose(made.transition.sum(dim=1), 1)
    np.testing.assert_array_equal(made.transition[4], made.transition[made.start])
