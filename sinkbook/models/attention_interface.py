"""Which attention a model of transformers computes by, for a while."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

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
