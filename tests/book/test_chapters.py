"""The object that a chapter works with: what it hands in, what it shows, what it refuses."""

import json
import subprocess
import sys

import pandas as pd
import pytest

from sinkbook import book
from sinkbook.book import claims, experiments, records
from sinkbook.book.notebooks import Execution
from sinkbook.errors import SinkbookError


def test_a_chapter_hands_in_a_claim_by_its_own_profile(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SINKBOOK_CACHE", str(tmp_path))
    book.chapter("paper").check("sink.one-layer", [0.9, 0.8])
    assert "sink.one-layer" in capsys.readouterr().out
    (verdict,) = [v for v in claims.verdicts() if v.measured]
    assert (verdict.claim.id, verdict.profile) == ("sink.one-layer", "paper")
    assert verdict.measured == (0.9, 0.8)


def test_a_chapter_is_all_that_an_experiment_needs_to_know():
    (first, *_) = experiments.one_layer(book.chapter("quick", seed=3))
    assert first.seed == 42 + 3
    assert first.steps < experiments.one_layer(book.chapter("paper"))[0].steps


def test_a_profile_that_is_none_is_refused_when_the_chapter_begins():
    with pytest.raises(SinkbookError, match="no profile named 'fast'"):
        book.chapter("fast")


def test_a_record_comes_with_a_line_on_when_where_and_by_which_command_it_was_made(capsys):
    shown = book.chapter("quick").record("league")
    line = capsys.readouterr().out
    assert shown.identical(records.load("league"))
    for name in ("date", "device", "command"):
        assert shown.attrs[name][:10] in line


def test_what_a_chapter_offers_reaches_the_page_as_links_and_the_build_as_bytes():
    shown, metadata = book.chapter("quick").attach({"a.csv": b"1,2\n"})._repr_mimebundle_()
    assert 'download="a.csv"' in shown["text/html"] and "MSwyCg==" in shown["text/html"]
    assert metadata["sinkbook.files"] == {"a.csv": "MSwyCg=="}


def test_a_table_scrolls_in_a_box_of_its_own_also_by_keys():
    html = book.chapter("quick").table(pd.DataFrame({"a": [1]}))._repr_html_()
    assert html.startswith('<div class="sinkbook-scroll" role="group" aria-label="Table" tabindex')


def test_the_package_of_the_book_is_imported_without_what_its_chapters_need():
    code = (
        "import sys, sinkbook.book; sys.exit(bool({'torch', 'xarray', 'IPython'} & {*sys.modules}))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_page_says_in_its_figures_what_they_show(tmp_path):
    drawn = '<div class="sinkbook-figure"><svg aria-label=""></svg><svg aria-label=""></svg></div>'
    output = {"output_type": "display_data", "metadata": {}, "data": {"text/html": [drawn]}}
    metadata = {"mystnb": {"image": {"alt": 'Bars of "<s>"'}}}
    cell = {"cell_type": "code", "source": "", "metadata": metadata, "outputs": [output]}
    path = tmp_path / "01_bars.ipynb"
    path.write_text(json.dumps({"cells": [cell], "metadata": {}}), encoding="utf-8")
    (cell,) = json.loads(Execution(path, 1.0).page())["cells"]
    shown = cell["outputs"][0]["data"]["text/html"]
    assert shown.count('aria-label="Bars of &quot;&lt;s&gt;&quot;"') == 2
