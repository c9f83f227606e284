"""A claim as a card: its rule as a band, a dot for each number, the paper's value as a cross.

The line is SVG without a frame of its own: places along it are percentages, so it is as wide as the
page and its dots and letters keep their size. Colours are the style sheet's.
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

HEIGHT, MIDDLE, RADIUS = 48, 24, 4.5  # pixels
MARGIN = 5  # of the width, in percent, on either side of the outermost number
PIXELS = 3.2  # of a percent, on a phone: dots that would touch there are set apart
EDGE = 12  # percent from either end, where letters would leave the card
DECADES = 2  # numbers of one sign that span more are drawn on a logarithmic line


@dataclass(frozen=True)
class Card:
    """What a card says of a claim, as plain data: words as they are shown, numbers as drawn."""

    id: str
    chapter: str
    statement: str  # one sentence
    verdict: str  # in a word: the card's class
    words: str  # the verdict as the card says it
    whose: str  # paper, rival or ours
    kind: str  # whose claim it is, and what decides it
    source: str  # section or figure of the paper, or whoever else claims it
    quantity: str  # what the numbers are
    values: tuple[float, ...]  # one a seed, or whatever there is one of
    met: tuple[bool, ...]  # whether each meets the rule
    low: float  # what the rule allows, from here; -inf: from anywhere
    high: float  # to here
    paper: float | None  # the paper's own value, where it is a number
    numbers: dict[str, str]  # what was measured, the rule, the paper's value, in words
    notes: tuple[str, ...] = ()  # why it fails, what would decide it
    debt: str = ""  # what is owed, where the verdict is not final
    date: str = ""  # on which its chapter ran

    @property
    def anchor(self) -> str:
        """The card's id on its page."""
        return f"claim-{self.id}"


def card(of: Card, *, link: str = "") -> str:
    """A card as HTML; its id leads to `link`, where there is one."""
    numbers = "".join(
        f"<span><b>{label}</b> {escape(text)}</span>" for label, text in of.numbers.items()
    )
    notes = "".join(f'<p class="why">{inline(note)}</p>' for note in of.notes)
    name = f"<code>{escape(of.id)}</code>"
    if link:
        name = f'<a href="{escape(link)}">{name}</a>'
    return (
        f'<div class="sinkbook-claim {of.verdict.replace(" ", "-")} of-{of.whose}" '
        f'id="{escape(of.anchor)}" data-chapter="{escape(of.chapter)}" '
        f'data-verdict="{of.verdict}" data-whose="{of.whose}">'
        f'<p class="kind"><strong>{of.words}</strong> <span>{of.kind}</span></p>'
        f'<p class="statement">{inline(of.statement)}</p>'
        f"{number_line(of)}"
        f'<p class="numbers">{numbers}</p>{notes}'
        f'<p class="source">{inline(of.quantity)} · {inline(of.source)} · {name}</p></div>'
    )


def inline(text: str) -> str:
    """One sentence as HTML: `code` between backticks, everything else escaped."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text))


def number_line(of: Card) -> str:
    """The numbers on a line as an `svg` element; nothing where none is finite.

    A number that meets the rule is a full dot, one that does not a ring.
    """
    dots = [(v, m) for v, m in zip(of.values, of.met, strict=True) if math.isfinite(v)]
    if not dots:
        return ""
    bounds = sorted({bound for bound in (of.low, of.high) if math.isfinite(bound)})
    of_paper = [] if of.paper is None else [of.paper]
    place, logarithmic = _places([*(value for value, _ in dots), *bounds, *of_paper])
    start, end = (_within(place, of.low, 0.0), _within(place, of.high, 100.0))
    parts = [
        f'<rect class="band" x="{start:.2f}%" y="{MIDDLE - 11}" width="{end - start:.2f}%" '
        'height="22"/>',
        f'<line class="axis" x1="0" x2="100%" y1="{MIDDLE}" y2="{MIDDLE}"/>',
    ]
    for at, bound, side in zip(
        map(place, bounds), bounds, _sides(*map(place, bounds)), strict=True
    ):
        parts.append(_bound(at, f"{bound:,g}", side))
    levels = _apart([place(value) for value, _ in dots])
    for (value, met), level in zip(dots, levels, strict=True):
        parts.append(
            f'<circle class="{"met" if met else "missed"}" cx="{place(value):.2f}%" '
            f'cy="{MIDDLE + level}" r="{RADIUS}"/>'
        )
    for value in of_paper:
        parts.append(_cross(place(value)))
    if logarithmic:  # at the end that the paper's name leaves free
        x, side = ("0", "start") if of_paper and place(of_paper[0]) > 50 else ("100%", "end")
        parts.append(f'<text x="{x}" y="10" text-anchor="{side}">log scale</text>')
    return (
        f'<svg class="number-line" width="100%" height="{HEIGHT}" role="img" '
        f'aria-label="{escape(described(of))}">{"".join(parts)}</svg>'
    )


def described(of: Card) -> str:
    """The line for those who do not see it."""
    numbers = "; ".join(f"{label} {text}" for label, text in of.numbers.items())
    return f"{numbers}; {sum(of.met)} of {len(of.met)} within the rule."


def _places(points: Sequence[float]) -> tuple[Callable[[float], float], bool]:
    """Where on the line a number lies, in percent of its width; and whether it is logarithmic."""
    low, high = min(points), max(points)
    logarithmic = low > 0 and math.log10(high / low) > DECADES
    scale = math.log10 if logarithmic else float
    low, high = scale(low), scale(high)
    if high - low < 1e-12 * max(abs(low), abs(high), 1e-300):
        return lambda value: 50.0, False
    across = (100 - 2 * MARGIN) / (high - low)
    return lambda value: MARGIN + across * (scale(value) - low), logarithmic


def _within(place: Callable[[float], float], bound: float, open_end: float) -> float:
    return place(bound) if math.isfinite(bound) else open_end


def _sides(*ends: float) -> list[str]:
    """On which side of each end of the band its number begins or ends, so that all are on the card.

    >>> _sides(5.0, 95.0), _sides(40.0, 60.0), _sides(50.0)
    (['start', 'end'], ['end', 'start'], ['middle'])
    """
    if len(ends) == 2 and ends[1] - ends[0] < 2 * EDGE:
        return ["end", "start"]
    usual = ("end", "start") if len(ends) == 2 else ("middle",)
    return [
        "start" if at < EDGE else "end" if at > 100 - EDGE else side
        for at, side in zip(ends, usual, strict=False)
    ]


def _bound(at: float, label: str, side: str) -> str:
    """Where the rule's band ends, with its number below."""
    return (
        f'<line class="bound" x1="{at:.2f}%" x2="{at:.2f}%" y1="{MIDDLE - 11}" '
        f'y2="{MIDDLE + 11}"/><text x="{at:.2f}%" y="{HEIGHT - 2}" text-anchor="{side}">'
        f"{label}</text>"
    )


def _cross(at: float) -> str:
    """The paper's value: a cross, named above."""
    side = "start" if at < 12 else "end" if at > 80 else "middle"
    return (
        f'<svg class="cross" x="{at:.2f}%" y="{MIDDLE}" overflow="visible">'
        f'<path d="M-5-5L5 5M-5 5L5-5"/></svg>'
        f'<text x="{at:.2f}%" y="10" text-anchor="{side}">paper</text>'
    )


def _apart(places: Sequence[float]) -> list[int]:
    """How far below the middle each dot is set, in pixels, so that none hides another."""
    levels = (0, -6, 6, -3, 3, -9, 9)
    taken: list[tuple[float, float]] = []
    for place in places:
        for level in levels:
            near = (math.hypot((place - x) * PIXELS, level - y) for x, y in taken)
            if all(distance >= 1.2 * RADIUS for distance in near):
                break
        else:
            level = 0
        taken.append((place, level))
    return [level for _, level in taken]


def number(value: int | float | str | None, unit: str = "") -> str:
    """Three significant digits and the unit; whole numbers and words as they are.

    >>> number(0.7834), number(12345.6, "steps"), number(3), number(None)
    ('0.783', '12,346 steps', '3', '')
    """
    if value is None:
        return ""
    if isinstance(value, float):
        value = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return f"{value} {unit}".rstrip()


def spread(values: Sequence[float], unit: str, over: str) -> str:
    """What was measured: mean, how many there are of what, and range; of an interval its ends.

    >>> spread([1.0, 3.0], "nats", "seeds"), spread([-0.5, 0.25], "", "ends of the interval")
    ('2 nats (2 seeds: 1 to 3)', '-0.5 to 0.25 (ends of the interval)')
    """
    if not values:
        return "–"
    mean, low, high = sum(values) / len(values), min(values), max(values)
    if len(values) == 1:
        return f"{number(mean, unit)} (one value)"
    if len(values) == 2 and over.startswith("ends of "):
        return f"{number(low)} to {number(high, unit)} ({over})"
    return f"{number(mean, unit)} ({len(values)} {over}: {number(low)} to {number(high)})"
