"""Tiny random models, and a tokenizer of a few words, for tests to which any will do."""

from functools import partial

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from sinkbook.models import LanguageModel
from sinkbook.toy.transformer import Transformer, TransformerConfig

WORDS = ["<|endoftext|>", "<s>", "to", "be", "or", "not", "<script>", "the"]  # by token id
BOS = WORDS.index("<s>")
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
    first_token = BOS if adds_bos else None
    tokenizer = tiny_tokenizer(adds_bos=adds_bos)
    return LanguageModel("tiny", model, tokenizer, first_token, "a tiny one")
