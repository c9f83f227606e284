"""Measurements that take minutes, mostly of pretrained models: made once, kept, and read by the
same call.

    scan = kept("dormant-heads-scan", dormant_heads.scan)
    seen = scan(model, tokens)  # read, if this very call has been kept, and measured if not

A call is the same if all that it is given is: a model its weights, texts their ids. Then the page
has the same numbers, and so the same verdicts, on every machine. `sinkbook run CHAPTER --keep`
measures all anew and writes `book/records/measured`. A page that reads what was kept measures a
part of it again (`meet`).
"""

import functools
import hashlib
import inspect
import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, is_dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import xarray as xr
from torch import Tensor, nn

from sinkbook.book.records.kept import FROM_A_CLONE, check_facts, write_packed
from sinkbook.book.settings import KEEP
from sinkbook.errors import SinkbookError
from sinkbook.files import is_there, reading
from sinkbook.provenance import provenance, repository

FACTS = ("date", "device", "seconds", "versions", "command")
# How far what is measured again may lie from what was kept: shares of attention and nats, where
# two instruction sets differ by a hundred-thousandth.
ABSOLUTE, RELATIVE = 2e-4, 2e-3

Measurement = xr.Dataset | xr.DataArray


def kept(
    name: str,
    measure: Callable[..., Measurement],
) -> Callable[..., Measurement]:
    """`measure`, which reads what the same call gave when it was kept under `name`.

    Its attribute `facts` is the provenance of what was last read, None where it was measured.
    Outside of a copy of the repository, and where a model is changed by hooks or in place, which
    its weights do not tell, all is measured.
    """

    @functools.wraps(measure)
    def call(*arguments, **keywords) -> Measurement:
        call.facts = None
        given = inspect.signature(measure).bind(*arguments, **keywords)
        given.apply_defaults()
        root = repository()
        if root is None or any(_is_changed(each) for each in given.arguments.values()):
            return measure(*arguments, **keywords)
        digest = hashlib.sha256()
        for argument, value in given.arguments.items():
            digest.update(argument.encode())
            _describe(value, digest)
        folder = root / "book" / "records" / "measured"
        path = folder / f"{name}-{digest.hexdigest()[:12]}.nc"
        if os.environ.get(KEEP):
            _keep(path, name, lambda: measure(*arguments, **keywords))
        elif not is_there(path):
            return measure(*arguments, **keywords)
        with reading(path, f"{FROM_A_CLONE}.", named=True):
            found = xr.load_dataset(path, engine="h5netcdf")
            check_facts(found.attrs)
            call.facts = {fact: found.attrs.pop(fact) for fact in FACTS}
        return found[name].rename(None) if set(found.data_vars) == {name} else found

    call.facts = None
    return call


def _keep(path: Path, name: str, measure: Callable[[], Measurement]) -> None:
    begin = time.perf_counter()
    found = measure()
    facts = provenance() | {"seconds": round(time.perf_counter() - begin)}
    facts |= {"command": os.environ[KEEP]}
    whole = found.to_dataset(name=name) if isinstance(found, xr.DataArray) else found
    # Not kept: its own attributes, among them the folder that the model came from.
    whole = whole.drop_attrs(deep=False)
    whole = whole.assign_attrs(facts | {"versions": json.dumps(facts["versions"])})
    write_packed(path, whole)


def _is_changed(value: object) -> bool:
    """Whether a model computes something else than its weights say."""
    return isinstance(value, nn.Module) and any(
        module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
        for module in value.modules()
    )


def _describe(value: object, digest) -> None:
    """Add what an argument holds to a digest."""
    digest.update(f"{type(value).__name__}\0".encode())
    match value:
        case nn.Module():
            _describe(dict(value.state_dict()) | {"training": value.training}, digest)
        case Tensor():
            whole = value.detach().cpu().contiguous()
            digest.update(f"{whole.dtype} {tuple(whole.shape)}\0".encode())
            digest.update(memoryview(whole.reshape(-1).view(torch.uint8).numpy()))
        case np.ndarray():
            _describe(torch.tensor(value) if value.dtype.kind in "iufb" else value.tolist(), digest)
        case xr.DataArray():
            _describe([list(value.dims), value.values], digest)
            _describe({str(n): each.values for n, each in sorted(value.coords.items())}, digest)
        case pd.DataFrame():  # of computed columns, which rounding may alter, four digits
            digest.update(value.to_json(orient="split", double_precision=4).encode())
        case dict():
            for key, each in value.items():
                digest.update(f"{key}\0".encode())
                _describe(each, digest)
        case list() | tuple():
            for each in value:
                _describe(each, digest)
        case np.generic():
            _describe(value.item(), digest)
        case _ if is_dataclass(value):  # the configuration of a training
            _describe(asdict(value), digest)
        case str() | int() | float() | None | slice() | range():
            digest.update(f"{value!r}\0".encode())
        case _:
            raise SinkbookError(
                f"a {type(value).__name__} is no argument by which a measurement can be kept. "
                "Give texts, numbers, names, tables, configurations and models."
            )


def meet(again: Measurement, stored: Measurement) -> str:
    """What to say of a part of a measurement that was made again; both have the same coordinates.

    Raises `SinkbookError` if any number differs by more than rounding does, and if none is there.
    """
    pairs = [(again, stored)]
    if isinstance(again, xr.Dataset):
        pairs = [(values, stored[name]) for name, values in again.items()]
    furthest, count = 0.0, 0
    for new, old in pairs:
        new, old = xr.align(new, old, join="exact")
        both = np.abs(new - old).values[np.isfinite(new.values)]
        allowed = (ABSOLUTE + RELATIVE * np.abs(old)).values[np.isfinite(new.values)]
        count += both.size
        if not (both <= allowed).all():
            raise SinkbookError(
                f"{new.name or 'what was measured again'} differs by "
                f"{np.nanmax(both):.1e} from what was kept. Either the code of the measurement has "
                "changed, and it is to be made again (sinkbook run CHAPTER --keep), or its "
                "file has."
            )
        furthest = max(furthest, (both / allowed).max(initial=0.0))
    if not count:
        raise SinkbookError("nothing was measured again. Give a part with numbers.")
    apart = f"as they were kept: the largest difference is {furthest:.2f} of what rounding may make"
    how = apart if furthest else "the same"
    return f"Measured again on this machine, {count:,} of these numbers are {how}."
