"""Runs that differ in their seed alone, trained as one program: batches, steps, checkpoints.

A run goes on from its last checkpoint and ends with the same weights, bit by bit, as an unbroken
one.
"""

import io
import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial

import torch
import xarray as xr
from jaxtyping import Int
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from sinkbook import store
from sinkbook.models.losses import next_token_loss
from sinkbook.provenance import provenance
from sinkbook.toy.measurements import measure_toy, measure_writers
from sinkbook.toy.optimizers import MATRIX_OPTIMIZERS, OPTIMIZERS
from sinkbook.toy.runs import EVALUATION_SEED, TrainingConfig
from sinkbook.toy.tasks import task
from sinkbook.toy.training_loop import train_steps
from sinkbook.toy.transformer import Transformer

NUMBERS_AT_ONCE = 2**18  # in the residual states of a layer: its activations fit a CPU's cache
BATCHES_AHEAD = 64  # drawn on the CPU while a GPU trains
CAPTURED = ("adamw", "sgd")  # optimizers whose steps can be
STEPS_BEFORE_CAPTURE = 3  # that a GPU takes before its kernels are captured as one graph


@dataclass
class Unfinished:
    """One run on its way: its step, its named weights and optimizer state, its measurements."""

    config: TrainingConfig
    step: int
    weights: dict[str, Tensor]
    optimizer: dict[str, Tensor]  # by parameter and name; one of bytes for MATRIX_OPTIMIZERS
    measurements: list[xr.Dataset]
    along: store.Along  # weights at measured steps, where they are few enough to be kept
    seconds: float


def resume(config: TrainingConfig, device: torch.device) -> Unfinished | None:
    """Where a run goes on: its last checkpoint, or the start; None if it is finished.

    A finished one that was measured by other code is measured again, or, where its weights along
    the way were too many to be kept, trained again.
    """
    folder = config.folder
    try:
        if (run := store.load_run(folder)) is not None:
            if _is_measured_now(config, run, device):
                return None
            (folder / "run.json").unlink()
        tensors, step = store.load_checkpoint(folder)
    except store.DamagedError as damage:
        store.set_aside(folder, str(damage))
        tensors, step = {}, 0
    if not tensors:
        torch.manual_seed(config.seed)
        weights = Transformer(config.model).to(device).state_dict()
        return Unfinished(config, 0, weights, {}, [], {}, 0.0)
    parts: dict[str, dict[str, Tensor]] = {
        name: {} for name in ("weights", "optimizer", "along", "other")
    }
    for name, tensor in tensors.items():
        part, _, rest = name.partition("/")
        parts[part][rest] = tensor.to(device) if part in ("weights", "optimizer") else tensor
    other, along = parts["other"], store.by_step(parts["along"])
    measured = xr.load_dataset(io.BytesIO(other["measurements"].numpy().tobytes()))
    if bytes(other["measured by"].tolist()).decode() != config.measured_by:
        measured = _measured_again(config, along, measured, device)
    if measured is None:
        (folder / "checkpoint.safetensors").unlink()
        return resume(config, device)
    measurements = [measured.isel(step=[i]) for i in range(measured.sizes["step"])]
    seconds = other["seconds"].item()
    return Unfinished(
        config, step, parts["weights"], parts["optimizer"], measurements, along, seconds
    )


def _is_measured_now(
    config: TrainingConfig,
    run: tuple[dict[str, Tensor], xr.Dataset, dict],
    device: torch.device,
) -> bool:
    """Whether a finished run was measured by today's code, or could be and now is."""
    weights, before, facts = run
    if facts.get("measured by") == config.measured_by:
        return True
    along = store.load_along(config.folder, facts)
    measurements = _measured_again(config, along | {config.steps: weights}, before, device)
    if measurements is None:
        return False
    facts = facts | {"measured by": config.measured_by}
    store.save_run(config.folder, weights, measurements, facts, along)
    return True


def _measured_again(
    config: TrainingConfig, along: store.Along, before: xr.Dataset, device: torch.device
) -> xr.Dataset | None:
    """Measurements at the steps of those before, of weights by step; None if any are missing."""
    model, tokens = Transformer(config.model).to(device), config.evaluation_tokens.to(device)

    def measure(weights: dict[str, Tensor]) -> xr.Dataset:
        model.load_state_dict(weights)
        return _measured(model, config, tokens)

    found = store.measured_again(along, before.step.values.tolist(), measure)
    # Gradients and steps were measured by the training itself, whose code is the same.
    of_training = [name for name in before if "parameter" in before[name].dims]
    return None if found is None else found.assign({n: before[n] for n in of_training})


def _measured(
    model: Transformer, config: TrainingConfig, tokens: Int[Tensor, "text position"]
) -> xr.Dataset:
    of_task = task(config.task)
    measured = measure_toy(model, of_task, tokens)
    if config.details:
        measured = measured.merge(measure_writers(model, of_task, tokens))
    return measured


class Program:
    """Several runs at the same step, trained together: their weights are stacked if there are
    more than one, and one optimizer steps them all, which is the same as stepping each."""

    def __init__(self, runs: list[Unfinished], device: torch.device):
        self.runs, self.device, self.config = runs, device, runs[0].config
        self.stacked = len(runs) > 1
        self.task = task(self.config.task)
        self.tokens = self.config.evaluation_tokens.to(device)
        size, steps = self.config.batch_size, range(runs[0].step, self.config.steps)
        of_runs = [self.task.batches(size, run.config.seed, steps) for run in runs]
        self.batches = zip(*of_runs, strict=True)
        self.graph = self.texts = None
        self.steps_taken = 0
        first_weights = runs[0].weights.values()
        self.keeps_along = store.few_enough(first_weights, len(self.config.measured_steps))
        self.model = Transformer(self.config.model).to(device)
        self.weights = {
            name: self._join([run.weights[name] for run in runs]).requires_grad_()
            for name in runs[0].weights
        }
        if not self.stacked:
            self.model.load_state_dict(self.weights)
            self.weights = dict(self.model.named_parameters())
        self.optimizer = OPTIMIZERS[self.config.optimizer](self.weights.values(), self.config)
        if runs[0].optimizer:
            self._restore_optimizer()

    def run(self, checkpoint_seconds: float, until: float = math.inf) -> None:
        """Train from the runs' step to the end, measuring and checkpointing on the way."""
        before = self.runs[0].seconds
        start = saved = time.monotonic()

        def keep(step: int) -> bool:
            nonlocal saved
            now = time.monotonic()
            time_is_up = time.time() >= until
            if time_is_up or now - saved >= checkpoint_seconds:
                self._keep(step, before + now - start)
                saved = now
            return time_is_up

        with self._ahead(self.batches) as batches:
            finished = train_steps(
                self._step,
                batches,
                steps=self.config.steps,
                start=self.runs[0].step,
                measured=self.config.measured_steps,
                measure=self._measure,
                after_step=lambda step: step < self.config.steps and keep(step),
                label=f"training {len(self.runs)} runs" if self.stacked else "training",
            )
        if finished:
            self._finish(before + time.monotonic() - start)

    @contextmanager
    def _ahead(self, batches: Iterator) -> Iterator[Iterator]:
        """The same batches; for a GPU, a thread draws them while it trains."""
        if self.device.type == "cpu":
            yield batches
            return
        with ThreadPoolExecutor(1) as thread:
            waiting = deque(thread.submit(next, batches, None) for _ in range(BATCHES_AHEAD))

            def drawn() -> Iterator:
                while waiting:
                    batch = waiting.popleft().result()
                    waiting.append(thread.submit(next, batches, None))
                    yield batch

            yield drawn()
            thread.shutdown(cancel_futures=True)

    def _step(self, texts: tuple[Int[Tensor, "text position"], ...]) -> None:
        """One step of all runs, each on its own texts.

        On a GPU the kernels of a step are captured once and then replayed: at the size of the
        toys, launching them one by one would take longer than computing them.
        """
        if self.device.type == "cpu" or not self.config.optimizer.startswith(CAPTURED):
            self._compute(torch.stack(texts).to(self.device))
            return
        if self.texts is None:
            self.texts = torch.stack(texts).to(self.device)
        self.texts.copy_(torch.stack(texts))
        if self.graph is None and self.steps_taken < STEPS_BEFORE_CAPTURE:
            # On a stream of its own, as capturing asks for.
            stream = torch.cuda.Stream(self.device)
            stream.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(stream):
                self._compute(self.texts)
            torch.cuda.current_stream(self.device).wait_stream(stream)
        else:
            if self.graph is None:
                self.graph = torch.cuda.CUDAGraph()
                self.optimizer.zero_grad()
                with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
                    self._compute(self.texts)
            self.graph.replay()
        self.steps_taken += 1

    def _compute(self, texts: Int[Tensor, "run text position"]) -> None:
        """Gradients of the runs' losses, and a step of their optimizer."""
        self.optimizer.zero_grad()
        if self.stacked:
            # The fused CPU kernel has no batching rule: vmap would call it run by run.
            with sdpa_kernel(SDPBackend.MATH) if self.device.type == "cpu" else nullcontext():
                loss = torch.vmap(self._loss_of)(self.weights, texts).sum()
            loss.backward()
        else:
            add_gradients(self.model, texts[0], self.config.precision)
        self.optimizer.step()

    def _loss_of(self, weights: dict[str, Tensor], texts: Tensor) -> Tensor:
        with in_precision(self.config.precision, texts.device):
            logits = torch.func.functional_call(self.model, weights, (texts[:, :-1],))
        return next_token_loss(logits, texts)

    def _measure(self, step: int) -> Callable[[], None] | None:
        """Measure all runs; with details, what is to be called after the step that follows."""
        if any(step in measured.step for measured in self.runs[0].measurements[-1:]):
            return None
        for i, run in enumerate(self.runs):
            if self.stacked:
                self.model.load_state_dict(self._weights_of(i))
            measured = _measured(self.model, self.config, self.tokens)
            run.measurements.append(measured.expand_dims(step=[step]))
            if self.keeps_along and step < self.config.steps:
                weights = self._weights_of(i).items()
                run.along[step] = {name: w.to("cpu", copy=True) for name, w in weights}
            if self.config.details:
                self._measure_gradients(i)
        if not self.config.details:
            return None
        before = [weight.detach().clone() for weight in self.weights.values()]
        return partial(self._measure_the_step, before)

    def _measure_gradients(self, i: int) -> None:
        """Add the norm of every parameter's gradient on texts that are not trained on."""
        texts = self.task.batch_at(
            self.config.evaluation_size, EVALUATION_SEED, 0, device=self.device
        )
        kept = {name: w.grad for name, w in self.model.named_parameters()}
        for w in self.model.parameters():
            w.grad = None
        for part in texts.split(16):
            (next_token_loss(self.model(part[:, :-1]), part) * (len(part) / len(texts))).backward()
        norms = [_norm(w.grad) for w in self.model.parameters()]
        for name, w in self.model.named_parameters():
            w.grad = kept[name]
        self._add_norms(i, gradient_norm=norms, batch_gradient_norm=None, update_norm=None)

    def _measure_the_step(self, before: list[Tensor]) -> None:
        """Add the norms of every parameter's gradient on the batch, and of its change."""
        weights = list(self.weights.values())
        for i in range(len(self.runs)):
            pairs = zip(weights, before, strict=True)
            changes = [self._part(w.detach() - b, i).norm().item() for w, b in pairs]
            gradients = [_norm(None if w.grad is None else self._part(w.grad, i)) for w in weights]
            self._add_norms(i, batch_gradient_norm=gradients, update_norm=changes)

    def _add_norms(self, i: int, **norms: list[float] | None) -> None:
        nothing = [math.nan] * len(self.weights)
        added = {
            name: (("step", "parameter"), [nothing if values is None else values])
            for name, values in norms.items()
        }
        measured = self.runs[i].measurements[-1].assign(added)
        self.runs[i].measurements[-1] = measured.assign_coords(parameter=list(self.weights))

    def _keep(self, step: int, seconds: float) -> None:
        for i, run in enumerate(self.runs):
            netcdf = bytes(xr.concat(run.measurements, "step").to_netcdf(engine=store.ENGINE))
            tensors = {f"weights/{n}": t for n, t in self._weights_of(i).items()}
            tensors |= {f"optimizer/{n}": t for n, t in self._optimizer_of(i).items()}
            tensors |= {f"along/{n}": t for n, t in store.flat(run.along).items()}
            code = bytearray(run.config.measured_by.encode())
            tensors["other/measured by"] = torch.frombuffer(code, dtype=torch.uint8)
            tensors["other/measurements"] = torch.frombuffer(bytearray(netcdf), dtype=torch.uint8)
            tensors["other/seconds"] = torch.tensor(seconds)
            store.save_checkpoint(run.config.folder, tensors, step)

    def _finish(self, seconds: float) -> None:
        for i, run in enumerate(self.runs):
            facts = {
                "config": asdict(run.config),
                "measured by": run.config.measured_by,
                # Runs trained as one program share its time.
                "seconds": seconds / len(self.runs),
            } | provenance()
            measurements = xr.concat(run.measurements, "step")
            weights = self._weights_of(i)
            store.save_run(run.config.folder, weights, measurements, facts, run.along)

    def _join(self, tensors: list[Tensor]) -> Tensor:
        return torch.stack(tensors) if self.stacked else tensors[0].clone()

    def _part(self, tensor: Tensor, run: int) -> Tensor:
        return tensor.detach()[run] if self.stacked else tensor.detach()

    def _weights_of(self, run: int) -> dict[str, Tensor]:
        return {name: self._part(tensor, run) for name, tensor in self.weights.items()}

    def _restore_optimizer(self) -> None:
        kept = [run.optimizer for run in self.runs]
        if self.config.optimizer in MATRIX_OPTIMIZERS:
            whole = io.BytesIO(kept[0]["whole"].cpu().numpy().tobytes())
            self.optimizer.load_state_dict(
                torch.load(whole, map_location=self.device, weights_only=True)
            )
            return
        for name, key in [n.rsplit("/", 1) for n in kept[0]]:
            tensors = [of_run[f"{name}/{key}"] for of_run in kept]
            # The step count is one scalar for a whole tensor, stacked or not.
            joined = tensors[0].clone() if tensors[0].ndim == 0 else self._join(tensors)
            self.optimizer.state[self.weights[name]][key] = joined

    def _optimizer_of(self, run: int) -> dict[str, Tensor]:
        if self.config.optimizer in MATRIX_OPTIMIZERS:
            # Their state may be lists and numbers, and is that of one run.
            whole = io.BytesIO()
            torch.save(self.optimizer.state_dict(), whole)
            return {"whole": torch.frombuffer(bytearray(whole.getvalue()), dtype=torch.uint8)}
        return {
            f"{name}/{key}": value if value.ndim == 0 else self._part(value, run)
            for name, weight in self.weights.items()
            for key, value in self.optimizer.state[weight].items()
        }


def _norm(gradient: Tensor | None) -> float:
    """NaN for a weight that nothing reads, such as the norm before a part that is left out."""
    return math.nan if gradient is None else gradient.norm().item()


def in_precision(precision: str, device: torch.device) -> AbstractContextManager:
    """The context in which a model's matrix products are computed at a precision."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16")


def add_gradients(
    model: Transformer, texts: Int[Tensor, "text position"], precision: str = "float32"
) -> None:
    """Add the gradients of the mean loss on `texts` to those of the model's weights.

    CPUs take a few texts at a time: their activations stay in the cache, and in memory that the
    process has already.
    """
    of_a_text = (texts.shape[1] - 1) * model.config.width
    at_once = max(1, NUMBERS_AT_ONCE // of_a_text) if texts.device.type == "cpu" else len(texts)
    for part in texts.split(at_once):
        with in_precision(precision, texts.device):
            logits = model(part[:, :-1])
        (next_token_loss(logits, part) * (len(part) / len(texts))).backward()
