"""Which modules give what a layer's attention and MLP add to the residual state, found by trial.

The module that is called MLP need not give what is added: Gemma and OLMo 2 normalise it first,
Granite scales it, BLOOM's adds the residual state itself, and Granite's mixtures have two. So a
short text runs through the model once while every sum is followed from the state that a layer
gives back to the one that it took. What was found is tried: without both parts each layer must pass
on its input, and with a vector in the place of one it must add that vector.
"""

import operator
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TypeVar
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sinkbook.errors import SinkbookError
from sinkbook.models.layout import Layer, layers
from sinkbook.models.partial_forward import (
    Output,
    all_running,
    alone_with,
    answer_in,
    own_forward,
    run_on,
    state_into,
    state_of,
)
from sinkbook.models.trials.sums import Sums, Term
from sinkbook.models.wrappers import computing_device, evaluating, uncompiled, unwrapped

TEXTS, LENGTH = 2, 3  # different, so that states in another order are told apart
PARTS = ("attention", "mlp")
# In names of modules that do a part's work, such as experts through which every token goes.
_NAMES = {
    "attention": ("attn", "attention"),
    "mlp": ("mlp", "moe", "expert", "ffn", "feed_forward", "feedforward"),
}

State = Float[Tensor, "batch position width"]
Found = TypeVar("Found")  # what a trial finds of one layer


@dataclass
class Writers:
    """Whose outputs one layer adds to the residual state, or why that cannot be said."""

    attention: list[Term] = field(default_factory=list)
    mlp: list[Term] = field(default_factory=list)
    others: list[Term] = field(default_factory=list)  # of neither
    refusal: str | None = None
    odd_state: str | None = None  # why its positions cannot be told apart

    def of_others(self) -> str:
        """What gives the terms that are of neither part."""
        kinds = sorted({type(term.module).__name__ for term in self.others})
        return f"what {' and '.join(kinds)} gives" if kinds else "something else"


_known: WeakKeyDictionary = WeakKeyDictionary()  # of each model what it was made of, and writers


def writers(model: nn.Module) -> list[Writers]:
    """Who writes in each layer of a model; tried once, and again when modules have changed.

    Raises `SinkbookError` if the model cannot be run on a short text.
    """
    return tried_once(_known, unwrapped(model), _tried)


def tried_once(
    known: WeakKeyDictionary, model: nn.Module, tried: Callable[[nn.Module], list[Found]]
) -> list[Found]:
    """What a trial finds of each layer: kept in `known`, and tried anew when modules have changed.

    It depends on the model's modules, and on forward functions put on them.
    """
    modules = list(model.modules())[1:]  # without the model, which would keep itself alive
    current = modules + [own_forward(module) for module in modules]
    before, found = known.get(model, ([], []))
    if len(before) != len(current) or not all(map(operator.is_, before, current)):
        found = tried(model)
        known[model] = current, found
    return found


@contextmanager
def on_trial(
    model: nn.Module, texts: int = TEXTS, length: int = LENGTH
) -> Iterator[Callable[[], Tensor]]:
    """Gives a function that runs short texts through the model as it is by itself, to the logits.

    Without the hooks that others have hung on it, which may count or keep what they see, and in
    evaluation mode; both are put back, and other threads wait until then. Raises `SinkbookError` if
    the model cannot be run.
    """
    model = unwrapped(model)
    with alone_with(model), _as_it_is(model, texts, length) as run:
        yield run


@contextmanager
def _as_it_is(model: nn.Module, texts: int, length: int) -> Iterator[Callable[[], Tensor]]:
    kinds = ("_forward_hooks", "_forward_pre_hooks")
    hung = [(module, kind, vars(module)[kind]) for module in model.modules() for kind in kinds]
    device = computing_device(model)

    def run() -> Tensor:
        tokens = (torch.arange(length, device=device) % 2).repeat(texts, 1)
        try:
            return answer_in(run_on(model, tokens))
        except SinkbookError:
            raise
        except Exception as error:  # whatever a model raises that is not what we take it for
            raise SinkbookError(
                f"{type(model).__name__} does not run on {length} tokens, by which sinkbook finds "
                f"out what its layers add: {type(error).__name__}: {error}"
            ) from error

    try:
        for module, kind, hooks in hung:
            vars(module)[kind] = type(hooks)()
        with torch.no_grad(), evaluating(model), all_running(model), uncompiled():
            yield run
    finally:
        for module, kind, hooks in hung:
            vars(module)[kind] = hooks


class Inside:
    """Watches a layer: what its modules give is only touched while the layer itself runs.

    Modules may be shared by layers, and may give their states as (batch * position, width). Where
    layers hand on several states side by side, states have an `own_shape`. With `all_run` a layer
    that runs without a module that is to be changed, as for longer texts, is an error.
    """

    def __init__(
        self, block: nn.Module, hooks: ExitStack, own_shape: bool = False, all_run: bool = False
    ):
        self.own_shape, self.all_run = own_shape, all_run
        self._changing: set[nn.Module] = set()
        self._ran: set[nn.Module] = set()
        self.shape: tuple[int, int] | None = None  # texts and positions, while the layer runs
        enter = block.register_forward_pre_hook(self._enter, with_kwargs=True)
        hooks.callback(enter.remove)
        hooks.callback(block.register_forward_hook(self._leave).remove)

    def _enter(self, _block, arguments, keywords) -> None:
        self.shape = tuple(state_into(arguments, keywords).shape[:2])
        self._ran = set()

    def _leave(self, block, _arguments, _output) -> None:
        self.shape = None
        spared = vars(block).get("forward") is not own_forward(block)
        if self.all_run and not spared and (idle := self._changing - self._ran):
            kinds = " and ".join(sorted(type(module).__name__ for module in idle))
            raise SinkbookError(
                f"a layer, {type(block).__name__}, runs without its {kinds}, by which it was found "
                "to write. sinkbook changes what layers do for every text."
            )

    def _changed(
        self, module: nn.Module, states: Tensor, change: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """The states as `change` gives them, which it is handed as (batch, position, width)."""
        if self.shape is None:
            return states
        self._ran.add(module)
        shape = states.shape[:2] if self.own_shape and states.ndim > 2 else self.shape
        return change(states.reshape(*shape, -1)).reshape(states.shape)

    def change_output(
        self, module: nn.Module, change: Callable[[Tensor], Tensor], hooks: ExitStack
    ) -> None:
        """Put what `change` makes of a module's states in their place."""
        handle = module.register_forward_hook(
            lambda _, __, output: with_state(
                output, self._changed(module, state_of(output), change)
            )
        )
        self._changing.add(module)
        hooks.callback(handle.remove)

    def change_input(
        self, module: nn.Module, change: Callable[[Tensor], Tensor], hooks: ExitStack
    ) -> None:
        """Put what `change` makes of the states that a module reads in their place."""
        handle = module.register_forward_pre_hook(
            lambda _, inputs: (self._changed(module, inputs[0], change), *inputs[1:])
        )
        self._changing.add(module)
        hooks.callback(handle.remove)


def with_state(output: Output, state: Tensor) -> Output:
    """What a module gives, with another state in the place of its own."""
    if torch.is_tensor(output):
        return state
    rest = (state, *output[1:])
    return type(output)(*rest) if hasattr(output, "_fields") else type(output)(rest)


def rewrite(
    inside: Inside, terms: list[Term], write: Callable[[State, float], State], hooks: ExitStack
) -> None:
    """Have `write` change what a part adds, which may be the sum of several terms.

    It is given a term's states and what they are multiplied by before they are added; 0.0 for all
    but the first, whose place the others leave.
    """
    for place, term in enumerate(terms):
        factor = 0.0 if place else term.factor
        change = lambda states, factor=factor: write(states, factor)  # noqa: E731
        inside.change_output(term.module, change, hooks)


# --- The trial -------------------------------------------------------------------------------


def _tried(model: nn.Module) -> list[Writers]:
    found = layers(model)
    with on_trial(model) as run:
        sums = Sums()
        with sums:
            states = _run(run, found, lambda *at: None, sums)
        who = [_named(layer, sums.terms(n), n) for n, layer in enumerate(found)]
        for writing, (entered, _, _) in zip(who, states, strict=True):
            if entered.shape[:-1] != (TEXTS, LENGTH):
                writing.refusal = writing.odd_state = (
                    f"layers take states of the shape {tuple(entered.shape)} for {TEXTS} texts of "
                    f"{LENGTH} tokens, not (batch, position, width)"
                )
        tried = {
            written: _run(run, found, _writing_in(found, who, written))
            for written in (None, *PARTS)
        }
    for number, writing in enumerate(who):
        writing.refusal = writing.refusal or _fault(
            writing, {written: states[number] for written, states in tried.items()}, number
        )
    return who


def _named(layer: Layer, terms: list[Term] | str, number: int) -> Writers:
    """The terms of a layer's sum by the part that gives them."""
    if isinstance(terms, str):
        return Writers(refusal=f"layer {number} {terms}")
    names = {module: name for name, module in layer.block.named_modules()}
    owned = {
        part: set(owner.modules()) if owner is not None else set()
        for part, owner in (("attention", layer.attention), ("mlp", layer.mlp))
    }
    writing = Writers()
    for term in terms:
        name = names[term.module].lower()
        by_owner = (part for part in PARTS if term.comes_from(owned[part]))
        by_name = (part for part in PARTS if any(word in name for word in _NAMES[part]))
        getattr(writing, [*by_owner, *by_name, "others"][0]).append(term)
    return writing


def _run(
    run: Callable[[], object], found: list[Layer], prepare: Callable, sums: Sums | None = None
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Run with known states at the layers: each one's input, a vector to add, and its output."""
    kept: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
    with ExitStack() as hooks:
        for number, layer in enumerate(found):
            known: list[Tensor] = []

            def enter(block, arguments, keywords, number=number, known=known):
                call, known[:] = known_input(arguments, keywords, number)
                if sums is not None:
                    sums.begin(number, block, known[0])
                return call

            def leave(_block, _arguments, output, number=number, known=known):
                if number in kept:
                    raise SinkbookError(
                        f"layer {number} runs more than once for a text. sinkbook cuts parts of "
                        "layers that run once."
                    )
                if sums is not None:
                    sums.end(state_of(output))
                # The known ones anew, since layers may write into what they are given.
                kept[number] = (*_known_states(known[0], number), state_of(output))

            block = layer.block
            hooks.callback(block.register_forward_pre_hook(enter, with_kwargs=True).remove)
            prepare(number, known, hooks)
            hooks.callback(block.register_forward_hook(leave).remove)
        run()
    if len(kept) < len(found):
        raise SinkbookError(
            f"only {len(kept)} of {len(found)} layers run for a text. sinkbook cuts parts of "
            "layers that all run."
        )
    return [kept[number] for number in range(len(found))]


def known_input(
    arguments: tuple, keywords: dict, number: int, alike: bool = False
) -> tuple[tuple[tuple, dict], tuple[Tensor, Tensor]]:
    """A layer's call with a known state in the place of its own, and `_known_states`."""
    state, vector = _known_states(state_into(arguments, keywords), number)
    state = state[:1].expand_as(state).clone() if alike else state
    if "hidden_states" in keywords and not arguments:
        return (arguments, keywords | {"hidden_states": state}), (state, vector)
    if arguments:
        return ((state, *arguments[1:]), keywords), (state, vector)
    return ((), keywords | {next(iter(keywords)): state}), (state, vector)


def _known_states(like: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """A state and a vector whose sum is exact in every precision, other ones for each layer."""
    generator = torch.Generator().manual_seed(number)
    signs = torch.randint(0, 2, (2, *like.shape), generator=generator) * 2 - 1
    sizes = 2.0 ** -torch.randint(0, 2, like.shape, generator=generator)
    return signs[0].to(like), (signs[1] * sizes).to(like)


def _writing_in(found: list[Layer], who: list[Writers], written: str | None) -> Callable:
    """Cuts both parts of a layer, or writes the known vector in the place of one of them."""

    def prepare(number: int, known: list[Tensor], hooks: ExitStack) -> None:
        if who[number].refusal is not None:
            return
        inside = Inside(found[number].block, hooks)
        for part in PARTS:

            def write(states: Tensor, factor: float, part=part) -> Tensor:
                if part != written or not factor:
                    return torch.zeros_like(states)
                return (known[1] / factor).to(states)

            rewrite(inside, getattr(who[number], part), write, hooks)

    return prepare


def _fault(writing: Writers, tried: dict[str | None, tuple], number: int) -> str | None:
    """What is wrong with a layer's writers, by the states that it gave without and with them."""
    entered, vector, silent = tried[None]
    rounding = 16 * torch.finfo(silent.dtype).eps

    def same(one: Tensor, other: Tensor) -> bool:
        return torch.allclose(one, other, rtol=0, atol=rounding)

    if (writing.attention or not writing.others) and not same(silent, entered):
        return f"layer {number} adds more than its attention and MLP do: {writing.of_others()}"
    for part in PARTS:
        if getattr(writing, part) and not same(tried[part][2] - silent, vector):
            return f"what its {part} adds in layer {number} is changed before it is added"
    return None
