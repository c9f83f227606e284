"""Trainings are values: the same config is the same run, whatever happens on the way."""

import contextlib
import errno
import io
import json
import logging
import os
import random
import shutil
import signal
import time
from concurrent.futures import Executor, Future
from dataclasses import replace
from importlib.metadata import version
from multiprocessing import get_context

import distributed
import numpy as np
import pytest
import torch
import xarray as xr
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sinkbook import store
from sinkbook.errors import SinkbookError
from sinkbook.toy import program
from sinkbook.toy.optimizers import MATRIX_OPTIMIZERS
from sinkbook.toy.tasks import Task, TaskConfig
from sinkbook.toy.training import TrainingConfig, seeds_of, train, train_all
from sinkbook.toy.transformer import Transformer, TransformerConfig

TASK = TaskConfig(length=16)
TINY = TrainingConfig(
    task=TASK,
    model=TransformerConfig(vocab_size=67, length=16, width=16),
    learning_rate=3e-3,
    batch_size=8,
    steps=30,
    measurements=4,
    evaluation_size=4,
)


@pytest.fixture(autouse=True)
def run_store(tmp_path, monkeypatch):
    monkeypatch.setenv("SINKBOOK_RUNS", str(tmp_path / "runs"))
    return tmp_path / "runs"


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """The run of TINY, trained without interruption in a store of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SINKBOOK_RUNS", str(tmp_path_factory.mktemp("unbroken")))
        yield train(TINY)


def assert_same_run(run, expected):
    for name, weight in expected.model.state_dict().items():
        assert torch.equal(run.model.state_dict()[name], weight), name
    xr.testing.assert_identical(run.measurements, expected.measurements)


def stop_at(monkeypatch, step):
    """Interrupt the training where it asks for the batch of a step."""
    batches = Task.batches

    def interrupted(self, size, seed, steps, *device):
        for number, texts in zip(steps, batches(self, size, seed, steps, *device), strict=True):
            if number == step:
                raise KeyboardInterrupt
            yield texts

    monkeypatch.setattr(Task, "batches", interrupted)


def test_training_lowers_both_risks(unbroken):
    first, last = unbroken.measurements.isel(step=0), unbroken.measurements.isel(step=-1)
    assert last.bigram_risk < first.bigram_risk - 0.1
    assert last.backcopy_risk < first.backcopy_risk - 0.1


def test_measurements_are_taken_at_the_announced_steps(unbroken):
    assert tuple(unbroken.measurements.step.values) == TINY.measured_steps
    assert TINY.measured_steps[0] == 0
    assert TINY.measured_steps[-1] == TINY.steps


def test_a_finished_run_is_read_and_not_trained_again(unbroken, monkeypatch):
    run = train(TINY)
    monkeypatch.setattr(Task, "batches", None)
    assert_same_run(train(TINY), run)
    assert_same_run(run, unbroken)


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 43},
        {"learning_rate": 1e-3},
        {"optimizer": "sgd"},
        {"model": replace(TINY.model, attention="relu")},
    ],
    ids=str,
)
def test_a_changed_config_is_another_run(change):
    assert replace(TINY, **change).key != TINY.key


def test_an_interrupted_run_goes_on_and_ends_with_the_same_bits(unbroken, monkeypatch):
    for step in (1, 11, 29):
        with monkeypatch.context() as patch:
            stop_at(patch, step)
            with pytest.raises(KeyboardInterrupt):
                train(TINY, checkpoint_seconds=0.0)
        _, kept = store.load_checkpoint(store.runs_folder() / TINY.key)
        assert kept == step
    assert_same_run(train(TINY), unbroken)


@pytest.mark.parametrize(
    ("optimizer", "rate"), [("sgd", 0.1), *((name, 3e-3) for name in MATRIX_OPTIMIZERS)]
)
def test_every_optimizer_resumes_with_its_state(optimizer, rate, monkeypatch):
    config = replace(TINY, optimizer=optimizer, learning_rate=rate)
    whole = train(config)
    shutil.rmtree(store.runs_folder())
    with monkeypatch.context() as patch:
        stop_at(patch, 15)
        with pytest.raises(KeyboardInterrupt):
            train(config, checkpoint_seconds=0.0)
    assert_same_run(train(config), whole)


def _train_in_child(config, runs, output, checkpoint_seconds):
    os.environ["SINKBOOK_RUNS"] = str(runs)
    torch.set_num_threads(1)
    with open(output, "w") as file:
        logging.getLogger("sinkbook").addHandler(logging.StreamHandler(file))
        train(config, checkpoint_seconds=checkpoint_seconds)


def _child(*arguments):
    context = get_context("forkserver")
    context.set_forkserver_preload(["sinkbook.toy.training"])
    child = context.Process(target=_train_in_child, args=arguments)
    child.start()
    return child


def test_twenty_kills_at_random_moments_change_nothing(run_store):
    config = replace(TINY, steps=1_000)
    delays = random.Random(0)
    kills = 0
    while kills < 20:
        child = _child(config, run_store, os.devnull, 0.0)
        child.join(delays.uniform(0.1, 0.6))
        if child.exitcode is None:
            os.kill(child.pid, signal.SIGKILL)
            kills += 1
        child.join()
        if (run_store / config.key / "run.json").exists():
            break
    assert kills == 20, "the training finished before it was killed often enough"
    broken = train(config)
    shutil.rmtree(run_store)
    torch.set_num_threads(1)
    assert_same_run(broken, train(config))


def test_two_processes_that_ask_for_one_run_train_it_once(run_store, tmp_path):
    config = replace(TINY, steps=600)
    outputs = [tmp_path / "first", tmp_path / "second"]
    children = [_child(config, run_store, output, 30.0) for output in outputs]
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0, 0]
    said = sorted(output.read_text() for output in outputs)
    assert said[0] == "", "both waited"
    assert "being made by another process" in said[1], "both trained"


def _truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def _flip_a_byte(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _replace_by_a_foreign_file(path):
    path.write_text("not one of ours")


def _delete(path):
    path.unlink()


@pytest.mark.parametrize("name", ["weights.safetensors", "measurements.nc", "run.json"])
@pytest.mark.parametrize("fault", [_truncate, _flip_a_byte, _replace_by_a_foreign_file, _delete])
def test_a_damaged_run_is_reported_set_aside_and_trained_again(
    name, fault, unbroken, run_store, caplog
):
    train(TINY)
    fault(run_store / TINY.key / name)
    assert_same_run(train(TINY), unbroken)
    forgotten = name == "run.json" and fault is _delete
    if not forgotten:
        assert "is damaged" in caplog.text
        assert list((run_store / TINY.key).glob("damaged-*/*"))


@pytest.mark.parametrize("fault", [_truncate, _flip_a_byte, _replace_by_a_foreign_file])
def test_a_damaged_checkpoint_is_reported_and_training_starts_over(
    fault, unbroken, run_store, monkeypatch, caplog
):
    with monkeypatch.context() as patch:
        stop_at(patch, 15)
        with pytest.raises(KeyboardInterrupt):
            train(TINY, checkpoint_seconds=0.0)
    fault(run_store / TINY.key / "checkpoint.safetensors")
    assert_same_run(train(TINY), unbroken)
    assert "is damaged (checkpoint.safetensors" in caplog.text


def _stopped_at_12(config, monkeypatch):
    with monkeypatch.context() as patch:
        stop_at(patch, 12)
        with pytest.raises(KeyboardInterrupt):
            train(config, checkpoint_seconds=0.0)


@pytest.mark.parametrize("step", ["2", "99", "-1", "many", "", "１２", None])
def test_a_step_that_is_not_the_checkpoints_is_found(unbroken, monkeypatch, caplog, step):
    """It stands beside the weights and decides what is trained on."""
    _stopped_at_12(TINY, monkeypatch)
    path = TINY.folder / "checkpoint.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata() | {"step": step}
    metadata = {name: value for name, value in metadata.items() if value is not None}
    save_file(load_file(path), path, metadata)
    with pytest.raises(store.DamagedError):
        store.load_checkpoint(TINY.folder)
    assert_same_run(train(TINY), unbroken)
    assert "is damaged" in caplog.text


def test_an_optimizers_state_runs_no_code(monkeypatch, caplog, tmp_path):
    """A pickle in a checkpoint, as earlier versions kept them, is not opened."""

    class Trap:
        def __reduce__(self):
            return (tmp_path / "executed").touch, ()

    config = replace(TINY, optimizer="muon")
    _stopped_at_12(config, monkeypatch)
    tensors, step = store.load_checkpoint(config.folder)
    trap = io.BytesIO()
    torch.save(Trap(), trap)
    tensors["optimizer/whole"] = torch.frombuffer(bytearray(trap.getvalue()), dtype=torch.uint8)
    with monkeypatch.context() as patch:
        patch.setattr(store, "_without_pickle", lambda tensors: tensors)
        store.save_checkpoint(config.folder, tensors, step)
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    train(config)
    assert "is no JSON with tensors" in caplog.text and not (tmp_path / "executed").exists()


def test_an_optimizers_state_comes_back_as_it_lay_in_memory(tmp_path):
    """Lists, numbers and tensors, their axes in the same order; the file itself has no pickle."""
    state = {
        "state": {0: {"step": 3, "sides": [torch.randn(3, 2).mT, None, torch.tensor(2.5)]}},
        "groups": [{"betas": (0.9, 0.1 + 0.2), "cube": torch.randn(2, 3, 4).permute(2, 0, 1)}],
    }
    whole = io.BytesIO()
    torch.save(state, whole)
    given = {"optimizer/whole": torch.frombuffer(bytearray(whole.getvalue()), dtype=torch.uint8)}
    store.save_checkpoint(tmp_path, given, 7)
    assert b"pickle" not in (tmp_path / "checkpoint.safetensors").read_bytes()
    tensors, step = store.load_checkpoint(tmp_path)
    found = torch.load(io.BytesIO(tensors["optimizer/whole"].numpy().tobytes()), weights_only=True)
    (cube,), (before,) = ([each.pop("cube") for each in s["groups"]] for s in (found, state))
    sides, those = (s["state"][0].pop("sides") for s in (found, state))
    for one, other in ((cube, before), (sides[0], those[0]), (sides[2], those[2])):
        assert one.equal(other) and one.stride() == other.stride()
    assert sides[1] is None and found == state and tensors.keys() == given.keys() and step == 7


def _in_no_known_form(kept):
    return {"pickle": kept}


def _without_a_tensor(kept):
    return {"tensor": ["optimizer/whole/99", [0, 1]]}


@pytest.mark.parametrize("change", [_in_no_known_form, _without_a_tensor])
def test_a_state_of_another_form_is_damaged(tmp_path, monkeypatch, change):
    text = bytearray(json.dumps(change({"list": []})).encode())
    monkeypatch.setattr(store, "_without_pickle", lambda tensors: tensors)
    tensors = {"optimizer/whole": torch.frombuffer(text, dtype=torch.uint8)}
    store.save_checkpoint(tmp_path, tensors, 1)
    with pytest.raises(store.DamagedError, match="is no JSON with tensors"):
        store.load_checkpoint(tmp_path)


def test_another_runs_files_under_this_runs_name_are_not_believed(unbroken, run_store, caplog):
    other = replace(TINY, seed=7)
    train(other)
    shutil.copytree(run_store / other.key, run_store / TINY.key)
    assert_same_run(train(TINY), unbroken)
    assert "not this run's record" in caplog.text


def test_a_record_with_an_edited_number_is_not_believed(unbroken, run_store, caplog):
    train(TINY)
    path = run_store / TINY.key / "run.json"
    record = json.loads(path.read_text())
    record["facts"]["seconds"] = 0.001
    path.write_text(json.dumps(record))
    assert_same_run(train(TINY), unbroken)
    assert "checksum differs" in caplog.text


def test_a_full_disk_is_said_and_the_last_checkpoint_is_kept(run_store, monkeypatch, unbroken):
    save_file = store.save_file
    writes = []

    def fills_up(tensors, path, *args):
        writes.append(path)
        save_file(tensors, path, *args)
        if len(writes) > 5:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(store, "save_file", fills_up)
        with pytest.raises(SinkbookError, match="No space left on device.*SINKBOOK_RUNS"):
            train(TINY, checkpoint_seconds=0.0)
    _, step = store.load_checkpoint(run_store / TINY.key)
    assert step == 5
    assert_same_run(train(TINY), unbroken)


@pytest.mark.parametrize("way", ["batched", "processes", "sequence"])
def test_every_way_of_training_many_seeds_gives_the_same_runs(way, unbroken):
    # Thirty steps: beyond that, Adam carries rounding errors far.
    configs = seeds_of(TINY, 3)
    alone = [train(config) for config in configs]
    shutil.rmtree(store.runs_folder())
    for run, expected in zip(train_all(configs, way=way), alone, strict=True):
        assert run.config == expected.config
        for name, weight in expected.model.state_dict().items():
            torch.testing.assert_close(run.model.state_dict()[name], weight, atol=2e-4, rtol=1e-3)
        for name in ("backcopy_risk", "sink_attention", "value_norm"):
            np.testing.assert_allclose(
                run.measurements[name], expected.measurements[name], rtol=1e-3
            )


def test_runs_trained_on_a_cluster_come_back_into_the_store_here(unbroken, tmp_path, monkeypatch):
    elsewhere = {"SINKBOOK_RUNS": str(tmp_path / "elsewhere"), "OMP_NUM_THREADS": "1"}
    workers = distributed.LocalCluster(
        n_workers=2,
        threads_per_worker=1,
        env=elsewhere,
        dashboard_address=None,
        local_directory=str(tmp_path / "dask"),
    )
    with workers:
        monkeypatch.setenv("SINKBOOK_DASK", workers.scheduler_address)
        first, second = train_all(seeds_of(TINY, 2))
    assert_same_run(first, unbroken)
    assert {run.name for run in (tmp_path / "elsewhere").iterdir()} == {
        first.config.key,
        second.config.key,
    }
    monkeypatch.delenv("SINKBOOK_DASK")
    assert_same_run(train(TINY), unbroken)


def test_a_worker_with_another_torch_is_refused(run_store, monkeypatch):
    class Worker(Executor):
        def submit(self, work, *arguments, **options):
            future = Future()
            with monkeypatch.context() as there:
                there.setattr(torch, "__version__", "0.0")
                try:
                    future.set_result(work(*arguments, **options))
                except SinkbookError as error:
                    future.set_exception(error)
            return future

    with pytest.raises(SinkbookError, match="another version of sinkbook's training code"):
        train_all([TINY], executor=Worker())


@pytest.mark.parametrize("optimizer", MATRIX_OPTIMIZERS)
def test_seeds_whose_optimizer_wants_matrices_are_not_stacked(optimizer):
    configs = seeds_of(replace(TINY, optimizer=optimizer, steps=5), 2)
    alone = [train(config) for config in configs]
    shutil.rmtree(store.runs_folder())
    for run, expected in zip(train_all(configs, way="batched"), alone, strict=True):
        assert_same_run(run, expected)


def test_seeds_trained_as_one_program_resume_together(monkeypatch):
    configs = seeds_of(TINY, 2)
    with monkeypatch.context() as patch:
        stop_at(patch, 15)
        with pytest.raises(KeyboardInterrupt):
            train_all(configs, way="batched", checkpoint_seconds=0.0)
    broken = train_all(configs, way="batched")
    shutil.rmtree(store.runs_folder())
    for run, expected in zip(broken, train_all(configs, way="batched"), strict=True):
        assert_same_run(run, expected)


def test_gradients_taken_a_few_texts_at_a_time_are_those_of_the_whole_batch(monkeypatch):
    torch.manual_seed(0)
    model = Transformer(TINY.model).double()
    texts = TINY.evaluation_tokens.repeat(3, 1)[:7]
    found = []
    for tokens_at_once in (4096, 45):  # 15 inputs a text: all, and three at a time with one left
        monkeypatch.setattr(program, "NUMBERS_AT_ONCE", tokens_at_once * TINY.model.width)
        model.zero_grad()
        program.add_gradients(model, texts)
        found.append([weight.grad.clone() for weight in model.parameters()])
    for whole, parts in zip(*found, strict=True):
        torch.testing.assert_close(parts, whole)


def test_a_model_that_does_not_fit_the_task_is_refused():
    with pytest.raises(SinkbookError, match="Give the model the task's"):
        replace(TINY, model=replace(TINY.model, vocab_size=66))
    with pytest.raises(SinkbookError, match="Known: adamw"):
        replace(TINY, optimizer="adam")


def test_facts_tell_versions_device_and_time(unbroken):
    assert unbroken.facts["versions"]["torch"] == version("torch")
    assert unbroken.facts["config"]["seed"] == TINY.seed
    assert 0 < unbroken.seconds < 60
    assert time.strptime(unbroken.facts["date"], "%Y-%m-%dT%H:%M:%S%z")


def mend_the_probe(monkeypatch):
    """As if the code that measures had been edited: losses are then reported doubled."""
    measure_toy = program.measure_toy

    def doubled(*arguments):
        measured = measure_toy(*arguments)
        return measured.assign(bigram_risk=2 * measured.bigram_risk)

    monkeypatch.setattr(program, "measure_toy", doubled)
    monkeypatch.setattr(TrainingConfig, "measured_by", property(lambda config: "another hash"))


@pytest.mark.parametrize("changes", [{}, {"details": True}])
def test_a_mended_probe_measures_stored_runs_again_and_trains_none(changes, run_store, monkeypatch):
    config = replace(TINY, **changes)
    before = train(config)
    mend_the_probe(monkeypatch)
    monkeypatch.setattr(Task, "batches", None)
    after = train(config)
    expected = before.measurements.assign(bigram_risk=2 * before.measurements.bigram_risk)
    xr.testing.assert_identical(after.measurements, expected)
    assert_same_run(train(config), after)


def test_a_mended_probe_measures_an_unfinished_run_again(run_store, unbroken, monkeypatch):
    with monkeypatch.context() as patch:
        stop_at(patch, 15)
        with pytest.raises(KeyboardInterrupt):
            train(TINY, checkpoint_seconds=0.0)
    mend_the_probe(monkeypatch)
    stop_at(monkeypatch, 10)  # it goes on after that
    after = train(TINY).measurements
    expected = unbroken.measurements.assign(bigram_risk=2 * unbroken.measurements.bigram_risk)
    xr.testing.assert_allclose(after, expected, rtol=0, atol=0)


@pytest.mark.parametrize("step", [None, 15])
def test_runs_that_kept_no_weights_on_the_way_are_trained_again_by_a_mended_probe(
    step, run_store, unbroken, monkeypatch
):
    monkeypatch.setattr(store, "KEPT_ALONG", 0)
    with monkeypatch.context() as patch:
        if step is not None:
            stop_at(patch, step)
        with contextlib.suppress(KeyboardInterrupt):
            train(TINY, checkpoint_seconds=0.0)
    assert not list(run_store.glob("*/along.safetensors"))
    mend_the_probe(monkeypatch)
    after = train(TINY)
    expected = unbroken.measurements.assign(bigram_risk=2 * unbroken.measurements.bigram_risk)
    xr.testing.assert_allclose(after.measurements, expected, rtol=0, atol=0)


@pytest.mark.parametrize("fault", [_truncate, _flip_a_byte, _replace_by_a_foreign_file])
def test_damaged_weights_of_the_way_are_not_measured(fault, run_store, unbroken, monkeypatch):
    train(TINY)
    fault(run_store / TINY.key / store.ALONG)
    assert_same_run(train(TINY), unbroken)  # not needed, not looked at
    mend_the_probe(monkeypatch)
    after = train(TINY).measurements
    expected = unbroken.measurements.assign(bigram_risk=2 * unbroken.measurements.bigram_risk)
    xr.testing.assert_allclose(after, expected, rtol=0, atol=0)
