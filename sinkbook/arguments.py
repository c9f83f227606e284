"""Checks of arguments where they enter: each names what does not fit, its value, and what does.

What begins with `check_` only refuses. Standing alone, with nothing called in its arguments, such a
statement is no part of what decides a result, nor is `@check_arguments` before a function:
`syntax.py` leaves them out, so that a stored run is found again after its arguments are looked at
more closely.

What an argument *is*, its annotation says, and `annotations.py` reads it; how large it may be, and
what goes with what, is said by the statements.
"""

import math
from collections.abc import Collection, Iterable
from numbers import Real
from operator import index
from types import UnionType

from sinkbook.errors import SinkbookError

# The seeds that there are. From the first one on that there is not, texts are held out.
SEEDS = 2**31

LARGEST = 2**63 - 1  # what the libraries beneath take for a whole number

Number = int | float
Limits = Number | tuple[Number, Number]  # the least value, or the least and the most


def whole_number(name: str, value: object, least: int = 0, most: int = LARGEST) -> int:
    """The value of an argument that must be a whole number, from `least` to `most`.

    >>> whole_number("window", 4.0, 1)
    Traceback (most recent call last):
    ...
    sinkbook.errors.SinkbookError: `window=4.0` is no whole number. Give one from 1 on.
    """
    there = f"from {least} on" if most == LARGEST else f"from {least} to {most}"
    try:
        if isinstance(value, bool):
            raise TypeError
        number = index(value)
    except TypeError:
        raise SinkbookError(
            f"`{name}={shown(value)}` is no whole number. Give one {there}."
        ) from None
    if number < least:
        instead = f"{least} or more" if most == LARGEST else f"one {there}"
        raise SinkbookError(f"`{name}={shown(value)}` is too small. Give {instead}.")
    if number > most:
        instead = "less than 2**63" if most == LARGEST else f"one {there}"
        raise SinkbookError(f"`{name}={shown(value)}` is too large. Give {instead}.")
    return number


def check_whole_number(name: str, value: object, least: int = 0, most: int = LARGEST) -> None:
    """Refuse what is no whole number from `least` to `most`."""
    whole_number(name, value, least, most)


def check_seed(seed: object) -> None:
    """Refuse what is no seed of a training: from 2**31 on, they are those of held-out texts."""
    whole_number("seed", seed, 0, SEEDS - 1)


def check_number(
    name: str,
    value: object,
    least: Number = -math.inf,
    most: Number = math.inf,
    *,
    infinite: bool = False,
) -> None:
    """Refuse what is no number from `least` to `most`, or is infinite where it may not be.

    >>> check_number("learning_rate", float("nan"), 0)
    Traceback (most recent call last):
    ...
    sinkbook.errors.SinkbookError: `learning_rate=nan` is no finite number. Give one from 0 on.
    """
    bounds = {(True, True): f" from {least} to {most}", (True, False): f" from {least} on"}
    there = bounds.get((least > -math.inf, most < math.inf), "")
    real = isinstance(value, Real) and not isinstance(value, bool)
    if not real or math.isnan(value) or (math.isinf(value) and not infinite):
        raise SinkbookError(f"`{name}={shown(value)}` is no finite number. Give one{there}.")
    if not least <= value <= most:
        raise SinkbookError(f"`{name}={shown(value)}` is out of range. Give a number{there}.")


def check_whole_numbers(config: object, **limits: Limits) -> None:
    """Refuse a config with fields that are no whole numbers within their limits."""
    for name, limit in limits.items():
        check_whole_number(name, getattr(config, name), *_pair(limit))


def check_numbers(config: object, **limits: Limits) -> None:
    """Refuse a config with fields that are no finite numbers within their limits."""
    for name, limit in limits.items():
        check_number(name, getattr(config, name), *_pair(limit))


def check_multiple(name: str, value: object, of: int) -> None:
    """Refuse what is no positive multiple of a whole number."""
    if whole_number(name, value, of) % of:
        raise SinkbookError(f"`{name}={value}` is no multiple of {of}. Give one.")


def check_known(kind: str, name: object, known: Iterable[object]) -> None:
    """Refuse a name that is none of those known.

    >>> check_known("way", "nonsense", ("zero", "mean"))
    Traceback (most recent call last):
    ...
    sinkbook.errors.SinkbookError: no way named 'nonsense'. Known: zero, mean.
    """
    known = list(known)
    if not isinstance(name, str) or name not in known:
        raise SinkbookError(f"no {kind} named {shown(name)}. Known: {', '.join(map(str, known))}.")


def names_of(kind: str, given: object, known: Collection[str]) -> tuple[str, ...]:
    """A list of known names, one at least, of whatever gives them one after the other.

    >>> names_of("variable", (name for name in ["loss"]), ("loss", "value_norm"))
    ('loss',)
    """
    instead = f"Give one, such as [{next(iter(known))!r}]."
    several = f"`{kind}s={shown(given)}` is no list of names. {instead}"
    names = items_of(given)
    if names is None:
        raise SinkbookError(several)
    for name in names:
        if not isinstance(name, str) or name not in known:
            raise SinkbookError(f"no {kind} {shown(name)}. Known: {', '.join(known)}.")
    if not names:
        raise SinkbookError(several)
    return tuple(names)


def texts_of(given: object) -> list[str]:
    """A list of texts, one at least, of whatever gives them one after the other.

    >>> texts_of("one text")
    Traceback (most recent call last):
    ...
    sinkbook.errors.SinkbookError: texts is one string, 'one text'. Give a list: [text].
    """
    check_not_one_text(given)
    texts = items_of(given)
    if texts is None:
        raise SinkbookError(f"texts is {shown(given)}. Give a list of strings.")
    for number, text in enumerate(texts):
        if not isinstance(text, str):
            raise SinkbookError(
                f"texts has {shown(text)} at place {number}, which is no string. Give a list of "
                "strings."
            )
    if not texts:
        raise SinkbookError("there are no texts to measure. Give one at least.")
    return texts


def check_not_one_text(texts: object) -> None:
    """Refuse one string in the place of a list of texts."""
    if isinstance(texts, str):
        raise SinkbookError(f"texts is one string, {texts[:30]!r}. Give a list: [text].")


def check_all(name: str, given: object, *kinds: type) -> None:
    """Refuse what is no list of things of some kinds.

    >>> check_all("configs", 5, str)
    Traceback (most recent call last):
    ...
    sinkbook.errors.SinkbookError: `configs=5` is no list. Give a list of str.
    """
    wanted = " or ".join(kind.__name__ for kind in kinds)
    if not isinstance(given, Collection) or (items := items_of(given)) is None:
        raise SinkbookError(f"`{name}={shown(given)}` is no list. Give a list of {wanted}.")
    for place, value in enumerate(items):
        if not isinstance(value, kinds):
            raise SinkbookError(
                f"`{name}` has {shown(value)} at place {place}. Give a list of {wanted}."
            )


def check_kind(name: str, given: object, kind: type | UnionType) -> None:
    """Refuse what is not of a kind.

    >>> check_kind("text", 5, str)
    Traceback (most recent call last):
    ...
    sinkbook.errors.SinkbookError: `text=5` is no str. Give one.
    """
    if not isinstance(given, kind):
        wanted = kind.__name__ if isinstance(kind, type) else str(kind).replace(" | ", " or ")
        raise SinkbookError(f"`{name}={shown(given)}` is no {wanted}. Give one.")


def check_token_ids(name: str, given: object, vocabulary: int | None = None) -> None:
    """Refuse what is no tensor of whole numbers over (text, position), as models read them.

    Nor those of another vocabulary, of which the size is known: `check_tokens`.

    >>> check_token_ids("input_ids", [[1, 2], [3, 4]])
    Traceback (most recent call last):
    ...
    sinkbook.errors.SinkbookError: `input_ids=[[1, 2], [3, 4]]` is no tensor of token ids over \
    (text, position). Give one: torch.tensor([[1, 2], [3, 4]]).
    """
    dtype, shape = str(getattr(given, "dtype", "")), getattr(given, "shape", ())
    if dtype not in ("torch.int64", "torch.int32") or len(shape) != 2 or not all(shape):
        seen = f"{dtype} of shape {tuple(shape)}" if dtype.startswith("torch.") else shown(given)
        raise SinkbookError(
            f"`{name}={seen}` is no tensor of token ids over (text, position). Give one: "
            "torch.tensor([[1, 2], [3, 4]])."
        )
    if vocabulary is not None:
        check_tokens(name, given, vocabulary)


def check_tokens(name: str, ids, vocabulary: int) -> None:
    """Refuse a tensor of ids that are no tokens: negative ones, and those beyond the vocabulary.

    Not while a model is compiled or mapped over others with `vmap`, where numbers are not known,
    and not on a GPU, where everything would wait for them.
    """
    if ids.is_cuda or not ids.numel():
        return
    try:
        least, most = int(ids.min()), int(ids.max())
    except RuntimeError:  # those that `vmap` stands in the place of
        return
    if least < 0 or most >= vocabulary:
        raise SinkbookError(
            f"`{name}` has ids from {least} to {most}, and there are {vocabulary} tokens. Give ids "
            f"from 0 to {vocabulary - 1}."
        )


def check_has(name: str, given: object, attribute: str) -> None:
    """Refuse what has no attribute of a name."""
    if not hasattr(given, attribute):
        raise SinkbookError(f"`{name}={shown(given)}` has no {attribute}. Give one that has.")


def check_some(name: str, given: Collection) -> None:
    """Refuse a list with nothing in it, of which there would be nothing to say."""
    if not len(given):
        raise SinkbookError(f"`{name}={shown(given)}` is empty. Give one at least.")


def check_layers(name: str, given: object, count: int) -> None:
    """Refuse what is no tuple of layers, of which there are `count`."""
    if not isinstance(given, tuple):
        raise SinkbookError(
            f"`{name}={shown(given)}` is no tuple of layers. Give one, such as (0,)."
        )
    for layer in given:
        check_whole_number(name, layer, 0)
        if layer >= count:
            raise SinkbookError(f"{name} has layer {layer}, and there are {count}. Leave it out.")


def items_of(given: object) -> list | None:
    """What somebody gives one after the other; None for a string, and for what gives nothing."""
    try:
        return None if isinstance(given, str | bytes) else list(given)
    except TypeError:
        return None


def _pair(limit: Limits) -> tuple[Number, ...]:
    return limit if isinstance(limit, tuple) else (limit,)


def shown(value: object) -> str:
    """A value in a message: short, on one line, whatever its class does when it is asked."""
    try:
        shown = " ".join(repr(value).split())
    except Exception:
        return f"a {type(value).__name__}"
    return shown if len(shown) <= 60 else f"{shown[:57]}..."
