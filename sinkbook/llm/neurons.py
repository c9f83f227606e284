"""Inside one MLP: which of its units write the peak of the sink, and what is left without them.

A unit is an entry of what an MLP's last linear map reads; its weights are a column of that map,
and its write is the two multiplied.
"""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import numpy as np
import torch
import xarray as xr
from torch import Tensor, nn

from sinkbook.annotations import check_arguments
from sinkbook.arguments import (
    check_all,
    check_seed,
    check_token_ids,
    whole_number,
)
from sinkbook.errors import SinkbookError
from sinkbook.llm.components import Tokens, symptoms
from sinkbook.models.layout import layers
from sinkbook.models.partial_forward import can_resume, given, kept, state_of
from sinkbook.probe.measure import measure
from sinkbook.progress import progress


@check_arguments
@torch.no_grad()
def unit_writes(
    model: nn.Module, input_ids: Tokens, *, layer: int, position: int = 0
) -> xr.Dataset:
    """What each unit of one MLP adds to the residual state at one position.

    Variables over (batch, unit):

    - `activation`: the entry;
    - `along`: component of the unit's write along the whole write of the map; biases apart, the
      units add up to its length;
    - `share`: the same as a share of the sum over units.

    `weight` (batch, unit) is the component of the unit's weights along that write. Raises
    `SinkbookError` if the layer has no MLP that ends in a linear map, as mixtures of experts.
    """
    projection = down_projection(model, input_ids, layer)
    runs: list[tuple[Tensor, Tensor]] = []
    with _heard(projection, lambda _, inputs, output: runs.append((inputs[0], output))):
        measure(model, input_ids, ("residual_norm",))
    shape = input_ids.shape
    read, written = (states.reshape(*shape, -1)[:, position].double() for states in runs[-1])
    columns = projection.weight.double()
    columns = columns if isinstance(projection, nn.Linear) else columns.T
    weight = nn.functional.normalize(written, dim=-1) @ columns
    along = read * weight
    found = {
        "activation": read,
        "weight": weight,
        "along": along,
        "share": along / along.sum(-1, keepdim=True),
    }
    dims = ("batch", "unit")
    return xr.Dataset({name: (dims, values.cpu().numpy()) for name, values in found.items()})


@check_arguments
@torch.no_grad()
def cut_units(
    model: nn.Module,
    input_ids: Tokens,
    *,
    layer: int,
    counts: Iterable[int],
    draws: int = 3,
    seed: int = 0,
) -> xr.Dataset:
    """Silence the units of one MLP that carry the peak, and as many others, at all positions.

    Over (chosen, count): the `symptoms` without the `count` units whose `share` in `unit_writes`
    is largest ("largest"), and without `count` of the others at random ("random 0" and so on).
    """
    check_all("counts", counts, int, np.integer)
    counts = [whole_number("counts", count, 1) for count in counts]
    check_seed(seed)
    share = unit_writes(model, input_ids, layer=layer).share.mean("batch").values
    order = np.argsort(-share, kind="stable")
    if not 0 < max(counts, default=0) <= len(order) // 2:
        raise SinkbookError(
            f"the MLP of layer {layer} has {len(order)} units. Cut from 1 to {len(order) // 2}."
        )
    generator = np.random.default_rng(seed)
    chosen = {"largest": lambda count: order[:count]}
    for draw in range(draws):
        chosen[f"random {draw}"] = lambda count: generator.choice(
            order[count:], count, replace=False
        )
    projection = down_projection(model, input_ids, layer)
    with kept(model) as outputs:
        whole = symptoms(model, input_ids)
    below = layer if can_resume(model, input_ids) else 0
    rows = []
    with (
        given(model, outputs, below=below),
        progress("cutting units", len(chosen) * len(counts)) as show,
    ):
        for choose in chosen.values():
            row = []
            for count in counts:
                silence = partial(_without_units, torch.from_numpy(choose(count)))
                handle = projection.register_forward_pre_hook(silence)
                try:
                    row.append(symptoms(model, input_ids).fillna(whole))
                finally:
                    handle.remove()
                show(len(rows) * len(counts) + len(row))
            rows.append(xr.concat(row, dim=xr.Variable("count", counts)))
    together = xr.concat(rows, dim=xr.Variable("chosen", list(chosen)))
    return together.assign_coords(cut=layer)


def _without_units(units: Tensor, _projection, inputs: tuple) -> tuple:
    read = inputs[0].clone()
    read[..., units.to(read.device)] = 0
    return (read, *inputs[1:])


@check_arguments
def down_projection(model: nn.Module, input_ids: Tokens, layer: int) -> nn.Module:
    """The linear map that an MLP runs last, if it is as wide as what the MLP writes."""
    check_token_ids("input_ids", input_ids)
    found = layers(model)
    mlp = found[layer].mlp if 0 <= layer < len(found) else None
    modules = [] if mlp is None else list(mlp.modules())
    maps = [m for m in modules if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D"]
    widths: dict[nn.Module, int] = {}  # in the order in which the modules end

    def note(module, _arguments, output):
        widths[module] = state_of(output).shape[-1]

    with ExitStack() as hooks:
        for module in {*maps, *modules[:1]}:
            hooks.enter_context(_heard(module, note))
        measure(model, input_ids[:1], ("residual_norm",))
    ran = [module for module in widths if module in maps]
    if not ran or widths[ran[-1]] != widths[mlp]:
        raise SinkbookError(
            f"layer {layer} has no MLP that ends in one linear map, so no units to look at."
        )
    return ran[-1]


@contextmanager
def _heard(module: nn.Module, hook) -> Iterator[None]:
    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
