"""Sweeps over the revisions of a hub model: what is kept, what is told, and what survives a kill.

The hub is a cache folder made here, with refs, snapshots and blobs as a download leaves them.
"""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
import xarray as xr
from huggingface_hub import constants
from typer.testing import CliRunner

from sinkbook import store
from sinkbook.cli import app
from sinkbook.errors import SinkbookError
from sinkbook.llm import checkpoints
from sinkbook.llm.checkpoint_metrics import measure_checkpoint
from sinkbook.llm.checkpoints import measure_checkpoints, revisions_of
from sinkbook.models import pretrained
from sinkbook.parallel import cluster
from tiny import Hub, tiny_tokenizer

pytestmark = pytest.mark.weights

TEXTS = ["to be or not to be the to be", "or the not to be or be the be"]
STEPS = {"step0": 0, "step500-tokens2B": 1, "step1000-tokens4B": 2, "step10000-tokens40B": 3}
SMALL = {"length": 10, "random_queries": 5}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    made = Hub(tmp_path)
    made.add("someone/tiny", "main", 3)
    for revision, seed in STEPS.items():
        made.add("someone/tiny", revision, seed)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(made.cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    # The same for processes that start later: they read the environment.
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setenv("HF_HUB_CACHE", str(made.cache))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("SINKBOOK_RUNS", str(tmp_path / "runs"))
    return made


def measurements_kept() -> list[str]:
    files = store.runs_folder().glob("checkpoint-*/run.json")
    return sorted(json.loads(path.read_text())["facts"]["revision"] for path in files)


def count_loads(monkeypatch) -> list[str]:
    """The revisions that are loaded from now on."""
    loaded, load = [], pretrained.load

    def counting(name, *, revision, **options):
        loaded.append(revision)
        return load(name, revision=revision, **options)

    monkeypatch.setattr(pretrained, "load", counting)
    return loaded


# --- Names -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "name", "step", "tokens"),
    [
        ("allenai/OLMo-7B-0424-hf", "step1000-tokens4B", 1000, 4 * 10**9),
        ("allenai/OLMo-2-1124-7B", "stage1-step928646-tokens3896B", 928646, 3896 * 10**9),
        ("allenai/OLMo-2-1124-7B", "stage2-ingredient1-step1000-tokens5B", 1000, 5 * 10**9),
        ("EleutherAI/pythia-70m", "step512", 512, 512 * 2_097_152),
        ("someone/else", "step512", 512, None),
        ("someone/else", "main", None, None),
        ("someone/else", "stepwise", None, None),
    ],
)
def test_a_revisions_name_tells_step_and_tokens(model, name, step, tokens):
    assert checkpoints._read(model, name) == (step, tokens)


def test_revisions_are_listed_in_the_order_of_their_steps_without_main(hub):
    found = revisions_of("someone/tiny")
    assert [r.name for r in found] == list(STEPS)  # not in that of their letters
    assert [r.tokens for r in found] == [None, 2 * 10**9, 4 * 10**9, 40 * 10**9]
    assert [r.commit for r in found] == [hub.commit(seed) for seed in STEPS.values()]


# --- What is measured ------------------------------------------------------------------------


def test_a_sweep_measures_what_loading_each_revision_and_measuring_it_does(hub):
    dataset = measure_checkpoints("someone/tiny", None, TEXTS, **SMALL)
    assert dataset.revision.values.tolist() == list(STEPS)
    assert dataset.step.values.tolist() == [0, 500, 1000, 10000]
    for revision in ("step0", "step1000-tokens4B"):
        reader = pretrained.load("someone/tiny", revision=revision)
        tokens = reader.encode(TEXTS, 10)
        alone = measure_checkpoint(reader.model, tokens, random_queries=5)
        swept = dataset.sel(revision=revision, drop=True)
        for name, values in alone.items():
            np.testing.assert_array_equal(swept[name].values, values.values, err_msg=name)
        np.testing.assert_array_equal(dataset.token, tokens)


def test_revisions_can_be_chosen_by_step_or_by_name(hub):
    dataset = measure_checkpoints("someone/tiny", [1000, "main", 0, 0], TEXTS, **SMALL)
    assert dataset.revision.values.tolist() == ["main", "step0", "step1000-tokens4B"]
    assert np.isnan(dataset.step[0])


def test_a_second_sweep_loads_only_what_is_new(hub, monkeypatch):
    loaded = count_loads(monkeypatch)
    measure_checkpoints("someone/tiny", [0, 500], TEXTS, **SMALL)
    measure_checkpoints("someone/tiny", [0, 500, 1000], TEXTS, **SMALL)
    assert loaded == ["step0", "step500-tokens2B", "step1000-tokens4B"]
    measure_checkpoints("someone/tiny", [0], TEXTS[::-1], **SMALL)  # other texts, measured anew
    assert loaded[3:] == ["step0"]


def test_an_interrupted_sweep_goes_on_and_ends_with_the_same_bits(hub, monkeypatch):
    unbroken = measure_checkpoints("someone/tiny", None, TEXTS, **SMALL)
    shutil.rmtree(store.runs_folder())
    measure_now = checkpoints._measure_now

    def interrupted(job):
        if job.revision.step == 1000:
            raise KeyboardInterrupt
        return measure_now(job)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "_measure_now", interrupted)
        with pytest.raises(KeyboardInterrupt):
            measure_checkpoints("someone/tiny", None, TEXTS, **SMALL)
    assert measurements_kept() == ["step0", "step500-tokens2B"]
    loaded = count_loads(monkeypatch)
    resumed = measure_checkpoints("someone/tiny", None, TEXTS, **SMALL)
    assert loaded == ["step1000-tokens4B", "step10000-tokens40B"]
    xr.testing.assert_identical(resumed, unbroken)


def test_a_damaged_measurement_is_set_aside_and_made_again(hub, caplog):
    first = measure_checkpoints("someone/tiny", [0], TEXTS, **SMALL)
    (kept,) = store.runs_folder().glob("checkpoint-*/measurements.nc")
    data = bytearray(kept.read_bytes())
    data[len(data) // 2] ^= 1
    kept.write_bytes(data)
    xr.testing.assert_identical(measure_checkpoints("someone/tiny", [0], TEXTS, **SMALL), first)
    assert "damaged" in caplog.text
    assert list(kept.parent.glob("damaged-*/measurements.nc"))


def test_other_tokens_in_one_revision_are_noticed(hub):
    hub.tokenizer = tiny_tokenizer(adds_bos=False)
    hub.add("someone/tiny", "step2000", 9)
    with pytest.raises(SinkbookError, match="tokenizer of step2000 cuts the texts into other"):
        measure_checkpoints("someone/tiny", [0, 2000], TEXTS, **SMALL | {"length": 9})


def test_any_executor_gives_the_same(hub):
    alone = measure_checkpoints("someone/tiny", [0, 500], TEXTS, **SMALL)
    shutil.rmtree(store.runs_folder())
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        apart = measure_checkpoints("someone/tiny", [0, 500], TEXTS, executor=pool, **SMALL)
    xr.testing.assert_identical(apart, alone)


def test_what_a_worker_with_another_store_has_measured_comes_home(hub, monkeypatch, tmp_path):
    measure = checkpoints._measure

    def elsewhere(job):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("SINKBOOK_RUNS", str(tmp_path / "elsewhere"))
            return measure(job)

    monkeypatch.setattr(checkpoints, "_measure", elsewhere)
    measure_checkpoints("someone/tiny", [0, 500], TEXTS, **SMALL)
    assert measurements_kept() == ["step0", "step500-tokens2B"]


def test_a_worker_with_other_measuring_code_is_refused(hub, monkeypatch):
    measure = checkpoints._measure
    other = "checkpoint-0123"
    monkeypatch.setattr(checkpoints, "_measure", lambda j: measure(replace(j, asked_as=other)))
    with pytest.raises(SinkbookError, match="a worker has another version of sinkbook"):
        measure_checkpoints("someone/tiny", [0], TEXTS, **SMALL)
    assert measurements_kept() == []


# --- The disk --------------------------------------------------------------------------------


def test_freed_weights_are_gone_and_all_else_stays(hub):
    weights = {
        revision: (hub.folder("someone/tiny") / "snapshots" / hub.commit(seed)).resolve()
        / "model.safetensors"
        for revision, seed in STEPS.items()
    }
    blobs = {revision: path.resolve() for revision, path in weights.items()}
    measure_checkpoints("someone/tiny", [0, 10000], TEXTS, free=True, **SMALL)
    assert not weights["step0"].is_symlink() and not blobs["step0"].exists()
    assert weights["step500-tokens2B"].exists()
    # The last checkpoint is main as well, and keeps its weights.
    reader = pretrained.load("someone/tiny")
    assert reader.model.config.num_hidden_layers == 2
    assert [r.name for r in revisions_of("someone/tiny")] == list(STEPS)
    again = measure_checkpoints("someone/tiny", [0], TEXTS, free=True, **SMALL)
    assert again.sizes["revision"] == 1


@pytest.mark.parametrize("where", ["download", "store"])
def test_a_full_disk_stops_the_sweep_and_keeps_what_was_measured(hub, monkeypatch, where):
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    load, save_run = pretrained.load, store.save_run
    tried = []

    def load_on_a_full_disk(name, *, revision, **options):
        tried.append(revision)
        if where == "download" and len(tried) > 2:
            raise SinkbookError(f"cannot load {name!r}") from full
        return load(name, revision=revision, **options)

    def save_on_a_full_disk(folder, weights, measurements, facts):
        if where == "store" and len(tried) > 2:
            raise SinkbookError("cannot write") from full
        save_run(folder, weights, measurements, facts)

    with monkeypatch.context() as patch:
        patch.setattr(pretrained, "load", load_on_a_full_disk)
        patch.setattr(store, "save_run", save_on_a_full_disk)
        with pytest.raises(SinkbookError, match="disk was full at step1000-tokens4B.*is kept"):
            measure_checkpoints("someone/tiny", None, TEXTS, **SMALL)
    assert tried == list(STEPS)[:3]  # and not the fourth
    assert measurements_kept() == ["step0", "step500-tokens2B"]
    assert measure_checkpoints("someone/tiny", None, TEXTS, **SMALL).sizes["revision"] == 4


# --- What cannot be measured -----------------------------------------------------------------


def test_a_missing_revision_is_told_before_anything_is_measured(hub):
    with pytest.raises(SinkbookError, match=r"no revision 2000\. Near it: step1000-tokens4B"):
        measure_checkpoints("someone/tiny", [0, 2000], TEXTS, **SMALL)
    with pytest.raises(SinkbookError, match="no revision 'step1000'. Near it: step1000-tokens4B"):
        measure_checkpoints("someone/tiny", ["step1000"], TEXTS, **SMALL)
    assert measurements_kept() == []


def test_a_revision_without_weights_does_not_stop_the_others(hub):
    snapshot = hub.folder("someone/tiny") / "snapshots" / hub.commit(STEPS["step500-tokens2B"])
    (snapshot / "model.safetensors").unlink()
    with pytest.raises(SinkbookError) as failure:
        measure_checkpoints("someone/tiny", None, TEXTS, **SMALL)
    told = str(failure.value)
    assert told.startswith("1 of 4 checkpoints could not be measured; the measurements of the oth")
    assert "\n  step500-tokens2B: " in told and "weights" in told.split("step500-tokens2B: ")[1]
    assert measurements_kept() == ["step0", "step1000-tokens4B", "step10000-tokens40B"]


class OneDies(Executor):
    """As a cluster does it: one future holds what became of its worker, the others go on."""

    def __init__(self, revision, error, when_asked=False):
        self.revision, self.error, self.when_asked = revision, error, when_asked

    def submit(self, measure, job):
        future = Future()
        if job.revision.name != self.revision:
            future.set_result(measure(job))
        elif self.when_asked:
            raise self.error
        elif self.error is None:
            future.cancel()
            future.set_running_or_notify_cancel()
        else:
            future.set_exception(self.error)
        return future


@pytest.mark.parametrize(
    ("error", "when_asked", "told"),
    [
        (BrokenProcessPool("a worker was killed"), False, "memory is full"),
        (BrokenProcessPool("a worker was killed"), True, "memory is full"),
        (MemoryError(), False, "MemoryError"),
        (KeyError("lm_head"), False, "KeyError: 'lm_head'"),
        (None, False, "CancelledError"),
    ],
)
def test_what_becomes_of_one_worker_is_the_failure_of_one_revision(hub, error, when_asked, told):
    dying = OneDies("step500-tokens2B", error, when_asked)
    with pytest.raises(SinkbookError, match="^1 of 4 checkpoints could not be") as failure:
        measure_checkpoints("someone/tiny", None, TEXTS, executor=dying, **SMALL)
    assert told in str(failure.value).split("\n  step500-tokens2B: ")[1]
    assert measurements_kept() == ["step0", "step1000-tokens4B", "step10000-tokens40B"]
    assert measure_checkpoints("someone/tiny", None, TEXTS, **SMALL).sizes["revision"] == 4


def test_a_model_that_is_nowhere_or_has_no_steps_is_an_error_that_says_so(hub, tmp_path):
    with pytest.raises(SinkbookError, match="no way to the hub, and no revision of 'no/such'"):
        revisions_of("no/such")
    with pytest.raises(SinkbookError, match="Checkpoints are revisions of a hub model"):
        revisions_of(str(tmp_path))
    hub.add("someone/plain", "main", 0)
    with pytest.raises(SinkbookError, match="no revision of 'someone/plain' is named after"):
        revisions_of("someone/plain")


def test_one_string_is_no_list_of_texts(hub):
    with pytest.raises(SinkbookError, match="texts is one string, 'to be or not'. Give a list"):
        measure_checkpoints("someone/tiny", None, "to be or not")


def test_texts_that_are_too_short_are_named(hub):
    with pytest.raises(SinkbookError, match="texts are shorter than 10 tokens: text 0"):
        measure_checkpoints("someone/tiny", [0], ["to be"], **SMALL)


# --- The command line, and many machines -----------------------------------------------------


def sinkbook(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "sinkbook.cli", "checkpoints", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=200)


def test_the_command_measures_a_cached_model_offline_and_writes_one_dataset(hub, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("\n".join(TEXTS * 2))
    out = tmp_path / "tiny.nc"
    done = sinkbook(
        "someone/tiny",
        *("--steps", "0,1000", "--text", str(text), "--texts", "3", "--length", "10"),
        *("--out", str(out)),
    )
    assert done.returncode == 0, done.stderr
    assert "1,000" in done.stdout and done.stdout.strip().endswith("tiny.nc")
    dataset = xr.load_dataset(out, engine="h5netcdf")
    assert dataset.step.values.tolist() == [0, 1000] and dataset.sizes["text"] == 3
    again = sinkbook("someone/tiny", "--steps", "0,1000", "--text", str(text), "--out", str(out))
    assert again.returncode == 1 and "--force" in again.stderr


# What every worker process runs first. Dask may run it more than once.
WATCHED = """
import os, time
from sinkbook.llm import checkpoints
measure_now = getattr(checkpoints, "unwatched", checkpoints._measure_now)
checkpoints.unwatched = measure_now

def tell(what, job):
    with open({log!r}, "a") as file:
        file.write(f"{{what}} {{job.revision.name}} {{os.getpid()}}\\n")

def watched(job):
    tell("begin", job)
    result = measure_now(job)
    time.sleep(0.5)
    tell("end", job)
    return result

checkpoints._measure_now = watched
"""


class Killer(Thread):
    """Kills the first worker that begins a second measurement, in the middle of it."""

    def __init__(self, log: Path):
        super().__init__()
        self.log, self.killed, self.stopped = log, None, False

    def run(self):
        while self.killed is None and not self.stopped:
            time.sleep(0.05)
            lines = self.log.read_text().splitlines() if self.log.exists() else []
            begun = [line.split()[1:] for line in lines if line.startswith("begin")]
            for name, pid in begun:
                if [other for _, other in begun].count(pid) == 2:
                    name = [n for n, other in begun if other == pid][1]
                    os.kill(int(pid), signal.SIGKILL)
                    self.killed = f"{name} {pid}"
                    return


def test_two_dask_workers_one_of_which_is_killed_lose_nothing_and_repeat_nothing(hub, tmp_path):
    distributed = pytest.importorskip("distributed")
    for seed in range(10, 16):
        hub.add("someone/many", f"step{seed}", seed)
    log, preload = tmp_path / "log", tmp_path / "watched.py"
    preload.write_text(WATCHED.format(log=str(log)))
    cluster = distributed.LocalCluster(
        n_workers=2,
        threads_per_worker=1,
        processes=True,
        dashboard_address=None,
        preload=[str(preload)],
        local_directory=str(tmp_path / "dask"),
    )
    killer = Killer(log)
    with cluster, distributed.Client(cluster) as client:
        killer.start()
        try:
            dataset = measure_checkpoints(
                "someone/many", None, TEXTS, executor=client.get_executor(), **SMALL
            )
        finally:
            killer.stopped = True
            killer.join()
    ended = [line.split()[1] for line in log.read_text().splitlines() if line.startswith("end")]
    assert killer.killed is not None and f"end {killer.killed}" not in log.read_text()
    assert sorted(ended) == sorted(dataset.revision.values.tolist())  # each of them once
    alone = measure_checkpoints("someone/many", None, TEXTS, **SMALL)
    xr.testing.assert_identical(dataset, alone)


def test_the_command_measures_the_steps_that_it_is_given_or_says_what_is_wrong(
    tmp_path, monkeypatch
):
    asked = []
    texts = tmp_path / "texts.txt"
    texts.write_text("to be\n\nor not\n")

    def measured(model, steps, texts, **options):
        asked.append((model, steps, texts))
        raise SinkbookError("measured nothing")

    monkeypatch.setattr(checkpoints, "measure_checkpoints", measured)
    command = ["checkpoints", "someone/many", "--text", str(texts), "--steps"]
    wrong = CliRunner().invoke(app, [*command, "0,many"])
    assert "--steps '0,many' is no list of steps" in str(wrong.exception) and not asked
    CliRunner().invoke(app, [*command, "0,10_000"])
    assert asked == [("someone/many", [0, 10_000], ["to be", "or not"])]


def test_a_cluster_that_is_not_there_is_told_at_once():
    with (
        pytest.raises(SinkbookError, match="no Dask scheduler answers at 'tcp://127.0.0.1:9'"),
        cluster("tcp://127.0.0.1:9", patience="1s"),
    ):
        pass
