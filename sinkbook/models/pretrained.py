"""Pretrained causal language models, their tokenizers, and the token that each text begins with.

A model is named by a short name (`KNOWN`), a folder in transformers' layout, a `.gguf` file or an
id on the Hugging Face hub. Weights are read from safetensors and GGUF only, which hold numbers;
pickles, which hold programs, are refused.
"""

import io
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from huggingface_hub.utils import logging as hub_logging
from jaxtyping import Int
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
)
from transformers.utils import logging as transformers_logging

from sinkbook.annotations import check_arguments
from sinkbook.arguments import check_kind, check_not_one_text, texts_of, whole_number
from sinkbook.devices import device_of
from sinkbook.errors import SinkbookError
from sinkbook.files import reading
from sinkbook.models.gguf import DEQUANTISED, check_header, check_tensors, prepared
from sinkbook.models.load_errors import (
    NO_MODEL,
    check_options,
    comes_with_code,
    explained,
    may_be_on_hub,
    path_of,
    unknown,
)
from sinkbook.models.weight_files import (
    check_downloaded,
    check_folder,
    check_hub,
    check_numbers,
    check_read,
)


@dataclass(frozen=True)
class Known:
    """A model with a short name, whose weights `data/sources.py` pins under the same name."""

    card: str
    first_token: str | None = None  # None: whatever the tokenizer puts first


KNOWN: dict[str, Known] = {
    "smollm2-135m": Known(
        card="SmolLM2-135M-Instruct (Hugging Face, Apache-2.0): a Llama-like decoder of 30 layers "
        "with 9 query heads and 3 key-value heads each, width 576, tuned on instructions. These "
        "are its weights quantised to 4 bits (Q4_1 GGUF), written out in float32: expect small "
        "differences from the original bfloat16 weights. Each text begins with <|endoftext|>, "
        "which stood between documents in pretraining and gives the lowest loss on prose.",
        first_token="<|endoftext|>",
    ),
    "gemma-3-270m": Known(
        card="Gemma 3 270M (Google, Gemma Terms of Use), the base model: 18 layers with 4 query "
        "heads and 1 key-value head each, width 640; every sixth layer sees the whole text, the "
        "others a window of 512 tokens. These are its weights quantised to 4 bits (Q4_K_M GGUF), "
        "written out in float32. Each text begins with <bos>.",
    ),
}


@dataclass(frozen=True, eq=False)
class LanguageModel:
    """A causal language model, ready to be measured."""

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    prefix: tuple[int, ...]  # ids of the tokens that stand before every text; most have one or none
    card: str  # what the weights are and where they come from, in words for a page

    @property
    def first_token(self) -> int | None:
        """The id of the token that each text begins with; `None` if that is its own first one."""
        return self.prefix[0] if self.prefix else None

    @property
    def ordinary_tokens(self) -> Int[np.ndarray, " token"]:
        """The ids of all tokens that are not special, in their order."""
        return np.setdiff1d(np.arange(len(self.tokenizer)), self.tokenizer.all_special_ids)

    @check_arguments
    def tokenize(self, texts: Iterable[str]) -> Iterator[list[int]]:
        """The token ids of each text, those of `prefix` before them."""
        check_not_one_text(texts)
        for text in texts:
            check_kind("text", text, str)
            encoded = self.tokenizer(text, add_special_tokens=False, verbose=False)
            yield [*self.prefix, *encoded["input_ids"]]

    @check_arguments
    def encode(self, texts: Sequence[str], length: int) -> Int[Tensor, "text position"]:
        """Token ids of each text, those of `prefix` included, cut to exactly `length` tokens.

        They lie on the model's device. Raises SinkbookError if a text is too short.
        """
        texts, length = texts_of(texts), whole_number("length", length, 1)
        rows = list(self.tokenize(texts))
        short = [index for index, row in enumerate(rows) if len(row) < length]
        if short:
            named = "; ".join(
                f"text {index} ({texts[index][:30]!r}...) has {len(rows[index])}"
                for index in short[:3]
            )
            raise SinkbookError(
                f"{len(short)} of {len(rows)} texts are shorter than {length} tokens: {named}. "
                "Ask for a smaller `length`, or give longer texts."
            )
        return torch.tensor([row[:length] for row in rows], device=self.model.device)


def load(
    name: str | os.PathLike[str] = "smollm2-135m",
    *,
    revision: str | None = None,
    device: str | torch.device = "auto",
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
) -> LanguageModel:
    """Load a causal language model by short name, folder, `.gguf` file or hub id.

    `revision` is a branch, tag or commit on the hub. `device="auto"` takes a GPU where there is
    one. `dtype=None` is float32 on the CPU and elsewhere the type that the weights are stored in.
    `trust_remote_code=True` lets a model's own code run: only where you have read that code.

    Raises SinkbookError if there is no such model, it cannot be fetched, it is no causal language
    model, its files are damaged, incomplete, pickled or those of an adapter, its weights and
    config or its tokenizer do not belong together, or a GGUF file says what would not be read.

    >>> language_model = load("smollm2-135m")
    >>> language_model.encode(["The capital of France is Paris."], length=4)
    tensor([[   0,  504, 3575,  282]])
    """
    path = path_of(name)
    name, device = os.fspath(name), device_of(device)
    check_options(revision, dtype)
    check_kind("trust_remote_code", trust_remote_code, bool)
    options = {"revision": revision or "main", "trust_remote_code": trust_remote_code}
    with quiet(), reading(repr(name), NO_MODEL):
        if name in KNOWN:
            source, card = prepared(name), KNOWN[name].card
        elif path.suffix.lower() == ".gguf" and path.is_file():
            check_downloaded([path])
            source, card = path.parent, f"{name}, a GGUF file, its weights written out."
            options["gguf_file"] = path.name
        elif path.is_dir():
            check_folder(path)
            source, card = path, f"{name}, a folder."
        elif may_be_on_hub(name, KNOWN):
            source, card = name, f"{name} from the hub, revision {options['revision']}."
        else:
            raise unknown(name, KNOWN)
        if revision and source != name:
            raise SinkbookError(
                f"revision {revision!r} was asked for, but {name!r} is not on the hub and has "
                "none. Leave the revision out."
            )
        model, tokenizer = _read(name, str(source), device, dtype, options)
    with reading(f"the tokenizer of {name!r}", NO_MODEL):
        _check_vocabulary(name, model, tokenizer)
    first_token = KNOWN[name].first_token if name in KNOWN else None
    if first_token is None:
        prefix = prefix_of(name, tokenizer)
    else:
        prefix = (tokenizer.convert_tokens_to_ids(first_token),)
    if any(token >= model.get_input_embeddings().num_embeddings for token in prefix):
        raise SinkbookError(
            f"the tokenizer of {name!r} is another model's: before every text it puts {prefix}, "
            "and the model has no embeddings for that. Take both from one place."
        )
    return LanguageModel(name, model, tokenizer, prefix, card)


def prefix_of(name: str, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """What the tokenizer itself puts before a text, tried out on several: one token, two, none."""
    found = set()
    for text in ("a", "the", "1 2", "one two three"):
        try:
            whole = tokenizer(text, verbose=False)["input_ids"]
            own = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        except Exception as error:  # whatever a tokenizer raises whose files do not fit its class
            raise SinkbookError(
                f"the tokenizer of {name!r} does not read {text!r}: {error}. Load a tokenizer that "
                "is whole."
            ) from error
        starts = range(len(whole) - len(own), -1, -1)
        start = next((n for n in starts if own and whole[n : n + len(own)] == own), None)
        if start is not None:
            found.add(tuple(whole[:start]))
    if len(found) != 1:
        raise SinkbookError(
            f"the tokenizer of {name!r} does not put the same tokens before every text, so what "
            f"its texts begin with is not known; tried: {sorted(found) or 'texts without tokens'}. "
            "Load a tokenizer that is whole."
        )
    return found.pop()


def _check_vocabulary(
    name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Refuse a tokenizer whose ordinary tokens the model has no embeddings for.

    Special ones may lie beyond: Gemma 3 is published with one for images that it never reads.
    """
    rows, special = model.get_input_embeddings().num_embeddings, set(tokenizer.all_special_ids)
    added = tokenizer.added_tokens_decoder
    special |= {number for number, token in added.items() if token.special}
    beyond = [
        (number, token)
        for token, number in tokenizer.get_vocab().items()
        if number >= rows and number not in special
    ]
    if beyond:
        number, token = min(beyond)
        raise SinkbookError(
            f"the tokenizer of {name!r} is another model's: it has {len(tokenizer)} tokens, such "
            f"as {token!r} with the id {number}, and the model has embeddings for {rows}. Take "
            "both from one place, or resize the embeddings before the model is saved."
        )


# --- Reading through transformers ------------------------------------------------------------


def _read(
    name: str,
    source: str,
    device: torch.device,
    dtype: torch.dtype | None,
    options: dict[str, str | bool],
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model and the tokenizer in a folder or hub repository, as safetensors or GGUF."""
    if "gguf_file" in options:
        weights = dict(DEQUANTISED)
    else:
        stored = torch.float32 if device.type == "cpu" else "auto"
        weights = {"use_safetensors": True, "dtype": stored}
    if dtype is not None:
        weights["dtype"] = dtype
    # Else transformers asks a bot on the hub to convert pickled weights, and takes what it answers.
    os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")
    part = "config"  # of the model, that is being read
    try:
        if not Path(source).is_dir():
            check_hub(name, str(options["revision"]))
        config = AutoConfig.from_pretrained(source, **options)
        _refuse_encoders(name, config)
        if not options["trust_remote_code"]:
            _refuse_own_class(name, config)
        if "gguf_file" in options:
            check_header(Path(source) / str(options["gguf_file"]), config)
        else:
            weights["config"] = _with_own_attention(config)
        part = "tokenizer"
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
        part = "weights"
        model, report = AutoModelForCausalLM.from_pretrained(
            source, output_loading_info=True, ignore_mismatched_sizes=True, **options, **weights
        )
        check_read(name, model, report)
        if "gguf_file" in options:
            check_tensors(Path(source) / str(options["gguf_file"]), model)
        else:
            check_numbers(name, source, str(options["revision"]), model)
        return model.to(device), tokenizer
    except (SinkbookError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # whatever a reader raises, or panics with, that meets a file
        raise explained(name, part, str(options["revision"]), error, KNOWN) from error


def _with_own_attention(config: PretrainedConfig) -> PretrainedConfig:
    """The config without a word on implementations: attention is then torch's, "sdpa" or "eager".

    A config may name a kernel on the hub, which is code that transformers would fetch and run.
    """
    for part in (config, *(getattr(config, name, None) for name in config.sub_configs)):
        if part is not None:
            part._attn_implementation = part._experts_implementation = None
    return config


def _refuse_encoders(name: str, config: PretrainedConfig) -> None:
    """Refuse what is known to be no causal language model; a model's own code is let through."""
    kind = type(config)
    encoder = kind in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False)
    unknown = kind not in MODEL_FOR_CAUSAL_LM_MAPPING and not hasattr(config, "auto_map")
    if config.is_encoder_decoder or encoder or unknown:
        raise SinkbookError(
            f"{name!r} is no causal language model (model_type {config.model_type!r}). Sinks are "
            "measured in decoders, which read from left to right: Llama, GPT-2, Gemma and others."
        )


def _refuse_own_class(name: str, config: PretrainedConfig) -> None:
    """Refuse a model whose own class transformers has not, and would take another of its own for.

    Of the same name it is one that transformers has taken over, as Phi's are.
    """
    own = (getattr(config, "auto_map", None) or {}).get("AutoModelForCausalLM", "")
    taken = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if own and taken is not None and own.rpartition(".")[2] != taken.__name__:
        raise comes_with_code(name, f" ({own})")


@contextmanager
def quiet() -> Iterator[None]:
    """Keep notices and progress bars off stderr while a model loads; failures are raised.

    On a terminal the bars stay: a download of many gigabytes should show that it moves.
    """
    with ExitStack() as undo:
        for logger in (transformers_logging, hub_logging):
            undo.callback(logger.set_verbosity, logger.get_verbosity())
            logger.set_verbosity_error()
        if not sys.stderr.isatty():
            undo.enter_context(redirect_stderr(io.StringIO()))
            if transformers_logging.is_progress_bar_enabled():
                undo.callback(transformers_logging.enable_progress_bar)
                transformers_logging.disable_progress_bar()
        yield
