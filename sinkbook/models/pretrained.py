"""Pretrained causal language models, their tokenizers, and the token that each text begins with.

A model is named by a short name (`KNOWN`), a folder in transformers' layout, a `.gguf` file or an
id on the Hugging Face hub. Weights are read from safetensors and GGUF only, which hold numbers;
pickles, which hold programs, are refused.
"""

import difflib
import io
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from huggingface_hub import errors as hub_errors
from huggingface_hub.utils import logging as hub_logging
from jaxtyping import Int
from safetensors import SafetensorError
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

from sinkbook.devices import device_of
from sinkbook.errors import SinkbookError
from sinkbook.models.gguf import DEQUANTISED, prepared

# Else transformers asks a bot on the hub to convert pickled weights, and takes what it answers.
os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")


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
    first_token: int | None  # id of the token that each text begins with; None: its own first one
    card: str  # what the weights are and where they come from, in words for a page

    @property
    def ordinary_tokens(self) -> Int[np.ndarray, " token"]:
        """The ids of all tokens that are not special, in their order."""
        return np.setdiff1d(np.arange(len(self.tokenizer)), self.tokenizer.all_special_ids)

    @property
    def prefix(self) -> list[int]:
        """The ids that stand before every text: the first token's, or none."""
        return [] if self.first_token is None else [self.first_token]

    def tokenize(self, texts: Iterable[str]) -> Iterator[list[int]]:
        """The token ids of each text, those of `prefix` before them."""
        for text in texts:
            encoded = self.tokenizer(text, add_special_tokens=False, verbose=False)
            yield [*self.prefix, *encoded["input_ids"]]

    def encode(self, texts: Sequence[str], length: int) -> Int[Tensor, "text position"]:
        """Token ids of each text, the first token included, cut to exactly `length` tokens.

        They lie on the model's device. Raises SinkbookError if a text is too short.
        """
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
    model, or its weights are damaged, incomplete or pickled.

    >>> language_model = load("smollm2-135m")
    >>> language_model.encode(["The capital of France is Paris."], length=4)
    tensor([[   0,  504, 3575,  282]])
    """
    name = os.fspath(name)
    device = device_of(device)
    path = Path(name).expanduser()
    options = {"revision": revision or "main", "trust_remote_code": trust_remote_code}
    with quiet():
        if name in KNOWN:
            source, card = prepared(name), KNOWN[name].card
        elif path.suffix == ".gguf" and path.is_file():
            source, card = path.parent, f"{name}, a GGUF file, its weights written out."
            options["gguf_file"] = path.name
        elif path.is_dir():
            _check_folder(path)
            source, card = path, f"{name}, a folder."
        elif _may_be_on_hub(name):
            source, card = name, f"{name} from the hub, revision {options['revision']}."
        else:
            raise _unknown(name)
        if revision and source != name:
            raise SinkbookError(
                f"revision {revision!r} was asked for, but {name!r} is not on the hub and has "
                "none. Leave the revision out."
            )
        model, tokenizer = _read(name, str(source), device, dtype, options)
    first_token = KNOWN[name].first_token if name in KNOWN else None
    if first_token is None:
        first_id = _bos(tokenizer)
    else:
        first_id = tokenizer.convert_tokens_to_ids(first_token)
    return LanguageModel(name, model, tokenizer, first_id, card)


def _bos(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The beginning-of-sequence token, if the tokenizer itself puts one before a text."""
    bos = tokenizer.bos_token_id
    return bos if tokenizer("a")["input_ids"][:1] == [bos] else None


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
    try:
        config = AutoConfig.from_pretrained(source, **options)
        _refuse_encoders(name, config)
        tokenizer = AutoTokenizer.from_pretrained(source, **options)
        model, report = AutoModelForCausalLM.from_pretrained(
            source, output_loading_info=True, **options, **weights
        )
    except (OSError, ValueError, ImportError, RuntimeError, SafetensorError) as error:
        raise _explain(name, str(options["revision"]), error) from error
    if report["missing_keys"]:  # transformers would go on with random numbers
        missing = sorted(report["missing_keys"])
        raise SinkbookError(
            f"the weights of {name!r} are incomplete: {len(missing)} tensors are missing, "
            f"such as {missing[0]}."
        )
    return model.to(device), tokenizer


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


_PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl"}
_NO_PICKLES = "sinkbook reads safetensors and GGUF only: look for the model in one of these."


def _check_folder(folder: Path) -> None:
    """Refuse a folder that is no model in transformers' layout, or holds only pickled weights."""
    if not (folder / "config.json").exists():
        raise SinkbookError(
            f"the folder {str(folder)!r} is no model: it has no config.json. "
            "Give the folder that has it, or a .gguf file by its own name."
        )
    if not any(folder.glob("*.safetensors")):
        others = sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLES)
        held = f"only as {others[0]}, a pickle, which can run any code" if others else "nowhere"
        raise SinkbookError(f"the folder {str(folder)!r} has its weights {held}. {_NO_PICKLES}")


def _explain(name: str, revision: str, error: Exception) -> SinkbookError:
    """Say in one sentence why transformers could not load a model."""
    causes: list[BaseException] = [error]
    while cause := causes[-1].__cause__ or causes[-1].__context__:
        causes.append(cause)

    def caused_by(kind: type[Exception]) -> bool:
        return any(isinstance(cause, kind) for cause in causes)

    page = f"https://huggingface.co/{name}"
    if caused_by(hub_errors.GatedRepoError):
        return SinkbookError(
            f"{name!r} is gated. Accept its terms at {page} and log in with: hf auth login"
        )
    if caused_by(hub_errors.RepositoryNotFoundError):
        return _unknown(name)
    if caused_by(hub_errors.RevisionNotFoundError):
        return SinkbookError(f"{name!r} has no revision {revision!r}. See {page}/tree/main")
    if caused_by(hub_errors.LocalEntryNotFoundError):
        return _unknown(name, f" (revision {revision!r}) on this machine, and no way to the hub")
    if "use_safetensors" in str(error):
        return SinkbookError(f"{name!r} has no weights as safetensors. {_NO_PICKLES}")
    if "custom code" in str(error):
        return SinkbookError(
            f"{name!r} comes with code of its own, which is not run. If you have read that code "
            "and trust it, add `trust_remote_code=True`."
        )
    reason = str(error).strip().splitlines() or [type(error).__name__]
    return SinkbookError(f"cannot load {name!r}: {reason[0]}")


def _may_be_on_hub(name: str) -> bool:
    """Whether it reads like `owner/model`, or like `gpt2` and not like a slip in a known name."""
    shape = re.fullmatch(r"([\w-][\w.-]*/)?[\w-][\w.-]*", name)
    slip = "/" not in name and (name.endswith(".gguf") or difflib.get_close_matches(name, KNOWN))
    return bool(shape) and not slip


def _unknown(name: str, where: str = "") -> SinkbookError:
    near = difflib.get_close_matches(name, KNOWN, n=1)
    meant = f" Did you mean {near[0]!r}?" if near else ""
    return SinkbookError(
        f"no model named {name!r}{where}.{meant} Known: {', '.join(KNOWN)}; "
        "or give a folder, a .gguf file or a hub id."
    )


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
