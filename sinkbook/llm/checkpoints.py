"""The checkpoints of a pretraining as one dataset: every revision of a hub model, measured alike.

    olmo = "allenai/OLMo-7B-0424-hf"
    dataset = measure_checkpoints(olmo, OLMO_STEPS, texts, free=True)

Checkpoints are loaded one at a time, measured on the same token windows, and each measurement is
kept in the store, so that an interrupted sweep goes on where it stopped. Any
`concurrent.futures.Executor` can run it; without one the calling process does.
"""

import hashlib
import json
import re
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import transformers
import xarray as xr
from huggingface_hub import HfApi, constants, scan_cache_dir
from huggingface_hub import errors as hub_errors
from huggingface_hub.file_download import repo_folder_name

from sinkbook import store
from sinkbook.annotations import check_arguments
from sinkbook.arguments import check_all, check_whole_number, texts_of
from sinkbook.data import corpora
from sinkbook.dependencies import code_hash
from sinkbook.errors import SinkbookError
from sinkbook.files import no_room
from sinkbook.llm.checkpoint_metrics import measure_checkpoint
from sinkbook.models import pretrained
from sinkbook.parallel import all_failures, on_executor
from sinkbook.provenance import provenance

CHARACTERS_PER_TOKEN = 8  # more than a word piece has on average, so that texts are long enough

# The 31 steps of arXiv 2410.13835, section 3.2.
OLMO_STEPS = (
    *range(0, 10_001, 500),
    *(25_000, 50_000, 100_000, 147_500, 200_000, 250_000, 300_000, 350_000, 410_000, 449_000),
)

_STEP = re.compile(r"(?:.+-)?step(\d+)(?:-tokens(\d+(?:\.\d+)?)([KMBT]?))?", re.IGNORECASE)
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
_PYTHIA_TOKENS = 2_097_152  # of a training step of every Pythia: 1,024 texts of 2,048 tokens

_one_model = threading.Lock()  # in the memory of a process, however many threads it works with


class DiskFullError(SinkbookError):
    """No space is left for the next checkpoint, or for its measurement."""


@dataclass(frozen=True)
class Revision:
    """A branch or tag of a hub model, and what its name says about the training so far."""

    name: str
    commit: str
    step: int | None
    tokens: int | None


@check_arguments
def revisions_of(model_id: str) -> list[Revision]:
    """The revisions of a hub model whose names tell a step, in the order of the steps.

    Names such as OLMo's `step1000-tokens4B` and `stage1-step1000-tokens4B` and Pythia's `step1000`
    are understood. Without a network they are those in the hub's cache on this machine.
    Raises `SinkbookError` if there is no such model, or none of its revisions names a step.
    """
    found = [revision for revision in _all_revisions(model_id) if revision.step is not None]
    if not found:
        raise SinkbookError(
            f"no revision of {model_id!r} is named after a training step, as step1000 is. Models "
            "with such revisions are OLMo's and Pythia's, such as EleutherAI/pythia-70m."
        )
    return found


@check_arguments
def measure_checkpoints(
    model_id: str,
    revisions: Iterable[str | int] | None,
    texts: Sequence[str],
    *,
    length: int = 64,
    random_queries: int = 128,
    seed: int = 0,
    executor: Executor | None = None,
    free: bool = False,
    device: str = "auto",
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
) -> xr.Dataset:
    """Measure revisions of a hub model on the same texts, and put them along `revision`.

    `revisions` are names or steps; None is every revision that names a step. Every text becomes its
    first `length` tokens, the model's first token included, and these have to be the same in all
    revisions. The variables are those of `checkpoint_metrics.measure_checkpoint`, and `token`, the
    ids; `step`, `tokens` and `commit` are coordinates of `revision`.

    One checkpoint is in a process's memory at a time. `free` removes its weights from the hub's
    cache once its measurement is kept. A revision that cannot be measured does not stop the others;
    a full disk does. Whatever was measured is kept in the store: the same call again measures only
    what is missing. `executor` runs the measurements, on other machines too if its workers are
    there; they come back to the caller's store.
    Raises `SinkbookError` for a missing revision, or for a string in the place of the texts, before
    anything is measured, and at the end for revisions without weights or otherwise unreadable.
    """
    texts = texts_of(texts)
    check_whole_number("length", length, 2)
    if revisions is not None:
        check_all("revisions", revisions, str, int)
    jobs = [
        _Job(
            model_id,
            revision,
            tuple(texts),
            length,
            random_queries,
            seed,
            device,
            None if dtype is None else str(dtype).removeprefix("torch."),
            trust_remote_code,
            free,
        )
        for revision in _chosen(model_id, revisions)
    ]
    jobs = [replace(job, asked_as=job.folder.name) for job in jobs]
    results = _run(jobs, executor or _InProcess())
    return _together(jobs, results)


@check_arguments
def texts_to_measure(domain: str, *, count: int, length: int) -> list[str]:
    """The first texts of a domain that give `length` tokens each.

    Raises `SinkbookError` for a domain with too few of them.
    """
    return corpora.texts(domain, count, minimum_characters=CHARACTERS_PER_TOKEN * length)


# --- Which revisions -------------------------------------------------------------------------


def _all_revisions(model_id: str) -> list[Revision]:
    """Branches and tags, those that name a step in its order, after all others."""
    try:
        refs = HfApi().list_repo_refs(model_id)
        named = {ref.name: ref.target_commit for ref in [*refs.tags, *refs.branches]}
    except (hub_errors.HFValidationError, hub_errors.RepositoryNotFoundError) as error:
        raise SinkbookError(
            f"no model {model_id!r} on the hub. Checkpoints are revisions of a hub model: give an "
            "id such as EleutherAI/pythia-70m."
        ) from error
    except Exception as error:  # offline, no network, the hub's own trouble: each has its exception
        named = _cached_refs(model_id)
        if not named:
            raise SinkbookError(
                f"no way to the hub, and no revision of {model_id!r} in its cache on this machine "
                f"({constants.HF_HUB_CACHE}). Go where there is a network."
            ) from error
    found = [Revision(name, commit, *_read(model_id, name)) for name, commit in named.items()]
    return sorted(found, key=lambda r: (-1 if r.step is None else r.step, r.name))


def _cached_refs(model_id: str) -> dict[str, str]:
    folder = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=model_id, repo_type="model")
    refs = folder / "refs"
    return {
        path.relative_to(refs).as_posix(): path.read_text().strip()
        for path in refs.rglob("*")
        if path.is_file()
    }


def _read(model_id: str, name: str) -> tuple[int | None, int | None]:
    """The step and the tokens that a revision's name tells."""
    match = _STEP.fullmatch(name)
    if match is None:
        return None, None
    step, amount, unit = match.groups()
    if amount is not None:
        return int(step), round(float(amount) * _UNITS[unit.upper()])
    is_pythia = re.fullmatch(r"EleutherAI/pythia-.+", model_id)
    return int(step), int(step) * _PYTHIA_TOKENS if is_pythia else None


def _chosen(model_id: str, revisions: Iterable[str | int] | None) -> list[Revision]:
    if revisions is None:
        return revisions_of(model_id)
    known = _all_revisions(model_id)
    chosen = []
    for wanted in revisions:
        matches = [r for r in known if wanted == (r.name if isinstance(wanted, str) else r.step)]
        if not matches:
            steps = [r for r in known if r.step is not None] or known
            goal = wanted if isinstance(wanted, int) else _read(model_id, wanted)[0] or 0
            near = sorted(steps, key=lambda r: abs((r.step or 0) - goal))[:3]
            raise SinkbookError(
                f"{model_id!r} has no revision {wanted!r}. Near it: "
                f"{', '.join(r.name for r in near)}. All: sinkbook checkpoints {model_id} --list"
            )
        chosen.append(matches[0])
    return sorted(dict.fromkeys(chosen), key=known.index)


# --- One measurement, wherever it runs -------------------------------------------------------


@dataclass(frozen=True)
class _Job:
    """One checkpoint to be measured, and how."""

    model_id: str
    revision: Revision
    texts: tuple[str, ...]
    length: int
    random_queries: int
    seed: int
    device: str
    dtype: str | None
    trust_remote_code: bool
    free: bool
    asked_as: str = ""  # the name under which the machine that asks keeps it

    @property
    def folder(self) -> Path:
        """Where the store keeps the measurement: named by all that decides it."""
        decides = [
            *(self.model_id, self.revision.name, self.revision.commit, self.texts),
            *(self.length, self.random_queries, self.seed, self.dtype),
            *(torch.__version__, transformers.__version__),
            code_hash(f"{__name__}:_measure_now"),
        ]
        digest = hashlib.sha256(json.dumps(decides).encode()).hexdigest()
        return store.runs_folder() / f"checkpoint-{digest[:16]}"


def _measure(job: _Job) -> xr.Dataset:
    """The measurement of a job: from the store, or else made and kept there."""
    if job.folder.name != job.asked_as:
        raise SinkbookError(
            "a worker has another version of sinkbook's measuring code, of torch or of "
            "transformers, than the machine that asks. Install the same on all of them."
        )
    with _stopped_by_full_disk(job):
        with _one_model:
            _, result, _ = store.finished(job.folder, lambda: _keep(job, _measure_now(job)))
        if job.free:
            _free(job)
        return result


@contextmanager
def _stopped_by_full_disk(job: _Job) -> Iterator[None]:
    """Whatever is raised for lack of room, by whomever, says so: it ends the whole sweep."""
    try:
        yield
    except DiskFullError:
        raise
    except Exception as error:
        if not no_room(error):
            raise
        raise DiskFullError(
            f"the disk was full at {job.revision.name} of {job.model_id!r} ({error}). Free "
            "some space and run the same again: what was measured is kept. To remove each "
            "checkpoint once it is measured, add `free=True`."
        ) from error


def _measure_now(job: _Job) -> xr.Dataset:
    reader = pretrained.load(
        job.model_id,
        revision=job.revision.name,
        device=job.device,
        dtype=None if job.dtype is None else getattr(torch, job.dtype),
        trust_remote_code=job.trust_remote_code,
    )
    tokens = reader.encode(job.texts, job.length)
    result = measure_checkpoint(
        reader.model, tokens, random_queries=job.random_queries, seed=job.seed
    )
    return result.assign(token=(("text", "position"), tokens.cpu().numpy()))


def _keep(job: _Job, result: xr.Dataset) -> None:
    facts = {
        "model": job.model_id,
        "revision": job.revision.name,
        "commit": job.revision.commit,
    } | provenance()
    store.save_run(job.folder, {}, result, facts)  # the weights stay on the hub


def _free(job: _Job) -> None:
    """Remove a checkpoint's weights from the hub's cache, unless another revision shares them."""
    repositories = scan_cache_dir(constants.HF_HUB_CACHE).repos
    revisions = [r for held in repositories if held.repo_id == job.model_id for r in held.revisions]
    shared = {
        file.blob_path
        for revision in revisions
        if revision.commit_hash != job.revision.commit
        for file in revision.files
    }
    for revision in revisions:
        here = revision.commit_hash == job.revision.commit
        if here and not revision.refs - {job.revision.name}:
            for file in revision.files:
                if file.file_name.endswith(".safetensors"):
                    file.file_path.unlink(missing_ok=True)
                    if file.blob_path not in shared:
                        file.blob_path.unlink(missing_ok=True)


# --- The sweep -------------------------------------------------------------------------------


class _InProcess(Executor):
    """Runs each call at once in the calling thread, where Ctrl-C stops it."""

    def submit(self, fn, /, *args, **kwargs) -> Future:
        future: Future = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future


def _run(jobs: list[_Job], executor: Executor) -> dict[_Job, xr.Dataset]:
    """The measurement of every job, each kept in this process's store as soon as it is there."""
    results: dict[_Job, xr.Dataset] = {}
    failures: dict[_Job, Exception] = {}
    calls = {job: (job,) for job in jobs}
    label = "measuring checkpoints"
    for job, result in on_executor(
        executor, _measure, calls, label=label, stop=(DiskFullError,), failures=failures
    ):
        try:
            with _stopped_by_full_disk(job):
                _bring_home(job, result)
        except DiskFullError:
            raise
        except Exception as error:
            failures[job] = error
        else:
            results[job] = result
    if failures:
        named = {job.revision.name: failures[job] for job in jobs if job in failures}
        raise all_failures(
            f"{len(failures)} of {len(jobs)} checkpoints could not be measured; the measurements "
            "of the others are kept, and the same call measures only what is missing.",
            named,
        )
    return results


def _bring_home(job: _Job, result: xr.Dataset) -> None:
    """Keep what a worker has measured, unless its store is this one."""
    with store.locked(job.folder):
        if not (job.folder / "run.json").exists():
            _keep(job, result)


def _together(jobs: list[_Job], results: dict[_Job, xr.Dataset]) -> xr.Dataset:
    """All measurements along `revision`. Raises `SinkbookError` if their texts differ in tokens."""
    first = results[jobs[0]].token
    for job in jobs:
        if not results[job].token.equals(first):
            raise SinkbookError(
                f"the tokenizer of {job.revision.name} cuts the texts into other tokens than that "
                f"of {jobs[0].revision.name}. Measure the two apart."
            )
    revisions = [job.revision for job in jobs]
    unknown = float("nan")
    coordinates = {
        "revision": [r.name for r in revisions],
        "step": ("revision", [unknown if r.step is None else r.step for r in revisions]),
        "tokens": ("revision", [unknown if r.tokens is None else r.tokens for r in revisions]),
        "commit": ("revision", [r.commit for r in revisions]),
    }
    measured = [results[job].drop_vars("token") for job in jobs]
    dataset = xr.concat(measured, dim="revision").assign(token=first)
    return dataset.assign_coords(coordinates).assign_attrs(model=jobs[0].model_id)
