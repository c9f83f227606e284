"""Many machines: the executor of a Dask cluster, for work that is a list of independent runs."""

import os
from collections.abc import Iterator
from concurrent.futures import Executor
from contextlib import contextmanager

from sinkbook.errors import SinkbookError

# The environment variable that names the cluster's scheduler; `sinkbook run --dask` sets it.
ADDRESS = "SINKBOOK_DASK"


@contextmanager
def cluster(address: str, *, patience: str = "10s") -> Iterator[Executor]:
    """The executor of the Dask cluster at an address, for the body.

    Raises `SinkbookError` if Dask is not installed or nothing answers at the address.
    """
    try:
        from distributed import Client
    except ImportError as error:
        raise SinkbookError(
            "Dask is not installed here. Install it on every machine: pip install 'sinkbook[dask]'"
        ) from error
    try:
        client = Client(address, timeout=patience)
    except (OSError, ValueError) as error:
        raise SinkbookError(
            f"no Dask scheduler answers at {address!r} ({error}). Start one with: dask scheduler, "
            "and on every machine: dask worker ADDRESS"
        ) from error
    with client:
        yield client.get_executor(pure=False)


@contextmanager
def asked_for() -> Iterator[Executor | None]:
    """The executor of the cluster that `SINKBOOK_DASK` names; None where it names none."""
    address = os.environ.get(ADDRESS)
    if not address:
        yield None
        return
    with cluster(address) as executor:
        yield executor
