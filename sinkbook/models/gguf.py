"""Pinned weights, unpacked and written out once, so that a chapter loads a model in a second."""

import shutil
from hashlib import file_digest
from pathlib import Path

import torch
from filelock import FileLock
from gguf import GGUFReader, dequantize
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer

from sinkbook.data.sources import unpack
from sinkbook.files import cache_folder, is_whole, writing

GGUF_FILE = "weights.gguf"
_SUMS = "SHA256SUMS"
_PREPARATION = 1  # raise it when prepared folders must be made anew


def prepared(name: str) -> Path:
    """The folder of a model in `SOURCES`, made from its pinned download on first use.

    A Llama-like model is written out as float32 safetensors, which load in a tenth of the time;
    any other stays one GGUF file. What no longer matches its checksum is made again.
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
            print(f"sinkbook: the prepared model {folder} is damaged: preparing it again.")
        for leftover in (folder, part):
            shutil.rmtree(leftover, ignore_errors=True)
        part.mkdir()
        try:
            unpack(name, part / GGUF_FILE)
            if AutoConfig.from_pretrained(part, gguf_file=GGUF_FILE).model_type == "llama":
                convert_llama(part / GGUF_FILE, part)
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


# GGUF's names for the parts of a Llama layer, and transformers'.
_LLAMA = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def convert_llama(gguf: Path, folder: Path) -> None:
    """Write a Llama-like GGUF file out in transformers' layout, as float32 safetensors."""
    config = AutoConfig.from_pretrained(gguf.parent, gguf_file=gguf.name)
    config.architectures = ["LlamaForCausalLM"]
    config.dtype = "float32"
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    weights = {}
    for tensor in GGUFReader(gguf).tensors:
        values = torch.tensor(dequantize(tensor.data, tensor.tensor_type))
        match tensor.name.split("."):
            case ["blk", layer, part, "weight"]:
                if part in heads:
                    values = rotate_halves(values, heads[part])
                weights[f"model.layers.{layer}.{_LLAMA[part]}.weight"] = values
            case ["token_embd", "weight"]:
                weights["model.embed_tokens.weight"] = values
            case ["output_norm", "weight"]:
                weights["model.norm.weight"] = values
            case ["output", "weight"]:
                weights["lm_head.weight"] = values
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)


def rotate_halves(rows: Float[Tensor, "row width"], heads: int) -> Float[Tensor, "row width"]:
    """Reorder a query or key projection from GGUF's rotary layout to transformers'.

    GGUF turns neighbouring rows of a head by one angle, (0, 1), (2, 3), ..., transformers rows of
    its two halves, (0, d/2), (1, d/2 + 1), ...
    """
    pairs = rows.reshape(heads, -1, 2, rows.shape[1])
    return pairs.transpose(1, 2).reshape(rows.shape)
