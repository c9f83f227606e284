"""Looking at a model's files before anything opens them, and at what was read of them afterwards.

What lies in a folder is somebody's training run, clone or download. A file that is not what its
name says, a pickle that an index names, or a tensor that finds no place is told of here, in words
of what to do, and never read around.
"""

import json
from collections.abc import Iterable
from difflib import SequenceMatcher
from pathlib import Path, PurePosixPath

from safetensors import safe_open
from torch import nn
from transformers.utils import cached_file

from sinkbook.errors import SinkbookError

PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl"}
NO_PICKLES = "sinkbook reads safetensors and GGUF only: look for the model in one of these."
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_ADAPTER = "adapter_config.json"
# What tokenizers are kept in; without any, some classes of transformers make an empty one.
_TOKENIZERS = (
    "tokenizer.json",
    "*.model",
    "vocab*",
    "*.tiktoken",
    "tekken.json",
    "tokenization*.py",
)
_READ = {".json", ".model", ".txt", ".tiktoken", ".gguf"}
_POINTERS = {
    b"version https://git-lfs": "a pointer of Git LFS. In the folder run: git lfs pull",
    b"version https://hawser": "a pointer of Git LFS. In the folder run: git lfs pull",
    b"/annex/objects/": "a pointer of git-annex. In the folder run: git annex get",
}
_PAGES = (b"<!doctype", b"<html")
# What else a file of weights may be.
_PICKLED = (b"PK\x03\x04", *(bytes([0x80, protocol]) for protocol in range(2, 6)))


# --- Before reading --------------------------------------------------------------------------


def check_folder(folder: Path) -> None:
    """Refuse a folder that is no whole model in transformers' layout with a tokenizer.

    Raises `SinkbookError` for an adapter, beside a model or not, for weights that are pickled,
    lie outside the folder, are missing or were not downloaded, and if there is no tokenizer.
    """
    here = f"the folder {str(folder)!r}"
    adapters = sorted(path.name for path in folder.glob("adapter_*"))
    if adapters:
        raise _adapter(here, adapters[0], folder / _ADAPTER)
    if not (folder / "config.json").exists():
        raise SinkbookError(
            f"{here} is no model: it has no config.json. "
            "Give the folder that has it, or a .gguf file by its own name."
        )
    check_downloaded(path for path in sorted(folder.iterdir()) if path.suffix.lower() in _READ)
    names = _weight_names(here, folder)
    missing = [name for name in names if not (folder / name).exists()]
    if missing:
        raise SinkbookError(
            f"{here} is incomplete: of the {len(names)} files of its weights {len(missing)} are "
            f"missing, such as {missing[0]}. Download them again."
        )
    check_downloaded(folder / name for name in names)
    if not any(path for pattern in _TOKENIZERS for path in folder.glob(pattern)):
        raise SinkbookError(
            f"{here} has no tokenizer files, such as tokenizer.json. Copy them into it from the "
            "model that it was trained from, or save them with tokenizer.save_pretrained(folder)."
        )


def check_hub(name: str, revision: str) -> None:
    """Refuse a repository on the hub that is an adapter, or whose index leads to other files."""
    settings = {"revision": revision}
    for kind in ("missing_entries", "connection_errors", "gated_repo"):
        settings[f"_raise_exceptions_for_{kind}"] = False
    if found := cached_file(name, _ADAPTER, **settings):
        raise _adapter(repr(name), _ADAPTER, Path(found))
    if found := cached_file(name, "config.json", **settings):
        _explicit_name(repr(name), Path(found))
    if found := cached_file(name, _INDEX, **settings):
        _shards(repr(name), Path(found))
        check_downloaded(Path(found).parent.glob("*.safetensors"))
    elif found := cached_file(name, _WEIGHTS, **settings | {"local_files_only": True}):
        check_downloaded([Path(found)])


def check_downloaded(paths: Iterable[Path]) -> None:
    """Refuse what stands for a large file that was never downloaded, links to nowhere, pickles."""
    for path in paths:
        if not path.exists():
            raise SinkbookError(f"{str(path)!r} is a link to a file that is not there.")
        if not path.is_file():  # a pipe would be waited for, a folder passed over
            raise SinkbookError(f"{str(path)!r} is no file. Put the model's own in its place.")
        with path.open("rb") as file:
            start = file.read(200)
        if not start and path.suffix != ".txt":
            raise SinkbookError(f"{str(path)!r} is empty. Download it again.")
        if start.lstrip().lower().startswith(_PAGES):
            raise SinkbookError(
                f"{str(path)!r} is a web page. Download it again, from a link to the file."
            )
        for mark, what in _POINTERS.items():
            if mark in start[: len(mark) + 40]:
                raise SinkbookError(f"{str(path)!r} is not downloaded, it is {what}")
        if path.suffix in (".safetensors", ".gguf") and start.startswith(_PICKLED):
            raise SinkbookError(
                f"{str(path)!r} is a pickle under another name, which can run any code. "
                f"{NO_PICKLES}"
            )


def _weight_names(here: str, folder: Path) -> list[str]:
    """The files that transformers would read a folder's weights from; checked, not opened."""
    if explicit := _explicit_name(here, folder / "config.json"):
        index = explicit.endswith(".json")
        return _shards(here, folder / explicit) if index else [explicit]
    if any(folder.glob("shard-*-model-*.safetensors")):  # transformers would take them first of all
        raise SinkbookError(
            f"{here} is a checkpoint of a distributed training. Load it there and save the model "
            "with save_pretrained into a folder of its own."
        )
    if (folder / _WEIGHTS).exists() or (folder / _WEIGHTS).is_symlink():
        return [_WEIGHTS]
    if (folder / _INDEX).exists():
        return _shards(here, folder / _INDEX)
    others = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
    held = f"only as {others[0]}, a pickle, which can run any code" if others else "nowhere"
    if named := sorted(path.name for path in folder.glob("*.safetensors")):
        held = f"as {named[0]}, where transformers looks for {_WEIGHTS} or {_INDEX}"
    raise SinkbookError(f"{here} has its weights {held}. {NO_PICKLES}")


def _explicit_name(here: str, config: Path) -> str | None:
    """The file that a config itself names for its weights, if any."""
    named = _json(config).get("transformers_weights")
    if named is not None:
        _check_name(here, config.name, named, (".safetensors", ".safetensors.index.json"))
    return named


def _shards(here: str, index: Path) -> list[str]:
    names = _json(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise SinkbookError(f"{here} has an {index.name} without a weight_map. Download it again.")
    for name in names.values():
        _check_name(here, index.name, name, (".safetensors",))
    return sorted(set(names.values()))


def _check_name(here: str, by: str, name: object, endings: tuple[str, ...]) -> None:
    inside = isinstance(name, str) and not {"..", "/"} & {*PurePosixPath(name).parts}
    if not inside or "\\" in name or ":" in name or not name.endswith(endings):
        raise SinkbookError(
            f"{here} is refused: its {by} names {name!r} for its weights, which is no safetensors "
            f"file inside of it. {NO_PICKLES}"
        )


def _json(path: Path) -> dict:
    try:
        held = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise SinkbookError(
            f"{str(path)!r} cannot be read as JSON: {error}. Download it again."
        ) from error
    if not isinstance(held, dict):
        raise SinkbookError(f"{str(path)!r} holds a {type(held).__name__}, not an object of JSON.")
    return held


def _adapter(here: str, file: str, config: Path) -> SinkbookError:
    about = _json(config) if config.exists() else {}
    base = about.get("base_model_name_or_path") or "the model that it was trained on"
    return SinkbookError(
        f"{here} holds an adapter of PEFT ({file}, {about.get('peft_type', 'kind unknown')}), and "
        f"not just a model. Load {base} with transformers, put the adapter on it with "
        "peft.PeftModel.from_pretrained(model, folder), and measure that; or save it with "
        "merge_and_unload() into a folder of its own."
    )


# --- After reading ---------------------------------------------------------------------------


def check_numbers(name: str, source: str, revision: str, model: nn.Module) -> None:
    """Refuse whole numbers where the model has fractions: their scales would be left out.

    `source` is the folder, or the repository on the hub, that the model was read from.
    """
    if getattr(model, "hf_quantizer", None) is not None:
        return
    folder = Path(source)
    if not folder.is_dir():
        held = cached_file(source, "config.json", revision=revision, local_files_only=True)
        folder = Path(held).parent
    for file in _weight_names(repr(name), folder):
        with safe_open(folder / file, "pt") as stored:
            for tensor in stored.keys():  # noqa: SIM118, it is no dictionary
                kind = stored.get_slice(tensor).get_dtype()
                if tensor.endswith(".weight") and kind.lstrip("IU").isdigit():
                    raise SinkbookError(
                        f"{name!r} holds {tensor} as whole numbers ({kind}), and its config does "
                        "not say how they are scaled. Load the model that was quantised, or save "
                        "it with its quantization_config."
                    )


def check_read(name: str, model: nn.Module, report: dict) -> None:
    """Refuse a model whose tensors and those of its file are not the same, by transformers' report.

    It would go on with random numbers where one is missing, and without those it has no place for.
    """
    for tensor, stored, wanted in sorted(report["mismatched_keys"]):
        raise SinkbookError(
            f"the weights of {name!r} do not fit its config.json: {tensor} is stored in the shape "
            f"{tuple(stored)}, and the config asks for {tuple(wanted)}. Mend the config (a "
            "vocabulary that has grown is in vocab_size), or take both from one place."
        )
    missing, unexpected = sorted(report["missing_keys"]), _unexpected(model, report)
    if missing and unexpected:
        raise SinkbookError(
            f"the weights of {name!r} are stored under other names: "
            f"{_other_names(missing, unexpected)} ({len(missing)} tensors are missing). Rename the "
            "tensors and save them again, or save the model inside the wrapper, if it was in one; "
            "or take config and weights from one place."
        )
    if missing:
        raise SinkbookError(
            f"the weights of {name!r} are incomplete: {len(missing)} tensors are missing, "
            f"such as {missing[0]}."
        )
    if unexpected:
        raise SinkbookError(
            f"the weights of {name!r} hold {len(unexpected)} tensors that its config has no place "
            f"for, such as {unexpected[0]}: another number of layers, an adapter or a head of its "
            "own. Without them it would be another model. Take config and weights from one place."
        )


def _unexpected(model: nn.Module, report: dict) -> list[str]:
    """Stored tensors without a place, but for buffers that a model computes anew."""
    buffers = {name for name, _ in model.named_buffers()}
    computed = ("rotary_emb.inv_freq", "attn.masked_bias", "attention.masked_bias")
    return sorted(
        name
        for name in report["unexpected_keys"]
        if not name.endswith(computed)
        and not any(f".{buffer}".endswith(f".{name}") for buffer in buffers)
    )


def _other_names(missing: list[str], unexpected: list[str]) -> str:
    """How the names in a file differ from those that were looked for, by the nearest two."""
    stored, wanted = max(
        ((stored, wanted) for stored in unexpected[:50] for wanted in missing[:50]),
        key=lambda pair: SequenceMatcher(None, *pair, autojunk=False).ratio(),
    )
    if stored.endswith(f".{wanted}"):
        return f"{stored} has the prefix {stored.removesuffix(wanted)!r} before {wanted}"
    if wanted.endswith(f".{stored}"):
        return f"{stored} lacks the prefix {wanted.removesuffix(stored)!r} of {wanted}"
    return f"it has {stored}, perhaps for {wanted}"
