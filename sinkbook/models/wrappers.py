"""The model inside what training scripts and tools put around it, and where it computes.

One place knows them: `torch.compile`, data parallelism, mixed precision, PEFT's adapters. What
cannot be taken off without changing what the model computes, such as a trained prompt, is refused
here.
"""

import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import MethodType, ModuleType
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Int
from torch import Tensor, nn

from sinkbook.errors import SinkbookError


@runtime_checkable
class Holder(Protocol):
    """What keeps a model, as a `LanguageModel` of `sinkbook.load` does."""

    model: nn.Module


AnyModel = nn.Module | Holder  # or a wrapper of one: what `unwrapped` takes

_LOCK = threading.Lock()
_INSIDE: list[object] = []  # the bodies of `uncompiled` that are open
_EAGER = ExitStack()


def unwrapped(model: AnyModel) -> nn.Module:
    """The model that computes, out of all that stands around it.

    What keeps a model as its `model`, as `sinkbook.load` gives it or a pipeline, stands for it.
    Adapters inside its layers stay where they are and count. Raises `SinkbookError` for what is no
    model, weights that are sharded over processes, and a trained prompt before the text.
    """
    if not isinstance(model, nn.Module):
        held = getattr(model, "model", None)
        if not isinstance(held, nn.Module):
            what = f"{model!r:.40}" if isinstance(model, str) else f"a {type(model).__name__}"
            raise SinkbookError(
                f"{what} is no model. Give an nn.Module, or what `sinkbook.load` returns."
            )
        model = held
    while (inner := _inside(model)) is not model:
        model = inner
    return model


def computing_device(model: AnyModel) -> torch.device:
    """Where a model takes its tokens.

    Raises `SinkbookError` if its weights are not in this process's memory: offloaded, not loaded
    yet or sharded over processes.
    """
    model = unwrapped(model)
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise SinkbookError(
                f"{name} of {type(model).__name__} is not in memory: it is offloaded, or was never "
                "loaded. Load the model whole, without `device_map` and offloading."
            )
        if type(parameter).__name__ == "DTensor" or hasattr(parameter, "ds_id"):
            raise _sharded(model)  # the latter by DeepSpeed's ZeRO-3
    held = next(model.parameters(), None)
    held = next(model.buffers(), torch.empty(0)) if held is None else held
    return held.device


def check_ids(model: AnyModel, input_ids: Int[Tensor, "batch position"]) -> None:
    """Refuse ids that are no tokens of a model: on a GPU they would end the whole process."""
    found = unwrapped(model)
    embedding = found.get_input_embeddings() if hasattr(found, "get_input_embeddings") else None
    known = getattr(embedding, "num_embeddings", None)
    if input_ids.min() < 0 or (known is not None and input_ids.max() >= known):
        raise SinkbookError(
            f"token ids go from {int(input_ids.min())} to {int(input_ids.max())}; the model has "
            f"{known or 'none below 0'}. Give input_ids of its own tokenizer; labels are none."
        )


@contextmanager
def taking(model: AnyModel, input_ids: Int[Tensor, "batch position"]) -> Iterator[None]:
    """In the body a model reads tokens; `SinkbookError` is raised for those that it has not."""
    check_ids(model, input_ids)
    try:
        yield
    except IndexError as error:
        raise SinkbookError(
            f"the model cannot take {input_ids.shape[1]} positions with token ids up to "
            f"{int(input_ids.max())}. Cut the text, or use the model's own tokenizer."
        ) from error


@contextmanager
def uncompiled() -> Iterator[None]:
    """In the body compiled models run as they are written: a graph made before skips our hooks.

    The setting is one for all threads, so it is put back when the last of them is out.
    """
    if "torch._dynamo" not in sys.modules:  # nothing has been compiled
        yield
        return
    body = object()
    with _LOCK:
        _INSIDE.append(body)
        if len(_INSIDE) == 1:
            _EAGER.enter_context(torch.compiler.set_stance("force_eager"))
    try:
        yield
    finally:
        with _LOCK:
            _INSIDE.remove(body)
            if not _INSIDE:
                _EAGER.close()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Without dropout, whatever mode each module is in.

    By the mark alone: some modules do more where `train` is called, such as merging adapters.
    """
    training = [module for module in unwrapped(model).modules() if module.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def in_own_precision(model: nn.Module) -> Iterator[None]:
    """In the body a model computes in the type of its own weights, as outside mixed precision.

    Taken off are the autocast around the body and the one that accelerate has put around the
    model's `forward`, which is put back.
    """
    device, model = computing_device(model), unwrapped(model)
    found = vars(model).get("forward")
    outer = bare = getattr(found, "__func__", found)
    while type(converting := getattr(bare, "__wrapped__", None)).__name__ == "ConvertOutputsToFp32":
        bare = converting.model_forward.__wrapped__  # autocast's decorator lies between
    try:
        if bare is not outer:
            del vars(model)["forward"]
            if bare is not type(model).forward:  # somebody else's, which lay there before
                model.forward = MethodType(bare, model) if hasattr(found, "__func__") else bare
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        if bare is not outer:
            model.forward = found


def _inside(model: nn.Module) -> nn.Module:
    """What one wrapper holds; the model itself if it is none."""
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        return model.module
    if "_orig_mod" in model._modules:  # `torch.compile`
        return model._orig_mod
    if "_fsdp_wrapped_module" in model._modules:
        raise _sharded(model)
    peft = sys.modules.get("peft")
    if peft is not None and isinstance(model, (peft.PeftModel, peft.PeftMixedModel)):
        return _adapted(model, peft)
    return model


def _adapted(model: nn.Module, peft: ModuleType) -> nn.Module:
    """The model whose layers PEFT has adapted, if calling it is the same as calling the wrapper."""
    plain = peft.tuners.tuners_utils.BaseTuner
    # AdaLoRA only adds to the loss. Others read a prompt before the text, or the text twice.
    alike = (plain.forward, peft.AdaLoraModel.forward)
    configs = model.peft_config.values()
    of_tokens = any(getattr(config, "alora_invocation_tokens", None) for config in configs)
    tuner = model.base_model
    if isinstance(tuner, plain) and type(tuner).forward in alike and not of_tokens:
        return tuner.model
    kinds = ", ".join(str(getattr(config.peft_type, "value", "")) for config in configs)
    raise SinkbookError(
        f"{type(model).__name__} carries {kinds}, which is more than adapted layers: a trained "
        "prompt before the text, or adapters that depend on the text. sinkbook reads models with "
        "LoRA and other adapters inside their layers. Give the model that it was trained on."
    )


def _sharded(model: nn.Module) -> SinkbookError:
    return SinkbookError(
        f"the weights of {type(model).__name__} are sharded over processes. Gather them, save the "
        "model, and load it whole in one process."
    )
