"""How a head reads a text, or what every head rests on: pictures of which a reader chooses one.

    Choice("Choose a language.", {"with <s>": reading, "without": another})

A choice needs no script, no kernel and no other machine: its buttons are the browser's own.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from xml.etree import ElementTree

import numpy as np
from jaxtyping import Float

from sinkbook.errors import SinkbookError
from sinkbook.figures.style import DRAIN, OTHER, SINK, TRIGGER

LEFT, CELL, BARS, TALL = 26.0, 19.0, 56.0, 120.0  # pixels
# Where no style sheet of the book says otherwise, as in Jupyter.
COLOURS = {
    "first": DRAIN,
    "trigger": TRIGGER,
    "other": OTHER,
    "cell": SINK,
    "ground": "#f1f3f5",
    "title": "#48566b",
}


@dataclass(frozen=True, eq=False)
class Reading:
    """How a head reads one text: where each token looks, and how long each value is, written."""

    weights: Float[np.ndarray, "query key"]
    values: Float[np.ndarray, " key"]
    labels: list[str]
    triggers: list[bool]

    def in_words(self, first: str) -> str:
        """What the first token gets of the others' attention, and its value; `first` names it.

        The same of the token that gets most, where that is another one.
        """
        ordinary = [not trigger for trigger in self.triggers[1:]]
        gets = self.weights[1:][ordinary].mean(axis=0)
        drains = self.values / ((self.values.sum() - self.values) / (len(self.values) - 1))
        most = int(gets.argmax())
        words = (
            f"the ordinary characters of this text give {first} {gets[0]:.2f} of their attention; "
            f"its value is {drains[0]:.2f} times as long as the others'."
        )
        if most:
            words += (
                f" The largest share, {gets[most]:.2f}, goes to {self.labels[most]} at position "
                f"{most}, whose value is {drains[most]:.2f} times as long."
            )
        return words

    def __str__(self) -> str:
        return self.in_words(f"{self.labels[0]}, which stands first,")

    def drawn(self, says: str) -> str:
        """An `svg` element: the attention map, rows are queries, over the values of its keys.

        Colours are those of `_static/lab/lab.css`; `says` is for those who do not see it.
        """
        count = len(self.labels)
        side = count * CELL
        floor = side + 46 + BARS
        root = _picture(LEFT + side, floor + 2, says)
        for n, row in enumerate(self.weights):
            _rect(root, "ground", LEFT, n * CELL, (n + 1) * CELL - 1, CELL - 1)
            for key, weight in enumerate(row[: n + 1]):
                cell = _rect(root, "cell", LEFT + key * CELL, n * CELL, CELL - 1, CELL - 1)
                cell.set("fill-opacity", f"{min(max(weight, 0.0), 1.0):.3f}")
        others = float(self.values[1:].mean() if count > 1 else self.values[0])
        for n, (label, value) in enumerate(zip(self.labels, self.values.tolist(), strict=True)):
            kind = "first" if label == "<s>" else "trigger" if self.triggers[n] else "other"
            x, y = LEFT + (n + 0.5) * CELL, (n + 0.5) * CELL
            _text(root, kind, LEFT - 5, y + 4, "end", label)
            _text(root, kind, x, side + 14, "middle", label)
            high = max(min(value / others / 2, 1.0) * BARS, 0.5)
            kind = "first" if n == 0 else kind
            _rect(root, f"bar {kind}", x - 0.35 * CELL, floor - high, 0.7 * CELL, high)
        _text(root, "title", 0.0, side + 38, "start", "How long the value is that it finds there")
        _dotted(root, LEFT, LEFT + side, floor - BARS / 2)
        return (
            '<p class="lab-title">Where each character looks, a row for each</p>'
            f"{ElementTree.tostring(root, encoding='unicode')}"
            '<p class="lab-small">Pink: triggers.</p>'
        )


@dataclass(frozen=True, eq=False)
class Heads:
    """What every head of a model gives the first token, as bars; `even` is an even share of it.

    A bar is as high as there is room where a head gives `full` or more.
    """

    shares: Float[np.ndarray, "layer head"]
    even: float
    full: float = 0.5

    @property
    def _strongest(self) -> tuple[int, int]:
        return divmod(int(self.shares.argmax()), self.shares.shape[1])

    def __str__(self) -> str:
        layer, head = self._strongest
        return (
            f"head {head} of layer {layer} gives the first token most, {self.shares.max():.2f} of "
            f"its attention; looking evenly would give it {self.even:.2f}."
        )

    def drawn(self, says: str) -> str:
        """An `svg` element: a bar for each head, layers side by side, and a line at `even`."""
        (layers, heads), most = self.shares.shape, self.shares.max()
        of_layer = (heads + 0.8) * CELL
        full, floor = layers * of_layer, TALL + 12
        root = _picture(full, floor + 36, says)
        for (layer, head), share in np.ndenumerate(self.shares):
            x = layer * of_layer + (head + 0.4) * CELL
            high = TALL * min(share / self.full, 1.0)
            _rect(root, "ground", x + 1, 12.0, CELL - 2, TALL)
            _rect(root, "cell", x + 1, floor - high, CELL - 2, high)
            _text(root, "other", x + CELL / 2, floor + 13, "middle", str(head))
        for layer in range(layers):
            _text(root, "title", (layer + 0.5) * of_layer, floor + 29, "middle", f"layer {layer}")
        layer, head = self._strongest
        x, high = layer * of_layer + (head + 0.9) * CELL, TALL * min(most / self.full, 1.0)
        # After all bars, so that none of them covers it.
        _text(root, "title", x, floor - high - 3, "middle", f"{most:.2f}")
        _dotted(root, 0.0, full, floor - TALL * self.even / self.full)
        return (
            '<p class="lab-title">Attention on the first token, a bar for each head</p>'
            f"{ElementTree.tostring(root, encoding='unicode')}"
            f'<p class="lab-small">A bar that fills its place is {self.full:g} or more. Dotted: '
            "looking evenly.</p>"
        )


def _picture(width: float, height: float, says: str) -> ElementTree.Element:
    size = {"viewBox": f"0 0 {width:g} {height:g}", "width": f"{width:g}"}
    return ElementTree.Element("svg", {"class": "map", "role": "img", "aria-label": says} | size)


def _rect(
    root: ElementTree.Element, kind: str, x: float, y: float, width: float, height: float
) -> ElementTree.Element:
    size = {"x": x, "y": y, "width": width, "height": height}
    look = {name: f"{value:.4g}" for name, value in size.items()}
    look |= {"rx": "2", "fill": COLOURS[kind.split()[-1]]}
    return ElementTree.SubElement(root, "rect", {"class": kind, **look})


def _text(
    root: ElementTree.Element, kind: str, x: float, y: float, anchor: str, words: str
) -> None:
    where = {"x": f"{x:.4g}", "y": f"{y:.4g}", "text-anchor": anchor}
    look = {"fill": COLOURS[kind], "font-size": "11", "font-family": "monospace"}
    ElementTree.SubElement(root, "text", {"class": kind, **where, **look}).text = words


def _dotted(root: ElementTree.Element, x1: float, x2: float, y: float) -> None:
    ends = {"x1": f"{x1:g}", "x2": f"{x2:g}", "y1": f"{y:g}", "y2": f"{y:g}"}
    look = {"stroke": OTHER, "stroke-dasharray": "2 3"}
    ElementTree.SubElement(root, "line", {"class": "ordinary", **ends, **look})


@dataclass(frozen=True)
class Choice:
    """Readings, or heads, of which a page shows those that its reader chooses; the first at first.

    `asks` says what is chosen, the names of `readings` stand on the buttons. Without a style sheet
    all are shown, one below the other. Raises `SinkbookError` for fewer than two.
    """

    asks: str
    readings: Mapping[str, Reading | Heads]

    def __post_init__(self):
        if len(self.readings) < 2:
            raise SinkbookError(f"{len(self.readings)} readings are no choice. Give two or more.")

    def _repr_html_(self) -> str:
        told = [f"{name}: {reading}" for name, reading in self.readings.items()]
        pictures = [
            f'<div class="chosen">{reading.drawn(says)}<p>{escape(says)}</p></div>'
            for reading, says in zip(self.readings.values(), told, strict=True)
        ]
        group = f"c{hashlib.sha256(''.join(pictures).encode()).hexdigest()[:8]}"
        buttons, rules = [], []
        for number, name in enumerate(self.readings):
            ours = f"{group}-{number}"
            checked = "" if number else " checked"
            buttons.append(
                f'<input type="radio" name="{group}" id="{ours}"{checked}>'
                f'<label for="{ours}">{escape(name)}</label>'
            )
            rules.append(f"#{ours}:not(:checked) ~ .chosen:nth-of-type({number + 1})")
        return (
            f'<div class="sinkbook-choice mathjax_ignore tex2jax_ignore" role="radiogroup" '
            f'aria-label="{escape(self.asks)}">\n<style>{", ".join(rules)} {{ display: none }}'
            f"</style>\n<p>{escape(self.asks)}</p>\n{''.join(buttons)}\n{''.join(pictures)}</div>"
        )

    def __repr__(self) -> str:
        return f"{self.asks} There are {', '.join(self.readings)}."
