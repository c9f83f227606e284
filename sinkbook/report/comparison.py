"""Two models on the same texts, or one and itself in eight bits: what differs, and by how much.

Both read the same tokens, so differences are taken text by text, and what the texts have in common
drops out. They are B minus A.
"""

import shlex
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import xarray as xr
from jaxtyping import Float
from rich.console import Group
from rich.table import Table
from rich.text import Text

from sinkbook.annotations import check_arguments
from sinkbook.arguments import check_known
from sinkbook.errors import SinkbookError
from sinkbook.mitigations.quantization import RANGES, quantized
from sinkbook.models.losses import token_losses
from sinkbook.models.pretrained import LanguageModel, load
from sinkbook.models.token_windows import Windows
from sinkbook.probe.metrics import THRESHOLD, residual_peak_ratio, value_drain_ratio
from sinkbook.report.headroom import magnitude
from sinkbook.report.report import Reading, describe_texts, measure_windows, plain

QUANTITIES = {  # one number for each text: what it is called, and what it is
    "loss": ("loss, nats", "of the next token, mean over the text"),
    "sink_rate": ("sink rate", f"share of heads whose sink attention exceeds {THRESHOLD}"),
    "sink_attention": ("sink attention", "attention on the first token, mean over heads"),
    "value_drain_ratio": (
        "value ratio",
        "the first token's value norm over the mean of the others', median over heads",
    ),
    "residual_peak_ratio": (
        "residual ratio",
        "its residual norm over the others' median, where that is largest",
    ),
    "largest_magnitude": ("largest entry", "of any token's residual states"),
}
CHANGES = {  # one number for each head: what it is, and how an axis calls it
    "attention": ("change of its attention on the first token", "B - A"),
    "write": ("relative change of what it writes to the residual stream", "(B - A) / A"),
}
RESAMPLES, SEED = 9999, 0
NOTE = (
    "Means over texts; B - A is paired by text, with its 95 % bootstrap interval over the texts "
    "(percentiles). It speaks of more texts of this kind, and with few texts it is too narrow."
)


@dataclass(frozen=True)
class Comparison:
    """The measurements of A and B on the same texts, `report.probe`'s and the loss of each text."""

    a: xr.Dataset
    b: xr.Dataset


@check_arguments
def compare(
    a: str,
    b: str | None = None,
    *,
    int8_b: str | None = None,
    text: Path | None = None,
    domain: str = "prose-en",
    texts: int = 8,
    length: int = 256,
    revision_a: str | None = None,
    revision_b: str | None = None,
    trust_remote_code: bool = False,
) -> Comparison:
    """Measure two models on the same windows of tokens, one model in memory at a time.

    Without `b`, A is compared with itself: at another revision, or in eight bits. `int8_b` names
    the ranges of activations in `quantization.RANGES`; it can be simulated in a B of its own, too.
    Raises SinkbookError for texts and models that cannot be used, and for models whose tokenizers
    or first tokens differ, since they would not read the same.
    """
    if b is None and int8_b is None and revision_b is None:
        raise SinkbookError(f"{a!r} has nothing to be compared with. Give B, or `int8_b=tensor`.")
    if int8_b is not None:
        check_known("ranges", int8_b, RANGES)
    reading = Reading.of(text, domain, texts=texts, length=length)
    command = ["sinkbook", "compare", a, *([b] if b else []), *reading.option]
    chosen = {"--int8-b": int8_b, "--revision-a": revision_a, "--revision-b": revision_b}
    command += [word for option, value in chosen.items() if value for word in (option, value)]
    command += ["--trust-remote-code"] if trust_remote_code else []
    circumstances = {"texts": reading.about, "command": shlex.join(command)}

    model = load(a, revision=revision_a, trust_remote_code=trust_remote_code)
    tokens = reading.windows(model)
    of_a = measure_one(model, tokens, revision=revision_a, **circumstances)
    if b is None and revision_b is None:
        revision_b = revision_a
    if (b or a, revision_b) != (a, revision_a):
        del model  # one at a time
        model = load(b or a, revision=revision_b, trust_remote_code=trust_remote_code)
        _check_same(tokens, reading.windows(model), of_a, model)
    of_b = measure_one(model, tokens, int8=int8_b, revision=revision_b, **circumstances)
    if not np.array_equal(of_a.token, of_b.token):
        raise _different(of_a.attrs["model"], of_b.attrs["model"], "spell them differently")
    return Comparison(of_a, of_b)


@check_arguments
def measure_one(
    language_model: LanguageModel,
    tokens: Windows,
    *,
    int8: str | None = None,
    revision: str | None = None,
    **attrs: str,
) -> xr.Dataset:
    """What `measure_windows` gives and the loss of each text, in eight bits if `int8` says how."""
    model = language_model.model
    with quantized(model, int8) if int8 else nullcontext():
        result = measure_windows(language_model, tokens)
        result["loss"] = "batch", token_losses(model, tokens).mean(1)
    result.attrs |= {"weights": language_model.card, **attrs}
    result.attrs["model"] += f" at {revision}" if revision else ""
    if int8:
        words = f"int8 weights and activations, simulated: {RANGES[int8]}"
        result.attrs["model"] += f" in int8 ({int8})"
        result.attrs["weights"] += f" In {words}."
    return result


def _check_same(tokens: Windows, others: Windows, of_a: xr.Dataset, b: LanguageModel) -> None:
    if tokens.shape == others.shape and torch.equal(tokens, others):
        return
    how = "cut them into different tokens"
    count = min(len(tokens), len(others))
    parted = np.argwhere((tokens[:count] != others[:count]).numpy())
    if len(parted):
        text, position = parted[0]
        token = str(of_a.token.values[text, position])
        how += f", from token {position} of text {text} on, which is {token!r} in A"
    raise _different(of_a.attrs["model"], b.name, how)


def _different(a: str, b: str, how: str) -> SinkbookError:
    return SinkbookError(
        f"{a!r} and {b!r} do not read the same texts: they {how}. Compare models that share a "
        "tokenizer and a first token; of others, look at two reports of `sinkbook probe`."
    )


# --- What differs ----------------------------------------------------------------------------


@check_arguments
def difference_table(comparison: Comparison) -> pd.DataFrame:
    """One row per quantity: means of A and B over texts, B - A, and its interval.

    Columns: `quantity`, `title`, `a`, `b`, `difference`, `low`, `high`. NaN where a quantity is not
    known of one of them in some text; the interval also where there is one text only.
    """
    a, b = comparison.a, comparison.b
    ratios = [value_drain_ratio(result) for result in (a, b)]
    if ratios[0].sizes == ratios[1].sizes and all(ratio.notnull().any() for ratio in ratios):
        known = ratios[0].notnull().values & ratios[1].notnull().values
        ratios = [ratio.where(known) for ratio in ratios]  # the same heads of both
    numbers = [_by_text(result, ratio) for result, ratio in zip((a, b), ratios, strict=True)]
    rows = []
    for name, (title, _) in QUANTITIES.items():
        of_a, of_b = (found[name].astype(float) for found in numbers)
        low, high = bootstrap_interval(of_b - of_a)
        means = (of_a.mean(), of_b.mean(), (of_b - of_a).mean())
        rows.append((name, title, *means, low, high))
    return pd.DataFrame(rows, columns=["quantity", "title", "a", "b", "difference", "low", "high"])


def _by_text(result: xr.Dataset, ratio: xr.DataArray) -> dict[str, Float[np.ndarray, " text"]]:
    """The `QUANTITIES` of every text, given the ratio of each head's value norms."""
    attention = result.sink_attention
    found = {
        "loss": result.loss,
        "sink_rate": (attention > THRESHOLD).where(attention.notnull()).mean(("layer", "head")),
        "sink_attention": attention.mean(("layer", "head")),
        "value_drain_ratio": ratio.median(("layer", "head")),
        "residual_peak_ratio": residual_peak_ratio(result).max("residual_layer"),
        "largest_magnitude": result.residual_max_abs.max(("residual_layer", "position")),
    }
    return {name: values.values for name, values in found.items()}


@check_arguments
def bootstrap_interval(
    differences: Float[np.ndarray, " text"] | Sequence[float],
) -> tuple[float, float]:
    """The 95 % interval of a mean, by the percentiles of means of texts drawn with replacement.

    Always the same draws. NaN where a difference is not known, and for fewer than two.

    >>> bootstrap_interval(np.zeros(8)), bootstrap_interval(np.ones(1))
    ((0.0, 0.0), (nan, nan))
    """
    values = np.asarray(differences, dtype=np.float64)
    if len(values) < 2 or not np.isfinite(values).all():
        return float("nan"), float("nan")
    drawn = np.random.default_rng(SEED).integers(len(values), size=(RESAMPLES, len(values)))
    low, high = np.quantile(values[drawn].mean(1), (0.025, 0.975))
    return float(low), float(high)


@check_arguments
def head_changes(comparison: Comparison) -> xr.Dataset | None:
    """What of `CHANGES` each head has, mean over texts: (layer, head). NaN where A writes nothing.

    None for models with other numbers of layers or heads, whose heads do not belong together.
    """
    a, b = comparison.a, comparison.b
    if a.sink_attention.sizes != b.sink_attention.sizes:
        return None
    written_a, written_b = (
        result.head_output_norm.astype(float).mean("batch") for result in (a, b)
    )
    attention = (b.sink_attention.astype(float) - a.sink_attention.astype(float)).mean("batch")
    written = (written_b - written_a) / written_a.where(written_a > 0)
    return xr.Dataset({"attention": attention, "write": written})


def most_changed(changes: xr.Dataset, name: str) -> tuple[int, int, float] | None:
    """Layer, head and change of the head that changes most; None where none is known to."""
    size = np.abs(changes[name].transpose("layer", "head").values)
    if np.isnan(size).all() or np.nanmax(size) == 0:
        return None
    layer, head = (int(i) for i in np.unravel_index(np.nanargmax(size), size.shape))
    return layer, head, float(changes[name].sel(layer=layer, head=head))


# --- In words --------------------------------------------------------------------------------


COLUMNS = ("", "A", "B", "B - A", "95 % interval")


def rows(comparison: Comparison) -> list[tuple[str, str, str, str, str]]:
    """The table of differences that `COLUMNS` heads, in words and numbers."""
    return [
        (
            row.title,
            magnitude(row.a),
            magnitude(row.b),
            signed(row.difference),
            "–" if np.isnan(row.low) else f"{signed(row.low)} to {signed(row.high)}",
        )
        for row in difference_table(comparison).itertuples()
    ]


def signed(value: float) -> str:
    """Three digits with a sign; – for what is not known.

    >>> signed(0.5), signed(-1234.0), signed(0.0), signed(float("nan"))
    ('+0.5', '-1,234', '0', '–')
    """
    return f"+{magnitude(value)}" if value > 0 else magnitude(value)


def about_heads(comparison: Comparison) -> str:
    """Which heads differ most, in a sentence."""
    changes = head_changes(comparison)
    if changes is None:
        sizes = (
            f"{result.sizes['layer']} layers of {result.sizes['head']} heads"
            for result in (comparison.a, comparison.b)
        )
        return f"A has {' and B '.join(sizes)}: their heads cannot be compared one by one."
    parts = []
    for name, words in {
        "attention": "attention on the first token {:+.2f}",
        "write": "write to the residual stream {:+.0%}",
    }.items():
        if (most := most_changed(changes, name)) is not None:
            layer, head, change = most
            parts.append(f"layer {layer}, head {head} ({words.format(change)})")
    return f"Most changed: {'; '.join(parts)}." if parts else "No head differs."


def titles(comparison: Comparison) -> tuple[str, str]:
    """What A and B are, a line each."""
    return f"A: {comparison.a.attrs['model']}", f"B: {comparison.b.attrs['model']}"


def terminal(comparison: Comparison) -> Group:
    """The comparison as a table and a sentence, to print with rich."""
    table = Table(
        title=plain("\n".join((*titles(comparison), describe_texts(comparison.a)))),
        title_justify="left",
        caption=NOTE,
        caption_justify="left",
    )
    for number, title in enumerate(COLUMNS):
        table.add_column(title, justify="right" if number else "left")
    for row in rows(comparison):
        table.add_row(*row)
    return Group(table, "", Text(about_heads(comparison)))
