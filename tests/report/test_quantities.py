"""The numbers of a report: as one JSON object, and held against the conditions of --fail-if."""

import json

import numpy as np
import pytest
from typer.main import get_command

from sinkbook import cli
from sinkbook.data import corpora
from sinkbook.errors import SinkbookError
from sinkbook.report import quantities, report, summary
from tiny import tiny_model, tiny_tokenizer

pytestmark = pytest.mark.weights


@pytest.fixture
def arguments(folder, document) -> tuple:
    return folder, "--text", document, "--texts", 2, "--length", 24


@pytest.fixture
def result(folder, document):
    return report.probe(str(folder), text=document, texts=2, length=24)


def test_json_is_one_object_alone_on_stdout_and_says_what_was_measured(sinkbook, arguments, result):
    status, shown, errors = sinkbook(*arguments, "--json")
    assert status == 0 and errors == ""
    found = json.loads(shown)
    assert found["model"] == str(arguments[0])
    assert found["texts"] == {
        "about": "windows of hamlet.txt",
        "count": 2,
        "length": 24,
        "first_token": "<s>",
    }
    assert found["verdict"] == summary.verdict(result)
    assert set(found["numbers"]) == set(quantities.QUANTITIES)
    attention = result.sink_attention.mean("batch")
    strongest = found["strongest_head"]
    at = attention.sel(layer=strongest["layer"], head=strongest["head"])
    assert float(at) == float(attention.max()) == pytest.approx(strongest["sink_attention"])
    largest = found["headroom"]["all_tokens"]
    held = result.residual_max_abs[largest["text"], largest["residual_layer"], largest["position"]]
    assert largest["magnitude"] == float(held) == float(result.residual_max_abs.max())
    assert found["numbers"]["float16_factor"] == 65504 / largest["magnitude"]


def test_json_and_a_report_together_name_the_page_inside_of_the_object(
    sinkbook, arguments, tmp_path
):
    status, shown, _ = sinkbook(*arguments, "--json", "--out", tmp_path / "out")
    assert status == 0
    assert json.loads(shown)["report"] == str(tmp_path / "out" / "report.html")
    assert (tmp_path / "out" / "report.html").is_file()


def test_the_numbers_are_those_of_the_table_and_of_the_definitions(result):
    found = quantities.quantities(result)
    attention = result.sink_attention.values
    assert found["sink_rate"] == pytest.approx(np.mean(attention > 0.3))
    received = (result.key_importance / result.even_importance).values
    oldest = range(1, 1 + max(8, received.shape[-1] // 8))
    bars = [np.quantile(received[:, n][..., oldest], 0.95) for n in range(received.shape[1])]
    above = received[..., 0] > 1.001 * np.array(bars)[:, None]
    assert found["sink_rate_above_null"] == pytest.approx(above.mean()) and 0 < above.mean() < 1
    assert found["strongest_sink_attention"] == pytest.approx(attention.mean(0).max())
    norm = result.value_norm.values
    ratio = (norm[..., 0] / norm[..., 1:].mean(-1)).mean(0)
    assert found["value_drain_ratio"] == pytest.approx(np.median(ratio), rel=1e-5)
    norm = result.residual_norm.values
    ratio = np.median(norm[..., 0] / np.median(norm[..., 1:], -1), 0)
    assert found["residual_peak_ratio"] == pytest.approx(ratio.max(), rel=1e-5)
    assert list(found) == list(quantities.QUANTITIES)


def test_the_status_is_3_exactly_when_a_condition_is_so(sinkbook, arguments, result):
    value = quantities.quantities(result)["strongest_sink_attention"]
    low, high = value - 1e-3, value + 1e-3
    name = "strongest_sink_attention"
    for written, so in {
        f"{name}<{high}": True,
        f"{name}<{low}": False,
        f"{name} <= {high}": True,
        f"{name}<={low}": False,
        f"{name}>{low}": True,
        f"{name}>{high}": False,
        f"{name} >= {low}": True,
        f"{name}>={high}": False,
        "sink_rate<0": False,
        "sink_rate<=0": True,
        "largest_magnitude>1e9": False,
    }.items():
        assert bool(quantities.met(result, [quantities.condition(written)])) == so, written
    for conditions, expected in {(low, low): 0, (low, high): 3, (high, low): 3}.items():
        options = [word for bound in conditions for word in ("--fail-if", f"{name}<{bound}")]
        status, shown, errors = sinkbook(*arguments, "--json", *options)
        assert status == expected and json.loads(shown)["numbers"][name] == pytest.approx(value)
        said = f"sinkbook: {name}<{high:g} is so: {name} is {value:.4g}\n" if expected else ""
        assert errors == said


@pytest.mark.parametrize(
    "written, complaint",
    [
        (
            "sinkrate<0.4",
            "no quantity named 'sinkrate'. Known: sink_rate, sink_rate_above_null, str",
        ),
        ("sink_rate", "'sink_rate' is no condition"),
        ("sink_rate=0.4", "is no condition"),
        ("sink_rate==0.4", "is no condition"),
        ("sink_rate<", "is no condition"),
        ("sink_rate<x", "is no condition"),
        ("sink_rate<nan", "is no condition"),
        ("sink_rate<inf", "is no condition"),
        ("sink_rate<0.4<0.5", "is no condition"),
        ("0.4>sink_rate", "is no condition"),
        ("", "is empty"),
    ],
)
def test_a_condition_that_cannot_be_held_is_refused_before_the_model_is_loaded(
    sinkbook, document, written, complaint
):
    status, shown, errors = sinkbook("no-such-model", "--text", document, "--fail-if", written)
    assert status == 1 and shown == "" and complaint in errors


def test_what_is_not_known_is_null_in_json_and_an_error_for_a_condition(
    sinkbook, document, tmp_path
):
    tiny_model("diffllama", max_position_embeddings=48).save_pretrained(tmp_path)  # no value norms
    tiny_tokenizer().save_pretrained(tmp_path)
    arguments = (tmp_path, "--text", document, "--length", 24, "--json")
    status, shown, _ = sinkbook(*arguments, "--fail-if", "sink_rate>1")
    assert status == 0 and json.loads(shown)["numbers"]["value_drain_ratio"] is None
    for condition in ("value_drain_ratio<9", "value_drain_ratio>9"):
        status, _, errors = sinkbook(
            *arguments, "--fail-if", "sink_rate<=1", "--fail-if", condition
        )
        assert status == 1 and "value_drain_ratio is not known of" in errors


def test_headroom_that_is_not_known_makes_no_condition_pass(result):
    result["residual_max_abs"] = result.residual_max_abs * np.nan
    assert quantities.plain(result)["headroom"] is None
    for name in ("largest_magnitude", "float16_factor", "int8_steps", "int8_steps_apart"):
        assert quantities.plain(result)["numbers"][name] is None
        with pytest.raises(SinkbookError, match=f"{name} is not known"):
            quantities.met(result, [quantities.condition(f"{name}<1")])


@pytest.mark.parametrize("command", ["probe", "compare", "checkpoints"])
def test_the_help_names_every_domain(command):
    (option,) = [
        parameter
        for parameter in get_command(cli.app).commands[command].params
        if parameter.name == "domain"
    ]
    assert option.help == f"Texts of this domain: {', '.join(corpora.DOMAINS)}."
