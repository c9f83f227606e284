"""Trying malformed inputs, each in one process without type checks, as a user's program has none.

    python tests/faults/trying.py OUTCOMES < inputs.json

The inputs are in tables, one after the other; the names that they may use are what `names()` in a
table's module gives.
"""

import importlib
import json
import signal
import sys
import traceback
import warnings
from pathlib import Path

SECONDS = 20  # of computing, after which an input counts as never-ending


class EndlessError(BaseException):
    """An input has not ended. Nothing but what tried it may catch this."""


def outcome(given: str, names: dict) -> dict[str, object]:
    """Whether an input ends with an error of ours, its kind, its message, and who raised it."""
    from sinkbook.errors import SinkbookError

    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        value = eval(given, names)
    except BaseException as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        return {
            "ours": isinstance(error, SinkbookError),
            "kind": type(error).__name__,
            "said": str(error),
            "where": f"{last.filename}:{last.lineno}",
        }
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    return {"ours": False, "kind": "", "said": f"taken, and made {value!r:.80}", "where": ""}


def end(*_) -> None:
    """Called when an input has taken too long."""
    raise EndlessError("has not ended")


def main(outcomes: str) -> None:
    """Read inputs by their table, and write what became of them."""
    tables = json.load(sys.stdin)
    sys.path.append(str(Path(__file__).parents[1]))  # for tests/tiny.py
    signal.signal(signal.SIGPROF, end)
    warnings.simplefilter("ignore")
    place, found = Path(outcomes).absolute(), {}
    for table, inputs in tables.items():
        names = importlib.import_module(table).names()
        found[table] = [outcome(given, names) for given in inputs]
    place.write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
