"""A tiny repository to break: chapters that import nothing, so that each test takes seconds."""

import json
import shutil
from pathlib import Path

import pytest

CLAIMS = """
- id: two
  chapter: 01_good
  source: arithmetic
  statement: One and one are two.
  quantity: their sum
  criterion: {quick: "in [2, 2]", paper: "in [2, 2]"}
"""
PARAMETERS = 'profile = "quick"  # or "paper"\nseed = 0'


def notebook(*cells: str, parameters: str | None = PARAMETERS) -> dict:
    """A notebook of code cells, after a parameters cell unless that is None."""
    sources = [(["parameters"], parameters)] if parameters is not None else []
    sources += [([], cell) for cell in cells]
    return {
        "cells": [
            {
                "cell_type": "code",
                "id": f"cell-{number}",
                "metadata": {"tags": tags},
                "source": source,
                "execution_count": None,
                "outputs": [],
            }
            for number, (tags, source) in enumerate(sources)
        ],
        "metadata": {"kernelspec": {"name": "python3", "display_name": "Python 3"}},
        "nbformat": 4,
        "nbformat_minor": 5,
    }


class Repository:
    """A folder that looks like the book's repository."""

    def __init__(self, root: Path):
        self.root = root
        (root / "book").mkdir(parents=True)
        (root / "_toc.yml").write_text("format: jb-book\nroot: book/index\n")
        (root / "_config.yml").write_text('execute: {execute_notebooks: "off"}\n')
        (root / "book" / "claims.yml").write_text(CLAIMS)
        self.output = root / "build"

    def chapter(self, name: str, *cells: str, **options) -> Path:
        path = self.root / "book" / f"{name}.ipynb"
        path.write_text(json.dumps(notebook(*cells, **options)))
        return path

    def executed(self, name: str) -> Path:
        return self.output / "executed" / "quick" / f"{name}.ipynb"


@pytest.fixture
def repository(tmp_path, monkeypatch) -> Repository:
    """An empty repository, which is the working directory; with a cache of its own."""
    repository = Repository(tmp_path / "repository")
    monkeypatch.chdir(repository.root)
    monkeypatch.setenv("SINKBOOK_CACHE", str(tmp_path / "cache"))
    return repository


@pytest.fixture
def no_renderer(monkeypatch) -> None:
    """Stand in for jupyter-book, and for the scripts that npm installs: one page, at once."""
    from sinkbook.book import build

    def render(place):
        shutil.rmtree(place.pages, ignore_errors=True)
        place.pages.mkdir(parents=True)
        (place.pages / "index.html").write_text("new")
        return place.pages / "index.html"

    monkeypatch.setattr(build, "render", render)
    monkeypatch.setattr(build, "install_scripts", lambda root: None)
    monkeypatch.setattr(build.vendor, "copy", lambda root, vendor: None)
