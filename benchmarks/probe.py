"""What the probe costs beside a plain forward pass of the same model: time, and peak memory.

The model is Llama-like, 12 layers of width 768, with a vocabulary so small that the output head,
which the probe leaves out, does not flatter it. Plain and probed passes alternate in one
process. Memory is the peak of a process of its own, over what it held before the pass.
"""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.timing import alternate, row
from sinkbook.probe import DEFAULT, measure

REPETITIONS = {256: 9, 1024: 5, 2048: 5, 4096: 3}  # tokens: alternating passes
WITH_KEYS = (*DEFAULT, "key_importance", "attention_entropy")
VOCABULARY = 1000


def ratios() -> list[dict]:
    """Time against a plain forward pass and against eager attention, and growth of memory."""
    model = _model()
    rows = []
    for tokens, repetitions in REPETITIONS.items():
        ids = torch.randint(VOCABULARY, (1, tokens))
        passes = {
            "plain": lambda ids=ids: _forward(model, ids),
            "default": lambda ids=ids: measure(model, ids),
            "keys": lambda ids=ids: measure(model, ids, WITH_KEYS),
        }
        if tokens == 1024:
            passes["eager"] = lambda ids=ids: _forward_eagerly(model, ids)
        seconds = alternate(passes, repetitions)
        name = f"probe / plain forward, {tokens:,} tokens"
        rows.append(row(name, seconds["default"], seconds["plain"], 1.15))
        name = f"probe with key importance and entropy / plain forward, {tokens:,} tokens"
        rows.append(row(name, seconds["keys"], seconds["plain"], 2.5))
        if "eager" in passes:
            name = f"probe with key importance and entropy / eager attention, {tokens:,} tokens"
            rows.append(row(name, seconds["keys"], seconds["eager"], 1.0))
    return [*rows, _memory_growth(2048, 4096)]


def _model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=12,
        num_key_value_heads=4,
        max_position_embeddings=4096,
    )
    return LlamaForCausalLM(config).eval()


@torch.no_grad()
def _forward(model: LlamaForCausalLM, ids: torch.Tensor) -> None:
    model(ids)


@torch.no_grad()
def _forward_eagerly(model: LlamaForCausalLM, ids: torch.Tensor) -> None:
    model.set_attn_implementation("eager")
    model(ids, output_attentions=True)
    model.set_attn_implementation("sdpa")


def _memory_growth(tokens: int, more_tokens: int) -> dict:
    """Extra memory at twice the tokens: 2 if linear, 4 if a matrix of attention were formed."""
    extra = [_extra_memory(count) for count in (tokens, more_tokens)]
    ratio = extra[1] / extra[0]
    return {
        "name": f"peak extra memory of the probe, {more_tokens:,} / {tokens:,} tokens",
        "ratio": round(ratio, 3),
        "bound": 2.5,
        "holds": ratio <= 2.5,
        "n": 1,
        "spread": 0.0,
    }


def _extra_memory(tokens: int) -> int:
    """Bytes that a measurement needs at its peak, beyond the model: in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.probe", str(tokens)]
    # What the probe needs, not what an allocator that was told to keep memory has kept.
    usual = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    root = Path(__file__).parent.parent
    done = subprocess.run(command, cwd=root, env=usual, stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout)


def _measure_memory(tokens: int) -> int:
    model = _model()
    measure(model, torch.randint(VOCABULARY, (1, 16)), WITH_KEYS)
    before = _peak_memory()
    measure(model, torch.randint(VOCABULARY, (1, tokens)), WITH_KEYS)
    return _peak_memory() - before


def _peak_memory() -> int:
    """Bytes. Where Linux tells it, since the peak in `getrusage` begins with the parent's."""
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    print(json.dumps(_measure_memory(int(sys.argv[1]))))
