"""The Bigram-Backcopy task and its variants (arXiv 2410.13835, section 2).

A text starts with `<s>`. After an ordinary character the next one is drawn from Shakespeare's
bigram statistics; after a *trigger*, one of the most frequent characters, the character before
the trigger is copied. A variant changes one field of `TaskConfig`.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sinkbook.annotations import check_arguments, check_fields
from sinkbook.arguments import (
    check_numbers,
    check_tokens,
    check_whole_number,
    check_whole_numbers,
)
from sinkbook.data.shakespeare import CharacterStatistics, characters
from sinkbook.devices import check_device
from sinkbook.errors import SinkbookError
from sinkbook.models.token_labels import token_label

START, DELIMITER = "<s>", "<d>"
RULES = ("backcopy", "backward", "in-context", "markov")
STEPS_AT_ONCE = 16  # whose batches are drawn together


@dataclass(frozen=True)
class TaskConfig:
    """What the texts are made of; the defaults are the paper's Bigram-Backcopy task."""

    rule: str = "backcopy"  # what follows a trigger, one of RULES
    characters: int = 65  # the most frequent characters are kept
    triggers: int = 3  # the most frequent characters are triggers
    length: int = 256  # positions that a model sees; a text is one token longer
    starts: int = 1  # start tokens in front: <s>; or <s><s2>; or none
    random_first: bool = False  # a random character before <s>, which is then in second place
    delimiter_probability: float = 0.0  # of <d> after an ordinary character
    copy_probability: float = 1.0  # of copying at a trigger; else the bigram rule

    def __post_init__(self):
        check_fields(self)
        check_whole_numbers(self, characters=0, triggers=0, length=0, starts=0)
        check_numbers(self, delimiter_probability=0, copy_probability=0)
        limits = {
            "characters": (self.triggers + 2, 65),
            "triggers": (0, 60),
            "length": (3, 1 << 20),
            "starts": (0, 2),
            "delimiter_probability": (0, 1),
            "copy_probability": (0, 1),
        }
        for name, (low, high) in limits.items():
            if not low <= getattr(self, name) <= high:
                raise SinkbookError(
                    f"TaskConfig.{name} is {getattr(self, name)}; choose from {low} to {high}."
                )
        if self.rule not in RULES:
            raise SinkbookError(f"no rule named {self.rule!r}. Known: {', '.join(RULES)}.")
        if self.random_first and (self.rule, self.starts) != ("backcopy", 1):
            raise SinkbookError(
                f"a random first character goes before one <s>, under the rule 'backcopy'; "
                f"there are starts={self.starts} and rule={self.rule!r}."
            )


class Risks(NamedTuple):
    """Soft cross-entropies against the oracle, in nats; scalars, or one number per model."""

    backcopy: Float[Tensor, "*model"]  # mean over the trigger positions
    bigram: Float[Tensor, "*model"]  # mean over all other positions
    backcopy_excess: Float[Tensor, "*model"]  # minus the oracle's own risk
    bigram_excess: Float[Tensor, "*model"]


class Task:
    """Texts of one `TaskConfig`, and the oracle that knows how they are made.

    Token ids are the kept characters in code-point order, then the start tokens, then `<d>`.

    Attributes:
        symbols: the text of each token id.
        vocab_size: number of token ids, V.
        start: id of `<s>`, or None for a task without one.
        delimiter: id of `<d>`.
        triggers: ids of the triggers, most frequent first.
        unigram: (V,) float64, frequency of each character.
        transition: (V, V) float64, the bigram rows P(. | token). The row of `<s>` and of `<d>` is
            the distribution of a first character: for the backcopy rule the unigram without the
            triggers, so that a trigger always has a character to copy.
    """

    @check_arguments
    def __init__(
        self, config: TaskConfig = TaskConfig(), statistics: CharacterStatistics | None = None
    ):
        statistics = statistics or characters()
        kept = np.sort(np.argsort(-statistics.unigrams, kind="stable")[: config.characters])
        counts = statistics.unigrams[kept].astype(float)
        bigrams = statistics.bigrams[np.ix_(kept, kept)].astype(float)

        self.config = config
        starts = [START, "<s2>"][: config.starts]
        self.symbols = [statistics.symbols[i] for i in kept] + starts + [DELIMITER]
        self.vocab_size = len(self.symbols)
        self.start = self.symbols.index(START) if starts else None
        self.delimiter = self.vocab_size - 1
        self.triggers = tuple(np.argsort(-counts, kind="stable")[: config.triggers].tolist())
        self.is_trigger = torch.zeros(self.vocab_size, dtype=torch.bool)
        self.is_trigger[list(self.triggers)] = True

        unigram = np.zeros(self.vocab_size)
        unigram[: len(kept)] = counts / counts.sum()
        first = unigram.copy()
        if config.rule == "backcopy":
            first[list(self.triggers)] = 0.0
        transition = np.tile(first / first.sum(), (self.vocab_size, 1))
        has_successor = np.flatnonzero(bigrams.sum(axis=1))
        rows = bigrams[has_successor]
        transition[has_successor, : len(kept)] = rows / rows.sum(axis=1, keepdims=True)
        if config.delimiter_probability:
            transition[: len(kept)] *= 1 - config.delimiter_probability
            transition[: len(kept), self.delimiter] = config.delimiter_probability
        self.unigram = torch.from_numpy(unigram)
        self.transition = torch.from_numpy(transition)

    @check_arguments
    def batch(
        self, size: int, generator: torch.Generator | None = None
    ) -> Int[Tensor, "batch position"]:
        """Draw `size` texts of `length + 1` tokens, on the generator's device (CPU without one).

        Inputs are `texts[:, :-1]`, targets `texts[:, 1:]`. Every position is drawn for all texts
        at once.
        """
        return self._draw(size, [generator])

    @check_arguments
    def batch_at(
        self, size: int, seed: int, step: int, device: torch.device | str = "cpu"
    ) -> Int[Tensor, "batch position"]:
        """The batch of a training step: a function of (seed, step) alone, on every device."""
        check_device(device)
        return self.batches_at(size, seed, range(step, step + 1), device)[0]

    def batches_at(
        self, size: int, seed: int, steps: range, device: torch.device | str = "cpu"
    ) -> tuple[Int[Tensor, "batch position"], ...]:
        """The batches of several steps, the same as one by one, and for small ones much faster.

        They are drawn on the CPU and then moved, so that a GPU trains on the same texts.
        """
        generators = [generator_at(seed, step) for step in steps]
        return self._draw(size, generators).to(device).split(size)

    def batches(
        self, size: int, seed: int, steps: range, device: torch.device | str = "cpu"
    ) -> Iterator[Int[Tensor, "batch position"]]:
        """The batches of a training's steps, one after the other, drawn some steps at a time."""
        for first in range(0, len(steps), STEPS_AT_ONCE):
            several = steps[first : first + STEPS_AT_ONCE]
            yield from self.batches_at(size, seed, several, device)

    def _draw(self, size: int, generators: list[torch.Generator | None]) -> Int[Tensor, "b t"]:
        """`size` texts from each generator, all of them position by position."""
        check_whole_number("size", size, 1)
        config, length = self.config, self.config.length + 1
        device = generators[0].device if generators[0] is not None else torch.device("cpu")
        rows, is_trigger = self._on(device)

        def from_each(draw, *arguments, **keywords) -> Tensor:
            parts = [draw(*arguments, device=device, generator=g, **keywords) for g in generators]
            return torch.cat(parts, dim=1)

        uniform = from_each(torch.rand, (length, size), dtype=torch.float64)
        if config.rule == "in-context":
            answers = from_each(torch.randint, config.characters, (self.vocab_size, size))
        if config.copy_probability < 1:
            copies = from_each(torch.rand, (length, size)) < config.copy_probability
        # A text without <s> starts as if it followed one: every special row is the first row.
        previous = current = torch.full(uniform.shape[1:], self.delimiter, device=device)
        texts = []
        for n in range(config.starts):
            previous, current = current, torch.full_like(current, self.start + n)
            texts.append(current)
        draws = list(zip(uniform.unbind(), rows.slices(uniform).unbind(), strict=True))
        random_first = rows.draw(current, *draws[0]) if config.random_first else None
        for n, draw in islice(enumerate(draws), config.starts, None):
            after_trigger = is_trigger.index_select(0, current)
            if config.rule == "backward":
                token = rows.draw(torch.where(after_trigger, previous, current), *draw)
            else:
                token = rows.draw(current, *draw)
            if config.rule in ("backcopy", "in-context"):
                if config.rule == "backcopy":
                    copied = previous
                else:
                    copied = answers.gather(0, current.unsqueeze(0)).squeeze(0)
                if config.copy_probability < 1:
                    after_trigger = after_trigger & copies[n]
                token = torch.where(after_trigger, copied, token)
            previous, current = current, token
            texts.append(token)
        if random_first is not None:
            texts = [random_first, *texts[:-1]]
        return torch.stack(texts, dim=1)

    @check_arguments
    def oracle(
        self, tokens: Int[Tensor, "batch position"]
    ) -> Float[Tensor, "batch position vocab"]:
        """The true distribution of the token after each position, float32.

        At position 0 it is the distribution of a first character, which the official code takes
        for the plain unigram (0.0106 nats of spurious excess risk at the paper's length).
        """
        check_tokens("tokens", tokens, self.vocab_size)
        config = self.config
        oracle = self.transition.to(tokens.device, torch.float32)[tokens]
        if config.starts == 2 or config.random_first:
            oracle[:, 0] = 0.0
            oracle[:, 0, self.delimiter - 1] = 1.0
        if config.rule == "markov" or not self.triggers:
            return oracle
        triggers = self.is_trigger.to(tokens.device)[tokens]
        previous = torch.full_like(tokens, self.delimiter)
        previous[:, 1:] = tokens[:, :-1]
        if config.rule == "backward":
            ruled = self.transition.to(oracle)[previous]
        elif config.rule == "backcopy":
            ruled = torch.zeros_like(oracle).scatter_(-1, previous.unsqueeze(-1), 1.0)
        else:
            ruled = self._in_context(tokens, oracle)
        if config.rule != "backward":
            p = config.copy_probability
            ruled = p * ruled + (1 - p) * oracle
        return torch.where(triggers.unsqueeze(-1), ruled, oracle)

    def _in_context(self, tokens, oracle):
        """What follows each trigger: uniform at first sight, then whatever followed it before."""
        ruled = torch.zeros_like(oracle)
        ruled[..., : self.config.characters] = 1 / self.config.characters
        successor = tokens.roll(-1, dims=1)
        for trigger in self.triggers:
            seen = tokens == trigger
            first = seen.int().argmax(dim=1, keepdim=True)
            answer = successor.gather(1, first)
            again = seen & (torch.arange(tokens.shape[1], device=tokens.device) > first)
            known = torch.zeros_like(oracle[:, :1]).scatter_(-1, answer.unsqueeze(-1), 1.0)
            ruled = torch.where(again.unsqueeze(-1), known, ruled)
        return ruled

    @check_arguments
    def risks(
        self,
        logits: Float[Tensor, "*model batch position vocab"],
        tokens: Int[Tensor, "batch position"],
    ) -> Risks:
        """Backcopy risk, bigram risk and their excess over the oracle (arXiv 2410.13835, sec. 2).

        `tokens` are the inputs that gave `logits`. A risk without any position is NaN.
        """
        oracle = self.oracle(tokens)
        cross_entropy = -(oracle * logits.log_softmax(dim=-1)).sum(dim=-1)
        entropy = torch.special.entr(oracle).sum(dim=-1)
        after_trigger = self.at_triggers(tokens)
        means = [
            values[..., where].mean(dim=-1)
            for values in (cross_entropy, cross_entropy - entropy)
            for where in (after_trigger, ~after_trigger)
        ]
        return Risks(*means)

    @check_arguments
    def at_triggers(self, tokens: Int[Tensor, "*batch"]) -> Bool[Tensor, "*batch"]:
        """Where the tokens are triggers."""
        check_tokens("tokens", tokens, self.vocab_size)
        return self.is_trigger.to(tokens.device)[tokens]

    @check_arguments
    def encode(self, text: str) -> Int[Tensor, "1 position"]:
        """Token ids of a text in the task's characters, the start tokens in front.

        Raises `SinkbookError` for a character that the task does not have.
        """
        starts = [s for s in self.symbols if s in (START, "<s2>")]
        unknown = sorted(set(text) - set(self.symbols))
        if unknown:
            raise SinkbookError(
                f"the task has no token for {unknown}. Its characters: "
                f"{''.join(self.symbols[: self.config.characters])!r}."
            )
        return torch.tensor([[self.symbols.index(symbol) for symbol in [*starts, *text]]])

    @check_arguments
    def labels(self, tokens: Int[Tensor, " position"]) -> list[str]:
        """The symbol of each token, blanks made visible: space as `␣`, line break as `⏎`."""
        check_tokens("tokens", tokens, self.vocab_size)
        return [token_label(self.symbols[token]) for token in tokens.tolist()]

    @cache  # noqa: B019 - a task lives as long as the program
    def _on(self, device: torch.device) -> tuple["_Rows", Tensor]:
        return _Rows(self.transition.to(device)), self.is_trigger.to(device)


class _Rows:
    """Draws from the rows of a stochastic matrix by inverting their cumulative sums.

    Most draws are read off a guide table (Chen and Asau, 1974), which knows the answer for every
    slice of [0, 1) that no cumulative sum cuts. The others are searched for.
    """

    SLICES = 1 << 16  # so many that fewer than one draw in a thousand is searched for

    def __init__(self, probabilities: Float[Tensor, "row column"]):
        self.rows, self.columns = probabilities.shape
        cumulative = probabilities.cumsum(dim=1)
        # Row x lies between x and x + 1, so that one search serves all rows.
        offsets = torch.arange(self.rows, device=cumulative.device).unsqueeze(1)
        self.cumulative = (cumulative / cumulative[:, -1:] + offsets).flatten()
        edges = torch.arange(self.SLICES + 1, device=offsets.device).double() / self.SLICES
        at_edges = self._search(offsets, edges)
        whole = at_edges[:, 1:] == at_edges[:, :-1]
        self.guide = torch.where(whole, at_edges[:, :-1], -1).to(torch.int8).T.flatten()

    def slices(self, uniform: Float[Tensor, "*draw"]) -> Int[Tensor, "*draw"]:
        """Where the guide table tells of the slice of [0, 1) that each number lies in."""
        return (uniform * self.SLICES).long() * self.rows

    def draw(
        self,
        row: Int[Tensor, " draw"],
        uniform: Float[Tensor, " draw"],
        slices: Int[Tensor, " draw"],
    ) -> Int[Tensor, " draw"]:
        """The column of each row whose share of [0, 1) holds the number."""
        known = self.guide.index_select(0, slices + row)
        column, cut = known.long(), (known < 0).nonzero()
        if len(cut):
            column[cut] = self._search(row[cut], uniform[cut])
        return column

    def _search(self, row: Int[Tensor, "..."], uniform: Float[Tensor, "..."]) -> Int[Tensor, "..."]:
        found = torch.searchsorted(self.cumulative, row + uniform, right=True)
        return found - row * self.columns


def generator_at(seed: int, step: int, device: torch.device | str = "cpu") -> torch.Generator:
    """The random numbers of a training step, which depend on nothing but (seed, step)."""
    check_whole_number("seed", seed)
    check_whole_number("step", step)
    entropy = np.random.SeedSequence((seed, step)).generate_state(1, np.uint64)[0]
    return torch.Generator(device).manual_seed(int(entropy >> np.uint64(1)))


@cache
@check_arguments
def task(config: TaskConfig) -> Task:
    """The task of a config, with the statistics of Shakespeare, made once per process."""
    return Task(config)
