"""The lab: one-layer toys that the reader trains and asks in the browser, without a kernel.

A chapter trains a run and ends a cell with one of three:

- `typed(runs)`: type a text; a trained model answers, and parts of it can be switched off;
- `training(run)`: the same training from its beginning, on the reader's own device;
- `recorded(run)`: slide through the steps that the run has kept.

Each is a still picture with words. On a page of the book the scripts of `_static/lab` put something
alive in its place; everywhere else the picture stays.
"""

from base64 import b64encode
from collections.abc import Mapping
from dataclasses import dataclass
from html import escape

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sinkbook import store
from sinkbook.errors import SinkbookError
from sinkbook.pages.scripts import carried
from sinkbook.pages.still import Reading
from sinkbook.probe.attention_maps import attention_weights
from sinkbook.probe.measure import measure
from sinkbook.toy.runs import Run, TrainingConfig
from sinkbook.toy.tasks import TaskConfig
from sinkbook.toy.transformer import Transformer, TransformerConfig

# A seed of the page's own random numbers whose sink comes late; tests/pages measures it.
SLOW_SEED = 8
TOKENS_SHOWN = 18  # of an example text: its map can be read on a phone


@dataclass(frozen=True)
class Lab:
    """A place on a page that comes alive there: `kind`, what its script reads, and a picture."""

    kind: str  # a name in LABS of _static/lab/page.js
    about: dict
    reading: Reading  # of the picture
    says: str  # what the picture shows

    def _repr_html_(self) -> str:
        return (
            f'<div class="sinkbook-lab" data-lab="{self.kind}">'
            f'<div class="lab-still">{self.reading.drawn(self.says)}'
            f'<p class="lab-says">{escape(self.says)}</p></div>'
            f'<script type="application/json">{carried(self.about)}</script></div>'
        )

    def __repr__(self) -> str:
        return self.says


def typed(runs: Mapping[str, Run], text: str) -> Lab:
    """Type a text, and see what one of the models makes of it; it begins with `text`.

    The models go by name, and their weights are in the page. They differ in their kernels alone.
    Raises `SinkbookError` for a toy that the page's own model does not have.
    """
    first, *others = runs.values()
    for run in runs.values():
        _check(run.config)
    sizes = _sizes(first.config)
    if any(_sizes(run.config) != sizes for run in others):
        raise SinkbookError("the models of one lab differ in size; give them the same.")
    models = {
        name: {"attention": run.config.model.attention, "weights": packed(run.model)}
        for name, run in runs.items()
    }
    about = {"config": sizes, "models": models, "text": text}
    reading = read(first, first.task.encode(text))
    return Lab("typed", about, reading, _in_words(reading))


def training(run: Run, *, compact: bool = False, starts: bool = False) -> Lab:
    """The training of a run, to be begun again in the page: its settings are the first choices.

    A `compact` one has few choices; one that `starts` does so by itself when the reader sees it.
    The picture shows where the run itself has ended. Raises `SinkbookError` as `typed` does.
    """
    config = run.config
    _check(config)
    tokens = run.evaluation_tokens[:1, :TOKENS_SHOWN]
    settings = {
        **_sizes(config),
        "batch": config.batch_size,
        "steps": config.steps,
        "rate": config.learning_rate,
        "optimizer": config.optimizer,
        "attention": config.model.attention,
        "starts": config.task.starts,
        "seed": 1,
        "example": "".join(run.task.symbols[t] for t in tokens[0, config.task.starts :]),
    }
    about = {"settings": settings, "slow": SLOW_SEED, "compact": compact, "starts": starts}
    reading = read(run, tokens)
    return Lab("training", about, reading, _in_words(reading))


def recorded(run: Run) -> Lab:
    """The recorded steps of a run with one layer and one head: its map and its curves together.

    Raises `SinkbookError` if the run has not kept its weights along the way.
    """
    along = store.load_along(run.config.folder, run.facts)
    measured = run.measurements.isel(layer=0, head=0)
    steps = measured.step.values.tolist()
    if not set(steps[:-1]) <= set(along):
        raise SinkbookError(
            "this run has not kept its weights along the way: they were too many. "
            "Give a smaller model."
        )
    tokens = run.evaluation_tokens[:1, :TOKENS_SHOWN]
    readings = [_read(_with(run, along[step]), run, tokens) for step in steps[:-1]]
    readings.append(read(run, tokens))
    below = np.tril_indices(tokens.shape[1])
    maps = np.stack([reading.weights[below] for reading in readings])
    others = [t for t in range(run.task.config.characters) if t not in run.task.triggers]
    curves = {
        "sink": measured.sink_attention,
        "drain": measured.value_norm / measured.other_value_norm,
        "sinkLogit": measured.sink_logit_by_token.isel(token=others).mean("token"),
        "backcopy": measured.backcopy_excess,
        "bigram": measured.bigram_excess,
    }
    about = {
        "steps": steps,
        "labels": readings[-1].labels,
        "triggers": readings[-1].triggers,
        "maps": b64encode((255 * maps).round().astype(np.uint8).tobytes()).decode(),
        "values": [np.round(reading.values, 4).tolist() for reading in readings],
        "curves": {name: np.round(curve.values, 4).tolist() for name, curve in curves.items()},
    }
    return Lab("recorded", about, readings[-1], _in_words(readings[-1]))


def packed(model: Transformer) -> str:
    """All weights one after the other, 32-bit floats with their little end first, in base64."""
    flat = torch.cat([weight.detach().flatten() for weight in model.parameters()])
    return b64encode(flat.numpy().astype("<f4").tobytes()).decode()


def read(run: Run, tokens: Int[Tensor, "1 position"], *, layer: int = 0) -> Reading:
    """How the head of a layer of a run's model reads a text."""
    return _read(run.model, run, tokens, layer)


def _read(
    model: Transformer, run: Run, tokens: Int[Tensor, "1 position"], layer: int = 0
) -> Reading:
    values = measure(model, tokens, ("value_norm",)).value_norm.sel(layer=layer).values[0, 0]
    weights = attention_weights(model, tokens, layer=layer)[0, 0].numpy()
    triggers = run.task.at_triggers(tokens[0]).tolist()
    return Reading(weights, values, run.task.labels(tokens[0]), triggers)


def _with(run: Run, weights: dict[str, Float[Tensor, "..."]]) -> Transformer:
    model = Transformer(run.config.model)
    model.load_state_dict(weights)
    return model.eval().requires_grad_(False)


def _in_words(reading: Reading) -> str:
    return f"After training, {reading.in_words(reading.labels[0])}"


def _sizes(config: TrainingConfig) -> dict[str, int]:
    return {"width": config.model.width, "length": config.model.length}


def _check(config: TrainingConfig) -> None:
    """Raise `SinkbookError` unless the page's own model, `_static/lab/model.js`, is that model."""
    model, task = config.model, config.task
    asked = TransformerConfig(
        vocab_size=model.vocab_size,
        length=model.length,
        width=model.width,
        attention=model.attention,
    )
    if (
        model != asked
        or task != TaskConfig(length=task.length, starts=task.starts)
        or task.starts > 1
        or model.attention not in ("softmax", "relu")
        or config.optimizer not in ("adamw", "sgd")
        or config.weight_decay != TrainingConfig.weight_decay
        or config.precision != "float32"
        or model.width % 4
    ):
        raise SinkbookError(
            "a page can train one layer with one head, softmax or ReLU, on Bigram-Backcopy, by "
            f"AdamW or SGD, at a width that 4 divides; this is {config}."
        )
