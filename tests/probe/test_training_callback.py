"""What a training logs of its sinks is what `measure` finds, and it trains as if unwatched."""

import copy

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import integration_utils

from sinkbook import SinkbookError, SinkCallback, measure, sink_metrics
from sinkbook.probe.metrics import residual_peak_ratio, sink_rate, value_drain_ratio
from sinkbook.report.quantities import quantities
from sinkbook.report.report import measure_windows
from tiny import WORDS, tiny_model, tiny_reader, tiny_tokenizer, tiny_toy

pytestmark = pytest.mark.weights

TOKENS = torch.randint(1, 90, (3, 12), generator=torch.Generator().manual_seed(0))
SIZES = {"n_positions": 32, "initializer_range": 0.3}


def gpt2(**changes) -> nn.Module:
    """With dropout everywhere, as GPT-2 is trained."""
    return tiny_model("gpt2", **SIZES | changes).train()


def train(folder, *callbacks, model=None, resume=None, **changes) -> Trainer:
    arguments = {
        "output_dir": str(folder),
        "max_steps": 6,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "logging_steps": 4,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
    }
    generator = torch.Generator().manual_seed(1)
    texts = [torch.randint(1, 90, (9,), generator=generator) for _ in range(40)]
    trainer = Trainer(
        model=gpt2() if model is None else model,
        args=TrainingArguments(**arguments | changes),
        train_dataset=[
            {"input_ids": ids, "labels": ids, "number": i} for i, ids in enumerate(texts)
        ],
        eval_dataset=[{"input_ids": ids, "labels": ids} for ids in TOKENS],
        callbacks=list(callbacks),
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def logged(trainer: Trainer) -> list[dict]:
    """What the history says of sinks."""
    return [entry for entry in trainer.state.log_history if "sink/rate" in entry]


def expected(model: nn.Module, tokens: torch.Tensor = TOKENS) -> dict[str, float]:
    """The same by hand, from what `measure` finds."""
    names = ("sink_attention", "value_norm", "residual_norm", "residual_max_abs")
    result = measure(model, tokens, names)
    attention = result.sink_attention.values.mean(0)  # layer, head
    sinks = attention > 0.3
    drain = value_drain_ratio(result).values.mean(0)[sinks if sinks.any() else ...]
    return {
        "sink/rate": float(sink_rate(result).mean()),
        "sink/strongest_attention": float(attention.max()),
        "sink/value_drain_ratio": float(np.median(drain)),
        "sink/residual_peak_ratio": float(np.median(residual_peak_ratio(result), axis=0).max()),
        "sink/largest_magnitude": float(result.residual_max_abs.max()),
    }


def assert_metrics(found: dict[str, float], wanted: dict[str, float]) -> None:
    assert {key for key in found if key.startswith("sink/")} == set(wanted)
    for key, value in wanted.items():
        assert found[key] == pytest.approx(value, rel=1e-5), key


def copy_of(model: nn.Module) -> nn.Module:
    """The same weights in float32, and nothing that accelerate has put around them."""
    copied = gpt2()
    copied.load_state_dict(model.state_dict())
    return copied


class Snapshots(TrainerCallback):
    """Copies of the model after each step."""

    def __init__(self):
        self.models = {}

    def on_step_end(self, args, state, control, model=None, **_):
        self.models[state.global_step] = copy_of(model)


# --- The training does not notice ------------------------------------------------------------

WAYS = {
    "plainly": {},
    "accumulating gradients": {"gradient_accumulation_steps": 3, "logging_steps": 1},
    "in mixed precision": {"bf16": True},
    "with activation checkpointing": {"activation_checkpointing": True},
    "logging nothing": {"logging_strategy": "no"},
    "evaluating": {"eval_strategy": "steps", "eval_steps": 2, "logging_steps": 2},
}


@pytest.mark.parametrize("way", WAYS)
def test_a_training_is_bit_identical_with_the_callback_and_without(tmp_path, way):
    ends = []
    for callbacks in ([], [SinkCallback(TOKENS, every=2)]):
        trainer = train(tmp_path, *callbacks, **WAYS[way])
        history = [
            {key: value for key, value in entry.items() if not key.endswith(("runtime", "second"))}
            for entry in trainer.state.log_history
            if "sink/rate" not in entry
        ]
        moments = [
            moment
            for of_parameter in trainer.optimizer.state_dict()["state"].values()
            for moment in of_parameter.values()
        ]
        tensors = [*trainer.model.state_dict().values(), *moments, torch.rand(3)]
        ends.append((history, tensors, len(logged(trainer))))
    (history, tensors, none), (same_history, same_tensors, three) = ends
    assert (none, three) == (0, 3)
    assert same_history == history
    assert all(torch.equal(*pair) for pair in zip(tensors, same_tensors, strict=True))


def test_a_plain_loop_is_bit_identical_with_the_function_and_without():
    ends = []
    for measuring in (False, True):
        model = gpt2()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        torch.manual_seed(0)
        for step in range(4):
            model(input_ids=TOKENS, labels=TOKENS).loss.backward()
            if measuring and step % 2:  # with gradients that wait for the step
                assert_metrics(sink_metrics(model, TOKENS), expected(copy.deepcopy(model)))
            optimizer.step()
            optimizer.zero_grad()
        ends.append([*model.state_dict().values(), torch.rand(3)])
    assert all(torch.equal(*pair) for pair in zip(*ends, strict=True))


def in_bfloat16(model: nn.Module) -> nn.Module:
    """As accelerate prepares a model, whatever trainings have set up before in this process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    return Accelerator(cpu=True, mixed_precision="bf16").prepare_model(model)


class Noisy(nn.Module):
    """Draws in evaluation mode, too, and does something when it is told to change it."""

    def __init__(self, fails: bool):
        super().__init__()
        self.fails, self.told = fails, 0

    def train(self, mode: bool = True):
        self.told += 1
        return super().train(mode)

    def forward(self, states):
        if self.fails and not self.training:
            raise RuntimeError("out of memory")
        return states + 0 * torch.rand(())


@pytest.mark.parametrize("fails", [False, True])
def test_modes_forward_attention_and_random_numbers_are_as_before_also_after_an_exception(fails):
    model = in_bfloat16(gpt2())
    model.transformer.h[1].mlp.dropout = noisy = Noisy(fails)
    model.transformer.h[0].eval()  # somebody keeps it without dropout

    def state() -> list:
        modes = [module.training for module in model.modules()]
        hooks = [len(module._forward_hooks) for module in model.modules()]
        attention = model.config._attn_implementation
        numbers = torch.get_rng_state().tolist()
        return [modes, hooks, model.forward, attention, noisy.told, numbers]

    before = state()
    if fails:
        with pytest.raises(RuntimeError, match="out of memory"):
            sink_metrics(model, TOKENS)
    else:
        sink_metrics(model, TOKENS)
    assert state() == before


# --- What is logged --------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["plainly", "accumulating gradients", "in mixed precision"])
def test_the_numbers_are_those_of_the_weights_after_the_step_under_which_they_are_logged(
    tmp_path, way
):
    seen = Snapshots()
    trainer = train(tmp_path, SinkCallback(TOKENS, every=2), seen, **WAYS[way])
    entries = logged(trainer)
    assert [entry["step"] for entry in entries] == [2, 4, 6]
    for entry in entries:
        assert_metrics(entry, expected(seen.models[entry["step"]]))
    assert len({entry["sink/strongest_attention"] for entry in entries}) == 3


class Listener(TrainerCallback):
    """An integration: keeps what it is given to log, and at which step."""

    heard: list = []

    def on_log(self, args, state, control, logs=None, **_):
        self.heard.append((state.global_step, dict(logs)))


class Another(Listener):
    heard: list = []


def test_integrations_hear_it_once_at_its_step_whatever_the_trainer_logs(tmp_path, monkeypatch):
    monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, "listener", Listener)
    for kind in (Listener, Another):
        monkeypatch.setattr(kind, "heard", [])
    trainer = train(
        tmp_path, SinkCallback(TOKENS, every=3), Another(), report_to=["listener"], logging_steps=2
    )
    assert Listener.heard == Another.heard
    of_sinks = [(step, logs) for step, logs in Listener.heard if "sink/rate" in logs]
    assert [{**logs, "step": step} for step, logs in of_sinks] == logged(trainer)
    assert [step for step, _ in of_sinks] == [3, 6]
    assert all(isinstance(value, float) for _, logs in of_sinks for value in logs.values())
    assert [step for step, logs in Listener.heard if "loss" in logs] == [2, 4, 6]


def test_a_resumed_training_logs_what_the_whole_one_does(tmp_path):
    whole = train(tmp_path / "whole", SinkCallback(TOKENS, every=2))
    train(tmp_path, SinkCallback(TOKENS, every=2), save_strategy="steps", save_steps=3)
    resumed = train(tmp_path, SinkCallback(TOKENS, every=2), resume=str(tmp_path / "checkpoint-3"))
    assert logged(resumed) == logged(whole)


def test_other_processes_measure_nothing():
    arguments, control = TrainingArguments(use_cpu=True, report_to="none"), TrainerControl()
    callback, model = SinkCallback(TOKENS, every=1), gpt2()
    for main in (False, True):
        state = TrainerState(global_step=1, is_world_process_zero=main)
        for event in (callback.on_train_begin, callback.on_step_end):
            event(arguments, state, control, model=model if main else None)
        assert len(state.log_history) == main


# --- Which model -----------------------------------------------------------------------------

WRAPPERS = {
    "data parallelism": nn.DataParallel,
    "a compiled model": lambda model: torch.compile(model, backend="eager"),
    "accelerate's mixed precision": in_bfloat16,
    "all of them": lambda model: nn.DataParallel(
        torch.compile(in_bfloat16(model), backend="eager")
    ),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_wrapped_model_is_measured_in_float32_as_the_model_inside(wrapper):
    model = gpt2()
    wanted = expected(copy_of(model))
    wrapped = WRAPPERS[wrapper](model)
    wrapped(input_ids=TOKENS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_metrics(sink_metrics(wrapped, TOKENS), wanted)


def test_a_model_that_was_prepared_twice_over_a_forward_of_its_own_is_measured_in_float32():
    model = gpt2()
    own = model.forward
    model.forward = lambda **inputs: own(**inputs)
    wanted = expected(model)
    assert_metrics(sink_metrics(in_bfloat16(in_bfloat16(model)), TOKENS), wanted)


def test_a_model_outside_transformers_is_measured():
    toy = tiny_toy().train()
    assert_metrics(sink_metrics(toy, TOKENS), expected(toy))


class Diverging(TrainerCallback):
    """The third step leads nowhere."""

    def on_step_end(self, args, state, control, model=None, **_):
        if state.global_step == 3:
            nn.init.constant_(model.transformer.h[0].mlp.c_fc.weight, float("nan"))


def test_of_a_model_that_has_diverged_nothing_is_logged_and_the_training_goes_on(tmp_path):
    with pytest.warns(UserWarning, match="no sinks measured at step 4: .*NaN"):
        trainer = train(tmp_path, Diverging(), SinkCallback(TOKENS, every=2))
    assert trainer.state.global_step == 6
    assert [entry["step"] for entry in logged(trainer)] == [2]


def test_what_a_model_does_not_have_is_left_out():
    """Differential attention has no one W_O for a head, and so no value norm."""
    model = tiny_model("diffllama")
    found, names = sink_metrics(model, TOKENS), ("sink_attention", "residual_norm")
    assert sorted(found) == [
        "sink/largest_magnitude",
        "sink/rate",
        "sink/residual_peak_ratio",
        "sink/strongest_attention",
    ]
    attention = measure(model, TOKENS, names).sink_attention.mean("batch")
    assert found["sink/strongest_attention"] == pytest.approx(float(attention.max()), rel=1e-5)


def test_the_numbers_are_those_that_a_report_tells_of_the_same_texts():
    model, tokens = gpt2(vocab_size=len(WORDS), initializer_range=1.0), TOKENS % len(WORDS)
    told = quantities(measure_windows(tiny_reader(model), tokens))
    found = sink_metrics(model, tokens)
    assert found["sink/rate"] > 0
    for key, name in {
        "rate": "sink_rate",
        "strongest_attention": "strongest_sink_attention",
        "value_drain_ratio": "value_drain_ratio",
        "residual_peak_ratio": "residual_peak_ratio",
        "largest_magnitude": "largest_magnitude",
    }.items():
        assert found[f"sink/{key}"] == pytest.approx(told[name], rel=1e-5), name


# --- What it is given ------------------------------------------------------------------------


def test_texts_lists_and_padded_tensors_are_the_same(tmp_path):
    model, tokenizer = gpt2(vocab_size=len(WORDS)), tiny_tokenizer()
    texts = ["to be or not", "be the to"]
    rows = [[1, 2, 3, 4, 5], [1, 3, 7, 2]]
    ids = torch.tensor([rows[0], [*rows[1], 0]])
    mask = torch.tensor([[1] * 5, [1] * 4 + [0]])
    wanted = sink_metrics(model, ids, attention_mask=mask)
    assert wanted != sink_metrics(model, ids)
    assert sink_metrics(model, rows) == wanted
    assert sink_metrics(model, texts, tokenizer=tokenizer) == wanted
    assert sink_metrics(model, texts, tokenizer=tokenizer, length=3) == sink_metrics(
        model, torch.tensor([row[:3] for row in rows])
    )


@pytest.mark.parametrize("given_to", ["the callback", "the trainer"])
def test_texts_are_read_by_the_tokenizer_of_the_callback_or_else_of_the_trainer(given_to):
    model, tokenizer = gpt2(vocab_size=len(WORDS)), tiny_tokenizer()
    own = {"tokenizer": tokenizer} if given_to == "the callback" else {}
    callback = SinkCallback(["to be or not"], every=1, **own)
    arguments = TrainingArguments(use_cpu=True, report_to="none")
    state = TrainerState(global_step=1)
    read_by = None if own else tokenizer
    callback.on_train_begin(arguments, state, TrainerControl(), model, processing_class=read_by)
    callback.on_step_end(arguments, state, TrainerControl(), model)
    assert_metrics(state.log_history[0], expected(model, torch.tensor([[1, 2, 3, 4, 5]])))


REFUSED = {
    "one string": ("to be", "Give one text as"),
    "one list of ids": ([1, 2, 3], "Give one text as"),
    "one vector of ids": (TOKENS[0], r"input_ids\[None\]"),
    "no whole numbers": ([[1.5, 2.0]], "no tensor of token ids"),
    "floats": (TOKENS.float(), "whole numbers"),
    "what a tokenizer returns": ({"input_ids": [[1, 2]]}, "of a tokenizer's output the input_ids"),
    "nothing": ([], "no text at all"),
    "an empty text": ([[1, 2], []], "without tokens"),
    "labels": ([[1, 2], [-100, 3]], "from -100 to 3"),
    "another tokenizer's ids": ([[1, 2], [3, 50_000]], "to 50000; the model has 97"),
    "texts without a tokenizer": (["to be or not"], "Give `tokenizer`"),
}


@pytest.mark.parametrize("given", REFUSED)
def test_what_cannot_be_measured_is_refused_before_the_training_begins(tmp_path, given):
    inputs, message = REFUSED[given]
    with pytest.raises(SinkbookError, match=message):
        sink_metrics(gpt2(), inputs)
    with pytest.raises(SinkbookError, match=message):
        train(tmp_path, SinkCallback(inputs))


@pytest.mark.parametrize("every", [0, -1])
def test_every_is_a_number_of_steps(every):
    with pytest.raises(SinkbookError, match="Give 1 or more"):
        SinkCallback(TOKENS, every=every)


def test_an_encoder_is_refused_before_the_training_begins(tmp_path):
    with pytest.raises(SinkbookError, match="causal"):
        train(tmp_path, SinkCallback(TOKENS), model=tiny_model("bert"))


class Breaking(TrainerCallback):
    """From the first step on nothing can be measured."""

    def __init__(self, broken: SinkbookError, patch: pytest.MonkeyPatch):
        self.broken, self.patch = broken, patch

    def on_step_end(self, args, state, control, **_):
        self.patch.setattr("sinkbook.probe.training_callback.measure", self.fails)

    def fails(self, *_, **__):
        raise self.broken


def test_what_cannot_be_measured_later_on_is_told_and_the_training_goes_on(tmp_path, monkeypatch):
    breaking = Breaking(SinkbookError("layer 1 attends to later tokens."), monkeypatch)
    with pytest.warns(UserWarning, match="no sinks measured at step 2: layer 1 attends"):
        trainer = train(tmp_path, breaking, SinkCallback(TOKENS, every=2))
    assert trainer.state.global_step == 6 and logged(trainer) == []
