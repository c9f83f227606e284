"""Pictures to leaf through: every head of a model on one text, or on text of every domain.

All pictures are drawn beforehand, and the browser itself joins them to their sliders. So they turn
on a page without a kernel as they do in Jupyter. Where there is a kernel, another text can be
typed, and all pictures are drawn anew; the book's pages, which have none, hide that line
(`_static/sinkbook.css`).
"""

import io
from base64 import b64encode
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from html import escape
from math import prod

import ipywidgets as widgets
import numpy as np
import torch
import xarray as xr
from jaxtyping import Int
from matplotlib.artist import Artist
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

from sinkbook.errors import SinkbookError
from sinkbook.figures import basic
from sinkbook.figures.style import DRAIN, OTHER, SINK
from sinkbook.llm.dormant_heads import gaps
from sinkbook.models.pretrained import LanguageModel
from sinkbook.models.token_labels import token_label
from sinkbook.probe.attention_maps import attention_weights
from sinkbook.probe.measure import measure
from sinkbook.probe.metrics import value_drain_ratio

NEEDS_KERNEL = "sinkbook-needs-kernel"  # the class of what the book's pages hide
ON_A_MAP, ON_A_TRACE = 24, 512  # tokens: more cannot be read, or take long
INCHES = 4.4  # the width of a picture, which fills a phone's page
PIXELS_PER_INCH = 144
SMOOTHED = 9  # tokens that a trace is averaged over
COLOURS = 64  # of a picture: with few, it is light enough to come by the dozen


class Explorer(widgets.VBox):
    """Sliders, the pictures that they choose from, and a line to type another text in.

    `choices` names the sliders and what each of them chooses from, in words. `draw` is given a
    text and makes the pictures, as HTML, for every combination of choices; the last slider's run
    fastest. What it raises for a typed text is shown in words, and the old pictures stay.
    """

    def __init__(
        self,
        about: str,
        choices: Mapping[str, Sequence[str]],
        draw: Callable[[str], Iterable[str]],
        text: str,
    ):
        wide = widgets.Layout(width="100%", max_width="30rem")
        names = {"description_width": "4.5rem"}
        self.sliders = [
            widgets.SelectionSlider(
                options=[(word, number) for number, word in enumerate(words)],
                description=name,
                layout=wide,
                style=names,
            )
            for name, words in choices.items()
        ]
        shared = widgets.HTML()  # one layout and one style for all: they weigh more than a picture
        self.pictures = [
            widgets.HTML(layout=shared.layout, style=shared.style)
            for _ in range(prod(map(len, choices.values())))
        ]
        self.text = widgets.Text(
            text,
            description="text",
            placeholder="type a text and press Enter",
            continuous_update=False,
            layout=wide,
            style=names,
        )
        self.message = widgets.HTML()
        for widget in (self.text, self.message):
            widget.add_class(NEEDS_KERNEL)
        self._draw = draw
        self._show(text)
        self.text.observe(self._typed, "value")
        label = widgets.HTML(f"<p style='line-height: 1.4; margin: 0'>{escape(about)}</p>")
        stack = _stacked(self.pictures, self.sliders)
        super().__init__([label, *self.sliders, self.text, self.message, stack])

    def _show(self, text: str) -> None:
        drawn = list(self._draw(text))  # all of them before the first one is replaced
        for picture, html in zip(self.pictures, drawn, strict=True):
            picture.value = html

    def _typed(self, change: Mapping) -> None:
        self._say("Drawing all pictures with your text ...")
        try:
            self._show(change["new"])
        except Exception as error:  # whatever a model makes of a text, the explorer goes on
            self._say(f"Not drawn: {error or type(error).__name__}")
        else:
            self._say("")

    def _say(self, words: str) -> None:
        self.message.value = f"<p role='status' style='margin: 0'>{escape(words)}</p>"


def _stacked(
    pictures: Sequence[widgets.HTML], sliders: Sequence[widgets.SelectionSlider]
) -> widgets.Stack:
    """A stack that shows what the first slider chooses: a picture, or a stack for the others."""
    slider, *others = sliders
    children = pictures
    if others:
        size = len(pictures) // len(slider.options)
        parts = [pictures[start : start + size] for start in range(0, len(pictures), size)]
        children = [_stacked(part, others) for part in parts]
    stack = widgets.Stack(children, selected_index=slider.index)
    widgets.jslink((slider, "index"), (stack, "selected_index"))
    return stack


class _Canvas:
    """A figure whose frame is drawn once, and what changes in it once for every picture."""

    def __init__(self, figure: Figure, changing: Sequence[Artist]):
        self.changing = changing
        self.canvas = FigureCanvasAgg(figure)
        figure.set_dpi(PIXELS_PER_INCH)
        for artist in changing:
            artist.set_animated(True)
        self.canvas.draw()
        self.frame = self.canvas.copy_from_bbox(figure.bbox)

    def picture(self, shows: str, caption: str) -> str:
        """The figure as it is now, as HTML: `shows` is for those who do not see it."""
        self.canvas.restore_region(self.frame)
        for artist in self.changing:
            artist.axes.draw_artist(artist)
        image = Image.fromarray(np.asarray(self.canvas.buffer_rgba())).convert("RGB")
        file = io.BytesIO()
        few = image.quantize(COLOURS, Image.Quantize.MAXCOVERAGE)  # keeps a small bar's own colour
        few.convert("RGB").save(file, "webp", lossless=True)
        source = b64encode(file.getvalue()).decode()
        return (
            f"<div style='max-width: 30rem'><img alt='{escape(shows)}' style='width: 100%' "
            f"src='data:image/webp;base64,{source}'>"
            f"<p style='line-height: 1.4; margin: 0'>{escape(caption)}</p></div>"
        )


# --- Every head on one text ------------------------------------------------------------------


def heads(
    language_model: LanguageModel, text: str, *, layers: int = 6, heads_of_each: int = 9
) -> Explorer:
    """Leaf through a model's heads on a short text: attention map, sink attention, value norms.

    The layers and the heads of each are spread evenly through the model, at most as many as are
    asked for, since a page carries every picture. Raises `SinkbookError` for a text that is empty
    or has more than 24 tokens, and for models without value norms of their own.
    """
    ids, _ = _read(language_model, {"text": text}, ON_A_MAP)
    present = measure(language_model.model, ids).sink_attention.isel(batch=0).notnull()
    attending = present.layer.values[present.any("head")].tolist()
    shown_layers = _spread(attending, layers)
    shown_heads = _spread(present["head"].values.tolist(), heads_of_each)

    def draw(text: str) -> Iterator[str]:
        ids, _ = _read(language_model, {"text": text}, ON_A_MAP)
        result = measure(language_model.model, ids)
        attention, drain = (
            values.isel(batch=0) for values in (result.sink_attention, value_drain_ratio(result))
        )
        norm = result.value_norm.isel(batch=0)
        norm = norm / norm.isel(position=slice(1, None)).mean("position")
        highest = norm.sel(layer=shown_layers, head=shown_heads).max().item()
        canvas, image, bars = _map_and_bars(_labels(language_model, ids[0]), highest)
        hidden = np.triu(np.ones((ids.shape[1],) * 2, dtype=bool), k=1)
        for layer in shown_layers:
            weights = attention_weights(language_model.model, ids, layer=layer)[0]
            for head in shown_heads:
                here = {"layer": layer, "head": head}
                image.set_data(np.ma.masked_array(weights[head].float().cpu().numpy(), hidden))
                for bar, height in zip(bars, norm.sel(here).values, strict=True):
                    bar.set_height(height)
                yield canvas.picture(
                    f"Attention map and value norms of head {head} in layer {layer}.",
                    f"Layer {layer}, head {head}: later tokens give the first one "
                    f"{attention.sel(here).item():.2f} of their attention. Its value norm is "
                    f"{drain.sel(here).item():.2f} times the mean of the others'.",
                )

    about = (
        f"{len(shown_layers)} of {len(attending)} layers and {len(shown_heads)} of "
        f"{present.sizes['head']} heads in each, spread evenly. Drag a slider, or choose it and "
        f"press the arrow keys. In a running notebook, type a text of up to {ON_A_MAP} tokens."
    )
    choices = {"layer": list(map(str, shown_layers)), "head": list(map(str, shown_heads))}
    return Explorer(about, choices, draw, text)


def _map_and_bars(labels: list[str], highest: float) -> tuple[_Canvas, Artist, Sequence[Artist]]:
    """An attention map above the value norms of its keys, both empty."""
    figure = Figure(figsize=(INCHES, 1.3 * INCHES))
    upper, lower = figure.subplots(2, 1, height_ratios=(4, 1), sharex=True)
    basic.attention_map(np.zeros((len(labels),) * 2), labels, upper, colorbar=False)
    upper.set(xlabel="", aspect="auto")
    upper.tick_params(labelbottom=False)
    positions = np.arange(len(labels))
    colours = [DRAIN, *[OTHER] * (len(labels) - 1)]
    bars = lower.bar(positions, np.zeros(len(labels)), color=colours, width=0.7)
    lower.axhline(1, color="black", lw=0.8)
    lower.set_xticks(positions, labels, fontfamily="monospace", rotation=90)
    lower.set(xlabel="key", ylabel="value norm\n/ others", ylim=(0, 1.05 * max(highest, 1)))
    lower.tick_params(axis="x", length=0)
    (image,) = upper.images
    return _Canvas(figure, [image, *bars]), image, bars


# --- Every domain, head by head --------------------------------------------------------------


def domains(
    language_model: LanguageModel,
    scanned: xr.Dataset,
    passages: Mapping[str, str],
    *,
    count: int = 30,
) -> Explorer:
    """Leaf through the heads whose sink attention depends most on what they read.

    `scanned` is what `dormant_heads.scan` returns. A picture shows a head's sink attention on each
    text of every domain and, below, along one running text, made of `passages` by their names; a
    typed text takes their place. The `count` heads come in the order of `dormant_heads.gaps`.
    Raises `SinkbookError` for passages without text, or of more than 512 tokens together.
    """
    attention = scanned.sink_attention.transpose("domain", "text", "layer", "head")
    means = attention.mean("text")
    found = gaps(scanned)
    shown = found.nlargest(count, "gap")
    whole = " ".join(passages.values())

    def draw(text: str) -> Iterator[str]:
        running = passages if text == whole else {"your text": text}
        ids, ends = _read(language_model, running, ON_A_TRACE)
        result = measure(language_model.model, ids, ("sink_attention_by_query",))
        by_query = result.sink_attention_by_query.isel(batch=0)
        smooth = by_query.rolling(position=SMOOTHED, center=True, min_periods=1).mean()
        names = attention.domain.values.tolist()
        canvas, dots, bars, each, curve = _dots_and_curve(names, attention.sizes["text"], ends)
        for row in shown.itertuples():
            here = {"layer": row.layer, "head": row.head}
            mean = means.sel(here)
            dots.set_xdata(attention.sel(here).values.ravel())
            bars.set_xdata(mean.values)
            each.set_ydata(by_query.sel(here).values)
            curve.set_ydata(smooth.sel(here).values)
            yield canvas.picture(
                f"Sink attention of head {row.head} in layer {row.layer}, by domain and along a "
                "text.",
                f"Layer {row.layer}, head {row.head}: most sink attention in {row.dormant}, "
                f"{mean.sel(domain=row.dormant).item():.2f} on average, and least in "
                f"{row.active}, {mean.sel(domain=row.active).item():.2f}.",
            )

    about = (
        f"The {len(shown)} of {len(found)} heads whose sink attention differs most between "
        "domains, the largest difference first. Above, a dot is a text and a bar the mean; below, "
        f"a dot is a token of one running text and the curve a mean over {SMOOTHED}. Drag the "
        "slider, or choose it and press the arrow keys. In a running notebook, type a text of up "
        f"to {ON_A_TRACE} tokens."
    )
    words = [f"{row.layer}, {row.head}" for row in shown.itertuples()]
    return Explorer(about, {"layer, head": words}, draw, whole)


def _dots_and_curve(
    names: list[str], texts: int, ends: dict[str, int]
) -> tuple[_Canvas, *tuple[Artist, ...]]:
    """Dots for the texts of every domain above two curves along one text, all still at zero."""
    figure = Figure(figsize=(INCHES, 1.2 * INCHES))
    upper, lower = figure.subplots(2, 1, height_ratios=(max(3, 0.6 * len(names)), 3))
    rows = np.arange(len(names))
    nearby = np.linspace(-0.25, 0.25, texts)  # so that equal values can be told apart
    heights = (rows[:, None] + nearby).ravel()
    blank = np.zeros_like(heights)
    (dots,) = upper.plot(blank, heights, ".", color=SINK, alpha=0.5, ms=5, mew=0)
    (bars,) = upper.plot(np.zeros(len(names)), rows, "|", color="black", ms=14, mew=2)
    upper.set_yticks(rows, names)
    upper.set(xlim=(-0.02, 1.02), ylim=(len(names) - 0.5, -0.5), xlabel="sink attention")
    length = max(ends.values())
    places, blank = np.arange(length), np.zeros(length)
    (each,) = lower.plot(places, blank, ".", color=OTHER, ms=2.5, mew=0)
    (curve,) = lower.plot(places, blank, color=SINK)
    start = 0
    for name, end in ends.items():
        lower.axvline(start, color=OTHER, lw=0.8, ls="--")
        lower.text((start + end) / 2, 1.04, name, ha="center", va="bottom", fontsize=8)
        start = end
    lower.set(xlim=(0, length), ylim=(0, 1.02), xlabel="position", ylabel="sink attention")
    changing = [dots, bars, each, curve]
    return _Canvas(figure, changing), *changing


# --- Texts -----------------------------------------------------------------------------------


def _read(
    language_model: LanguageModel, passages: Mapping[str, str], longest: int
) -> tuple[Int[Tensor, "1 position"], dict[str, int]]:
    """Token ids of passages one after the other, and where each of them ends.

    Raises `SinkbookError` if there is too little to look at, or too much.
    """
    ids, ends = [*language_model.prefix], {}
    for name, tokens in zip(passages, language_model.tokenize(passages.values()), strict=True):
        ids = ids + tokens[len(language_model.prefix) :]
        ends[name] = len(ids)
    if not "".join(passages.values()).strip() or len(ids) < 2:
        raise SinkbookError("there is nothing to look at in this text. Type a few words.")
    if len(ids) > longest:
        raise SinkbookError(
            f"this text has {len(ids)} tokens, and {longest} can be shown. Leave out the rest."
        )
    return torch.tensor([ids], device=language_model.model.device), ends


def _labels(language_model: LanguageModel, ids: Int[Tensor, " position"]) -> list[str]:
    """The tokens as text, short enough for an axis."""
    words = [language_model.tokenizer.decode([token]) for token in ids.tolist()]
    if len(language_model.prefix) == 1:
        words[0] = "<s>"
    words = [token_label(word.strip(" ") or " ", longest=10) for word in words]
    return [word.replace("$", r"\$") for word in words]  # else matplotlib takes it for mathematics


def _spread(numbers: Sequence[int], count: int) -> list[int]:
    """At most `count` of the numbers, from the first to the last in even steps.

    >>> _spread(range(30), 6)
    [0, 6, 12, 17, 23, 29]
    """
    chosen = np.linspace(0, len(numbers) - 1, min(count, len(numbers))).round().astype(int)
    return [numbers[index] for index in chosen]
