"""A tiny repository to break: chapters that import nothing, so that each test takes seconds."""

import json
from pathlib import Path

CLAIMS = """
- id: two
  chapter: 01_good
  source: arithmetic
  statement: One and one are two.
  quantity: their sum
  criterion: {quick: "in [2, 2]", paper: "in [2, 2]"}
"""
PARAMETERS = 'profile = "quick"  # or "paper"\nseed = 0'
# What npm has installed, as far as the pages carry it.
INSTALLED = ("mathjax/es5/tex-chtml.js", "mathjax/es5/output/chtml/fonts/woff-v2/a.woff")


def notebook(*cells: str, parameters: str | None = PARAMETERS, title: str | None = None) -> dict:
    """A notebook of code cells, after a parameters cell unless that is None."""
    sources = [(["parameters"], parameters)] if parameters is not None else []
    sources += [([], cell) for cell in cells]
    code = [
        {
            "cell_type": "code",
            "id": f"cell-{number}",
            "metadata": {"tags": tags},
            "source": source,
            "execution_count": None,
            "outputs": [],
        }
        for number, (tags, source) in enumerate(sources)
    ]
    text = {"cell_type": "markdown", "id": "title", "metadata": {}, "source": f"# {title}"}
    return {
        "cells": [text, *code] if title else code,
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

    def can_be_rendered(self) -> None:
        """Give it an index, the chapters that there are, and what npm would install."""
        names = sorted(path.stem for path in (self.root / "book").glob("*.ipynb"))
        chapters = ", ".join(f"{{file: book/{name}}}" for name in names)
        (self.root / "_toc.yml").write_text(
            f"format: jb-book\nroot: book/index\nchapters: [{chapters}]\n"
        )
        (self.root / "book" / "index.md").write_text("# Index\n")
        installed = self.root / "node_modules"
        for name in INSTALLED:
            (installed / name).parent.mkdir(parents=True, exist_ok=True)
            (installed / name).write_text("")
        lock = json.dumps({"lockfileVersion": 3, "packages": {"": {}}})
        (self.root / "package-lock.json").write_text(lock)
        (self.root / "package.json").write_text("{}")
        (installed / ".package-lock.json").write_text(lock)
