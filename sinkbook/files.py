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
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
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
    chosen = os.environ.get("SINKBOOK_CACHE")
    return Path(chosen).expanduser() if chosen else platformdirs.user_cache_path("sinkbook")


_whole: set[tuple[Path, int, int, str]] = set()


def is_whole(path: Path, sha256: str) -> bool:
    """Whether `path` is there and has this sha256. An unchanged file is read once per process."""
    if not path.is_file():
        return False
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


def write(path: Path, save: Callable[[Path], None], *, otherwise: str) -> None:
    """Write a file in one step: `save` fills a neighbour that then takes the file's place.

    A reader sees the old file or the new one, never half of one; two processes may write the same.
    Raises `SinkbookError` if the disk is full or the folder cannot be written. It ends with
    `otherwise`: what the user can do but free space and give rights, such as "name another file".
    """
    part = path.with_name(f".{path.name}.{_HERE}-{os.getpid()}-{uuid4().hex[:8]}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _sweep(path)
        save(part)
        with open(part, "rb") as file:
            os.fsync(file.fileno())
        part.replace(path)
    except Exception as error:
        refused = refusal(error)
        if refused is None and not isinstance(error, OSError):
            raise
        advice = "Free some space" if no_room(error) else "Make it writable"
        reason = error if refused is None else refused.strerror
        raise SinkbookError(f"cannot write {path}: {reason}. {advice}, or {otherwise}.") from error
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)


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
    return place.with_name(f".{place.name}.old")


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
            part.unlink(missing_ok=True)


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
