"""Guesses: a question to answer before looking, and what answers it, folded.

What follows a `:::{guess}` stays folded until a reader opens it, or takes one of its `:choices:`,
which stand on a line with `|` between them. This module is a Sphinx extension; folds need no
script, choices are shown by `_static/questions`.
"""

from docutils import nodes
from docutils.parsers.rst import directives
from docutils.statemachine import StringList
from sphinx.transforms import SphinxTransform
from sphinx.util.docutils import SphinxDirective


def setup(app) -> dict:
    """What Sphinx calls."""
    app.add_directive("guess", _Guess)
    app.add_transform(_FoldAnswers)
    app.add_node(_Answer, html=(_open_answer, _close_answer))
    app.add_node(_Choices, html=(_open_choices, _close_choices))
    app.add_node(_Choice, html=(_open_choice, _close_choice))
    return {"parallel_read_safe": True}


class _Answer(nodes.General, nodes.Element):
    """What follows a guess, folded: the browser opens it, without a script."""


class _Choices(nodes.General, nodes.Element):
    """The choices of a guess. Without a script nothing could be done with them: they are hidden."""


class _Choice(nodes.General, nodes.Element):
    """One of them: a button."""


class _Guess(SphinxDirective):
    """A question to answer before looking. What it asks about is folded: see `_FoldAnswers`."""

    has_content = True
    option_spec = {"choices": directives.unchanged_required}

    def run(self) -> list[nodes.Node]:
        guess = nodes.admonition(classes=["sinkbook-guess"])
        guess += nodes.title("", "Your guess")
        self.state.nested_parse(self.content, self.content_offset, guess)
        if "choices" in self.options:
            guess += self._choices()
        return [guess]

    def _choices(self) -> _Choices:
        found = [words.strip() for words in self.options["choices"].split("|")]
        if not 2 <= len(found) <= 4 or not all(found):
            raise self.error(f"a guess offers two to four choices, with | between them: {found}")
        choices = _Choices()
        for words in found:
            parsed = nodes.Element()
            self.state.nested_parse(StringList([words], ""), self.content_offset, parsed)
            choices += _Choice("", *parsed[0].children)
        return choices


class _FoldAnswers(SphinxTransform):
    """Fold what follows a guess: cells with what they show, the text that reads them, its cards.

    What is said before the first cell stays. It ends with the section, before a cell that shows
    something else, and with the answer to the next guess, to which its text leads.
    """

    default_priority = 870  # every cell and figure is there, and nothing is numbered yet

    def apply(self) -> None:
        for guess in reversed(list(self.document.findall(_is_guess))):
            if folded := _answer_to(guess):
                answer = _Answer()
                guess.parent.insert(guess.parent.index(folded[0]), answer)
                for node in folded:
                    guess.parent.remove(node)
                    answer += node


def _is_guess(node: nodes.Node) -> bool:
    return isinstance(node, nodes.admonition) and "sinkbook-guess" in node["classes"]


def _answer_to(guess: nodes.Node) -> list[nodes.Node]:
    """The nodes behind a guess that would give the answer away, from the next cell on."""
    folded: list[nodes.Node] = []
    text = ends = False
    for node in guess.parent[guess.parent.index(guess) + 1 :]:
        is_cell = isinstance(node, nodes.container) and "cell" in node["classes"]
        only_cards = is_cell and _shows_only_cards(node)
        if isinstance(node, nodes.section) or (_is_guess(node) and not folded):
            break
        if text and is_cell and not only_cards or ends and not only_cards:
            break
        if folded or is_cell:
            folded.append(node)
            ends |= text and is_cell or isinstance(node, _Answer)
            text |= isinstance(node, nodes.paragraph)
    return folded


def _shows_only_cards(cell: nodes.container) -> bool:
    """Whether a cell shows verdicts on claims, or nothing."""
    shown = [part for part in cell.findall(nodes.container) if "cell_output" in part["classes"]]
    html = "".join(raw.astext() for part in shown for raw in part.findall(nodes.raw))
    return not any(part.children for part in shown) or "sinkbook-claim" in html


def _open_answer(writer, node: _Answer) -> None:
    writer.body.append('<details class="sinkbook-answer"><summary>Look</summary>\n')


def _close_answer(writer, node: _Answer) -> None:
    writer.body.append("</details>\n")


def _open_choices(writer, node: _Choices) -> None:
    group = '<div class="choices" role="group" aria-label="Your guess">'
    writer.body.append(f'<div class="sinkbook-choices" hidden>{group}')


def _close_choices(writer, node: _Choices) -> None:
    writer.body.append('</div><p role="status"></p></div>\n')


def _open_choice(writer, node: _Choice) -> None:
    writer.body.append('<button type="button" aria-pressed="false">')


def _close_choice(writer, node: _Choice) -> None:
    writer.body.append("</button>")
