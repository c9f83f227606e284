"""The scripts of the lab, joined from their sources into two classic ones.

Pages are opened as files, where neither modules nor `fetch` work. The sources in `_static/lab` are
parts of one script each, put one behind the other; no tool but this one is involved.
"""

import json
from pathlib import Path

from sinkbook.data.shakespeare import characters

SOURCES = Path("_static") / "lab"  # in the repository
NAMES = ("lab-data.js", "lab.js")  # in the order in which a page loads them
# What computes: it runs in a worker, whose script is the text of this function.
ENGINE = ("random", "kernels", "task", "model", "optimizers", "measures", "training")
ENGINE_NAMES = (
    "Random, plainKernel, fastestKernel, Task, Model, OPTIMIZERS, measure, logSoftmax, "
    "Training, serve"
)
INTERFACE = ("draw", "typed", "train", "recorded", "page")


def carried(data: object) -> str:
    """Data as JSON inside of a `script` element, which only a "<" could end.

    >>> carried(["</script>"])
    '["\\\\u003c/script>"]'
    """
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    return text.replace("<", "\\u003c")


def lab_scripts(root: Path) -> dict[str, str]:
    """The scripts that a page with a lab loads, by name: the statistics of the language, the lab.

    `root` is the repository. Raises `SinkbookError` if Shakespeare can be neither found nor
    downloaded.
    """
    engine, interface = (
        "\n".join((root / SOURCES / f"{name}.js").read_text(encoding="utf-8") for name in names)
        for names in (ENGINE, INTERFACE)
    )
    lab = f"""(() => {{
"use strict";
function makeEngine() {{
"use strict";
{engine}
return {{ {ENGINE_NAMES} }};
}}
const engine = makeEngine();
const {{ {ENGINE_NAMES} }} = engine;
{interface}
}})();
"""
    statistics = characters()
    data = {
        "symbols": list(statistics.symbols),
        "unigrams": statistics.unigrams.tolist(),
        "bigrams": statistics.bigrams.tolist(),
    }
    text = json.dumps(data, separators=(",", ":"))
    return dict(zip(NAMES, (f"window.sinkbookStatistics = {text};\n", lab), strict=True))
