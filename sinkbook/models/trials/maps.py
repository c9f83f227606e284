"""Which linear maps are computed past their modules, by matrices that a layer takes from them."""

from collections.abc import Iterable
from contextlib import ExitStack

import torch
from torch import nn

from sinkbook.models.trials.writers import on_trial


def uncalled(model: nn.Module, maps: Iterable[nn.Module]) -> list[nn.Module]:
    """The maps that a short text never calls, though their `weight` changes its logits.

    Mamba's steps are such. Experts that get no token, and what a text does not need, are not.
    Raises `SinkbookError` if the model cannot be run on a short text.
    """
    called, found = set(), []
    with on_trial(model) as run:
        silent = list(maps)
        with ExitStack() as hooks:
            for module in silent:
                handle = module.register_forward_pre_hook(lambda module, _: called.add(module))
                hooks.callback(handle.remove)
            logits = run()
        for module in silent:
            if module in called:
                continue
            own = module.weight.data
            try:
                module.weight.data = torch.zeros_like(own)
                if not torch.equal(run(), logits):
                    found.append(module)
            finally:
                module.weight.data = own
    return found
