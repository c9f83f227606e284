"""The page of all claims: how many hold, by whose they are, the debts, and every card by chapter.

Without a script the page shows everything. `_static/claims.js` unveils the filters, which hide what
is not asked for.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape

from sinkbook.pages.claim_cards import Card, card, inline
from sinkbook.pages.tables import scrolling

WHOSE = {"paper": "the paper’s", "ours": "our own", "rival": "somebody else’s"}


def page(
    cards: Sequence[Card], *, summary: str, verdicts: Sequence[str], titles: Mapping[str, str]
) -> str:
    """The ledger as HTML: cards in their order, verdicts in the order in which they are listed.

    `titles` has the heading of a chapter by its name; one without is called by its number.
    """
    groups: dict[str, list[Card]] = {}
    for of in cards:
        groups.setdefault(of.chapter, []).append(of)
    groups = dict(sorted(groups.items()))
    found = [verdict for verdict in verdicts if any(of.verdict == verdict for of in cards)]
    called = {name: title(name, titles.get(name)) for name in groups}
    chapters = "".join(_chapter(name, called[name], group, found) for name, group in groups.items())
    return (
        f'<div class="sinkbook-ledger"><p><strong>{escape(summary)}</strong>{_dates(cards)}</p>'
        f"{_counts(cards, found)}{_debts(cards)}{_filters(called, found)}{chapters}</div>"
    )


def title(chapter: str, heading: str | None) -> str:
    """A chapter's number and heading as the ledger has them.

    >>> title("03_active_dormant", "A head that sleeps")
    'Chapter 3: A head that sleeps'
    """
    number = f"Chapter {int(chapter.partition('_')[0])}"
    return f"{number}: {heading}" if heading else number


def _dates(cards: Sequence[Card]) -> str:
    """When the chapters ran that handed the numbers in."""
    dates = sorted({of.date for of in cards if of.date})
    if not dates:
        return ""
    last = f" to {dates[-1]}" * (len(dates) > 1)
    return escape(f". Their chapters ran on {dates[0]}{last}.")


def _counts(cards: Sequence[Card], verdicts: Sequence[str]) -> str:
    """How many claims of each kind got each verdict."""
    counts = Counter((of.whose, of.verdict) for of in cards)
    head = "".join(f'<th scope="col">{verdict}</th>' for verdict in verdicts)
    rows = "".join(
        f'<tr><th scope="row">{words}</th>'
        + "".join(f"<td>{counts[whose, verdict] or '–'}</td>" for verdict in verdicts)
        + "</tr>"
        for whose, words in WHOSE.items()
        if any(of.whose == whose for of in cards)
    )
    return scrolling(
        '<table class="sinkbook-counts"><thead><tr>'
        f'<th scope="col">whose claim</th>{head}</tr></thead><tbody>{rows}</tbody></table>'
    )


def _debts(cards: Sequence[Card]) -> str:
    """What is owed: claims that nothing here decides, each with what would."""
    owed = [of for of in cards if of.debt]
    if not owed:
        return ""
    items = "".join(
        f'<li><a href="#{escape(of.anchor)}"><code>{escape(of.id)}</code></a> '
        f"{inline(of.statement)} {inline(of.debt)}</li>"
        for of in owed
    )
    return (
        f'<details class="debts"><summary>Debts ({len(owed)}): what is not decided here, and what '
        f"would decide it</summary><ul>{items}</ul></details>"
    )


def _filters(chapters: Mapping[str, str], verdicts: Sequence[str]) -> str:
    """Three choices, hidden until the script is there to obey them."""
    choices = {
        "chapter": chapters,
        "verdict": {verdict: verdict for verdict in verdicts},
        "whose": WHOSE,
    }
    everything = {"chapter": "all chapters", "verdict": "all verdicts", "whose": "everybody’s"}
    fields = "".join(
        f'<label>{name} <select name="{name}"><option value="">{everything[name]}</option>'
        + "".join(f'<option value="{escape(v)}">{escape(w)}</option>' for v, w in options.items())
        + "</select></label>"
        for name, options in choices.items()
    )
    return (
        f'<form class="filters" hidden>{fields}<output aria-live="polite"></output>'
        '<button type="reset" hidden>show all</button></form>'
    )


def _chapter(name: str, called: str, cards: Sequence[Card], verdicts: Sequence[str]) -> str:
    """A chapter's cards under its name; each leads to its place in the chapter."""
    counts = Counter(of.verdict for of in cards)
    words = ", ".join(f"{verdict} {counts[verdict]}" for verdict in verdicts if counts[verdict])
    drawn = "".join(card(of, link=f"{of.chapter}.html#{of.anchor}") for of in cards)
    return (
        f'<section><p class="sinkbook-chapter"><a href="{escape(name)}.html">'
        f"{escape(called)}</a> <span>{words}</span></p>{drawn}</section>"
    )
