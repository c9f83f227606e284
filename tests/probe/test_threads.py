"""Several threads at once: on one model, on two, and on two that share a configuration."""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import xarray as xr
from transformers import LlamaForCausalLM

from sinkbook import attention_weights, measure, quantized, zero
from sinkbook.errors import SinkbookError
from sinkbook.mitigations.sink_cache import streaming
from sinkbook.models.attention_interface import attending_by
from sinkbook.models.partial_forward import alone_with, kept, logits_of, residual_states
from sinkbook.probe import VARIABLES
from tiny import loud_llama, tiny_model, tiny_toy

TEXTS = [torch.randint(3, 50, (1, 16), generator=torch.Generator().manual_seed(n)) for n in (1, 2)]
SECONDS = 30  # for what would wait for ever
EACH = {
    "llama": loud_llama,
    "gemma2": lambda: tiny_model("gemma2", head_dim=8, initializer_range=0.3),
    "ctrl": lambda: tiny_model("ctrl", n_embd=32, dff=48, n_layer=2, n_head=4),
    "toy": lambda: tiny_toy(vocab_size=97).train(),
}


def state_of(model):
    """All that measuring changes for a while."""
    functions = [vars(module).get("attention_function") for module in model.modules()]
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    training = [module.training for module in model.modules()]
    attends_by = getattr(getattr(model, "config", None), "_attn_implementation", None)
    return functions, hooks, training, attends_by


@pytest.mark.parametrize("kind", EACH)
def test_two_threads_measure_one_model_and_leave_it_as_it_was(kind):
    model, names = EACH[kind](), tuple(VARIABLES)
    before = state_of(model)
    expected = [measure(model, text, names) for text in TEXTS]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda n: measure(model, TEXTS[n % 2], names), range(12)))
    for number, result in enumerate(found):
        xr.testing.assert_equal(result, expected[number % 2])
    assert state_of(model) == before


def test_two_models_are_measured_side_by_side():
    """Both are inside at once, and the one that ends first takes nothing from the other."""
    models = [loud_llama(), loud_llama(layers=3)]
    models.append(LlamaForCausalLM(models[0].config).eval())  # of the same configuration
    expected = [measure(model, TEXTS[0]) for model in models]
    both, first_done = threading.Barrier(len(models)), threading.Event()

    def meet(*_):
        both.wait(timeout=SECONDS)
        if threading.current_thread().name != "0":
            assert first_done.wait(timeout=SECONDS)

    hooks = [model.model.layers[0].register_forward_hook(meet) for model in models]
    found = {}

    def request(number):
        try:
            found[number] = measure(models[number], TEXTS[0])
        finally:
            first_done.set()

    threads = [threading.Thread(target=request, args=(n,), name=str(n)) for n in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=2 * SECONDS)
    for hook in hooks:
        hook.remove()
    for number, result in enumerate(expected):
        xr.testing.assert_equal(found[number], result)
        assert models[number].config._attn_implementation == "sdpa"


class Measuring:
    """A thread that is in the middle of a measurement of a model while the body runs."""

    def __init__(self, model):
        self.inside, self.go_on = threading.Event(), threading.Event()
        self.model, self.result = model, None
        self.thread = threading.Thread(target=self.measure)

    def measure(self):
        self.result = measure(self.model, TEXTS[1])

    def wait(self, *_):
        if threading.current_thread() is self.thread:
            self.inside.set()
            assert self.go_on.wait(timeout=SECONDS)

    def __enter__(self):
        self.hook = self.model.model.layers[0].register_forward_hook(self.wait)
        self.thread.start()
        assert self.inside.wait(timeout=SECONDS)
        return self

    def __exit__(self, *_):
        self.go_on.set()
        self.thread.join(timeout=SECONDS)
        self.hook.remove()


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt_oss"])
def test_who_only_runs_a_model_that_is_being_measured_gets_its_own_outputs(kind):
    """Soft caps and learned sinks included, whatever implementation the model had."""
    model = tiny_model(kind, head_dim=8, initializer_range=0.3)
    with torch.no_grad():
        expected = model(TEXTS[0]).logits
        cached = model.generate(TEXTS[0], max_new_tokens=4, do_sample=False)
        alone = measure(model, TEXTS[1])
        with Measuring(model) as measuring:
            assert model.config._attn_implementation == "sinkbook"
            found = model(TEXTS[0]).logits
            generated = model.generate(TEXTS[0], max_new_tokens=4, do_sample=False)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert generated.tolist() == cached.tolist()
    xr.testing.assert_equal(measuring.result, alone)


def test_streaming_begins_when_a_measurement_has_ended():
    model, found = loud_llama(), []
    alone = measure(model, TEXTS[1])
    with torch.no_grad(), streaming(model, window=4, kept=1):
        expected = logits_of(model, TEXTS[0])

    def stream():
        with torch.no_grad(), streaming(model, window=4, kept=1):
            found.append(logits_of(model, TEXTS[0]))

    thread = threading.Thread(target=stream)
    with Measuring(model) as measuring:
        thread.start()
        thread.join(timeout=0.5)
        assert thread.is_alive() and not found
    thread.join(timeout=SECONDS)
    assert torch.equal(found[0], expected)
    xr.testing.assert_equal(measuring.result, alone)
    assert model.config._attn_implementation == "sdpa"


def test_two_models_stream_with_their_own_windows():
    first, second = loud_llama(), loud_llama(layers=3)
    with torch.no_grad():
        alone = []
        for model, window in ((first, 4), (second, 7)):
            with streaming(model, window=window, kept=1):
                alone.append(logits_of(model, TEXTS[0]))
        with streaming(first, window=4, kept=1), streaming(second, window=7, kept=1):
            assert torch.equal(logits_of(first, TEXTS[0]), alone[0])
            assert torch.equal(logits_of(second, TEXTS[0]), alone[1])
    assert first.config._attn_implementation == second.config._attn_implementation == "sdpa"


def test_the_last_of_overlapping_users_puts_a_models_attention_back():
    model = loud_llama()
    eager, sdpa = attending_by(model, "eager"), attending_by(model, "sdpa")
    eager.__enter__()
    sdpa.__enter__()
    eager.__exit__(None, None, None)
    assert model.config._attn_implementation == "sdpa"
    sdpa.__exit__(None, None, None)
    assert model.config._attn_implementation == "sdpa"
    with pytest.raises(ValueError), attending_by(model, "no such attention"):
        pass
    assert model.config._attn_implementation == "sdpa"
    sdpa, eager = attending_by(model, "sdpa"), attending_by(model, "eager")
    sdpa.__enter__()
    eager.__enter__()
    sdpa.__exit__(None, None, None)
    assert model.config._attn_implementation == "eager"
    eager.__exit__(None, None, None)
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("listen", [kept, residual_states])
def test_what_one_thread_keeps_is_not_mixed_with_what_another_runs(listen):
    model = loud_llama()
    with listen(model) as alone:
        logits_of(model, TEXTS[0])
    other = threading.Thread(target=measure, args=(model, TEXTS[1]))
    with listen(model) as found:
        other.start()
        logits_of(model, TEXTS[0])
        other.join(timeout=0.5)
        assert other.is_alive()  # it waits
        assert len(found) == len(alone)
    other.join(timeout=SECONDS)
    assert not other.is_alive()


def test_a_held_model_can_be_held_again_by_its_own_thread():
    model = loud_llama()
    with alone_with(model), alone_with(model.model):
        result = measure(model, TEXTS[0])
    np.testing.assert_array_equal(result.sink_attention, measure(model, TEXTS[0]).sink_attention)
    assert attention_weights(model, TEXTS[0], layer=0).shape == (1, 4, 16, 16)


CHANGES = {
    "cut": lambda model: zero(model, "attention", layer=1),
    "another cut": lambda model: zero(model, "head", layer=0, head=2),
    "streaming": lambda model: streaming(model, window=4, kept=1),
    "eight bits": lambda model: quantized(model, "token"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_that_of_its_thread_and_others_wait_until_it_has_ended(name):
    """Both ways to use a changed model, and the whole one and other changes beside it."""
    model = loud_llama()
    before = state_of(model)

    def changed(change):
        with CHANGES[change](model), torch.no_grad():
            logits = logits_of(model, TEXTS[0])
            if change == "streaming":
                return logits, None
            return logits, measure(model, TEXTS[0])

    def whole():
        return None, measure(model, TEXTS[1])

    jobs = [lambda: changed(name), whole, lambda: changed("cut"), whole] * 3
    expected = [job() for job in jobs]
    with ThreadPoolExecutor(4) as pool:
        found = [running.result(timeout=SECONDS) for running in [pool.submit(j) for j in jobs]]
    for (logits, result), (own_logits, own_result) in zip(found, expected, strict=True):
        if own_logits is not None:
            assert torch.equal(logits, own_logits)
        if own_result is not None:
            xr.testing.assert_equal(result, own_result)
    assert not torch.equal(expected[0][0], logits_of(model, TEXTS[0]))
    assert state_of(model) == before


def test_two_threads_that_would_wait_for_each_other_for_ever_are_told():
    models, both, told = [loud_llama(), loud_llama(layers=3)], threading.Barrier(2), []

    def cross(own, other):
        with zero(own, "mlp", layer=0):
            both.wait(timeout=SECONDS)
            try:
                measure(other, TEXTS[0])
            except SinkbookError as error:
                told.append(str(error))

    threads = [
        threading.Thread(target=cross, args=pair, daemon=True) for pair in (models, models[::-1])
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=SECONDS)
    assert not any(thread.is_alive() for thread in threads)
    assert len(told) == 1 and "both would wait for ever" in told[0]
    assert all(measure(model, TEXTS[0]).sink_attention.notnull().all() for model in models)
