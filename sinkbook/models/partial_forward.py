"""Running only the upper layers of a model, on what the lower ones gave before.

A cut in layer 20 changes nothing below it. Who tries one cut after the other runs the model once
with `kept` and then, for each cut, only the layers from the cut on:

    with kept(model) as outputs:
        whole = model(tokens)
    with zero(model, "head", layer=20, head=3), given(model, outputs, below=20):
        without = model(tokens)
"""

import inspect
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from weakref import WeakValueDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sinkbook.annotations import check_arguments
from sinkbook.arguments import check_token_ids
from sinkbook.errors import SinkbookError
from sinkbook.models.layout import blocks, of_transformers
from sinkbook.models.wrappers import taking, uncompiled, unwrapped

Output = Tensor | tuple | list  # the states alone, or first of several


_GUARD = threading.Lock()
_LOCKS: WeakValueDictionary[int, object] = WeakValueDictionary()  # by the id of a block
_HOLDERS: dict[int, int] = {}  # threads, by the id of a block
_WAITING: dict[int, int] = {}  # the block that a thread waits for, by thread


@contextmanager
def alone_with(model: nn.Module) -> Iterator[None]:
    """Hold a model: another thread that wants to listen to its layers, or to change them, waits.

    Of one thread any number may lie inside each other. Models that share layers wait for each
    other, others do not. Who waits for another thread in the body should not need it for the model.
    Raises `SinkbookError` where two threads would wait for each other for ever.
    """
    with _GUARD:
        held = sorted({id(block) for block in blocks(model)})  # one order for all: no deadlock
        locks = {block: _LOCKS.setdefault(block, threading.RLock()) for block in held}
    with ExitStack() as stack:
        for block, lock in locks.items():
            _acquire(block, lock, type(model).__name__)
            stack.callback(_release, block, lock, _HOLDERS.get(block))
            _HOLDERS[block] = threading.get_ident()
        yield


def _acquire(block: int, lock, name: str) -> None:
    if lock.acquire(blocking=False):
        return
    me = threading.get_ident()
    with _GUARD:
        thread = _HOLDERS.get(block)
        while thread is not None and thread != me:
            thread = _HOLDERS.get(_WAITING.get(thread))
        if thread == me:
            raise SinkbookError(
                f"another thread uses this {name} and waits for a model that this thread uses, so "
                "both would wait for ever. Let each thread use one model at a time."
            )
        _WAITING[me] = block
    try:
        lock.acquire()
    finally:
        _WAITING.pop(me, None)


def _release(block: int, lock, before: int | None) -> None:
    if before != threading.get_ident():  # else it lies inside another body of this thread
        _HOLDERS.pop(block, None)
    lock.release()


@check_arguments
def logits_of(
    model: nn.Module, tokens: Int[Tensor, "text position"]
) -> Float[Tensor, "text position vocab"]:
    """The next-token logits of a causal language model, without a key-value cache.

    Raises `SinkbookError` for a model that gives none.
    """
    return logits_in(model, run_on(model, tokens))


def logits_in(model: nn.Module, output: object) -> Float[Tensor, "text position vocab"]:
    """The next-token logits in what a model gives.

    Raises `SinkbookError` if there are none: its states, or the labels of a classifier.
    """
    model = unwrapped(model)
    logits = answer_in(output)
    if of_transformers(model) and model.get_output_embeddings() is None:
        vocabulary = getattr(model.config.get_text_config(), "vocab_size", None)
        if not hasattr(output, "logits") or logits.shape[-1] != vocabulary:
            raise SinkbookError(
                f"{type(model).__name__} has no head that predicts the next token, so it has no "
                "loss. Load it as a causal language model: AutoModelForCausalLM."
            )
    return logits


@check_arguments
def run_on(model: nn.Module, tokens: Int[Tensor, "text position"]) -> object:
    """What a model gives for texts, without a key-value cache."""
    check_token_ids("tokens", tokens)
    model = unwrapped(model)
    cacheless = "use_cache" in inspect.signature(model.forward).parameters
    with taking(model, tokens):
        return model(tokens, **({"use_cache": False} if cacheless else {}))


def state_of(output: Output) -> Tensor:
    """The states that a layer or a part gives: its output, or the first of several."""
    return output if torch.is_tensor(output) else output[0]


def state_into(arguments: tuple, keywords: dict) -> Tensor:
    """The residual state that a block is called with: its first argument, by place or by name."""
    if arguments or "hidden_states" not in keywords:
        return next(iter((*arguments, *keywords.values())))
    return keywords["hidden_states"]


@contextmanager
def residual_states(model: nn.Module) -> Iterator[list[Float[Tensor, "batch position width"]]]:
    """Keep the residual states while the body runs the model once, the embedding first."""
    states: list[Tensor] = []
    found = blocks(model)
    with alone_with(model), uncompiled(), ExitStack() as hooks:
        first = found[0].register_forward_pre_hook(
            lambda _, arguments, keywords: states.append(state_into(arguments, keywords)),
            with_kwargs=True,
        )
        hooks.callback(first.remove)
        for block in found:
            leave = block.register_forward_hook(lambda *call: states.append(state_of(call[2])))
            hooks.callback(leave.remove)
        yield states


@contextmanager
def kept(model: nn.Module) -> Iterator[list[Output]]:
    """Keep what each layer gives while the body runs the model once."""
    outputs: list[Output] = []
    with alone_with(model), uncompiled(), ExitStack() as hooks:
        for block in blocks(model):
            handle = block.register_forward_hook(lambda *call: outputs.append(call[2]))
            hooks.callback(handle.remove)
        yield outputs


@contextmanager
def given(model: nn.Module, outputs: Sequence[Output], *, below: int) -> Iterator[None]:
    """In the body the layers `below` do not run, but give what they gave before.

    `outputs` is what `kept` found for the same tokens. Whether that is the same as running all
    layers depends on the architecture: ask `can_resume`.
    """
    with alone_with(model), uncompiled(), ExitStack() as undo:
        for block, output in zip(blocks(model)[:below], outputs, strict=False):
            own = vars(block).get("forward")
            undo.callback(partial(put_back, block, own))
            block.forward = partial(_again, output)
            block.forward.own = own
        yield


def own_forward(module: nn.Module) -> Callable | None:
    """The forward function that a module itself carries, if any: not what `given` puts there."""
    forward = vars(module).get("forward")
    given_to_it = isinstance(forward, partial) and forward.func is _again
    return forward.own if given_to_it else forward


@contextmanager
def all_running(model: nn.Module) -> Iterator[None]:
    """In the body all layers run, also those that `given` spares outside of it."""
    spared = [
        (module, vars(module)["forward"])
        for module in model.modules()
        if vars(module).get("forward") is not own_forward(module)
    ]
    try:
        for module, stand_in in spared:
            put_back(module, stand_in.own)
        yield
    finally:
        for module, stand_in in spared:
            module.forward = stand_in


@check_arguments
@torch.no_grad()
def can_resume(model: nn.Module, tokens: Int[Tensor, "text position"]) -> bool:
    """Whether the upper layers need nothing from the lower ones but the residual state.

    Tried on the beginning of one text, from the middle of the model and from its last layer. The
    answer is no where layers share keys and values, for example.
    """
    check_token_ids("tokens", tokens)
    tokens = tokens[:1, :8]
    with kept(model) as outputs:
        whole = answer_in(run_on(model, tokens))
    for below in {len(outputs) // 2, len(outputs) - 1}:
        with given(model, outputs, below=below):
            try:
                again = answer_in(run_on(model, tokens))
            except Exception:  # whatever a layer raises that misses what another had left for it
                return False
        if not torch.allclose(again, whole, rtol=1e-4, atol=1e-4):
            return False
    return True


def answer_in(output: object) -> Tensor:
    """The logits of what a model gives, or its states."""
    if hasattr(output, "logits"):
        return output.logits
    return state_of(output.to_tuple() if hasattr(output, "to_tuple") else output)


def _again(output: Output, *_arguments, **_keywords) -> Output:
    # A copy, since some architectures add to what they get in place.
    return output.clone() if torch.is_tensor(output) else (output[0].clone(), *output[1:])


def put_back(module: nn.Module, own: Callable | None) -> None:
    """Take what stands in for a module's forward function away.

    `own` is the one that the module itself carried before; None if it had that of its class.
    """
    del module.forward
    if own is not None:
        module.forward = own
