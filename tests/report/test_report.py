"""`sinkbook probe`: what it says of a model, what it writes, and what it refuses."""

import io
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import matplotlib.image
import numpy as np
import pandas as pd
import pytest
import xarray as xr
from matplotlib.colors import to_hex
from rich.console import Console
from transformers import BertConfig, BertForMaskedLM, PreTrainedModel, PreTrainedTokenizerFast

from sinkbook.data import corpora
from sinkbook.errors import SinkbookError
from sinkbook.models import load, token_windows
from sinkbook.probe import measure
from sinkbook.report import figures, report, summary
from sinkbook.report.html import html_page
from tiny import HAMLET, SIZES, tiny_model, tiny_reader, tiny_tokenizer

pytestmark = pytest.mark.weights


def measured(model: PreTrainedModel) -> xr.Dataset:
    """The dataset of a report on a tiny model, as `report.probe` returns it."""
    tiny = tiny_reader(model)
    result = report.measure_windows(
        tiny, token_windows.of_document(tiny, HAMLET, count=2, length=24)
    )
    result.attrs |= {"weights": "a tiny one", "texts": "Hamlet", "command": "sinkbook probe tiny"}
    return result


def shown(result: xr.Dataset) -> str:
    """The page of a report, once its table and its figures have been drawn too."""
    Console(file=io.StringIO()).print(report.terminal(result))
    for draw in figures.FIGURES.values():
        draw(result).draw_without_rendering()
    return html_page(result)


class Tags(HTMLParser):
    """The elements and the attributes of a page."""

    def __init__(self):
        super().__init__()
        self.names, self.attributes = set(), set()

    def handle_starttag(self, tag, attrs):
        self.names.add(tag)
        self.attributes |= {name for name, _ in attrs}


@pytest.fixture(scope="module")
def smollm2() -> xr.Dataset:
    return report.probe("smollm2-135m", texts=2, length=64)


@pytest.fixture(scope="module")
def written(smollm2, tmp_path_factory) -> Path:
    place = tmp_path_factory.mktemp("report") / "new" / "folder"
    report.write(smollm2, place)
    return place


# --- What is said of SmolLM2 -----------------------------------------------------------------


def test_the_verdict_tells_the_sinks_the_drain_and_the_peak_of_smollm2(smollm2):
    rate = summary.head_table(smollm2).sink_rate.mean()
    peak = summary.residual_peak(smollm2)
    assert 0.4 < rate < 0.9  # more in short texts
    assert peak.ratio > 50 and peak.written == range(11, 12) and peak.erased == range(28, 30)
    sentence = summary.verdict(smollm2)
    assert sentence.startswith(f"{100 * rate:.0f} % of the heads are sinks on the first token")
    assert "its value is drained to 0." in sentence
    assert "written in layer 11 and erased in layers 28-29" in sentence


def test_the_terminal_shows_every_layer_with_its_strongest_heads(smollm2):
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(report.terminal(smollm2))
    shown = console.export_text()
    rows = [line for line in shown.splitlines() if line.startswith("│")]
    assert len(rows) == 30
    strongest = smollm2.sink_attention.mean("batch").isel(layer=18)
    head, attention = int(strongest.argmax("head")), float(strongest.max())
    assert f"{head:2} ({attention:.2f})" in rows[18]
    assert "2 texts of 64 tokens (encyclopaedic prose in English" in shown


def test_the_first_token_leads_the_sink_positions_and_ends_of_texts_are_left_out(smollm2):
    table = summary.sink_positions(smollm2)
    assert table.token[0] == "'<|endoftext|>'" and table.texts[0] == 2 and table.heads[0] > 100
    assert not table["first"][1:].any()
    last = table.positions.str.split("-").str[-1].astype(int)
    assert last.max() < 64 - summary.LEAST_QUERIES


# --- What is written -------------------------------------------------------------------------


def test_a_report_is_exactly_its_files(written):
    assert {path.name for path in written.iterdir()} == set(report.FILES)


def test_the_csv_has_a_row_for_every_head_and_the_means_over_texts(written, smollm2):
    table = pd.read_csv(written / "summary.csv")
    assert len(table) == 30 * 9
    assert list(table.columns) == ["layer", "head", *summary.HEAD_COLUMNS]
    row = table[(table.layer == 18) & (table["head"] == 8)].iloc[0]
    attention = smollm2.sink_attention.sel(layer=18, head=8)
    assert row.sink_attention == pytest.approx(float(attention.mean()), rel=1e-5)
    assert row.sink_rate == float((attention > 0.3).mean())


def test_the_netcdf_gives_the_same_report_again(written, smollm2, tmp_path):
    with xr.open_dataset(written / "result.nc", engine="h5netcdf") as reopened:
        again = reopened.load()
    assert html_page(again) == html_page(smollm2)
    assert str(again.token.values[0, 0]) == "<|endoftext|>"
    assert again.attrs["command"] == (
        "sinkbook probe smollm2-135m --domain prose-en --texts 2 --length 64"
    )


def test_the_overview_is_a_wide_white_picture(written):
    picture = matplotlib.image.imread(written / "overview.png")
    assert 1350 <= picture.shape[1] <= 1450 and picture.shape[1] > 2 * picture.shape[0]
    assert np.all(picture[0] == 1) and picture.min() < 0.3


def test_the_page_names_no_address_and_runs_no_script(written):
    page = (written / "report.html").read_text("utf-8")
    assert "://" not in page and "<script" not in page
    assert not re.search(r"""url\((?!#)|href=["'](?!#|data:image/png)""", page)
    assert page.count('class="cell"') == page.count('class="dot"') == 270


def test_each_cell_and_each_dot_says_the_numbers_that_it_is_drawn_by(smollm2):
    page, table = html_page(smollm2), summary.head_table(smollm2)
    marks = re.findall(r'<(path|use) [^>]*class="(cell|dot)"[^>]*>\s*<title>([^<]*)</title>', page)
    attention = {
        f"layer {row.layer}, head {row.head}: attention {row.sink_attention:.2f}, value ratio "
        f"{row.value_drain_ratio:.2f}": row.sink_attention
        for row in table.itertuples()
    }
    assert sorted(title for _, _, title in marks) == sorted([*attention, *attention])
    for mark in re.finditer(r'<\w+ [^>]*class="(cell|dot)"[^>]*>\s*<title>([^<]*)</title>', page):
        drawn, kind, value = mark[0], mark[1], attention[mark[2]]
        if kind == "cell":
            assert f"fill: {to_hex(matplotlib.colormaps['Blues'](value))}" in drawn
        else:
            assert f"fill: var(--{'sink' if value > 0.3 else 'other'}, #" in drawn


def test_the_page_opens_in_a_browser_without_complaint(written, browser):
    complaints, requests = [], []
    page = (written / "report.html").as_uri()
    for width, scheme in ((1280, "light"), (390, "dark")):
        tab = browser.new_page(
            viewport={"width": width, "height": 800}, color_scheme=scheme, offline=True
        )
        tab.on("console", lambda message: complaints.append(message.text))
        tab.on("request", lambda request: requests.append(request.url))
        tab.goto(page)
        seen = tab.evaluate("""() => ({
          overflow: document.documentElement.scrollWidth - innerWidth,
          unnamed: [...document.querySelectorAll("svg:not([aria-label])")].length,
          drawings: document.querySelectorAll("svg[role=img]").length,
          ink: getComputedStyle(document.body).color,
          text: Math.min(...[...document.querySelectorAll("svg text")].map(
            text => text.getBoundingClientRect().height)),
        })""")
        assert seen["overflow"] <= 0 and seen["unnamed"] == 0 and seen["drawings"] == 3
        assert seen["text"] > 9
        assert (seen["ink"] == "rgb(230, 233, 237)") == (scheme == "dark")
        tab.close()
    assert not complaints and set(requests) == {page}


# --- The command -----------------------------------------------------------------------------


def test_without_out_nothing_is_written(sinkbook, folder, document, monkeypatch):
    monkeypatch.chdir(document.parent)
    status, shown, errors = sinkbook(folder, "--text", document, "--length", 32)
    assert status == 0 and errors == ""
    assert "5 texts of 32 tokens (windows of hamlet.txt)" in " ".join(shown.split())
    assert "No head is a sink" in shown and "--out DIR" in shown
    assert [path.name for path in document.parent.iterdir()] == ["hamlet.txt"]


def test_a_report_is_replaced_only_with_force_and_other_files_stay(
    sinkbook, folder, document, tmp_path
):
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    arguments = (folder, "--text", document, "--length", 32, "--out", out)
    status, shown, _ = sinkbook(*arguments)
    assert status == 0 and shown.splitlines()[-1] == str(out / "report.html")
    (out / "report.html").write_text("old")
    status, _, errors = sinkbook(*arguments)
    assert status == 1 and "already holds report.html" in errors and "--force" in errors
    assert (out / "report.html").read_text() == "old"
    assert sinkbook(*arguments, "--force")[0] == 0
    assert (out / "report.html").read_text() != "old"
    assert (out / "notes.txt").read_text() == "mine"


def test_out_that_is_a_file_is_refused_before_the_model_is_loaded(sinkbook, document):
    status, _, errors = sinkbook("no-such-model", "--text", document, "--out", document)
    assert status == 1 and "Not a directory" in errors


def test_text_and_domain_together_are_a_usage_error(sinkbook, folder, document):
    status, _, errors = sinkbook(folder, "--text", document, "--domain", "code")
    assert status == 2 and "--text or --domain, not both" in errors


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "is empty"),
        (b"\xef\xbb\xbf \n\t", "is empty"),
        (b"to be or not to b\xe9", "is not UTF-8: byte 17 is 0xe9"),
        ("to be".encode("utf-16"), "is not UTF-8: byte 0 is 0xff"),
        (b"to be or not to be", "the text has 7 tokens, and a window takes 32"),
        (None, "No such file or directory"),
    ],
)
def test_a_text_that_cannot_be_measured_is_refused(sinkbook, folder, tmp_path, content, complaint):
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    status, shown, errors = sinkbook(folder, "--text", path, "--length", 32)
    assert status == 1 and shown == ""
    assert errors.startswith("sinkbook: ") and complaint in errors and "Traceback" not in errors


def test_a_domain_that_does_not_exist_is_answered_with_those_that_do(sinkbook, folder):
    status, _, errors = sinkbook(folder, "--domain", "poetry")
    assert status == 1 and "no domain named 'poetry'. Known: prose-en" in errors


def test_a_domain_with_too_few_texts_says_what_to_ask_for():
    tiny = tiny_reader(tiny_model())
    with pytest.raises(SinkbookError, match="1 texts of the domain have 32 tokens, and 3 were"):
        token_windows.of_texts(tiny, [HAMLET, "to be"], count=3, length=32)


def test_more_tokens_than_the_model_has_positions_are_refused(sinkbook, folder, document):
    status, _, errors = sinkbook(folder, "--text", document, "--length", 49)
    assert status == 1 and "has 48 positions, and windows of 49 tokens" in errors


def test_models_that_are_none_of_ours_are_refused(sinkbook, document, tmp_path, capfd):
    BertForMaskedLM(BertConfig(**SIZES)).save_pretrained(tmp_path / "encoder")
    tiny_tokenizer().save_pretrained(tmp_path / "encoder")
    (tmp_path / "hollow").mkdir()
    tiny_model().config.save_pretrained(tmp_path / "hollow")
    capfd.readouterr()  # transformers' own bars
    for model, complaint in {
        "smolm2-135m": "Did you mean 'smollm2-135m'?",
        str(tmp_path / "encoder"): "is no causal language model (model_type 'bert')",
        str(tmp_path / "hollow"): "has its weights nowhere",
    }.items():
        status, _, errors = sinkbook(model, "--text", document)
        assert status == 1 and complaint in errors and errors.count("\n") == 1


# --- Windows ---------------------------------------------------------------------------------


def test_windows_follow_each_other_and_each_begins_with_the_first_token():
    tiny = tiny_reader(tiny_model())
    text = "to be or not the to be or not the"
    tokens = token_windows.of_document(tiny, text, count=8, length=4)
    assert tokens.tolist() == [[1, 2, 3, 4], [1, 5, 7, 2], [1, 3, 4, 5]]
    assert token_windows.of_document(tiny, text, count=2, length=4).tolist() == tokens[:2].tolist()


def test_a_model_without_a_first_token_gets_none():
    tiny = tiny_reader(tiny_model(), adds_bos=False)
    assert token_windows.of_document(tiny, "to be or not", count=8, length=2).tolist() == [
        [2, 3],
        [4, 5],
    ]


# --- Other models ----------------------------------------------------------------------------


def test_tokens_that_spell_a_script_are_only_shown():
    result = measured(tiny_model())
    assert result.token[0, 7] == "<script>"
    result["key_importance"][:, 1, 0, 7] = 0.9
    page = html_page(result)
    assert "&lt;script&gt;" in page and "<script" not in page


def test_what_a_folder_a_file_or_a_text_is_called_is_only_shown(tmp_path, sinkbook):
    model, text = tmp_path / "<script>alert(1)<", tmp_path / "<img src=x onerror=alert(1)>&.txt"
    tiny_model().save_pretrained(model)
    tiny_tokenizer().save_pretrained(model)
    text.write_text("<script>alert(1)</script> <b>to be</b> " * 40)
    out = tmp_path / '"><svg onload=alert(1)>'
    status, _, errors = sinkbook(model, "--text", text, "--length", 32, "--out", out)
    assert status == 0, errors
    page = (out / "report.html").read_text("utf-8")
    assert "&lt;script&gt;alert(1)&lt;" in page and "&lt;img src=x" in page
    found = Tags()
    found.feed(page)
    assert not {"script", "img", "b"} & found.names
    assert not [name for name in found.attributes if name.startswith("on")]


def test_a_model_without_value_norms_is_reported_without_a_drain():
    result = measured(tiny_model("diffllama"))
    assert result.value_norm.isnull().all()
    sentence = summary.verdict(result)
    assert "value" not in sentence and "residual state does not peak" in sentence
    page = shown(result)
    assert "Whose value is drained" not in page and "Where the residual state peaks" in page
    assert summary.head_table(result).value_drain_ratio.isnull().all()


def test_layers_without_attention_are_shown_as_such():
    model = tiny_model(
        "granitemoehybrid",
        layer_types=["mamba", "attention"],
        mamba_n_heads=4,
        mamba_d_head=16,
        mamba_d_state=8,
        mamba_n_groups=1,
        num_local_experts=0,
        shared_intermediate_size=64,
        pad_token_id=0,
    )
    result = measured(model)
    table = summary.layer_table(result)
    assert np.isnan(table.sink_rate[0]) and table.strongest[0] == []
    assert len(table.strongest[1]) == 2
    assert set(summary.head_table(result).layer) == {1}
    assert shown(result).count('class="cell"') == 4


def test_a_model_with_several_residual_streams_is_reported_without_a_peak():
    result = measured(tiny_model())
    for name in ("residual_norm", "residual_max_abs"):
        result[name] = result[name] * np.nan
    assert "residual" not in summary.verdict(result)
    page = shown(result)
    assert "Where the residual state peaks" not in page and "Whose value is drained" in page


def test_a_document_with_nul_characters_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(PreTrainedTokenizerFast, "decode", lambda *_: "\0")
    result = measured(tiny_model())
    result.to_netcdf(tmp_path / "result.nc", engine="h5netcdf")  # which takes no NUL
    assert set(result.token.values.ravel()) == {"␀"}


@pytest.mark.parametrize(
    ("norms", "words"),
    [
        ([1, 1, 50, 50, 50], "peaks at 50 times the median, written in layer 1 and still there"),
        ([1, 9, 30, 100, 100], "written in layers 1-2 and still there at the end"),
        ([1, 90, 100, 100, 4], "written in layer 0 and erased in layer 3 (to 4.0 times)"),
        ([80, 90, 100, 9, 4], "from the embedding on and erased in layers 2-3 (to 4.0 times)"),
        ([1, 1, 2, 2, 1], "its residual state does not peak (at most 2.0 times the median)"),
    ],
)
def test_the_verdict_says_where_a_peak_is_written_and_erased(norms, words):
    result = measured(tiny_model(num_hidden_layers=4))
    result["residual_norm"] = xr.ones_like(result.residual_norm)
    result["residual_norm"][:, :, 0] = np.array(norms, dtype=np.float32)
    assert words in summary.verdict(result)


def test_every_domain_fills_the_default_windows():
    """Of a tokenizer with four or more characters a token; others read less of each text."""
    for domain in corpora.DOMAINS:
        assert len(corpora.texts(domain, count=8, minimum_characters=5 * 256)) == 8


def test_the_command_line_starts_without_importing_torch():
    command = "import sys, sinkbook.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", command]).returncode == 0


def test_the_report_rests_on_what_the_probe_measures(folder, document):
    result = report.probe(str(folder), text=document, texts=2, length=32)
    tiny = load(folder)
    tokens = token_windows.of_document(tiny, HAMLET, count=2, length=32)
    expected = measure(tiny.model, tokens, ("sink_attention", "value_norm"))
    for name in expected.data_vars:
        np.testing.assert_allclose(result[name], expected[name], rtol=1e-5)
