"""Commands of the command line, each in a fork of one process that has imported what they need.

    python tests/faults/forked.py FAMILY < requests

A request is a line of JSON: a list of arguments starts a command, and is answered by its process;
the number of a process is answered by its status, once it has ended. So a kill at a random moment
strikes the work of a command, and hardly ever its imports. `record loop` makes a tiny record here.
"""

import json
import os
import sys


def prepare() -> None:
    """Import what the commands import, and make the record small."""
    from sinkbook.book import claims  # noqa: F401
    from sinkbook.book.records import makers, paper_scale  # noqa: F401
    from sinkbook.data import corpora  # noqa: F401
    from sinkbook.llm import checkpoints  # noqa: F401
    from sinkbook.report import comparison_page, report  # noqa: F401
    from sinkbook.toy.runs import TrainingConfig
    from sinkbook.toy.tasks import TaskConfig
    from sinkbook.toy.transformer import TransformerConfig

    small = {"task": TaskConfig(length=8), "model": TransformerConfig(length=8, width=4)}
    sizes = {"steps": 30, "batch_size": 2, "evaluation_size": 2, "measurements": 3}
    config = TrainingConfig(**small, **sizes)
    paper_scale.GROUPS["loop"] = lambda: {"softmax": [config]}


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
    sys.exit(cli.main())


def main(family: str) -> None:
    """Answer requests."""
    prepare()
    for line in sys.stdin:
        request = json.loads(line)
        if isinstance(request, list):
            answer = start(request, family)
        else:
            answer = os.waitstatus_to_exitcode(os.waitpid(request, 0)[1])
        print(answer, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
