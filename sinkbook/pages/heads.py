"""Every head of a model in one picture that its reader turns: the attention maps of short texts.

    from sinkbook.pages import heads

    heads.Viewer(heads.read(language_model, {"two words": "Hello there"}))

The page carries the maps in eight bits, compressed, and `heads.js` draws them. It needs no kernel,
no file beside the page and no other machine. Where scripts do not run, a still picture is left.
"""

import zlib
from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sinkbook.errors import SinkbookError
from sinkbook.models.pretrained import LanguageModel
from sinkbook.models.token_labels import token_label
from sinkbook.pages.scripts import carried
from sinkbook.probe.attention_maps import attention_maps
from sinkbook.probe.measure import measure

LONGEST = 32  # tokens of a text: of more, a phone cannot show the labels
LEVELS = 255  # of a weight: what is shown is within half a 255th of what was measured
CELL, LABELS = 12, 64  # of the still picture, which is a phone's width of pixels or less
FAINTEST = 0.02  # weights below are left out of the still picture


@dataclass(frozen=True)
class Reading:
    """What every head of a model does on one short text. Made by `read`."""

    name: str
    ids: tuple[int, ...]
    tokens: tuple[str, ...]  # labels; one that begins a word begins with a blank
    attention: Float[np.ndarray, "layer head query key"]  # NaN where there is no such head
    values: Float[np.ndarray, "layer head key"]  # norms over the mean of the later keys'; or NaN

    @property
    def present(self) -> Bool[np.ndarray, "layer head"]:
        """Which heads there are."""
        return ~np.isnan(self.attention[:, :, 0, 0])


class Waking(NamedTuple):
    """A head that rests on the first token, and copies where a text repeats itself."""

    layer: int
    head: int
    resting: float  # mean attention on the first token, from tokens that are new
    copying: float  # from tokens whose continuation repeats: on what followed them the last time


def read(language_model: LanguageModel, texts: Mapping[str, str]) -> list[Reading]:
    """The attention maps and value norms of every head on each text, by the texts' names.

    A text is cut to its first 32 tokens. Raises `SinkbookError` for a text without any token of its
    own, for models none of whose layers attends, and for weights that are no shares.
    """
    found = []
    for (name, text), tokens in zip(
        texts.items(), language_model.tokenize(texts.values()), strict=True
    ):
        if not text.strip() or len(tokens) < 2:
            raise SinkbookError(
                f"there is nothing to look at in the text {name!r}: {text!r}. Give a few words."
            )
        found.append(_read(language_model, name, tokens[:LONGEST]))
    return found


def _read(language_model: LanguageModel, name: str, tokens: list[int]) -> Reading:
    model = language_model.model
    ids = torch.tensor([tokens], device=model.device)
    maps = attention_maps(model, ids)
    heads = max((found.weights.shape[1] for found in maps if found is not None), default=0)
    if not heads:
        raise SinkbookError(f"no layer of {language_model.name} attends, so there are no maps.")
    attention = np.full((len(maps), heads, len(tokens), len(tokens)), np.nan, dtype=np.float32)
    for layer, found in enumerate(maps):
        if found is not None:
            weights = found.weights[0].float().cpu().numpy()
            attention[layer, : len(weights)] = weights
    shares = attention[~np.isnan(attention)]
    if shares.min() < 0 or shares.max() > 1 + 1e-3:
        raise SinkbookError(
            f"the attention weights of {language_model.name} on {name!r} reach from "
            f"{shares.min():.3g} to {shares.max():.3g}, and only shares from 0 to 1 can be shown."
        )
    values = _values(language_model, ids, attention.shape[:2])
    labels = tuple(_labels(language_model, tokens))
    return Reading(name, tuple(tokens), labels, attention, values)


def _values(
    language_model: LanguageModel, ids: Int[Tensor, "1 key"], shape: tuple[int, int]
) -> Float[np.ndarray, "layer head key"]:
    """Value norms over the mean of those after the first token's; NaN where a model has none."""
    every = {"layer": range(shape[0]), "head": range(shape[1])}
    try:
        norms = measure(language_model.model, ids, ("value_norm",)).value_norm
    except SinkbookError:  # it has maps all the same
        return np.full((*shape, ids.shape[1]), np.nan, dtype=np.float32)
    norms = norms.isel(batch=0).transpose("layer", "head", "position").reindex(every)
    return (norms / norms.isel(position=slice(1, None)).mean("position")).values


def _labels(language_model: LanguageModel, ids: Sequence[int]) -> list[str]:
    """The tokens as text; the one that the model puts before every text is `<s>`."""
    labels = []
    for token in ids:
        word = language_model.tokenizer.decode([token])
        shown = token_label(word.strip(" ") or " ", longest=10)
        begins = word.startswith(" ") and word.strip(" ")
        labels.append("<s>" if (token,) == language_model.prefix else " " * bool(begins) + shown)
    return labels


def waking(reading: Reading) -> Waking:
    """The head that does most of both: resting where a text is new, copying where it repeats.

    Copying is judged where it is right: at tokens that were there before, and are followed by the
    same one as the last time. Raises `SinkbookError` for a text without such tokens.
    """
    last, new, again = {}, [], []  # where each token stood last
    for query, (token, following) in enumerate(pairwise(reading.ids[1:]), start=1):
        if token not in last:
            new.append(query)
        elif reading.ids[last[token] + 1] == following:
            again.append((query, last[token] + 1))
        last[token] = query
    if not again:
        raise SinkbookError(f"nothing in the text {reading.name!r} is said a second time.")
    resting = reading.attention[:, :, new, 0].mean(-1)
    queries, copied = zip(*again, strict=True)
    copying = reading.attention[:, :, queries, copied].mean(-1)
    layer, head = np.unravel_index(np.nanargmax(np.minimum(resting, copying)), resting.shape)
    at = (int(layer), int(head))
    return Waking(*at, float(resting[at]), float(copying[at]))


def strongest(reading: Reading) -> tuple[int, int]:
    """The layer and the head that give the first token most of their attention."""
    resting = reading.attention[:, :, 1:, 0].mean(-1)
    layer, head = np.unravel_index(np.nanargmax(resting), resting.shape)
    return int(layer), int(head)


# --- The page --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Viewer:
    """What a cell shows: every head on every text, opened at one of them.

    `opens_at` is the name of a text, a layer and a head. The readings are of one model. Raises
    `SinkbookError` if there is no such text or head.
    """

    readings: Sequence[Reading]
    opens_at: tuple[str, int, int]

    def __post_init__(self):
        name, layer, head = self.opens_at
        names = [reading.name for reading in self.readings]
        if name not in names:
            raise SinkbookError(f"no text is called {name!r}. There are {', '.join(names)}.")
        present = self.opened.present
        layers, heads = present.shape
        if not (0 <= layer < layers and 0 <= head < heads and present[layer, head]):
            raise SinkbookError(f"there is no head {head} in layer {layer} to open at.")

    @property
    def opened(self) -> Reading:
        """The text that is open at first."""
        return next(reading for reading in self.readings if reading.name == self.opens_at[0])

    def _repr_html_(self) -> str:
        name, layer, head = self.opens_at
        heads = np.argwhere(self.opened.present).tolist()
        data = {
            "heads": heads,
            "opens": [name, heads.index([layer, head])],
            "texts": [_packed(reading) for reading in self.readings],
        }
        folder = Path(__file__).parent
        style, script = ((folder / f"heads.{kind}").read_text("utf-8") for kind in ("css", "js"))
        return (
            '<div class="sinkbook-heads mathjax_ignore tex2jax_ignore">\n'
            f"<style>\n{style}</style>\n{_still(self.opened, layer, head)}\n"
            f'<script type="application/json">{carried(data)}</script>\n'
            f"<script>\n{script}</script>\n"
            "</div>"
        )

    def __repr__(self) -> str:
        name, layer, head = self.opens_at
        names = ", ".join(reading.name for reading in self.readings)
        return f"every head on {names}; opened at layer {layer}, head {head} on {name}"


def _packed(reading: Reading) -> dict:
    """A text's maps, then its value norms, head by head; a byte each, compressed.

    Of a map the lower triangle, row by row, in 255ths. A head's value norms are in 255ths of its
    largest, which `scales` has; empty where a model has no value norms.
    """
    rows, columns = np.tril_indices(len(reading.tokens))
    present = reading.present
    weights = reading.attention[present][:, rows, columns].clip(0, 1)
    content = np.round(LEVELS * weights).astype(np.uint8).tobytes()
    values = reading.values[present]
    scales = []
    if np.isfinite(values).all():
        largest = values.max(-1, keepdims=True)
        scales = [float(f"{scale:.4g}") for scale in largest.ravel()]
        shares = np.divide(values, largest, out=np.zeros_like(values), where=largest > 0)
        content += np.round(LEVELS * shares).astype(np.uint8).tobytes()
    packed = b64encode(zlib.compress(content, 9)).decode()
    return {"name": reading.name, "tokens": reading.tokens, "scales": scales, "packed": packed}


def _still(reading: Reading, layer: int, head: int) -> str:
    """One map as a picture, for where scripts do not run."""
    weights = reading.attention[layer, head]
    side = CELL * len(reading.tokens)
    names = [escape(token.strip()) for token in reading.tokens]
    cells = "".join(
        f'<rect x="{LABELS + CELL * key}" y="{CELL * query}" width="{CELL - 1}" '
        f'height="{CELL - 1}" fill-opacity="{weights[query, key]:.2f}"/>'
        for query, key in np.argwhere(weights >= FAINTEST)
    )
    middles = [CELL * number + CELL / 2 + 3.5 for number in range(len(names))]
    labels = "".join(
        f'<text x="{LABELS - 4}" y="{middle}" text-anchor="end">{name}</text>'
        f'<text text-anchor="end" transform="translate({LABELS + middle} {side + 4}) rotate(-90)">'
        f"{name}</text>"
        for name, middle in zip(names, middles, strict=True)
    )
    says = f"Attention map of layer {layer}, head {head}: rows are queries, columns are keys."
    width, height = LABELS + side, side + LABELS
    return (
        f'<div class="still"><svg viewBox="0 0 {width} {height}" style="max-width: {width}px" '
        f'role="img" aria-label="{says}">{cells}{labels}</svg><p>{says}</p></div>'
    )
