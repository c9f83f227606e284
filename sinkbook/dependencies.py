"""What a result depends on: the code that makes it, followed from import to import.

    code_hash("sinkbook.toy.training")            # a module and all that it uses
    code_hash("sinkbook.figures.basic:head_map")  # one function and all that it uses

The sources are parsed, never imported. What counts are the definitions that can be reached by name,
and what a module does when it is imported: an edit of one function changes the hashes of what uses
it, and of nothing else. Comments and docstrings do not count, nor does formatting, nor what can
only refuse: checks of arguments, and `weights_only=True`. Where names are looked up in a way that
cannot be followed, all that might be meant is taken: too much, never too little.
"""

import ast
import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from sinkbook.errors import SinkbookError
from sinkbook.syntax import ROOT, Module, is_ours, module_at

FOLDER = Path(__file__).parent  # of the package
CELLS = "cells"  # the name that a notebook's code goes by

# What shows, hands out and keeps runs, and has no part in their numbers.
KEEPERS = tuple(
    f"{ROOT}.{name}"
    for name in (
        "annotations",
        "arguments",
        "children",
        "dependencies",
        "devices",
        "errors",
        "files",
        "parallel",
        "progress",
        "provenance",
        "store",
        "syntax",
    )
)

# Calls that can import, or run, what no name tells.
_UNKNOWN = {"__import__", "eval", "exec", "import_module", "run_module", "run_path"}


@dataclass(frozen=True)
class Closure:
    """What a result depends on: dumps of definitions by module and name, and files beside them."""

    definitions: dict[tuple[str, str], str]
    modules: frozenset[str]  # those whose import is part of it
    files: dict[str, bytes] = field(repr=False)
    paths: frozenset[Path] = frozenset()  # of all that was read for it

    @property
    def hash(self) -> str:
        """A hash of all of it."""
        digest = hashlib.sha256()
        for (module, name), dump in sorted(self.definitions.items()):
            digest.update(f"{module}:{name}\0{dump}\0".encode())
        for name, content in sorted(self.files.items()):
            digest.update(name.encode() + b"\0" + content + b"\0")
        return digest.hexdigest()


@cache
def code_hash(*roots: str, without: tuple[str, ...] = KEEPERS) -> str:
    """A hash of the code that is reached from some modules, or definitions `module:name`.

    It is not followed into what is named in `without`: packages, modules, definitions. Computed
    once a process.
    Raises `SinkbookError` for a module or definition that is not there.
    """
    return closure(*roots, without=without).hash


def closure(
    *roots: str, without: Iterable[str] = (), cells: str = "", folder: Path | None = None
) -> Closure:
    """All that is reached from some roots (see `code_hash`), and from the code of a notebook.

    `folder` is that of the package, by default this one's.
    """
    reached = _Reached(folder or FOLDER, tuple(without))
    if cells:
        reached.modules[CELLS] = Module(CELLS, ast.parse(cells), is_package=False, stub=None)
        reached.whole(CELLS)
    for root in roots:
        module, _, name = root.partition(":")
        if not reached.is_module(module) or (name and not reached.defines(module, name)):
            raise SinkbookError(f"no module or definition {root!r} whose code could be followed.")
        if name:
            reached.name(module, (name,))
        else:
            reached.whole(module)
    return reached.closure()


class _Reached:
    """What has been reached so far."""

    def __init__(self, folder: Path, without: tuple[str, ...]):
        self.folder, self.without = folder, without
        self.paths: dict[str, Path | None] = {}
        self.folders: dict[str, bool] = {}
        self.modules: dict[str, Module] = {}
        self.definitions: dict[tuple[str, str], list[str]] = {}
        self.touched: set[str] = set()
        self.wholes: set[str] = set()
        self.followed: set[tuple] = set()
        self.waiting: list[tuple[Module, ast.stmt]] = []

    def closure(self) -> Closure:
        while self.waiting:
            self._follow(*self.waiting.pop())
        paths = {path for name in self.touched if (path := self._path(name))}
        folders = {path.parent for path in paths}
        beside = [
            path
            for folder in folders
            for path in folder.iterdir()
            if path.is_file() and path.suffix not in {".py", ".pyc", ".pyi", ".typed"}
            if not path.name.startswith(".")
        ]
        return Closure(
            {key: "\n".join(sorted(set(dumps))) for key, dumps in self.definitions.items()},
            frozenset(self.touched),
            {path.relative_to(self.folder).as_posix(): path.read_bytes() for path in beside},
            frozenset(paths.union(beside)),
        )

    # --- Modules ---

    def is_module(self, name: str) -> bool:
        return name in self.modules or self._path(name) is not None

    def defines(self, module: str, name: str) -> bool:
        return name in self._module(module).bindings or name in self._module(module).imports

    def _path(self, name: str) -> Path | None:
        if not is_ours(name):
            return None
        if name not in self.paths:
            package, candidates = name.rpartition(".")[0], ()
            if not package or self._is_folder(package):  # most names are of attributes
                place = self._place(name)
                candidates = (place / "__init__.py", place.parent / f"{place.name}.py")
            self.paths[name] = next(filter(Path.is_file, candidates), None)
        return self.paths[name]

    def _place(self, name: str) -> Path:
        return self.folder.joinpath(*name.split(".")[1:])

    def _is_folder(self, name: str) -> bool:
        if name not in self.folders:
            self.folders[name] = self._place(name).is_dir()
        return self.folders[name]

    def _module(self, name: str) -> Module:
        if name not in self.modules:
            path = self._path(name)
            stub = path.with_suffix(".pyi")
            stamps = [p.stat().st_mtime_ns for p in (path, stub) if p.is_file()]
            self.modules[name] = module_at(name, path, *stamps)
        return self.modules[name]

    def _is_left_out(self, module: str) -> bool:
        return any(module == w or module.startswith(f"{w}.") for w in self.without)

    def imported(self, name: str) -> None:
        """A module is imported: what it does then counts, and what the modules do it imports."""
        if name in self.touched or not self.is_module(name) or self._is_left_out(name):
            return
        self.touched.add(name)
        if "." in name:
            self.imported(name.rpartition(".")[0])
        module = self._module(name)
        for statement in module.on_import:
            self._reach(module, "on import", statement)
        self._imported_by(module.imported)

    def _imported_by(self, targets: Iterable[tuple[str, str | None]]) -> None:
        for module, attribute in targets:
            if not is_ours(module):
                continue
            self.imported(module)
            if attribute == "*":
                self.whole(module)
            elif attribute:
                self.imported(f"{module}.{attribute}")

    def whole(self, name: str) -> None:
        """A module may be used in any way, as where it is given to a function."""
        self.imported(name)
        if name in self.wholes or name not in self.touched:
            return
        self.wholes.add(name)
        module = self._module(name)
        for bound in [*module.bindings, *module.imports]:
            if not any(
                self.is_module(f"{t}.{a}" if a else t) for t, a in module.imports.get(bound, ())
            ):
                self.name(name, (bound,))
        if module.is_package:
            for path in sorted(self._path(name).parent.iterdir()):
                if self.is_module(f"{name}.{path.stem}") and path.stem != "__init__":
                    self.whole(f"{name}.{path.stem}")

    # --- Names ---

    def name(self, name: str, chain: tuple[str, ...]) -> None:
        """A name of a module is used, and an attribute of that, and so on; none: the module."""
        if not chain:
            self.whole(name)
            return
        self.imported(name)
        if name not in self.touched or (name, chain) in self.followed:
            return
        self.followed.add((name, chain))
        module, (first, *rest) = self._module(name), chain
        if f"{name}:{first}" in self.without:
            return
        bound = first in module.bindings or first in module.imports
        for statement in module.bindings.get(first, ()):
            self._reach(module, first, statement)
        for target in module.imports.get(first, ()):
            self.target(module, first, target, tuple(rest))
        if self.is_module(f"{name}.{first}") and (not bound or (first in module.lazy and rest)):
            self.name(f"{name}.{first}", tuple(rest))
        elif not bound and "__getattr__" in module.bindings:
            self.name(name, ("__getattr__",))
        elif not bound and not first.startswith("__"):
            self.whole(name)

    def target(
        self, user: Module, bound: str, target: tuple[str, str | None], rest: tuple[str, ...]
    ) -> None:
        """What was imported under a name is used: a module, or an attribute of one."""
        module, attribute = target
        if self.is_module(module):
            self.name(module, (attribute, *rest) if attribute else rest)
        else:
            self.definitions.setdefault((user.name, bound), []).append(f"{module}:{attribute}")

    def _reach(self, module: Module, name: str, statement: ast.stmt) -> None:
        dumps = self.definitions.setdefault((module.name, name), [])
        dumps.append(module.read(statement).dump)
        if (module.name, id(statement)) not in self.followed:
            self.followed.add((module.name, id(statement)))
            self.waiting.append((module, statement))

    def _follow(self, module: Module, statement: ast.stmt) -> None:
        """Reach what a statement uses."""
        read = module.read(statement)
        self._imported_by(target for _, target in read.imports)
        for chain in read.chains:
            first, *rest = chain
            for bound, target in read.imports:
                if bound == first:
                    self.target(module, bound, target, tuple(rest))
            known = first in module.bindings or first in module.imports
            if known and (module.name, chain) not in self.followed:
                self.name(module.name, chain)
            if chain[-1] in _UNKNOWN and (len(chain) == 1 or chain[-1] not in ("eval", "exec")):
                self.whole(ROOT)
            if chain in {("globals",), ("vars",), ("locals",)}:
                self.whole(module.name)
        for text in read.texts:
            if "." in text and self.is_module(text):
                # Who imports or runs it by that name; or, a package, reads the files in its folder.
                (self.imported if self._module(text).is_package else self.whole)(text)
