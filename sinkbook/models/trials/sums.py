"""Following sums: which modules' outputs a layer adds to the state that it takes.

What torch computes inside a layer is written down as a graph. From the state that the layer gives,
its sums are followed back to the state that it took; whatever else was added is a `Term`.
"""

from collections import Counter
from collections.abc import Collection, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sinkbook.models.partial_forward import state_of

_COPIES = ("clone", "_to_copy")


@dataclass(eq=False)
class _Node:
    """A tensor: the sum of its parents, `factor` times its only one, or anything else of them."""

    operation: str = "other"
    parents: list["_Node"] = field(default_factory=list)
    factor: float = 1.0
    modules: list[nn.Module] = field(default_factory=list)  # who give it, inner ones first


@dataclass(frozen=True)
class Term:
    """A module, `factor` times whose output is added."""

    module: nn.Module
    factor: float
    makers: frozenset[nn.Module]  # the modules through which it came, from the state on

    def comes_from(self, modules: Collection[nn.Module]) -> bool:
        return not self.makers.isdisjoint(modules)


class Sums(TorchDispatchMode):
    """In its context, notes what layers compute between `begin` and `end`."""

    def __init__(self):
        super().__init__()
        self._found: dict[int, list[Term] | str] = {}
        self._nodes: dict[tuple, _Node] | None = None  # of the layer that runs

    def begin(self, number: int, block: nn.Module, state: Tensor) -> None:
        """A layer begins to run on a state."""
        self._number, self._alive = number, [state]
        self._nodes = {_place(state): (start := _Node())}
        self._start, self._runs = start, Counter()
        self._hooks = ExitStack()
        for module in block.modules():
            if module is not block:
                self._hooks.callback(module.register_forward_hook(self._gave).remove)

    def end(self, state: Tensor) -> None:
        """The layer has given a state."""
        self._hooks.close()
        self._found[self._number] = self._terms(self._node(state))
        self._nodes = None

    def terms(self, number: int) -> list[Term] | str:
        """What a layer adds to the state that it takes, or why that cannot be said."""
        return self._found.get(number, "does not run")

    # --- Writing down ------------------------------------------------------------------------

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self._nodes is None:
            return function(*args, **kwargs)
        read = [self._node(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        result = function(*args, **kwargs)
        name = function.overloadpacket.__name__
        for given in tree_leaves(result):
            # A view of all of a tensor is that tensor; what is written in place is a new one.
            if isinstance(given, Tensor) and (name.endswith("_") or not self._knows(given)):
                self._alive.append(given)
                self._nodes[_place(given)] = _made(name.rstrip("_"), args, kwargs, read)
        return result

    def _knows(self, tensor: Tensor) -> bool:
        return _place(tensor) in self._nodes

    def _node(self, tensor: Tensor) -> _Node:
        """The node of a tensor; one of its own for what the layer did not compute."""
        if not self._knows(tensor):
            self._alive.append(tensor)  # so that its memory is not used again
            self._nodes[_place(tensor)] = _Node()
        return self._nodes[_place(tensor)]

    def _gave(self, module: nn.Module, _arguments, output) -> None:
        if output is None:
            return
        self._runs[module] += 1
        states = state_of(output)
        if isinstance(states, Tensor):
            self._node(states).modules.append(module)

    # --- Following back ----------------------------------------------------------------------

    def _terms(self, last: _Node) -> list[Term] | str:
        added, taken = [], []
        for node, factor in self._summands(last, 1.0):
            (taken if node is self._start else added).append((node, factor))
        if not taken:
            return "gives no sum with the state that it takes, but a norm of it, for example"
        if len(taken) > 1 or taken[0][1] != 1.0:
            return "scales the state that it takes"
        terms = []
        for node, factor in added:
            located = self._located(node, factor)
            if located is None:
                return "adds something that is not the output of any module"
            terms += located
        return terms

    def _summands(self, node: _Node, factor: float) -> Iterator[tuple[_Node, float]]:
        if node is self._start or node.operation == "other" or not self._holds_start(node):
            yield node, factor
            return
        for parent in node.parents:
            yield from self._summands(parent, factor * node.factor)

    def _holds_start(self, node: _Node) -> bool:
        """Whether the state that the layer took is a summand of a tensor."""
        if node is self._start or node.operation == "other":
            return node is self._start
        return any(self._holds_start(parent) for parent in node.parents)

    def _located(self, node: _Node, factor: float) -> list[Term] | None:
        """The modules that give a summand, or together the summands of it."""
        once = [module for module in node.modules if self._runs[module] == 1]
        if once:
            return [Term(once[-1], factor, frozenset(self._makers(node)))]
        if node.operation == "other":
            return None
        located = [self._located(parent, factor * node.factor) for parent in node.parents]
        return None if None in located else [term for terms in located for term in terms]

    def _makers(self, node: _Node) -> set[nn.Module]:
        makers, seen, ahead = set(), set(), [node]
        while ahead:
            node = ahead.pop()
            if node in seen or self._holds_start(node):
                continue
            seen.add(node)
            makers.update(node.modules)
            ahead += node.parents
        return makers


def _place(tensor: Tensor) -> tuple:
    """Where a tensor's numbers lie: the same for all views of the whole of it."""
    try:
        return tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.numel()
    except (RuntimeError, NotImplementedError):  # a wrapper of other tensors
        return (id(tensor),)


def _made(name: str, args: tuple, kwargs: dict, read: list[_Node]) -> _Node:
    """The node of what an operation makes of the tensors that it reads."""
    numbers = [a for a in args if isinstance(a, int | float)]
    tensors = [a for a in args if isinstance(a, Tensor)]
    alike = len(tensors) == 2 and tensors[0].numel() == tensors[1].numel()
    if name == "add" and alike and kwargs.get("alpha", 1) == 1:
        return _Node("sum", read)
    if name == "mul" and len(tensors) == 2 and not alike:
        single = [a.numel() == 1 for a in tensors]
        if any(single):
            number = float(tensors[single.index(True)])
            return _Node("scaled", [read[single.index(False)]], number)
    if name in ("mul", "div") and len(tensors) == 1 and len(numbers) == 1:
        number = float(numbers[0])
        return _Node("scaled", read, number if name == "mul" else 1 / number)
    if name in _COPIES and len(read) == 1:
        return _Node("scaled", read)
    return _Node("other", read)
