"""The scripts of pages, joined from their sources into classic ones: the lab's, and the questions'.

Pages are opened as files, where neither modules nor `fetch` work. The sources in `_static/lab` and
`_static/questions` are parts of a script, put one behind the other; no other tool is involved.
"""

import json
from pathlib import Path

from sinkbook.data.shakespeare import characters

STATIC = Path("_static")  # in the repository
FOLDERS = ("lab", "questions")  # of it, with the sources
LAB_SCRIPTS = ("lab-data.js", "lab.js")  # in the order in which a page loads them
QUESTION_SCRIPTS = ("questions.js",)
# What computes: it runs in a worker, whose script is the text of this function.
ENGINE = ("random", "kernels", "task", "model", "optimizers", "measures", "training")
ENGINE_NAMES = (
    "Random, plainKernel, fastestKernel, Task, Model, OPTIMIZERS, measure, logSoftmax, "
    "Training, serve"
)
INTERFACE = ("draw", "typed", "train", "recorded", "page")
QUESTIONS = ("arithmetic", "formulas", "guesses")


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
    engine, interface = (_joined(root, "lab", names) for names in (ENGINE, INTERFACE))
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
    return dict(zip(LAB_SCRIPTS, (f"window.sinkbookStatistics = {text};\n", lab), strict=True))


def question_scripts(root: Path) -> dict[str, str]:
    """The script of a page that asks something, by its name."""
    (name,) = QUESTION_SCRIPTS
    return {name: f'(() => {{\n"use strict";\n{_joined(root, "questions", QUESTIONS)}}})();\n'}


def _joined(root: Path, folder: str, names: tuple[str, ...]) -> str:
    paths = [root / STATIC / folder / f"{name}.js" for name in names]
    return "\n".join(path.read_text(encoding="utf-8") for path in paths)
