"""Arguments are what their annotations say: looked at where they enter, for whoever calls us.

    @check_arguments
    def perplexity(losses: xr.DataArray, *, after: int = 0) -> xr.DataArray: ...

A class of settings does the same with `check_fields(self)`. What is refused is one message, which
names the argument. Whole numbers are counts, places and seeds: from 0 on. How large they may be
besides, and which model or table of ids will do, is said by whoever reads them.
"""

import functools
import inspect
import math
import typing
from collections.abc import Callable, Collection, Iterable, Mapping
from numbers import Real
from pathlib import Path
from types import NoneType, UnionType
from typing import TypeVar

from sinkbook.arguments import check_kind, check_number, shown, whole_number
from sinkbook.errors import SinkbookError

Function = TypeVar("Function", bound=Callable)

# Who reads these says what fits, better than an annotation: any model, any sequence, anything.
_READ_LATER = {
    "Any",
    "Holder",
    "Iterable",
    "Module",
    "PreTrainedModel",
    "Sequence",
    "SupportsIndex",
}
_VALUES = {"Int": "whole numbers", "Bool": "truth values"}  # of arrays; else numbers
_MADE_BY = {"Dataset": "measure", "LanguageModel": "load", "Run": "train"}
_ARRAYS = {"Tensor": "tensor of torch", "ndarray": "array of numpy", "DataArray": "DataArray"}


def check_arguments(function: Function) -> Function:
    """A function that refuses arguments of other kinds than its annotations say.

    Numbers of numpy, and tensors of one whole number, are given to it as Python's own.

    >>> @check_arguments
    ... def half(of: int, *, rounded: bool = False): return of / 2
    >>> half(True)
    Traceback (most recent call last):
    ...
    sinkbook.errors.SinkbookError: `of=True` is no whole number. Give one from 0 on.
    """

    @functools.cache
    def known() -> tuple[inspect.Signature, dict]:
        return inspect.signature(function), typing.get_type_hints(function)

    @functools.wraps(function)
    def checked(*arguments, **named):
        signature, kinds = known()
        try:
            given = signature.bind(*arguments, **named)
        except TypeError:
            return function(*arguments, **named)  # Python says which one is missing, or unknown
        with _shapes_in_common():
            for name, value in given.arguments.items():
                given.arguments[name] = _all_fitting(signature.parameters[name], value, kinds)
        return function(*given.args, **given.kwargs)

    return checked


def _all_fitting(parameter: inspect.Parameter, value: object, kinds: dict) -> object:
    """The value of a parameter, or all that are given to it where it takes several."""
    name = parameter.name
    if name not in kinds:
        return value
    infinite = isinstance(parameter.default, float) and math.isinf(parameter.default)
    if parameter.kind == parameter.VAR_POSITIONAL:
        return tuple(_fitting(name, each, kinds[name]) for each in value)
    if parameter.kind == parameter.VAR_KEYWORD:
        return {key: _fitting(key, each, kinds[name]) for key, each in value.items()}
    return _fitting(name, value, kinds[name], infinite)


def check_fields(config: object) -> None:
    """Refuse a config whose fields are not what their annotations say, with Python's own numbers.

    Those of others would not be found in the store, where its JSON is part of a name.
    """
    with _shapes_in_common():
        for name, kind in typing.get_type_hints(type(config)).items():
            value = getattr(config, name)
            if typing.get_origin(kind) is tuple and not isinstance(value, tuple):
                raise SinkbookError(f"`{name}={shown(value)}` is no tuple. Give one: (0,).")
            fitting = _fitting(name, value, kind)
            for own, theirs in zip(_flat(fitting), _flat(value), strict=True):
                if not isinstance(theirs, int | float | type(own)):
                    raise SinkbookError(
                        f"`{name}={shown(theirs)}` is a {type(theirs).__name__}, and a config is "
                        f"made of Python's own numbers. Give {own!r}."
                    )


def _flat(value: object) -> tuple:
    return value if isinstance(value, tuple) else (value,)


def _shapes_in_common():
    """In its body the axes of all arrays that have the same name are as long as each other."""
    from jaxtyping import jaxtyped  # numpy comes with it, which `sinkbook --help` does without

    return jaxtyped("context")


def _fitting(name: str, value: object, kind: object, infinite: bool = False) -> object:
    """What is given in the place of an argument: the value, if it is of the kind."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, UnionType):
        return _one_of(name, value, inner)
    if kind is bool:
        own = value.item() if getattr(value, "shape", None) == () else value  # of numpy
        check_kind(name, own, bool)
        return own
    if kind is int:
        return whole_number(name, value)
    if kind is float:
        check_number(name, value, infinite=infinite)
        return float(value)
    if kind is Path and isinstance(value, str):
        return Path(value)
    if hasattr(kind, "dim_str"):
        return _array(name, value, kind)
    if origin is not None and inner and issubclass(origin, Iterable):
        return _several(name, value, origin, inner)
    return _of_class(name, value, origin or kind)


def _one_of(name: str, value: object, kinds: tuple) -> object:
    """A value that is of one kind of several. Where one is looked at later, so are all."""
    others = [kind for kind in kinds if kind is not NoneType]
    if (value is None and len(others) < len(kinds)) or any(map(_is_read_later, others)):
        return value
    if len(others) == 1:
        return _fitting(name, value, *others)
    refusals = []
    for kind in others:
        try:
            return _fitting(name, value, kind)
        except SinkbookError as error:
            refusals.append(error)
    for kind, refusal in zip(others, refusals, strict=True):
        several = typing.get_args(kind) and not isinstance(value, str | bytes)
        if (
            isinstance(value, Iterable)
            if several
            else kind in (int, float) and isinstance(value, Real)
        ):
            raise refusal
    wanted = " or ".join(map(_in_words, others))
    raise SinkbookError(f"`{name}={_seen(value)}` is no {wanted}. Give one.")


def _several(name: str, value: object, origin: type, inner: tuple) -> object:
    """A list or the like, with all that it holds; what comes one by one is read later."""
    if issubclass(origin, Mapping):
        if not isinstance(value, Mapping):
            raise SinkbookError(f"`{name}={_seen(value)}` is no dict. Give one.")
        for key, each in value.items():
            _alone(name, key, inner[0])
            _alone(name, each, inner[1])
        return value
    if isinstance(value, str):
        raise SinkbookError(f"{name} is one string, {value[:30]!r}. Give a list: [{name}].")
    items = None if isinstance(value, bytes | Mapping) else value
    if not isinstance(items, Iterable) or (hasattr(value, "ndim") and not value.ndim):
        wanted = " or ".join(f"{_in_words(kind)}s" for kind in inner if kind is not ...)
        raise SinkbookError(f"`{name}={_seen(value)}` is no list of {wanted}. Give one.")
    if not isinstance(items, Collection):
        return value
    if origin is tuple and inner[-1] is not ...:
        if len(items) != len(inner):
            raise SinkbookError(f"`{name}={_seen(value)}` is not {len(inner)} values. Give those.")
        kinds = inner
    else:
        kinds = (inner[0],) * len(items)
    fitting = [_alone(name, each, kind) for each, kind in zip(items, kinds, strict=True)]
    return type(value)(fitting) if type(value) in (list, tuple) else value


def _alone(name: str, value: object, kind: object) -> object:
    """One of several: arrays in a list need not be as long as each other."""
    with _shapes_in_common():
        return _fitting(name, value, kind)


def _array(name: str, value: object, kind: type) -> object:
    """An array of the shape and of the values that its annotation in jaxtyping's words says."""
    found = _as_asked(value, kind)
    if isinstance(found, kind):
        return found
    with _shapes_in_common():
        alone = isinstance(found, kind)
    of, values = _ARRAYS[kind.array_type.__name__], _VALUES.get(kind.dtype.__name__, "numbers")
    over = ", ".join(dim.strip("*_ ") for dim in kind.dim_str.split() if dim != "...")
    over = f" over ({over})" if over else ""
    if alone:
        raise SinkbookError(
            f"`{name}` of shape {tuple(found.shape)} does not go with what else is given. Give "
            f"one{over} in which axes of one name are of one length."
        )
    raise SinkbookError(f"`{name}={_seen(value)}` is no {of} of {values}{over}. Give one.")


def _as_asked(value: object, kind: type) -> object:
    """Lists and arrays of others as numpy's, and whole numbers as floats, where those are asked."""
    import numpy as np

    if kind.array_type.__name__ == "Tensor":
        return value
    array = value
    if kind.array_type is np.ndarray and (
        isinstance(value, list | tuple) and value or hasattr(value, "__array__")
    ):
        try:
            array = np.asarray(value)
        except (ValueError, TypeError, RuntimeError):  # rows of several lengths; a GPU's
            return value
    if not isinstance(array, kind.array_type) or array.dtype.kind not in "biuf":
        return value
    floats = kind.dtype.__name__.startswith("Float") and array.dtype.kind in "iu"
    return array.astype(float) if floats else array


def _of_class(name: str, value: object, kind: object) -> object:
    """What is of a class, or can be called."""
    if kind is Callable:
        if not callable(value):
            raise SinkbookError(f"`{name}={_seen(value)}` cannot be called. Give a function.")
    elif isinstance(kind, type) and not _is_read_later(kind) and not isinstance(value, kind):
        made_by = _MADE_BY.get(kind.__name__)
        instead = f"what `{made_by}` returns" if made_by else "one"
        raise SinkbookError(f"`{name}={_seen(value)}` is no {_in_words(kind)}. Give {instead}.")
    return value


def _is_read_later(kind: object) -> bool:
    """Whether it is for the function to say what fits."""
    return getattr(kind, "__name__", "") in _READ_LATER and not typing.get_args(kind)


def _in_words(kind: object) -> str:
    """What a kind is called in a message."""
    words = {str: "string", int: "whole number", float: "number", Path: "path", list: "list"}
    return words.get(kind) or words.get(typing.get_origin(kind)) or getattr(kind, "__name__", "")


def _seen(value: object) -> str:
    """A value in a message: of an array, what it holds and its shape."""
    if hasattr(value, "dtype") and getattr(value, "shape", ()):
        return f"{value.dtype} of shape {tuple(value.shape)}"
    return shown(value)
