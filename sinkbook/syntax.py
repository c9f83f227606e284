"""What the text of a module says: which statement binds which name, and what it uses.

Modules are parsed, never imported.
"""

import ast
import builtins
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = "sinkbook"  # the package whose modules are read
# What has `check_` before its name there can only refuse.
CHECKS = (f"{ROOT}.arguments", f"{ROOT}.annotations", f"{ROOT}.devices")

_NAMES = (ast.Name, ast.Tuple, ast.List, ast.Starred, ast.expr_context)


@dataclass(frozen=True)
class Statement:
    """What a statement says, in the terms that are needed here."""

    dump: str  # without docstrings, comments, places, and what can only refuse
    chains: frozenset[tuple[str, ...]]  # names with the attributes taken of them
    imports: tuple[tuple[str, tuple[str, str | None]], ...]  # inside it
    texts: frozenset[str]

    @classmethod
    def of(cls, statement: ast.stmt, package: str, checks: frozenset[str]) -> "Statement":
        for node in ast.walk(statement):
            body = getattr(node, "body", None)
            if isinstance(body, list):
                node.body = [
                    child for child in body if not (_is_text(child) or _refuses(child, checks))
                ]
            if hasattr(node, "decorator_list"):
                node.decorator_list = [d for d in node.decorator_list if not _named(d, checks)]
            if isinstance(node, ast.Call):
                node.keywords = [given for given in node.keywords if not _is_for_weights(given)]
        nodes = list(ast.walk(statement))
        constants = [node.value for node in nodes if isinstance(node, ast.Constant)]
        return cls(
            ast.dump(statement),
            frozenset(_chains(statement)),
            tuple(pair for node in nodes for pair in _imports(node, package)),
            frozenset(value for value in constants if isinstance(value, str)),
        )


class Module:
    """The top level of a module: what binds which name, and what runs when it is imported."""

    def __init__(self, name: str, tree: ast.Module, *, is_package: bool, stub: ast.Module | None):
        self.name, self.is_package = name, is_package
        self.bindings: dict[str, list[ast.stmt]] = {}
        self.imports: dict[str, list[tuple[str, str | None]]] = {}
        self.on_import: list[ast.stmt] = []  # statements that do more than bind a name
        self.imported: list[tuple[str, str | None]] = []  # on import of this module
        self.lazy = set()  # names that a stub binds
        self._read: dict[int, Statement] = {}
        for statement in tree.body:
            if not _is_text(statement):
                self._add(statement)
        if stub is not None:
            for node in ast.walk(stub):
                for bound, target in _imports(node, self.package):
                    self.imports.setdefault(bound, []).append(target)
                    self.lazy.add(bound)

    @property
    def package(self) -> str:
        return self.name if self.is_package else self.name.rpartition(".")[0]

    def read(self, statement: ast.stmt) -> Statement:
        """What a statement of this module says; read once."""
        if id(statement) not in self._read:
            self._read[id(statement)] = Statement.of(statement, self.package, self._checks())
        return self._read[id(statement)]

    def _checks(self) -> frozenset[str]:
        """The names by which this module calls checks of arguments."""
        return frozenset(
            bound
            for bound, targets in self.imports.items()
            if all(m in CHECKS and (a or "").startswith("check_") for m, a in targets)
        )

    def _add(self, statement: ast.stmt) -> None:
        runs = not _is_for_types(statement)
        match statement:
            case ast.Import() | ast.ImportFrom():
                runs = False
                self.imported += [target for _, target in _imports(statement, self.package)]
            case ast.FunctionDef() | ast.AsyncFunctionDef():
                checks = self._checks()
                others = [each for each in statement.decorator_list if not _named(each, checks)]
                runs = any(map(self._may_register, others))
            case ast.ClassDef():
                # A base or metaclass of the package may keep a list of those that derive from it.
                bases = [*statement.bases, *(k.value for k in statement.keywords)]
                runs = any(map(self._may_register, [*bases, *statement.decorator_list]))
            case ast.Assign() | ast.AnnAssign():
                targets = getattr(statement, "targets", None) or [statement.target]
                plain = all(isinstance(n, _NAMES) for t in targets for n in ast.walk(t))
                calls = [n.func for n in ast.walk(statement) if isinstance(n, ast.Call)]
                runs = not plain or any(map(self._may_register, calls))
        if runs:
            self.on_import.append(statement)
        for node in _outside_of_functions(statement):
            for bound, target in _imports(node, self.package):
                self.imports.setdefault(bound, []).append(target)
                if runs:
                    self.imported.append(target)
            for bound in _bound_by(node):
                self.bindings.setdefault(bound, []).append(statement)

    def _may_register(self, called: ast.expr) -> bool:
        """Whether a call may leave something behind: one of the package, or a registration."""
        called = called.func if isinstance(called, ast.Call) else called
        root, last = _root(called), called.attr if isinstance(called, ast.Attribute) else ""
        outside = root in self.imports and not any(is_ours(m) for m, _ in self.imports[root])
        return not (outside or root in vars(builtins)) or last.startswith("register")


@cache
def module_at(name: str, path: Path, changed: int, stub_changed: int | None = None) -> Module:
    """A module as it was at a time, read once."""
    stub = None
    if stub_changed is not None:
        stub = ast.parse(path.with_suffix(".pyi").read_text(encoding="utf-8"))
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return Module(name, tree, is_package=path.name == "__init__.py", stub=stub)


def is_ours(module: str) -> bool:
    return module == ROOT or module.startswith(f"{ROOT}.")


def _is_text(node: ast.AST) -> bool:
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )


_CALLING = (ast.Call, ast.NamedExpr, ast.Await, ast.Yield, ast.YieldFrom)


def _refuses(node: ast.AST, checks: frozenset[str]) -> bool:
    """Whether it is a check of arguments that stands alone, or a method of nothing else."""
    if isinstance(node, ast.FunctionDef):
        body = [child for child in node.body if not _is_text(child)]
        return bool(body) and all(_refuses(child, checks) for child in body)
    if not isinstance(node, ast.Expr) or not isinstance(node.value, ast.Call):
        return False
    given = [*node.value.args, *node.value.keywords]
    calls = any(isinstance(inner, _CALLING) for each in given for inner in ast.walk(each))
    return _named(node.value.func, checks) and not calls


def _named(node: ast.expr, names: frozenset[str]) -> bool:
    return isinstance(node, ast.Name) and node.id in names


def _is_for_weights(given: ast.keyword) -> bool:
    """Whether it has torch refuse a file that holds more than numbers."""
    value = given.value
    return given.arg == "weights_only" and isinstance(value, ast.Constant) and value.value is True


def _root(node: ast.expr) -> str | None:
    while isinstance(node, ast.Attribute | ast.Call | ast.Subscript):
        node = node.func if isinstance(node, ast.Call) else node.value
    return node.id if isinstance(node, ast.Name) else None


def _is_for_types(statement: ast.stmt) -> bool:
    """Whether it is `if TYPE_CHECKING:`, which never runs."""
    test = statement.test if isinstance(statement, ast.If) and not statement.orelse else None
    name = test.attr if isinstance(test, ast.Attribute) else getattr(test, "id", None)
    return name == "TYPE_CHECKING"


def _outside_of_functions(node: ast.AST) -> Iterator[ast.AST]:
    """A top-level statement and what it contains that binds names of the module."""
    yield node
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        for child in ast.iter_child_nodes(node):
            yield from _outside_of_functions(child)


def _bound_by(node: ast.AST) -> Iterator[str]:
    match node:
        case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
            yield node.name
        case ast.Name(ctx=ast.Store()):
            yield node.id
        case ast.ExceptHandler(name=str(name)):
            yield name


def _imports(node: ast.AST, package: str) -> Iterator[tuple[str, tuple[str, str | None]]]:
    """The names that an import binds, and of what: a module, or an attribute of one."""
    if isinstance(node, ast.Import):
        for alias in node.names:
            bound = alias.asname or alias.name.partition(".")[0]
            yield bound, (alias.name if alias.asname else bound, None)
            if not alias.asname and "." in alias.name:
                yield "", (alias.name, None)  # binds no name of its own, but is imported
    elif isinstance(node, ast.ImportFrom):
        module = node.module or ""
        if node.level:
            parts = package.split(".")
            base = ".".join(parts[: len(parts) - node.level + 1])
            module = f"{base}.{module}" if module else base
        for alias in node.names:
            yield alias.asname or alias.name, (module, alias.name)


def _chains(node: ast.AST) -> Iterator[tuple[str, ...]]:
    """The names that are used, each with the attributes that are taken of it: `("np", "mean")`."""
    if isinstance(node, ast.Attribute):
        attributes, value = [node.attr], node.value
        while isinstance(value, ast.Attribute):
            attributes.append(value.attr)
            value = value.value
        if isinstance(value, ast.Name):
            yield (value.id, *reversed(attributes))
            return
    elif isinstance(node, ast.Name):
        yield (node.id,)
    for child in ast.iter_child_nodes(node):
        yield from _chains(child)
