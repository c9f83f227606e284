"""What is said of a model that cannot be loaded: a wrong name, and whatever a library raises."""

import difflib
import re
from collections.abc import Collection
from contextlib import suppress
from os import PathLike, fspath
from pathlib import Path

import torch
from huggingface_hub import errors as hub_errors

from sinkbook.arguments import check_kind
from sinkbook.errors import SinkbookError
from sinkbook.files import reason_of
from sinkbook.models.weight_files import NO_PICKLES

NO_MODEL = "Are its files whole, and those of a causal language model?"


def path_of(name: str | PathLike[str]) -> Path:
    """The path that a name is, if it is one. Raises `SinkbookError` for what can be no name."""
    try:
        if not isinstance(fspath(name), str):
            raise TypeError
        path = Path(name).expanduser()
        with suppress(FileNotFoundError, NotADirectoryError):
            path.stat()  # where `exists` raises nothing, as in Python 3.14
    except TypeError:
        raise SinkbookError(
            f"`name={name!r:.60}` is no name of a model. Give a short name, a folder, a .gguf file "
            "or a hub id."
        ) from None
    except (OSError, ValueError, RuntimeError) as error:  # too long, or somebody else's home
        raise SinkbookError(
            f"no model named {str(name)[:60]!r}: {reason_of(error)}. Give a short name, a folder, "
            "a .gguf file or a hub id."
        ) from error
    return path


def check_options(revision: object, dtype: object) -> None:
    """Refuse a revision that is no name, and a type in which no model computes."""
    check_kind("revision", "" if revision is None else revision, str)
    check_kind("dtype", torch.float32 if dtype is None else dtype, torch.dtype)
    if dtype is not None and not dtype.is_floating_point:
        raise SinkbookError(f"`dtype={dtype}` holds no fractions. Give torch.float32, or bfloat16.")


def comes_with_code(name: str, which: str = "") -> SinkbookError:
    """A model that is a program as well."""
    return SinkbookError(
        f"{name!r} comes with code of its own{which}, which is not run. If you have read that code "
        "and trust it, add `trust_remote_code=True`."
    )


def explained(
    name: str, part: str, revision: str, error: BaseException, known: Collection[str]
) -> SinkbookError:
    """Say in one sentence why transformers could not load a part of a model."""
    causes: list[BaseException] = [error]
    while cause := causes[-1].__cause__ or causes[-1].__context__:
        causes.append(cause)

    def caused_by(kind: type[Exception]) -> bool:
        return any(isinstance(cause, kind) for cause in causes)

    page = f"https://huggingface.co/{name}"
    if caused_by(hub_errors.GatedRepoError):
        return SinkbookError(
            f"{name!r} is gated. Accept its terms at {page} and log in with: hf auth login"
        )
    if caused_by(hub_errors.RepositoryNotFoundError):
        return unknown(name, known)
    if caused_by(hub_errors.RevisionNotFoundError):
        return SinkbookError(f"{name!r} has no revision {revision!r}. See {page}/tree/main")
    if caused_by(hub_errors.LocalEntryNotFoundError):
        return unknown(
            name, known, f" (revision {revision!r}) on this machine, and no way to the hub"
        )
    if "use_safetensors" in str(error):
        return SinkbookError(f"{name!r} has no weights as safetensors. {NO_PICKLES}")
    if "custom code" in str(error):
        return comes_with_code(name)
    if "module 'torch' has no attribute" in str(error):
        return SinkbookError(
            f"the config.json of {name!r} names a dtype that torch does not have: "
            f"{str(error).split()[-1]}. Write it as torch names it: bfloat16, float16 or float32."
        )
    if "backend tokenizer" in str(error):
        return SinkbookError(
            f"{name!r} has no tokenizer files that can be read, such as tokenizer.json. Take them "
            "from the model that it was trained from."
        )
    return SinkbookError(
        f"cannot load {name!r}, whose {part} cannot be read: {reason_of(error)}. {NO_MODEL}"
    )


def may_be_on_hub(name: str, known: Collection[str]) -> bool:
    """Whether it reads like `owner/model`, or like `gpt2` and not like a slip in a known name."""
    shape = re.fullmatch(r"([\w-][\w.-]*/)?[\w-][\w.-]*", name)
    file = name.lower().endswith(".gguf")
    slip = "/" not in name and (file or difflib.get_close_matches(name, known))
    return bool(shape) and not slip


def unknown(name: str, known: Collection[str], where: str = "") -> SinkbookError:
    """A name that is none of the known ones, nor a folder, a GGUF file or an id on the hub."""
    if path_of(name).is_file():
        return SinkbookError(
            f"{name!r} is a file. Give the folder that it lies in; only a .gguf file is a model by "
            "itself."
        )
    near = difflib.get_close_matches(name, known, n=1)
    meant = f" Did you mean {near[0]!r}?" if near else ""
    return SinkbookError(
        f"no model named {name!r}{where}.{meant} Known: {', '.join(known)}; "
        "or give a folder, a .gguf file or a hub id."
    )
