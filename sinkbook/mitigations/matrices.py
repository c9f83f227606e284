"""The matrices in a model's layers that eight-bit numbers reach: linear maps, and experts."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from sinkbook.errors import SinkbookError
from sinkbook.mitigations.experts import expert_matrices
from sinkbook.models.layout import blocks


class Part(NamedTuple):
    """A linear map, or the experts of a mixture."""

    name: str
    module: nn.Module
    matrices: list[nn.Parameter]
    experts: bool


def parts(model: nn.Module) -> list[Part]:
    """All linear maps of the layers, each once; an error if there are other matrices."""
    found: dict[nn.Module, Part] = {}
    others: dict[str, int] = {}
    for number, block in enumerate(blocks(model)):
        for name, module in block.named_modules():
            name = f"layers[{number}].{name}"
            own = expert_matrices(module)
            if own or isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":
                matrices = own or [module._parameters.get("weight")]
                _check_plain(name, matrices)
                found[module] = Part(name, module, matrices, bool(own))
            elif not isinstance(module, _ConvNd) and "router" not in type(module).__name__.lower():
                _check_not_packed(name, module)
                for key, weight in module.named_parameters(recurse=False):
                    if weight.ndim > 1 and "bias" not in key:
                        others[f"{name}.{key}"] = weight.numel()
    known = sum(matrix.numel() for part in found.values() for matrix in part.matrices)
    if not found or sum(others.values()) > 0.02 * known:
        raise SinkbookError(
            f"{type(model).__name__} has matrices in its layers that are no linear maps of torch's "
            "or experts of transformers' kind, and would stay exact: "
            f"{', '.join(others) or 'all'}. "
            "Give a model whose layers are made of these."
        )
    return list(found.values())


def _check_plain(name: str, matrices: list[nn.Parameter | None]) -> None:
    plain = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    for matrix in matrices:
        own = matrix is None or type(matrix.data) is not Tensor
        if own or matrix.dtype not in plain or matrix.is_meta:
            kind = "computed" if matrix is None else f"{matrix.dtype} on {matrix.device}"
            kind = f"{type(matrix.data).__name__}, {kind}" if own and matrix is not None else kind
            raise SinkbookError(
                f"the weights of {name} are {kind}: quantised already, offloaded, or made of "
                "others. Load the model in float32 or in half precision, without offloading."
            )


def _check_not_packed(name: str, module: nn.Module) -> None:
    """Refuse a linear map that keeps its weights where no parameter shows them."""
    whole = (torch.int8, torch.uint8, torch.int16, torch.int32)
    codes = any(b.ndim > 1 and b.dtype in whole for b in module.buffers(recurse=False))
    if codes or hasattr(module, "_packed_params"):
        raise SinkbookError(
            f"the weights of {name}, a {type(module).__module__}.{type(module).__name__}, are "
            "packed: quantised already. Load the model in float32 or in half precision."
        )
