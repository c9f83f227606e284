"""`sinkbook compare`: two models on the same texts, or one and itself in eight bits."""

import io
import re

import numpy as np
import pytest
import torch
import xarray as xr
from rich.console import Console
from scipy import stats
from typer.main import get_command

from sinkbook import cli
from sinkbook.errors import SinkbookError
from sinkbook.mitigations.quantization import RANGES, quantized
from sinkbook.models import load
from sinkbook.models.token_windows import of_document
from sinkbook.report import comparison as compared
from sinkbook.report.comparison import compare, difference_table, head_changes
from sinkbook.report.comparison_page import comparison_page
from sinkbook.report.report import measure_windows
from tiny import HAMLET, WORDS, losses_of, tiny_model, tiny_tokenizer

pytestmark = pytest.mark.weights

SIZES = {"num_key_value_heads": 4, "max_position_embeddings": 48, "initializer_range": 0.3}


@pytest.fixture
def saved(tmp_path):
    """Save a tiny model, as it is or after a change, and give its folder."""

    def save(name: str, change=None, *, kind: str = "llama", tokenizer=None, **sizes) -> str:
        model = tiny_model(kind, **SIZES | sizes)
        if change is not None:
            with torch.no_grad():
                change(model)
        model.save_pretrained(tmp_path / name)
        (tokenizer or tiny_tokenizer()).save_pretrained(tmp_path / name)
        return str(tmp_path / name)

    return save


@pytest.fixture
def texts(document) -> dict:
    return {"text": document, "texts": 4, "length": 24}


def cut_values(layer: int, head: int):
    """Zero the value states of one head of the tiny Llama, 8 wide."""

    def change(model):
        model.model.layers[layer].self_attn.v_proj.weight[8 * head : 8 * head + 8] = 0

    return change


def shown(comparison) -> str:
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(compared.terminal(comparison))
    return console.export_text()


def test_a_model_differs_from_itself_by_exactly_nothing(saved, texts):
    found = compare(saved("a"), saved("b"), **texts)
    table = difference_table(found)
    assert list(table.quantity) == list(compared.QUANTITIES)
    assert (table[["difference", "low", "high"]] == 0).all(axis=None)
    assert (table.a == table.b).all() and table.a.notnull().all() and table.a[0] > 1
    assert (head_changes(found) == 0).all().to_array().all()
    assert "No head differs." in shown(found)
    assert "No head differs." in comparison_page(found)


@pytest.mark.parametrize(("layer", "head"), [(1, 2), (0, 3)])
def test_a_head_whose_values_are_cut_is_where_the_difference_is(saved, texts, layer, head):
    found = compare(saved("a"), saved("b", cut_values(layer, head)), **texts)
    written = head_changes(found).write.transpose("layer", "head").values
    expected = np.zeros((2, 4))
    expected[layer, head] = -1
    # Exactly there, and in no earlier layer; later ones read what the head no longer writes.
    np.testing.assert_array_equal(written[: layer + 1], expected[: layer + 1])
    attention = head_changes(found).attention.transpose("layer", "head").values
    assert (attention[: layer + 1] == 0).all() and (attention[layer + 1 :] != 0).all()
    table = difference_table(found).set_index("quantity")
    assert table.difference.loss != 0
    if layer == 1:
        said = f"Most changed: layer 1, head {head} (write to the residual stream -100%)."
        assert said in shown(found) and said in comparison_page(found)
        page = comparison_page(found)
        cells = re.findall(r"<title>layer (\d), head (\d): ([^<]*)</title>", page)
        assert len(cells) == 2 * 8  # two maps
        assert [c for c in cells if float(c[2])] == [("1", str(head), "-1")]


def test_every_number_is_that_of_the_slow_formula(saved, texts):
    folders = saved("a"), saved("b", seed=1)
    found = compare(*folders, **texts)
    table = difference_table(found).set_index("quantity")
    numbers = {name: [] for name in compared.QUANTITIES}
    for folder, result in zip(folders, (found.a, found.b), strict=True):
        reader = load(folder)
        tokens = of_document(reader, HAMLET, count=4, length=24)
        with torch.no_grad():
            losses = losses_of(reader.model(tokens).logits, tokens)
        result = measure_windows(reader, tokens).drop_vars("token").astype(float)
        attention = result.sink_attention.values
        value, norm = result.value_norm.values, result.residual_norm.values
        numbers["loss"].append(losses.mean(1))
        numbers["sink_rate"].append((attention > 0.3).mean((1, 2)))
        numbers["sink_attention"].append(attention.mean((1, 2)))
        ratio = value[..., 0] / value[..., 1:].mean(-1)
        numbers["value_drain_ratio"].append([np.median(text) for text in ratio])
        ratio = norm[..., 0] / np.median(norm[..., 1:], axis=-1)
        numbers["residual_peak_ratio"].append(ratio.max(1))
        numbers["largest_magnitude"].append(result.residual_max_abs.values.max((1, 2)))
    for name, (a, b) in numbers.items():
        row = table.loc[name]
        a, b = np.array(a), np.array(b)
        expected = (a.mean(), b.mean(), (b - a).mean())
        np.testing.assert_allclose(
            row[["a", "b", "difference"]].astype(float), expected, 1e-4, 1e-6
        )
        assert row.low <= row.difference <= row.high
        assert (row.low, row.high) == pytest.approx(compared.bootstrap_interval(b - a), 1e-3, 1e-6)


def test_the_interval_is_that_of_scipy_and_the_same_each_time():
    values = np.random.default_rng(3).exponential(size=12) - 0.5
    found = compared.bootstrap_interval(values)
    expected = stats.bootstrap(
        (values,), np.mean, n_resamples=9999, method="percentile", rng=np.random.default_rng(1)
    ).confidence_interval
    assert found == pytest.approx(tuple(expected), abs=0.03 * values.std())
    assert found == compared.bootstrap_interval(values)
    assert compared.bootstrap_interval(np.full(5, 0.25)) == (0.25, 0.25)


@pytest.mark.parametrize("values", [[], [1.0], [1.0, float("nan")], [1.0, float("inf")]])
def test_an_interval_that_cannot_be_known_is_unknown(values):
    assert np.isnan(compared.bootstrap_interval(values)).all()


def test_int8_is_what_quantized_computes(saved, texts):
    folder = saved("a")
    reader = load(folder)
    tokens = of_document(reader, HAMLET, count=4, length=24)
    losses = {}
    for ranges in ("tensor", "token"):
        found = compare(folder, int8_b=ranges, **texts)
        with quantized(reader.model, ranges), torch.no_grad():
            losses[ranges] = losses_of(reader.model(tokens).logits, tokens).mean(1)
        np.testing.assert_allclose(found.b.loss, losses[ranges], rtol=1e-5)
        assert found.b.attrs["model"] == f"{folder} in int8 ({ranges})"
        assert RANGES[ranges] in comparison_page(found)
    assert not np.allclose(losses["tensor"], losses["token"])
    with torch.no_grad():
        exact = losses_of(reader.model(tokens).logits, tokens).mean(1)
    np.testing.assert_allclose(found.a.loss, exact, rtol=1e-5)


@pytest.mark.parametrize(
    "options, expected",
    [
        ({"revision_b": "step1"}, [("a", None), ("a", "step1")]),
        ({"revision_a": "step0", "revision_b": "step1"}, [("a", "step0"), ("a", "step1")]),
        ({"revision_a": "step0", "int8_b": "token"}, [("a", "step0")]),
        ({"revision_a": "step0", "b": "a"}, [("a", "step0"), ("a", None)]),
        ({"revision_b": "step1", "b": "b"}, [("a", None), ("b", "step1")]),
    ],
)
def test_every_model_is_loaded_at_the_revision_that_was_asked_for(
    saved, texts, monkeypatch, options, expected
):
    reader, asked = load(saved("a")), []

    def loaded(name, *, revision, trust_remote_code):
        asked.append((name, revision))
        return reader

    monkeypatch.setattr(compared, "load", loaded)
    found = compare("a", **options, **texts)
    assert asked == expected
    for result, revision in ((found.a, expected[0][1]), (found.b, expected[-1][1])):
        assert (f"at {revision}" in result.attrs["model"]) == (revision is not None)
        assert f"--revision-{'b' if 'revision_b' in options else 'a'}" in result.attrs["command"]


def test_models_that_do_not_read_the_same_tokens_are_refused(saved, texts, monkeypatch):
    model, plain, without_first = saved("a"), tiny_tokenizer(), tiny_tokenizer(adds_bos=False)
    monkeypatch.setattr("tiny.WORDS", [*WORDS[:2], *reversed(WORDS[2:])])
    other_words = tiny_tokenizer()
    assert other_words("to be")["input_ids"] != plain("to be")["input_ids"]
    for tokenizer in (other_words, without_first):
        with pytest.raises(SinkbookError, match="cut them into different tokens.*share a token"):
            compare(model, saved("b", tokenizer=tokenizer), **texts)


def test_models_of_other_sizes_are_compared_without_a_map(saved, texts):
    found = compare(saved("a"), saved("b", num_hidden_layers=3), **texts)
    assert head_changes(found) is None
    said = "A has 2 layers of 4 heads and B 3 layers of 4 heads: their heads cannot be compared"
    assert said in " ".join(shown(found).split())
    page = comparison_page(found)
    assert said in page and "<svg" not in page and "loss, nats" in page


def test_what_one_of_them_does_not_have_is_unknown(saved, texts):
    found = compare(saved("a", num_key_value_heads=2), saved("b", kind="diffllama"), **texts)
    row = difference_table(found).set_index("quantity").loc["value_drain_ratio"]
    assert (
        np.isfinite(row.a) and np.isnan(row[["b", "difference", "low", "high"]].astype(float)).all()
    )
    assert "nan" not in shown(found).lower() and ">nan" not in comparison_page(found).lower()


def test_one_text_has_a_difference_and_no_interval(saved, texts):
    table = difference_table(compare(saved("a"), saved("b", seed=1), **texts | {"texts": 1}))
    assert table.difference.notnull().all() and table.low.isnull().all()


def test_the_command_prints_the_table_and_writes_one_page(
    saved, document, tmp_path, sinkbook_cli, capfd
):
    arguments = ("compare", saved("a"), saved("<script>b", cut_values(1, 2)), "--text", document)
    arguments += ("--length", 24)
    capfd.readouterr()  # transformers' own bars
    status, printed, errors = sinkbook_cli(*arguments)
    assert status == 0 and errors == "" and "sink rate" in printed and "--out FILE" in printed
    out = tmp_path / "new" / "page.html"
    status, printed, _ = sinkbook_cli(*arguments, "--out", out)
    assert status == 0 and printed.splitlines()[-1] == str(out)
    page = out.read_text("utf-8")
    assert page.count("<svg") == 2 and "<script" not in page and "&lt;script&gt;b" in page
    assert "://" not in page and [path.name for path in out.parent.iterdir()] == ["page.html"]
    status, _, errors = sinkbook_cli(*arguments, "--out", out)
    assert status == 1 and "is there already" in errors and "--force" in errors
    assert sinkbook_cli(*arguments, "--out", out, "--force")[0] == 0


@pytest.mark.parametrize(
    "options, complaint",
    [
        ((), "Give B, or --int8-b tensor."),
        (("--int8-b", "row"), "no ranges named 'row'. Known: tensor, sink apart, token"),
        (("b", "--out", "."), "is a folder"),
        (("b", "--domain", "poetry"), "no domain named 'poetry'"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_a_model_is_loaded(
    sinkbook_cli, options, complaint
):
    status, printed, errors = sinkbook_cli("compare", "no-such-model", *options)
    assert status == 1 and printed == "" and complaint in errors


def test_the_help_names_the_ranges():
    options = {o.name: o for o in get_command(cli.app).commands["compare"].params}
    assert options["int8_b"].help.endswith(f"ranges: {', '.join(RANGES)}.")


def test_changes_of_heads_that_write_nothing_are_blank(saved, texts):
    found = compare(saved("a", cut_values(1, 0)), saved("b"), **texts)
    written = head_changes(found).write
    assert written.isnull().sum() == 1 and np.isnan(written.sel(layer=1, head=0))
    assert isinstance(written, xr.DataArray) and comparison_page(found).count("<title>layer") == 15
