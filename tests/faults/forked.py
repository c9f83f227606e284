"""Commands of the command line, each in a fork of one process that has imported what they need.

    python tests/faults/forked.py FAMILY INDEX < requests

A request is a line of JSON: a list of arguments starts a command, and is answered by its process;
the number of a process is answered by its status, once it has ended. So a kill at a random moment
strikes the work of a command, and neither its imports nor Python's own end, which takes longer.
`record loop` makes a tiny record here, and `fetch wikipedia` a tiny wheel in the folder INDEX.
"""

import atexit
import dataclasses
import gc
import json
import os
import sys
from importlib import import_module
from pathlib import Path

# What the commands import when they run: their own modules, and what other libraries put off.
IMPORTED = (
    *("sinkbook.book.claims", "sinkbook.data.corpora", "sinkbook.llm.checkpoints"),
    *("sinkbook.report.comparison_page", "sinkbook.report.report", "sinkbook.report.quantities"),
    *("dask.array", "dask.distributed", "matplotlib.backends.backend_svg", "pydantic", "scipy.io"),
    *("transformers.models.llama.modeling_llama", "xarray.backends.h5netcdf_"),
)


def prepare(index: Path) -> None:
    """Import what the commands import, and make the record and the wheel small."""
    for name in IMPORTED:
        import_module(name)
    from sinkbook.book.records import makers, paper_scale  # noqa: F401
    from sinkbook.data.sources import SOURCES
    from sinkbook.toy.runs import TrainingConfig
    from sinkbook.toy.tasks import TaskConfig
    from sinkbook.toy.transformer import TransformerConfig
    from tiny import make_wheel

    small = {"task": TaskConfig(length=8), "model": TransformerConfig(length=8, width=4)}
    sizes = {"steps": 30, "batch_size": 2, "evaluation_size": 2, "measurements": 3}
    config = TrainingConfig(**small, **sizes)
    paper_scale.GROUPS["loop"] = lambda: {"softmax": [config]}
    wheel = make_wheel(index, "tiny-articles", {"tiny/article.txt": "To be, or not to be"})
    SOURCES["wikipedia"] = dataclasses.replace(SOURCES["wikipedia"], wheels=(wheel,))


def start(arguments: list[str], family: str) -> int:
    """The process of a command, which ends as one does that was started from a shell."""
    from sinkbook import cli

    if process := os.fork():
        return process
    os.environ["SINKBOOK_TEST_FAMILY"] = family  # for what it starts
    nothing = os.open(os.devnull, os.O_RDWR)
    for number in range(3):
        os.dup2(nothing, number)
    sys.argv = ["sinkbook", *arguments]
    status = 1
    try:
        cli.main()
    except SystemExit as end:
        status = end.code or 0
    finally:
        atexit._run_exitfuncs()
        os._exit(status)


def main(family: str, index: str) -> None:
    """Answer requests."""
    sys.path.append(str(Path(__file__).parents[1]))  # for tests/tiny.py
    prepare(Path(index))
    gc.collect()
    gc.freeze()  # or each fork copies all that is there as soon as it collects
    for line in sys.stdin:
        request = json.loads(line)
        if isinstance(request, list):
            answer = start(request, family)
        else:
            answer = os.waitstatus_to_exitcode(os.waitpid(request, 0)[1])
        print(answer, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
