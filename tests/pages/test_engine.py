"""The lab's own transformer, in the browser, against the Python one and against torch."""

from base64 import b64decode
from dataclasses import replace

import numpy as np
import pytest
import torch

from sinkbook.book import experiments
from sinkbook.models.losses import next_token_loss
from sinkbook.pages.lab import SLOW_SEED, packed
from sinkbook.toy.measurements import measure_with_sink_logit
from sinkbook.toy.optimizers import OPTIMIZERS
from sinkbook.toy.runs import seeds_of
from sinkbook.toy.tasks import TaskConfig, task
from sinkbook.toy.training import TrainingConfig, train_all
from sinkbook.toy.transformer import Transformer

KERNELS = ["plain", "wasm"]
TEXTS = [
    *("", "v", "vtvnautuh", "MIRANDA:pourhim", "the th ah", "e"),
    *("a t tae eat", "\n\nKING HENRY:\nO", "zzzzqqq$3&xyz", "What's here? the cup, cl"[:23]),
]

# What tests ask of the engine: a model with given weights, and what it makes of given texts.
ASKED = """({ weights, tokens, texts, length, config, kernel, optimizer, rate, starts, full }) => {
  const { Task, Model, plainKernel, fastestKernel, OPTIMIZERS, measure } = sinkbookLab.engine;
  const made = kernel === "plain" ? plainKernel() : fastestKernel();
  if (made.name !== kernel) throw new Error(`no ${kernel} kernel here`);
  const model = new Model(config, made, texts).load(Float32Array.from(weights));
  const all = Int32Array.from(tokens);
  const step = length + 1;
  if (full) return measure(model, new Task(sinkbookStatistics, { starts }), all,
                           { length, step, count: all.length / step });
  model.forward(all, texts, length, step);
  const loss = model.backward();
  const numbers = (from) => model.parameters.map(({ name, at, size }) =>
    [name, Array.from(model.H.subarray(from + at, from + at + size))]);
  const gradients = numbers(model.gradients);
  const optimize = optimizer && new OPTIMIZERS[optimizer](model, rate);
  if (optimizer) optimize.step();
  return { loss, gradients, weights: numbers(0) };
}"""


def asked(tab, model: Transformer, texts: torch.Tensor, kernel: str, **more) -> dict:
    """What the engine in a page makes of a model and of texts, inputs and targets."""
    config = model.config
    flat = torch.cat([weight.detach().flatten() for weight in model.parameters()])
    about = {
        "weights": flat.tolist(),
        "tokens": texts.flatten().tolist(),
        "texts": len(texts),
        "length": texts.shape[1] - 1,
        "config": {
            "vocab": config.vocab_size,
            "length": config.length,
            "width": config.width,
            "attention": config.attention,
        },
        "kernel": kernel,
    }
    return tab.evaluate(ASKED, about | more)


def untrained(attention: str, seed: int = 0) -> tuple[Transformer, torch.Tensor]:
    """A model that is no multiple of eight anywhere, gains and biases moved, and a batch."""
    task_config = TaskConfig(length=13)
    of_task = task(task_config)
    torch.manual_seed(seed)
    base = experiments.in_the_page()["softmax"].model
    model = Transformer(replace(base, length=13, width=20, attention=attention))
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.1 * torch.randn_like(weight))
    return model, of_task.batch_at(5, seed, 0)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", ["softmax", "ReLU"])
def test_logits_in_the_page_are_those_of_the_model_that_was_trained(opened, runs, name, kernel):
    tab, run = opened("typed"), runs[name]
    for text in TEXTS:
        found = tab.evaluate(
            "([text, name, kernel]) => sinkbookLab.logits(text, name, { kernel })",
            [text, name, kernel],
        )
        expected = run.model(run.task.encode(text))[0].numpy()
        np.testing.assert_allclose(np.array(found), expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize("name", ["softmax", "ReLU"])
def test_switches_do_what_cuts_do_in_python(opened, runs, name):
    tab, run = opened("typed"), runs[name]
    config = run.config.model
    cuts = {
        '{ cut: ["head"] }': replace(config, without_attention=(0,)),
        '{ cut: ["mlp"] }': replace(config, without_mlp=(0,)),
        "{ ordinary: true }": replace(config, first_value="ordinary"),
    }
    text = TEXTS[2]
    whole = run.model(run.task.encode(text))[0].numpy()
    for switches, changed in cuts.items():
        model = Transformer(changed)
        model.load_state_dict(run.model.state_dict(), strict=False)
        expected = model(run.task.encode(text))[0].detach().numpy()
        found = tab.evaluate(
            f"([text, name]) => sinkbookLab.logits(text, name, {switches})", [text, name]
        )
        np.testing.assert_allclose(np.array(found), expected, atol=1e-3, rtol=0)
        if name == "softmax":
            assert np.abs(whole - expected).max() > 0.1


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("attention", ["softmax", "relu"])
def test_gradients_of_all_parameters_are_torchs(opened, attention, kernel):
    model, texts = untrained(attention)
    found = asked(opened("training"), model, texts, kernel)
    exact = model.double()
    loss = next_token_loss(exact(texts[:, :-1]), texts)
    loss.backward()
    assert found["loss"] == pytest.approx(loss.item(), rel=1e-5)
    names = [name for name, _ in found["gradients"]]
    assert names == [name for name, _ in exact.named_parameters()]
    for (name, gradient), weight in zip(found["gradients"], exact.parameters(), strict=True):
        expected = weight.grad.flatten().numpy()
        error = np.linalg.norm(np.array(gradient) - expected)
        assert error < 1e-4 * np.linalg.norm(expected), name


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("optimizer, rate", [("adamw", 0.02), ("sgd", 0.2)])
def test_a_step_of_an_optimizer_is_torchs(opened, optimizer, rate, kernel):
    model, texts = untrained("softmax", seed=1)
    found = asked(opened("training"), model, texts, kernel, optimizer=optimizer, rate=rate)
    made = TrainingConfig(optimizer=optimizer, learning_rate=rate)
    step = OPTIMIZERS[optimizer](model.parameters(), made)
    before = [weight.detach().clone() for weight in model.parameters()]
    next_token_loss(model(texts[:, :-1]), texts).backward()
    gradients = [weight.grad.clone() for weight in model.parameters()]
    step.step()
    for (name, values), weight, was, gradient in zip(
        found["weights"], model.parameters(), before, gradients, strict=True
    ):
        # Adam's first step is the sign of the gradient: rounding decides it where that is none.
        told = (gradient.abs() > 1e-6).flatten().numpy()
        expected = (weight - was).detach().flatten().numpy()[told]
        found_step = (np.array(values) - was.flatten().numpy())[told]
        np.testing.assert_allclose(found_step, expected, rtol=5e-3, atol=2e-6, err_msg=name)


def test_further_steps_of_an_optimizer_are_torchs(opened):
    code = """({ weights, tokens, config, length, texts, name, rate }) => {
      const { Model, plainKernel, OPTIMIZERS } = sinkbookLab.engine;
      const model = new Model(config, plainKernel(), texts).load(Float32Array.from(weights));
      const optimizer = new OPTIMIZERS[name](model, rate);
      const losses = [];
      for (let i = 0; i < 8; i++) {
        model.forward(Int32Array.from(tokens), texts, length, length + 1);
        losses.push(model.backward());
        optimizer.step();
      }
      return losses;
    }"""
    tab = opened("training")
    for name, rate in (("adamw", 0.01), ("sgd", 0.1)):
        model, texts = untrained("relu", seed=2)
        flat = torch.cat([weight.detach().flatten() for weight in model.parameters()])
        config = {"vocab": model.config.vocab_size, "length": 13, "width": 20, "attention": "relu"}
        about = {"weights": flat.tolist(), "tokens": texts.flatten().tolist(), "config": config}
        found = tab.evaluate(code, about | {"length": 13, "texts": 5, "name": name, "rate": rate})
        made = TrainingConfig(optimizer=name, learning_rate=rate)
        optimizer, losses = OPTIMIZERS[name](model.parameters(), made), []
        for _ in range(8):
            optimizer.zero_grad()
            loss = next_token_loss(model(texts[:, :-1]), texts)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        np.testing.assert_allclose(found, losses, rtol=1e-3)
        assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", ["softmax", "ReLU"])
def test_what_is_measured_in_the_page_is_what_python_measures(opened, runs, name, kernel):
    run = runs[name]
    texts = run.task.batch_at(16, 7, 0)
    found = asked(opened("training"), run.model, texts, kernel, starts=1, full=True)
    expected = measure_with_sink_logit(run.model, run.task, texts[:, :-1]).isel(layer=0, head=0)
    names = {
        "sink": expected.sink_attention,
        "sinkTriggers": expected.sink_attention_triggers,
        "drain": expected.value_norm / expected.other_value_norm,
        "sinkLogit": expected.sink_logit,
        "backcopy": expected.backcopy_excess,
        "bigram": expected.bigram_excess,
    }
    for key, value in names.items():
        assert found[key] == pytest.approx(value.item(), abs=1e-3, rel=1e-3), key


@pytest.mark.parametrize("starts", [0, 1])
def test_the_language_of_the_page_is_the_languages_own(opened, starts):
    of_task = task(TaskConfig(length=24, starts=starts))
    found = opened("training").evaluate(
        """(starts) => {
          const { Task, Random } = sinkbookLab.engine;
          const task = new Task(sinkbookStatistics, { starts });
          const rows = task.transition.map((row) => Array.from(row));
          const texts = Array.from(task.batch(4000, 24, new Random(5)));
          return { symbols: task.symbols, triggers: task.triggers, rows, texts };
        }""",
        starts,
    )
    assert found["symbols"] == of_task.symbols
    assert tuple(found["triggers"]) == of_task.triggers
    np.testing.assert_allclose(found["rows"], of_task.transition.numpy(), atol=1e-12)
    texts = torch.tensor(found["texts"]).reshape(4000, 25)
    if starts:
        assert (texts[:, 0] == of_task.start).all()
    # No token that the oracle rules out; and bigrams as often as it says, to sampling error.
    chances = of_task.oracle(texts[:, :-1]).gather(-1, texts[:, 1:, None]).squeeze(-1)
    assert (chances > 0).all()
    after_e = texts[:, 1:][texts[:, :-1] == of_task.symbols.index("h")]
    often = torch.bincount(after_e, minlength=of_task.vocab_size) / len(after_e)
    expected = of_task.transition[of_task.symbols.index("h")]
    assert (often - expected).abs().max() < 5 * (0.25 / len(after_e)) ** 0.5


def test_random_numbers_are_uniform_normal_and_the_same_for_the_same_seed(opened):
    draw = """() => {
      const { Random } = sinkbookLab.engine;
      const some = (seed, kind) => {
        const random = new Random(seed, 1);
        return Array.from({ length: 20000 }, () => random[kind]());
      };
      return [some(1, "uniform"), some(1, "uniform"), some(2, "uniform"), some(1, "normal")];
    }"""
    first, again, other, normal = map(np.array, opened("training").evaluate(draw))
    assert (first == again).all() and abs(np.corrcoef(first, other)[0, 1]) < 0.03
    assert first.min() >= 0 and first.max() < 1
    assert abs(np.histogram(first, 10, (0, 1))[0] - 2000).max() < 5 * 2000**0.5
    assert abs(normal.mean()) < 0.03 and abs(normal.std() - 1) < 0.03
    assert abs((np.abs(normal) < 1).mean() - 0.6827) < 0.015


TRAINED = """({ settings, seeds, every }) => seeds.map((seed) => {
  const { Training, fastestKernel } = sinkbookLab.engine;
  const training = new Training(sinkbookStatistics, { ...settings, seed }, fastestKernel());
  let half = null;
  while (training.steps < settings.steps) {
    training.step();
    if (half === null && training.steps % every === 0 && training.frame().sink > 0.5)
      half = training.steps;
  }
  return { ...training.frame(), half, loss: training.loss };
})"""


@pytest.fixture(scope="module")
def trained_in_python() -> list:
    """The same configuration under five seeds, by the project's own training code."""
    config = replace(experiments.in_the_page()["softmax"], measurements=2)
    return train_all(seeds_of(config, 5), way="sequence")


def settings_of(tab) -> dict:
    return tab.evaluate("() => sinkbookLab.labs[0].settings")


def test_the_sink_trained_in_the_page_lies_where_pythons_do(opened, trained_in_python):
    tab = opened("training")
    about = {"settings": settings_of(tab), "seeds": [1, 2, 3, 5], "every": 10_000}
    found = tab.evaluate(TRAINED, about)
    end = [run.measurements.isel(step=-1, layer=0, head=0) for run in trained_in_python]
    theirs = [one.sink_attention.item() for one in end]
    assert min(theirs) < np.mean([frame["sink"] for frame in found]) < max(theirs)
    for frame in found:  # and each by itself no further from them than they are from each other
        assert min(theirs) - np.ptp(theirs) < frame["sink"] <= 1
        assert frame["sink"] > 0.5 and frame["sinkTriggers"] < 0.05
    others = {
        "drain": [(one.value_norm / one.other_value_norm).item() for one in end],
        "bigram": [one.bigram_excess.item() for one in end],
    }
    for key, theirs in others.items():  # means to within three standard errors
        ours = [frame[key] for frame in found]
        error = np.hypot(*(np.std(x, ddof=1) / len(x) ** 0.5 for x in (ours, theirs)))
        assert abs(np.mean(ours) - np.mean(theirs)) < 3 * error, key


def test_relu_trained_in_the_page_has_no_sink_and_learns_as_well(opened):
    tab = opened("training")
    settings = settings_of(tab) | {"attention": "relu"}
    found = tab.evaluate(TRAINED, {"settings": settings, "seeds": [1, 2], "every": 10_000})
    for frame in found:
        assert frame["sink"] < 0.02
        assert frame["backcopy"] < 0.5 and frame["bigram"] < 0.3


def test_the_slow_seed_is_slow(opened):
    tab = opened("training")
    about = {"settings": settings_of(tab), "seeds": [SLOW_SEED, 1, 2, 3, 5], "every": 8}
    slow, *others = (frame["half"] for frame in tab.evaluate(TRAINED, about))
    assert slow > 1.5 * max(others)


def test_weights_travel_as_they_are(runs):
    model = runs["softmax"].model
    flat = np.frombuffer(b64decode(packed(model)), "<f4")
    expected = torch.cat([weight.flatten() for weight in model.parameters()]).numpy()
    assert (flat == expected).all()
