"""Which attention a model of transformers computes by, for a while."""

import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import count

import torch
from torch import Tensor, nn

from sinkbook.errors import SinkbookError
from sinkbook.models.partial_forward import alone_with
from sinkbook.models.wrappers import unwrapped


@dataclass(eq=False)
class _Use:
    """Somebody who has a model attend by a name, for a while."""

    name: str
    attend: Callable | None


@dataclass
class _Shared:
    """The uses of one configuration, by one thread or several, the latest last."""

    before: str  # what the configuration named before the first of them
    uses: list[_Use] = field(default_factory=list)


_GUARD = threading.RLock()
_SHARED: dict[int, _Shared] = {}  # by the id of the configuration, which the user keeps alive
_REGISTERED: dict[str, Callable] = {}
_NAMED = threading.RLock()


@contextmanager
def attending_by(model: nn.Module, name: str, attend: Callable | None = None) -> Iterator[None]:
    """Have a model of transformers attend by the implementation `name` in the body.

    With `attend` it is ours: an attention function that is registered under the name. The masks are
    then those of fused attention; without any, padding and windows would be dropped. Bodies may lie
    inside each other or overlap in several threads, for one model or for several: the latest one
    that has not ended decides, and after the last of them every part of the model has its own
    implementation back, also after an exception.
    """
    from transformers import PreTrainedModel

    model = unwrapped(model)
    parts = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    configs = {id(part.config): part.config for part in parts}
    use = _Use(name, attend)
    with alone_with(model), _GUARD:  # not in the middle of another thread's measurement
        if attend is not None:
            use.name = _registered(name, attend)
        for key, config in configs.items():
            shared = _SHARED.setdefault(key, _Shared(config._attn_implementation))
            shared.uses.append(use)
    try:
        with alone_with(model), _GUARD:
            model.set_attn_implementation(use.name)
        yield
    finally:
        with _GUARD:
            for key, config in configs.items():
                shared = _SHARED[key]
                shared.uses.remove(use)
                config._attn_implementation = shared.uses[-1].name if shared.uses else shared.before
                if not shared.uses:
                    del _SHARED[key]


def attention_beneath(config: object, attend: Callable) -> Callable | None:
    """The attention function of the latest other use of a configuration; None if there is none."""
    with _GUARD:
        shared = _SHARED.get(id(config))
        uses = [] if shared is None else shared.uses
        others = [use.attend for use in uses if use.attend not in (None, attend)]
        return others[-1] if others else None


def _registered(name: str, attend: Callable) -> str:
    """Register a function: under the name, or a numbered one where that is another's just now."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    in_use = {use.name for shared in _SHARED.values() for use in shared.uses}
    names = (name if number == 1 else f"{name}-{number}" for number in count(1))
    free = next(n for n in names if n not in in_use or _REGISTERED.get(n) is attend)
    _REGISTERED[free] = attend
    AttentionInterface.register(free, attend)
    AttentionMaskInterface.register(free, sdpa_mask)
    return free


# What attention functions are given that changes no weight, or that the mask says as well.
_BESIDE = ("scaling", "dropout", "position_ids", "cache_position", "position_embeddings")
_BESIDE += ("cu_seq_lens_q", "cu_seq_lens_k", "seq_idx")


def unknown(keywords: dict, known: Iterable[str] = ()) -> list[str]:
    """The tensors and numbers that an attention function is given under names it does not know.

    Any may change the weights, as inkling2's `sinks` do.
    """
    names = {*_BESIDE, *known}
    return [
        name
        for name, given in keywords.items()
        if name not in names and (torch.is_tensor(given) or isinstance(given, float))
    ]


def with_selection(
    module: nn.Module, attention_mask: Tensor | None, keywords: dict
) -> Tensor | None:
    """The mask without the keys that a layer's indexer has not chosen; takes that from `keywords`.

    Such layers hide these keys themselves from the functions that they know by name, and tell all
    others by `indices` (batch, query, chosen). Raises `SinkbookError` for choices of whole blocks.
    """
    if keywords.pop("block_indices", None) is not None:
        raise SinkbookError(
            f"{type(module).__name__} chooses blocks of keys, which sinkbook does not read. Give a "
            "model whose layers attend to all keys, or choose them one by one."
        )
    indices = keywords.pop("indices", None)
    if indices is None:
        return attention_mask
    hidden = torch.ones(
        *indices.shape[:2], attention_mask.shape[-1], dtype=torch.bool, device=indices.device
    )
    hidden = hidden.scatter(-1, indices.long(), False)[:, None]
    if attention_mask.dtype == torch.bool:
        return attention_mask & ~hidden
    return attention_mask.masked_fill(hidden, torch.finfo(attention_mask.dtype).min)


@contextmanager
def registered(name: str, attend: Callable) -> Iterator[None]:
    """Have models that attend by the implementation `name` call `attend` in the body."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    with _NAMED:  # models of one name wait for each other
        before = ALL_ATTENTION_FUNCTIONS._local_mapping.get(name)
        ALL_ATTENTION_FUNCTIONS[name] = attend
        try:
            yield
        finally:
            del ALL_ATTENTION_FUNCTIONS[name]
            if before is not None:
                ALL_ATTENTION_FUNCTIONS[name] = before


def own_function(
    model: nn.Module, attentions: Iterable[nn.Module | None]
) -> tuple[str, Callable | None]:
    """The attention function that a user has registered for a model, with the name of it.

    `None` if the model attends by one of transformers' own, which are all softmax attention.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    name = model.config.get_text_config()._attn_implementation or "eager"
    found = ALL_ATTENTION_FUNCTIONS.get(name)
    if found is None and name == "eager":  # a function of the module that defines the model
        homes = {type(attention).__module__ for attention in attentions if attention is not None}
        found = next(
            filter(
                _is_foreign, (vars(sys.modules[h]).get("eager_attention_forward") for h in homes)
            ),
            None,
        )
    return name, found if _is_foreign(found) else None


def _is_foreign(function: Callable | None) -> bool:
    """Whether a function is neither of transformers nor of a model's own code on the hub."""
    while isinstance(function, partial):
        function = function.func
    home = getattr(function, "__module__", None) or ""
    return function is not None and not home.startswith(("transformers.", "transformers_modules."))
