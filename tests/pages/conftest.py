"""Labs on pages of their own, in Chromium: neither the executed book nor a renderer is needed."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from sinkbook.book import experiments
from sinkbook.pages import lab, scripts
from sinkbook.toy.training import Run, train_all

ROOT = Path(__file__).resolve().parents[2]
STYLES = ("_static/sinkbook.css", "_static/lab/lab.css")
PAGE = """<!doctype html>
<html lang="en" data-theme="light"><head><meta charset="utf-8"><title>A lab</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
html {{ --pst-color-background: #fff; --pst-color-text-base: #222832; background: #fff }}
html[data-theme="dark"] {{
  --pst-color-background: #14181e; --pst-color-text-base: #ced6dd; --pst-color-text-muted: #9ca4af;
  --pst-color-border: #48566b; background: #14181e;
}}
body {{ margin: 16px; font-family: sans-serif }} {style}</style></head>
<body>{body}<script src="lab-data.js"></script><script src="lab.js"></script></body></html>"""


@pytest.fixture(scope="session")
def runs() -> dict[str, Run]:
    """The runs that chapters give to their labs, by kernel."""
    configs = experiments.in_the_page()
    return dict(zip(configs, train_all(list(configs.values()), way="sequence"), strict=True))


@pytest.fixture(scope="session")
def lab_pages(runs, tmp_path_factory) -> dict[str, Path]:
    """A page for each kind of lab."""
    folder = tmp_path_factory.mktemp("labs")
    for name, script in scripts.lab_scripts(ROOT).items():
        (folder / name).write_text(script, encoding="utf-8")
    style = "\n".join((ROOT / path).read_text(encoding="utf-8") for path in STYLES)
    labs = {
        "typed": lab.typed(runs, "vtvnautuh"),
        "training": lab.training(runs["softmax"]),
        "compact": lab.training(runs["softmax"], compact=True, starts=True),
        "recorded": lab.recorded(runs["softmax"]),
    }
    pages = {}
    for name, made in labs.items():
        pages[name] = folder / f"{name}.html"
        page = PAGE.format(style=style, body=made._repr_html_())
        pages[name].write_text(page, encoding="utf-8")
    return pages


@pytest.fixture
def opened(lab_pages, browser) -> Iterator[Callable]:
    """Open a lab's page; fails at the end if it complained or asked another machine."""
    contexts, complaints = [], []

    def open_page(name: str, *, theme: str = "light", script: str = "", **view):
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}} | view)
        contexts.append(context)
        tab = context.new_page()
        tab.on("console", lambda m: complaints.append(m.text) if m.type == "error" else None)
        tab.on("pageerror", lambda error: complaints.append(str(error)))
        tab.on(
            "request",
            lambda request: (
                complaints.append(request.url)
                if not request.url.startswith(("file:", "data:", "blob:"))
                else None
            ),
        )
        if script:
            tab.add_init_script(script)
        tab.goto(lab_pages[name].as_uri())
        tab.evaluate("theme => { document.documentElement.dataset.theme = theme }", theme)
        return tab

    yield open_page
    for context in contexts:
        context.close()
    assert complaints == []
