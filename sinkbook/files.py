"""The cache folder, and files that are whole or absent: written in one step, checked by sha256."""

import errno
import glob
import hashlib
import json
import logging
import os
import platform
import re
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from uuid import uuid4

import platformdirs

from sinkbook.errors import SinkbookError

# What a user may want to know of the cache and the store: a file was damaged, a process waits.
# Nothing shows it but the command line, since it has no place on a page.
NOTICES = logging.getLogger("sinkbook")
NOTICES.addHandler(logging.NullHandler())


def cache_folder() -> Path:
    """The folder for downloads and runs: `$SINKBOOK_CACHE`, else the user's cache folder."""
    return chosen_folder("SINKBOOK_CACHE") or platformdirs.user_cache_path("sinkbook")


def chosen_folder(variable: str) -> Path | None:
    """The folder that an environment variable names, whole; None if it names none.

    It begins where the process was when it was first asked for, or at home if with `~`. Raises
    `SinkbookError` for the home of nobody.
    """
    written = os.environ.get(variable)
    return _whole_path(variable, written) if written else None


@cache
def _whole_path(variable: str, written: str) -> Path:
    try:
        whole = Path(written).expanduser().absolute()
        whole.exists()
        return whole
    except (RuntimeError, OSError, ValueError) as error:
        raise SinkbookError(
            f"{variable} is {written!r}, which is no folder: {error}. Set it to a whole path."
        ) from error


def check_is_file(path: Path) -> None:
    """Raise `OSError` where there is no file, as a pipe would be waited for."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError("it is no file")


def is_there(path: Path) -> bool:
    """Whether anything has this name, such as a link in a circle, which `exists` does not see.

    What it is, shows when it is read. Raises `SinkbookError` where nobody may look.
    """
    with _looking(path, FileNotFoundError, NotADirectoryError):
        return path.lstat() is not None
    return False


def files_in(folder: Path, ending: str) -> list[Path]:
    """What has names with an ending in a folder, by name; of a folder that is not there, nothing.

    Raises `SinkbookError` where nobody may look, or it is no folder.
    """
    with _looking(folder, FileNotFoundError):
        return sorted(path for path in folder.iterdir() if path.name.endswith(ending))
    return []


@contextmanager
def _looking(path: Path, *nothing: type[OSError]) -> Iterator[None]:
    """The body ends where there is `nothing`; another refusal is one message."""
    try:
        yield
    except nothing:
        return
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise SinkbookError(
            f"cannot look for {path}: {reason}. Make its folder one that you can read. What is no "
            "part of the book may lie elsewhere: set SINKBOOK_CACHE, or SINKBOOK_RUNS."
        ) from error


_whole: set[tuple[Path, int, int, str]] = set()


def is_whole(path: Path, sha256: str) -> bool:
    """Whether `path` is there and has this sha256. An unchanged file is read once per process.

    Raises `SinkbookError` for what is there and may not be read.
    """
    if not is_there(path) or not path.is_file():
        return False
    with reading(path, "Let its owner make it readable, or name another cache in SINKBOOK_CACHE"):
        status = path.stat()
        stamp = (path, status.st_size, status.st_mtime_ns, sha256)
        if stamp not in _whole:
            with path.open("rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != sha256:
                    return False
            _whole.add(stamp)
    return True


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Make a folder in the cache; what the file system refuses in it becomes one clear message."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except Exception as error:
        if (refused := refusal(error)) is None:  # transformers raises OSErrors of its own
            raise
        raise SinkbookError(
            f"cannot write to the cache folder {folder}: {refused.strerror}. "
            "Set SINKBOOK_CACHE to a folder that you can write to, with room in it."
        ) from error


# What the file system answers where there is no room: the disk, the quota, the largest file.
NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
# Who writes through another library than Python's own has its words, with the number in them:
# safetensors and tokenizers those of Rust, netCDF 4 those of HDF5.
_NUMBER = re.compile(r"\(os error (\d+)\)|\berrno = (\d+)")


def refusal(error: BaseException) -> OSError | None:
    """What the file system refused, if it is that which an error tells of, in whatever class."""
    if isinstance(error, OSError) and error.errno is not None:
        return error
    found = _NUMBER.search(str(error))
    if found is None or isinstance(error, SinkbookError):
        return None
    number = int(found[1] or found[2])
    return OSError(number, os.strerror(number))


def no_room(error: BaseException | None) -> bool:
    """Whether an error, or one that led to it, tells of a full disk or of a quota."""
    while error is not None:
        if (refused := refusal(error)) is not None and refused.errno in NO_ROOM:
            return True
        error = error.__cause__ or error.__context__
    return False


@contextmanager
def reading(what: object, advice: str, *, named: bool = False) -> Iterator[None]:
    """In the body a user's file is read, by whatever library; what that raises is one sentence.

    Raises `SinkbookError`: what cannot be read, why, and `advice`, what to do about it. What is one
    already passes as it is, unless what it says has to be `named`. A pipe would be waited for.
    """
    try:
        if isinstance(what, Path):
            check_is_file(what)
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except SinkbookError as error:
        if not named:
            raise
        raise SinkbookError(f"cannot read {what}: {error} {advice}") from error
    except BaseException as error:  # also what is no Exception: a library in Rust that gives up
        raise SinkbookError(f"cannot read {what}: {reason_of(error)}. {advice}") from error


def reason_of(error: BaseException) -> str:
    """What an error says, on one line, with its class where that alone tells what happened."""
    try:
        said = " ".join(str(error).split())
    except Exception:  # whatever its class does when it is asked
        said = ""
    said = said if len(said) <= 300 else f"{said[:297]}..."
    plain = isinstance(error, OSError | ValueError | ImportError) and said
    return (said if plain else f"{type(error).__name__} {said}").strip().rstrip(".")


# What moves a terminal's cursor, changes its colours, or turns the direction of its text.
_UNSHOWN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    r"""Text of others for a terminal: what would steer that is spelt out.

    >>> printable("a \x1b[31mred\x1b[0m name")
    'a \\x1b[31mred\\x1b[0m name'
    """
    return _UNSHOWN.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def write(path: Path, save: Callable[[Path], None], *, otherwise: str) -> None:
    """Write a file in one step: `save` fills a neighbour that then takes the file's place.

    A reader sees the old file or the new one, never half of one; two processes may write the same.
    Raises `SinkbookError` if the disk is full or the folder cannot be written. It ends with
    `otherwise`: what the user can do but free space and give rights, such as "name another file".
    """
    part = _beside(path)
    try:
        with _refused(path, otherwise):
            path.parent.mkdir(parents=True, exist_ok=True)
            _sweep(path)
            save(part)
            with open(part, "rb") as file:
                os.fsync(file.fileno())
            readable_by_others(part)
            part.replace(path)
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)


@contextmanager
def _refused(path: Path, otherwise: str) -> Iterator[None]:
    """What the file system refuses in the body is one message, of a file that cannot be written."""
    try:
        yield
    except Exception as error:
        refused = refusal(error)
        if refused is None and not isinstance(error, OSError):
            raise
        advice = "Free some space" if no_room(error) else "Make it writable"
        reason = error if refused is None else refused.strerror
        raise SinkbookError(f"cannot write {path}: {reason}. {advice}, or {otherwise}.") from error


def _beside(path: Path) -> Path:
    """A new name for what is to take the place of a file or folder, by which a sweep knows it."""
    return path.with_name(f".{path.name}.{_HERE}-{os.getpid()}-{uuid4().hex[:8]}.part")


@contextmanager
def replacing(folder: Path, names: Sequence[str], *, otherwise: str) -> Iterator[Path]:
    """A fresh folder for the body to make files in, which then are in `folder`, all at once.

    The folder itself is replaced, by `replace_folder`. Where it holds other files than `names`, or
    cannot be moved, they go into it one by one: the last of them, for which all is made, is taken
    away before and put there last. Raises `SinkbookError` as `write` does.
    """
    with _refused(folder, otherwise):
        folder = Path(os.path.realpath(folder))  # `resolve` raises otherwise for links in a circle
        recover_folder(folder)
        folder.parent.mkdir(parents=True, exist_ok=True)
        for place in (folder, folder / names[-1]):
            _sweep(place)
        movable = _is_movable(folder, names)
        made = _beside(folder if movable else folder / names[-1])
        made.mkdir(parents=True)
        if folder.exists():
            shutil.copymode(folder, made)
    try:
        yield made
        with _refused(folder, otherwise):
            if movable:
                replace_folder(made, folder)
                return
            (folder / names[-1]).unlink(missing_ok=True)
            for name in names:
                (made / name).replace(folder / name)
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _is_movable(folder: Path, names: Sequence[str]) -> bool:
    """Whether a folder may be replaced as a whole: nothing of others is in it, and nobody there."""
    if folder == folder.parent or not os.access(folder.parent, os.W_OK):
        return False
    if not folder.exists():
        return True
    if Path.cwd().is_relative_to(folder) or os.path.ismount(folder):
        return False
    return {path.name for path in folder.iterdir()} <= {*names}


def replace_folder(new: Path, place: Path) -> None:
    """Put a finished folder in the place of another, which stands until it does.

    They lie on one disk. Who is interrupted in between leaves the old one for `recover_folder`.
    """
    old = _set_aside(place)
    shutil.rmtree(old, ignore_errors=True)
    if place.exists():
        place.rename(old)
    new.rename(place)
    shutil.rmtree(old, ignore_errors=True)


def recover_folder(place: Path) -> None:
    """Put back a folder that an interrupted `replace_folder` has left beside its place."""
    old = _set_aside(place)
    if old.is_dir() and not place.exists():
        old.rename(place)
    shutil.rmtree(old, ignore_errors=True)


def _set_aside(place: Path) -> Path:
    return place.with_name(f".{place.name}.sinkbook-old")


def check_output(path: Path, what: str, *, force: bool, otherwise: str) -> None:
    """Refuse a file that cannot be written there, before the work whose result it will hold.

    It is tried out in the nearest folder that there is. Raises `SinkbookError` for a folder, unless
    `force` for a file that is there, and where nothing can be written, with `otherwise`.
    """
    try:
        is_folder, is_there = path.is_dir(), path.exists()
        if "\0" in str(path):  # which `exists` says is not there
            raise ValueError("there is a NUL in it")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise SinkbookError(f"cannot write {str(path)[:200]!r}: {reason}. {otherwise}.") from error
    if is_folder:
        raise SinkbookError(f"{str(path)!r} is a folder, and {what} is one file. Name a file.")
    if is_there and not force:
        raise SinkbookError(
            f"{str(path)!r} is there already. {otherwise}, or let it be replaced with `force=True`."
        )
    try:
        nearest = next(place for place in path.absolute().parents if place.exists())
        os.rmdir(tempfile.mkdtemp(dir=nearest, prefix=".sinkbook-"))
    except OSError as error:
        raise SinkbookError(f"cannot write {path}: {error.strerror}. {otherwise}.") from error


def readable_by_others(path: Path) -> None:
    """Give a file the rights that the user's umask leaves: libraries in Rust keep it to its owner.

    So that a cache or a store can be shared.
    """
    path.chmod(path.stat().st_mode | 0o666 & ~_umask())


def _umask() -> int:
    with suppress(OSError, ValueError, IndexError):  # without setting it, which threads would see
        status = Path("/proc/self/status").read_text()
        return int(re.search(r"^Umask:\s*(\d+)", status, flags=re.MULTILINE)[1], 8)
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def write_netcdf(path: Path, dataset, *, otherwise: str, encoding: dict | None = None) -> None:
    """Write an xarray dataset as netCDF 4 in one step, by `write`.

    It is made in memory: HDF5 ends the whole process, minutes after, where its own file is cut off
    by a full disk.
    """
    made = dataset.to_netcdf(engine="h5netcdf", encoding=encoding)
    write(path, lambda part: part.write_bytes(made), otherwise=otherwise)


# This machine, as far as the name of a file tells: others may write to the same folder.
_HERE = hashlib.sha256(platform.node().encode()).hexdigest()[:8]


def _sweep(path: Path) -> None:
    """Remove what processes of this machine that were killed have left of the same file."""
    for part in path.parent.glob(f".{glob.escape(path.name)}.{_HERE}-*.part"):
        number = part.name.rpartition(f".{_HERE}-")[2].partition("-")[0]
        if number.isdecimal() and not _is_running(int(number)):
            shutil.rmtree(part) if part.is_dir() else part.unlink(missing_ok=True)


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # another user's
        return True
    return True


IN_ANOTHER_CACHE = "name another cache folder in SINKBOOK_CACHE"


def write_json(path: Path, value: object, *, otherwise: str = IN_ANOTHER_CACHE) -> None:
    """Write a JSON file in one step, by `write`."""
    text = json.dumps(value, indent=2) + "\n"
    write(path, lambda part: part.write_text(text, encoding="utf-8"), otherwise=otherwise)
