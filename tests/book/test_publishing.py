"""What pages say of where they are published: nothing without an owner, all of it with one."""

import json
import re
import shutil
from pathlib import Path

import pytest

from sinkbook.book import build
from sinkbook.errors import SinkbookError
from sinkbook.pages import publishing

ROOT = Path(__file__).resolve().parents[2]
FILLED = """[project.urls]
Homepage = "https://reader.example/sinkbook/"
Repository = "https://github.com/reader/sinkbook"
"""


def test_this_copy_names_no_owner_yet_in_one_place_only():
    assert publishing.addresses(ROOT) == {}
    written = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    shown = publishing.PLACEHOLDER
    assert len(re.findall(rf"//[^/]*{shown}|/{shown}/", written)) == 4
    for path in [*ROOT.glob("*.md"), *(ROOT / ".github").rglob("*.yml"), ROOT / "_config.yml"]:
        text = path.read_text(encoding="utf-8")
        assert not re.search(rf"{shown}[/.]", text), path


@pytest.mark.parametrize("url", ["http://reader.example", "reader.example/sinkbook", ""])
def test_what_is_no_address_is_refused(tmp_path, url):
    (tmp_path / "pyproject.toml").write_text(f'[project.urls]\nHomepage = "{url}"')
    with pytest.raises(SinkbookError, match=r"Homepage in \[project.urls\]"):
        publishing.addresses(tmp_path)


def rendered(folder: Path, urls: str) -> Path:
    """A book of two pages with the project's own configuration; the folder of its pages."""
    (folder / "book" / "images").mkdir(parents=True)
    shutil.copy(ROOT / publishing.PREVIEW, folder / "book" / "images")
    shutil.copytree(ROOT / "_static", folder / "_static")
    shutil.copy(ROOT / "_config.yml", folder)
    (folder / "pyproject.toml").write_text(urls)
    (folder / "_toc.yml").write_text(
        "format: jb-book\nroot: book/index\nchapters: [{file: book/01_good}]"
    )
    (folder / "book" / "references.bib").write_text("")
    (folder / "book" / "index.md").write_text('# Index\n\nA "softmax" has to look somewhere.\n')
    text = {"cell_type": "markdown", "id": "a", "metadata": {}, "source": "# Good\n\nWhy <s>?"}
    notebook = {"cells": [text], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}
    (folder / "book" / "01_good.ipynb").write_text(json.dumps(notebook))
    place = build.Workplace(folder, folder / "build", "quick")
    place.logs.mkdir(parents=True)
    shutil.copytree(folder, place.staged, ignore=shutil.ignore_patterns("build"))
    (place.staged / "extra").mkdir()
    return build.render(place).parent


def test_a_page_says_in_its_head_what_it_is_about_and_promises_no_address(tmp_path):
    page = (rendered(tmp_path, "") / "book" / "index.html").read_text()
    assert 'name="description" content="A “softmax” has to look somewhere."' in page or (
        'content="A &quot;softmax&quot; has to look somewhere."' in page
    )
    assert "colab.research" not in page and "og:image" not in page and "canonical" not in page


def test_a_published_page_has_its_address_its_preview_and_a_button_for_colab(tmp_path):
    pages = rendered(tmp_path, FILLED)
    page = (pages / "book" / "01_good.html").read_text()
    home = "https://reader.example/sinkbook"
    assert f'<link rel="canonical" href="{home}/book/01_good.html"' in page
    assert f'property="og:image" content="{home}/_static/probe-smollm2.png"' in page
    assert (pages / "_static" / "probe-smollm2.png").is_file()
    opened = "github/reader/sinkbook/blob/colab/book/01_good.ipynb"
    assert f'href="https://colab.research.google.com/{opened}"' in page
    assert (pages / "_sources" / "book" / "01_good.ipynb").is_file()


def test_what_colab_opens_is_the_chapter_after_a_cell_that_installs(tmp_path):
    shutil.copytree(ROOT / "book", tmp_path / "book", ignore=shutil.ignore_patterns("records"))
    (tmp_path / "pyproject.toml").write_text(FILLED)
    written = publishing.write_for_colab(tmp_path, tmp_path / "colab")
    assert [path.name for path in written] == sorted(p.name for p in ROOT.glob("book/*.ipynb"))
    for path in written:
        first, *rest = json.loads(path.read_text())["cells"]
        assert "https://github.com/reader/sinkbook" in first["source"]
        assert rest == json.loads((ROOT / "book" / path.name).read_text())["cells"]
