"""Pinned weights, unpacked and written out once, so that a chapter loads a model in a second."""

import shutil
from hashlib import file_digest
from pathlib import Path

import torch
from filelock import FileLock
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from sinkbook.data.sources import unpack
from sinkbook.files import NOTICES, cache_folder, is_whole, writing

GGUF_FILE = "weights.gguf"
# Else the weights would stay in their 4-bit blocks wherever there is a kernel for these.
DEQUANTISED = {"quantization_config": GgufConfig(dequantize=True), "dtype": torch.float32}
_SUMS = "SHA256SUMS"
_PREPARATION = 2  # raise it when prepared folders must be made anew


def prepared(name: str) -> Path:
    """The folder of a model in `SOURCES`, made from its pinned download on first use.

    It is written out as float32 safetensors, which load in a tenth of the time. What no longer
    matches its checksum is made again.
    Raises SinkbookError if the download cannot be had or the cache cannot be written.
    """
    folder = cache_folder() / "models" / f"{name}-{_PREPARATION}"
    if _is_prepared(folder):  # without the lock: a cache may be shared and read-only
        return folder
    part = folder.with_name(f"{folder.name}.part")
    with writing(folder.parent), FileLock(folder.with_name(f"{folder.name}.lock")):
        if _is_prepared(folder):  # another process made it meanwhile
            return folder
        if folder.exists():
            NOTICES.warning("the prepared model %s is damaged: preparing it again.", folder)
        for leftover in (folder, part):
            shutil.rmtree(leftover, ignore_errors=True)
        part.mkdir()
        try:
            unpack(name, part / GGUF_FILE)
            write_out(part / GGUF_FILE, part)
            (part / GGUF_FILE).unlink()
            sums = [f"{_sha256(file)}  {file.name}\n" for file in sorted(part.iterdir())]
            (part / _SUMS).write_text("".join(sums))
            part.rename(folder)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    return folder


def _is_prepared(folder: Path) -> bool:
    if not (folder / _SUMS).exists():
        return False
    lines = (folder / _SUMS).read_text(errors="replace").splitlines()
    sums = [line.partition("  ") for line in lines]
    return bool(sums) and all(is_whole(folder / file, sha256) for sha256, _, file in sums)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return file_digest(file, "sha256").hexdigest()


def write_out(gguf: Path, folder: Path) -> None:
    """Write a GGUF file out in transformers' layout, its weights as float32 safetensors."""
    file = {"gguf_file": gguf.name}
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, **file, **DEQUANTISED)
    # The weights are no longer quantised, and whoever loads them would be told that they are.
    model.config.__dict__.pop("quantization_config", None)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, **file).save_pretrained(folder)
