"""Counted costs agree with what the counted models do, and with arithmetic."""

import pytest
import torch

from sinkbook.book import costs, experiments
from sinkbook.book.records import paper_scale
from sinkbook.book.records.kept import NAMES, path_of
from sinkbook.book.settings import Settings
from sinkbook.llm.shakespeare_pretraining import PretrainingConfig
from sinkbook.toy.transformer import Transformer


def test_a_training_step_costs_three_forward_passes_of_two_operations_a_weight():
    # Without attention's products and embeddings, the rule of 6 operations a weight and token.
    config = PretrainingConfig(length=8, width=128, layers=2, heads=2, batch_size=4, steps=10)
    cost = costs.training_cost(config)
    width = 128
    layer = 4 * width**2 + 2 * width * 4 * width
    weights = 2 * layer + width * config.model.vocab_size
    tokens = config.length * config.batch_size * config.steps
    assert cost.operations == pytest.approx(6 * weights * tokens, rel=0.1)


def test_memory_holds_four_numbers_a_weight_and_grows_with_the_batch():
    small, large = (
        costs.training_cost(PretrainingConfig(batch_size=size)).memory for size in (32, 64)
    )
    model = Transformer(PretrainingConfig().model)
    state = 16 * sum(parameter.numel() for parameter in model.parameters())
    assert small > state
    assert large - state == pytest.approx(2 * (small - state), rel=0.15)


def test_the_tables_name_every_chapter_that_trains_and_every_device():
    chapters = costs.trainings_of_chapters()
    assert all(configs for configs in chapters.values())
    assert experiments.one_layer(Settings("paper"))[0] in chapters["03 · active-dormant"]
    table = costs.training_table()
    assert list(table.rows.index) == list(chapters)
    assert [column for column in table.rows if "hours" in column] == [
        f"hours, {name}" for name in costs.DEVICES
    ]
    assert 'class="sinkbook-scroll"' in table._repr_html_()


def test_a_seven_billion_model_is_counted_without_its_memory():
    rows = costs.reading_table(tokens=16, texts=4).rows
    assert rows.loc["Llama-2-7B", "weights (billions)"] == "6.74"
    assert rows.loc["Llama-3.1-8B", "weights (billions)"] == "8.03"
    assert float(rows.loc["OLMo-7B-0424", "operations a text"]) == pytest.approx(
        2 * 16 * 6.7e9, rel=0.05
    )
    assert torch.empty(0).device.type == "cpu"  # the meta device was left


def test_the_table_of_times_has_a_row_for_every_record_that_is_there():
    table = costs.measured_table().rows
    assert list(table.index) == [n for n in paper_scale.GROUPS if path_of(n).exists()]
    assert set(table.device) == {"NVIDIA H200"}
    assert (table.minutes.astype(float) > 0).all()
    assert table.loc["three-layers", ["trainings", "layers", "steps"]].tolist() == [
        9,
        "3",
        "10,000",
    ]


def test_every_record_has_a_row_that_says_what_made_it():
    table = costs.records_table().rows
    assert list(table.index) == [name for name in NAMES if path_of(name).exists()]
    assert (table.device.str.startswith("CPU") | (table.device == "NVIDIA H200")).all()
    assert (table.minutes.str.replace(",", "").astype(float) > 0).all()
    assert table.made.str.fullmatch(r"2\d{3}-\d\d-\d\d").all()
