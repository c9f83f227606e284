"""GGUF files: pinned ones, written out once, and what a file says that transformers would not read.

Written out, a chapter loads its model in a second.
"""

import shutil
from collections.abc import Iterator
from hashlib import file_digest
from pathlib import Path

import gguf
import torch
from filelock import FileLock
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PretrainedConfig

from sinkbook.data.sources import unpack
from sinkbook.errors import SinkbookError
from sinkbook.files import NOTICES, cache_folder, is_whole, readable_by_others, writing

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
            for file in part.iterdir():
                readable_by_others(file)
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


def write_out(file: Path, folder: Path) -> None:
    """Write a GGUF file out in transformers' layout, its weights as float32 safetensors."""
    named = {"gguf_file": file.name}
    model = AutoModelForCausalLM.from_pretrained(file.parent, **named, **DEQUANTISED)
    # The weights are no longer quantised, and whoever loads them would be told that they are.
    model.config.__dict__.pop("quantization_config", None)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(file.parent, **named).save_pretrained(folder)


# --- What a file says, and transformers would not read ----------------------------------------

# Keys of a header that change what a model computes, and the config's names for them.
_MEANINGS = {
    "attention.sliding_window": "sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "attention.scale": "attention_multiplier",
    "attention.clamp_kqv": "clip_qkv",
    "logit_scale": "logit_scale",
    "embedding_scale": "embedding_multiplier",
    "residual_scale": "residual_multiplier",
    "rope.scale_linear": None,
    "rope.scaling.attn_factor": None,
    "attention.temperature_scale": None,
    "expert_weights_scale": "routed_scaling_factor",
}
_NEUTRAL = (None, 0, 1)
_SCALED = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")


def check_header(file: Path, config: PretrainedConfig) -> None:
    """Refuse a GGUF file whose model computes something that the config read from it lacks.

    transformers drops what it does not know: scaled rotations, windows, caps, multipliers. The
    weights would be complete and all numbers off. Raises `SinkbookError` for these, and for one
    part of a file that was split.
    """
    reader = gguf.GGUFReader(file)
    architecture = _value(reader, "general.architecture")
    if (_value(reader, "split.count") or 0) > 1:
        raise SinkbookError(
            f"{str(file)!r} is one of {_value(reader, 'split.count')} parts of a model. Join them "
            "with llama.cpp's llama-gguf-split."
        )
    dropped = [*_scalings(reader, architecture)]
    for key, name in _MEANINGS.items():
        value = _value(reader, f"{architecture}.{key}")
        if value not in _NEUTRAL and not _near(value, getattr(config, name or "", None)):
            dropped.append(f"{key} = {value}")
    if _value(reader, f"{architecture}.attention.causal") is False:
        dropped.append("attention.causal = False")
    base = _value(reader, f"{architecture}.rope.freq_base")
    if base is not None and not any(_near(base, theta) for theta in _thetas(config)):
        dropped.append(f"rope.freq_base = {base}")
    turned = _value(reader, f"{architecture}.rope.dimension_count")
    if turned is not None and turned not in _turned(config):
        dropped.append(f"rope.dimension_count = {turned}")
    if dropped:
        raise SinkbookError(
            f"{str(file)!r} says what transformers does not read from a GGUF file: "
            f"{', '.join(dropped)}. The model would be another one. Load its safetensors, a "
            "folder or hub id, in the place of the GGUF file."
        )


def check_tensors(file: Path, model: nn.Module) -> None:
    """Refuse a GGUF file that holds more numbers than the model that was read from it."""
    stored = {tensor.name: int(tensor.n_elements) for tensor in gguf.GGUFReader(file).tensors}
    for name in _SCALED:  # not weights; `check_header` has seen that they change nothing
        stored.pop(name, None)
    tied = stored.get("output.weight", 0) if model.config.tie_word_embeddings else 0
    held = {tensor.data_ptr(): tensor.numel() for tensor in model.state_dict().values()}
    if sum(stored.values()) - tied > sum(held.values()):
        names = gguf.get_tensor_name_map(_architecture(file), len(stored))
        placed = {
            names.get_name(name, try_suffixes=(".weight", ".bias")) for name in model.state_dict()
        }
        left = sorted({*stored} - placed)
        raise SinkbookError(
            f"{str(file)!r} holds tensors for which transformers has no place, such as "
            f"{', '.join(left[:2])}. The model would be another one. Load its safetensors."
        )


def _architecture(file: Path) -> gguf.MODEL_ARCH:
    named = _value(gguf.GGUFReader(file), "general.architecture")
    return next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == named)


def _value(reader: gguf.GGUFReader, key: str) -> object:
    field = reader.get_field(key)
    return None if field is None else field.contents()


def _scalings(reader: gguf.GGUFReader, architecture: str) -> Iterator[str]:
    """What a file says of scaled rotations, by its header or by factors among its tensors."""
    kind = _value(reader, f"{architecture}.rope.scaling.type")
    factor = _value(reader, f"{architecture}.rope.scaling.factor")
    if kind not in (None, "none") and factor not in _NEUTRAL or kind in ("yarn", "longrope"):
        yield f"rope.scaling.type = {kind}, rope.scaling.factor = {factor}"
    elif kind is None and factor not in _NEUTRAL:
        yield f"rope.scaling.factor = {factor}"
    for tensor in reader.tensors:
        if tensor.name.endswith(_SCALED) and not (tensor.data == 1).all():
            yield tensor.name


def _near(value: object, other: object) -> bool:
    if isinstance(value, (int, float)) and isinstance(other, (int, float)):
        return abs(value - other) <= 1e-5 * abs(other)
    return value == other


def _thetas(config: PretrainedConfig) -> Iterator[float]:
    """The bases of a config's rotations; layers of two kinds may have two."""
    rope = getattr(config, "rope_parameters", None) or {}
    for held in (rope, *(part for part in rope.values() if isinstance(part, dict))):
        yield held.get("rope_theta")
    yield getattr(config, "rope_theta", None)


def _turned(config: PretrainedConfig) -> set[int]:
    """How many dimensions of a head turn, by all that a config says of it."""
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rope = getattr(config, "rope_parameters", None) or {}
    parts = [rope, *(part for part in rope.values() if isinstance(part, dict))]
    shares = [part.get("partial_rotary_factor") for part in parts]
    shares = [share for share in shares if share] or [
        getattr(config, "partial_rotary_factor", None) or 1
    ]
    widths = {width, getattr(config, "global_head_dim", None) or width}
    turned = {int(share * size) for share in shares for size in widths}
    return turned | {getattr(config, "rotary_dim", None) or width}
