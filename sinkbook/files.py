"""The cache folder, and files that are whole or absent: written in one step, checked by sha256."""

import errno
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import platformdirs

from sinkbook.errors import SinkbookError


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
    except OSError as error:
        if error.errno is None:  # not from the file system: transformers raises such ones
            raise
        raise SinkbookError(
            f"cannot write to the cache folder {folder}: {error.strerror}. "
            "Set SINKBOOK_CACHE to a folder that you can write to."
        ) from error


def write(path: Path, save: Callable[[Path], None]) -> None:
    """Write a file in one step: `save` fills a neighbour that then takes the file's place.

    Raises `SinkbookError` if the disk is full or the folder cannot be written.
    """
    part = path.with_name(f"{path.name}.part")
    try:
        save(part)
        with open(part, "rb") as file:
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        advice = "Free some space" if error.errno == errno.ENOSPC else "Make it writable"
        raise SinkbookError(
            f"cannot write {path}: {error.strerror or error}. {advice}, or choose another folder "
            "with SINKBOOK_RUNS; the run goes on from its last checkpoint."
        ) from error


def write_json(path: Path, value: object) -> None:
    """Write a JSON file so that a reader sees the old one or the new one, never half of one."""
    text = json.dumps(value, indent=2) + "\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.replace(temporary, path)
    except OSError as error:
        raise SinkbookError(
            f"cannot write {path}: {error.strerror}. Make the folder writable, or name another "
            "cache folder in SINKBOOK_CACHE."
        ) from error
