"""Tiny random models, a tokenizer of a few words, a hub that has them, and a wheel."""

import hashlib
import os
import zipfile
from functools import partial
from pathlib import Path

import gguf
import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from sinkbook.data.sources import Wheel
from sinkbook.models import LanguageModel
from sinkbook.toy.transformer import Transformer, TransformerConfig

WORDS = ["<|endoftext|>", "<s>", "to", "be", "or", "not", "<script>", "the"]  # by token id
BOS = WORDS.index("<s>")
HAMLET = "to be or not to be <script> the " * 20  # 160 tokens
SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def tiny_model(kind: str = "llama", *, seed: int = 0, **changes) -> PreTrainedModel:
    """A causal language model of one of transformers' kinds, in evaluation mode."""
    torch.manual_seed(seed)
    config = CONFIG_MAPPING[kind](**SIZES | changes)
    return AutoModelForCausalLM.from_config(config).eval()


def loud_llama(layers: int = 2, **changes) -> PreTrainedModel:
    """A Llama with weights so large that what is dropped or rounded makes a difference."""
    sizes = {"vocab_size": 50, "num_hidden_layers": layers, "initializer_range": 0.3}
    return tiny_model(**sizes | changes).requires_grad_(False)


def losses_of(logits: torch.Tensor, tokens: torch.Tensor) -> np.ndarray:
    """The loss of every token but the first, nats, over (text, token): the slow reference."""
    return F.cross_entropy(logits[:, :-1].mT, tokens[:, 1:], reduction="none").numpy()


def assert_close(found, expected, tolerance: float = 1e-4) -> None:
    """The same within an absolute tolerance."""
    np.testing.assert_allclose(found, expected, atol=tolerance, rtol=0)


# Texts of the Llama above.
LOUD_TOKENS = torch.randint(0, 50, (3, 40), generator=torch.Generator().manual_seed(0))


def tiny_toy(*, seed: int = 0, **changes) -> Transformer:
    """A toy transformer of several layers and heads."""
    torch.manual_seed(seed)
    sizes = {"vocab_size": 97, "length": 16, "width": 32, "layers": 2, "heads": 4}
    return Transformer(TransformerConfig(**sizes | changes)).eval()


_SMALLER = {"vocab_size": 50, "num_hidden_layers": 3, "hidden_size": 16}
# A model of each layout: the toy's own, heads that share keys and values, one matrix for all three.
EACH_LAYOUT = {
    "toy": partial(tiny_toy, vocab_size=50, layers=3, width=16),
    "llama": partial(tiny_model, "llama", **_SMALLER),
    "gpt2": partial(tiny_model, "gpt2", **_SMALLER),
}


def tiny_tokenizer(*, adds_bos: bool = True) -> PreTrainedTokenizerFast:
    """One token a word; words that it does not know are read as "or"."""
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, "or"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if adds_bos:
        bos = [("<s>", BOS)]
        words.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=bos)
    return PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>")


def tiny_reader(model: PreTrainedModel, *, adds_bos: bool = True) -> LanguageModel:
    """What `models.load` would return for a model with the tokenizer of a few words."""
    prefix = (BOS,) if adds_bos else ()
    tokenizer = tiny_tokenizer(adds_bos=adds_bos)
    return LanguageModel("tiny", model, tokenizer, prefix, "a tiny one")


# By token id: punctuation and line breaks among them.
LETTERS = ["<s>", ".", "\n", "a1", *(chr(97 + i) for i in range(26))]
LETTER_TEXTS = ["b c . d e \n f g h . i j", "k l m \n n o p . q r s t"]


def letter_reader(first_token: int | None = 0) -> LanguageModel:
    """A Llama that reads texts of single letters, and the model's first token before them."""
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(LETTERS)}, "a"))
    words.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    model = tiny_model(
        seed=1,
        vocab_size=len(LETTERS),
        hidden_size=16,
        num_hidden_layers=3,
        initializer_range=0.3,  # large enough for heads that look somewhere
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>")
    prefix = () if first_token is None else (first_token,)
    return LanguageModel("tiny", model.requires_grad_(False), tokenizer, prefix, "random")


GGUF_TOKENS = ["<|endoftext|>", "<s>", "t", "o", "b", "e", "to", "be"]


def write_tiny_gguf(path: Path, model: PreTrainedModel, about=lambda writer: None) -> None:
    """A tiny model in GGUF's layout, its matrices in 8 bits, with a byte-pair tokenizer."""
    config = model.config
    writer = gguf.GGUFWriter(path, config.model_type)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(64)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(GGUF_TOKENS)
    writer.add_token_types([3, 3, 1, 1, 1, 1, 1, 1])
    writer.add_token_merges(["t o", "b e"])
    writer.add_bos_token_id(1)
    writer.add_add_bos_token(False)
    about(writer)
    architecture = gguf.MODEL_ARCH[config.model_type.upper()]
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if architecture == gguf.MODEL_ARCH.LLAMA and (".q_proj." in name or ".k_proj." in name):
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            # From two halves to neighbouring pairs, as llama.cpp's own converter does.
            tensor = tensor.reshape(heads, 2, -1, config.hidden_size).transpose(1, 2)
            tensor = tensor.reshape(-1, config.hidden_size)
        values, kind = tensor.numpy(), gguf.GGMLQuantizationType.F32
        if values.ndim == 2:
            kind = gguf.GGMLQuantizationType.Q8_0
            values = gguf.quantize(values, kind)
        gguf_name = names.get_name(name, try_suffixes=(".weight", ".bias"))
        writer.add_tensor(gguf_name, values, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def make_wheel(folder: Path, package: str, files: dict[str, str]) -> Wheel:
    """A wheel that pip takes, version 1.0, and its pin. The first file is the one that is read."""
    folder.mkdir(exist_ok=True)
    module = package.replace("-", "_")
    path = folder / f"{module}-1.0-py3-none-any.whl"
    about = f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n"
    tags = "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
        archive.writestr(f"{module}-1.0.dist-info/METADATA", about)
        archive.writestr(f"{module}-1.0.dist-info/WHEEL", tags)
        archive.writestr(f"{module}-1.0.dist-info/RECORD", "")
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    return Wheel(package, "1.0", sha256, data=next(iter(files)))


class Hub:
    """A hub cache with revisions of tiny models, each from a seed of its own."""

    def __init__(self, folder: Path):
        self.cache, self.tokenizer = folder / "hub", tiny_tokenizer()

    def folder(self, name: str) -> Path:
        return self.cache / f"models--{name.replace('/', '--')}"

    def commit(self, seed: int) -> str:
        return hashlib.sha1(str(seed).encode()).hexdigest()

    def add(self, name: str, revision: str, seed: int) -> Path:
        """Download, as it were, a revision; returns its snapshot."""
        repository, commit = self.folder(name), self.commit(seed)
        snapshot, blobs = repository / "snapshots" / commit, repository / "blobs"
        if not snapshot.exists():
            snapshot.mkdir(parents=True)
            blobs.mkdir(exist_ok=True)
            tiny_model("llama", seed=seed).save_pretrained(snapshot)
            self.tokenizer.save_pretrained(snapshot)
            for path in list(snapshot.iterdir()):
                blob = blobs / hashlib.sha256(path.read_bytes()).hexdigest()
                path.rename(blob)
                path.symlink_to(os.path.relpath(blob, snapshot))
        ref = repository / "refs" / revision
        ref.parent.mkdir(parents=True, exist_ok=True)
        ref.write_text(commit)
        return snapshot
