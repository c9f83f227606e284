"""Which attention a model of transformers computes by, for a while."""

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial

from torch import nn

from sinkbook.models.wrappers import unwrapped


@contextmanager
def attending_by(model: nn.Module, name: str, attend: Callable | None = None) -> Iterator[None]:
    """Have a model of transformers attend by the implementation `name` in the body.

    With `attend` it is ours: an attention function that is registered under the name. The masks are
    then those of fused attention; without any, padding and windows would be dropped. Every part of
    the model has its own implementation back afterwards, also after an exception.
    """
    from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
    from transformers.masking_utils import sdpa_mask

    model = unwrapped(model)
    if attend is not None:
        AttentionInterface.register(name, attend)
        AttentionMaskInterface.register(name, sdpa_mask)
    parts = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    before = [(part.config, part.config._attn_implementation) for part in parts]
    try:
        model.set_attn_implementation(name)
        yield
    finally:
        for config, implementation in before:
            config._attn_implementation = implementation


@contextmanager
def registered(name: str, attend: Callable) -> Iterator[None]:
    """Have models that attend by the implementation `name` call `attend` in the body."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

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
