"""The texts that `sinkbook probe` measures: windows of one document, or texts of a domain.

All windows have the same number of tokens, so that they are measured side by side.
"""

from collections.abc import Iterable
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor

from sinkbook.annotations import check_arguments
from sinkbook.arguments import check_whole_number
from sinkbook.errors import SinkbookError
from sinkbook.models.pretrained import LanguageModel

Windows = Int[Tensor, "text position"]

# More than one token has in any language: what lies beyond in a long document is not tokenised.
CHARACTERS_PER_TOKEN = 50


@check_arguments
def read_document(path: Path) -> str:
    """The text of a UTF-8 file. Raises SinkbookError if it cannot be read or holds no text."""
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise SinkbookError(
            f"{str(path)!r} is not UTF-8: byte {error.start} is 0x{error.object[error.start]:02x}. "
            "Save it as UTF-8 plain text."
        ) from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise SinkbookError(
            f"cannot read {str(path)[:200]!r}: {reason}. Give the path of a text file."
        ) from error
    text = text.removeprefix("\ufeff")
    if not text.strip():
        raise SinkbookError(f"{str(path)!r} is empty. Give a file with some text in it.")
    return text


@check_arguments
def of_document(language_model: LanguageModel, text: str, *, count: int, length: int) -> Windows:
    """The first windows of a document, one after the other, at most `count`.

    Each begins with the model's first token, if its convention has one. What is left over at the
    end of the document is not used. Raises SinkbookError if it does not fill one window.
    """
    check_whole_number("count", count, 1)
    check_whole_number("length", length, 1)
    prefix = language_model.prefix
    step = length - len(prefix)
    if step < 1:
        raise SinkbookError(
            f"a window of {length} tokens holds no text: {len(prefix)} stand before every text. "
            f"Ask for `length={len(prefix) + 1}` or more."
        )
    (ids,) = language_model.tokenize([text[: count * step * CHARACTERS_PER_TOKEN]])
    found, ids = len(ids), ids[len(prefix) :]
    if found < length:
        raise SinkbookError(
            f"the text has {found} tokens, and a window takes {length}. "
            f"Give a longer text, or `length={found}`."
        )
    starts = range(0, min(len(ids) // step, count) * step, step)
    return torch.tensor([[*prefix, *ids[start : start + step]] for start in starts])


@check_arguments
def of_texts(
    language_model: LanguageModel, texts: Iterable[str], *, count: int, length: int
) -> Windows:
    """The beginnings of the first `count` texts that fill a window.

    Raises SinkbookError if there are fewer.
    """
    check_whole_number("count", count, 1)
    check_whole_number("length", length, 1)
    windows = []
    for ids in language_model.tokenize(texts):
        if len(ids) >= length:
            windows.append(ids[:length])
        if len(windows) == count:
            return torch.tensor(windows)
    raise SinkbookError(
        f"{len(windows)} texts of the domain have {length} tokens, and {count} were asked for. "
        "Ask for fewer texts or a smaller `length`, or give a document of your own."
    )


def check_length(language_model: LanguageModel, length: int) -> None:
    """Refuse windows that are longer than what the model has positions for."""
    config = language_model.model.config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and length > positions:
        raise SinkbookError(
            f"{language_model.name!r} has {positions} positions, and windows of {length} tokens "
            f"were asked for. Ask for `length={positions}` at most."
        )
