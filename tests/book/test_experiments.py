"""Experiments differ in what their names say, and what is measured on them means what it says."""

import dataclasses

import numpy as np
import pytest
import torch
import xarray as xr

from sinkbook import figures
from sinkbook.book import experiments
from sinkbook.book.settings import Settings
from sinkbook.errors import SinkbookError
from sinkbook.probe.attention_maps import attention_weights
from sinkbook.toy import measurements
from sinkbook.toy.runs import Run, TrainingConfig
from sinkbook.toy.tasks import TaskConfig, task
from sinkbook.toy.transformer import Transformer, TransformerConfig


def untrained(seed=0, layers=1, **changes) -> Run:
    """A run that has not been trained, on short texts of sixteen characters."""
    task_config = TaskConfig(**{"characters": 16, "length": 16} | changes)
    vocab_size = task(task_config).vocab_size
    config = TrainingConfig(
        task=task_config,
        model=TransformerConfig(vocab_size=vocab_size, length=16, width=32, layers=layers),
        evaluation_size=16,
        seed=seed,
    )
    torch.manual_seed(seed)
    model = Transformer(config.model).eval().requires_grad_(False)
    return Run(config, model, xr.Dataset(), {})


def of_seed_five(profile):
    settings = Settings(profile, 5)
    return {"3 × TF": experiments.three_layers(settings)} | experiments.variations(settings)


def test_three_layers_and_every_variation_have_a_run_for_each_seed():
    for configs in of_seed_five("paper").values():
        assert [config.seed for config in configs] == [47, 48, 49]


def test_a_page_trains_the_first_seeds_of_what_takes_long():
    counts = {name: len(configs) for name, configs in of_seed_five("quick").items()}
    assert {name for name, count in counts.items() if count == 1} == {
        *("no <s>", "delimiters", "in-context", "Bigram-backward", "Markov"),
        *("1 trigger", "8 triggers"),
    }
    assert counts["two starts"] == counts["Bigram-Backcopy"] == 2
    assert {configs[0].seed for configs in of_seed_five("quick").values()} == {47}


def test_variations_differ_from_bigram_backcopy_in_the_task_alone():
    varied = experiments.variations(Settings("quick"))
    for name, (config, *_) in varied.items():
        if name == "in-context":
            continue
        plain = varied["Bigram-Backcopy"][0]
        vocab_size = plain.model.vocab_size
        model = dataclasses.replace(config.model, vocab_size=vocab_size)
        assert dataclasses.replace(config, task=plain.task, model=model) == plain


def test_unknown_profiles_are_named():
    with pytest.raises(SinkbookError, match="fast"):
        experiments.three_layers(Settings("fast"))


@pytest.mark.parametrize("changes", [{}, {"starts": 0}, {"starts": 2}, {"triggers": 1}])
def test_attention_by_kind_of_key_adds_up_to_one(changes):
    found = measurements.attention_by_key([untrained(0, **changes), untrained(1, **changes)])
    np.testing.assert_allclose(found.attention.sum("key"), 1, atol=1e-5)
    assert found.key.values[0] == ("first" if changes.get("starts") == 0 else "<s>")
    assert len(set(found.key.values)) == found.sizes["key"]


@pytest.mark.parametrize(
    "changes, extra",
    [({}, []), ({"starts": 2}, ["<s2>"]), ({"delimiter_probability": 0.2}, ["<d>"])],
)
def test_roles_are_those_that_the_task_has_and_add_up_to_one(changes, extra):
    run = untrained(**changes)
    attention = measurements.attention_by_key([run]).attention
    shares = measurements.attention_by_role(attention, run.task)
    assert list(shares) == ["position 0", *extra, "triggers", "line break", "others"]
    assert sum(shares.values()) == pytest.approx(1)


def test_every_run_can_have_a_layer_of_its_own():
    runs = [untrained(0, layers=2), untrained(1, layers=2)]
    found = measurements.attention_by_key(runs, layer=np.array([0, 1]))
    for i, run in enumerate(runs):
        alone = measurements.attention_by_key([run], layer=i)
        xr.testing.assert_allclose(found.isel(seed=[i]), alone)


def test_attention_by_kind_of_key_agrees_with_counting_by_hand():
    run = untrained(delimiter_probability=0.3)
    tokens, made = run.evaluation_tokens, run.task
    weights = attention_weights(run.model, tokens, layer=0)[:, 0]
    start, delimiter, visible = [], [], []
    for text, rows in zip(tokens.tolist(), weights, strict=True):
        for n in range(1, len(text)):
            if text[n] in made.triggers:
                continue
            start.append(rows[n, 0].item())
            keys = [i for i in range(1, n + 1) if text[i] == made.delimiter]
            delimiter.append(sum(rows[n, i].item() for i in keys))
            if keys:
                visible.append(delimiter[-1])
    found = measurements.attention_by_key([run]).isel(seed=0)
    assert found.attention.sel(key="<s>") == pytest.approx(np.mean(start), abs=1e-5)
    assert found.attention.sel(key="<d>") == pytest.approx(np.mean(delimiter), abs=1e-5)
    on_visible = found.attention_where_visible.sel(key="<d>")
    assert on_visible == pytest.approx(np.mean(visible), abs=1e-5)


def test_a_head_that_looks_only_at_the_start_is_dormant_on_every_character():
    run = untrained()
    attention = run.model.layers[0].attention
    attention.attention_function = lambda module, query, key, value, *_, **__: (
        value[:, :, :1].expand_as(value).transpose(1, 2),
        torch.eye(query.shape[2])[:1].expand(len(query), 1, query.shape[2], -1),
    )
    assert measurements.dormant_characters([run]) == [1.0]
    assert measurements.dormant_characters([untrained()]) == [0.0]


@pytest.mark.parametrize("layer", [0, 1])
def test_the_layer_that_copies_is_the_one_whose_triggers_look_back(layer):
    run = untrained(layers=2)
    run.model.layers[layer].attention.attention_function = (
        lambda module, query, key, value, *_, **__: (
            torch.zeros_like(value).transpose(1, 2),
            torch.eye(query.shape[2]).roll(-1, 1).tril().expand(len(query), 1, -1, -1),
        )
    )
    assert measurements.copying_layer(run) == layer


def test_measuring_without_any_part_is_measuring_the_model():
    run = untrained(layers=2)
    whole = measurements.measure_toy(run.model, run.task, run.evaluation_tokens)
    found = measurements.measure_without([run]).isel(seed=0, drop=True)
    xr.testing.assert_allclose(found.drop_vars("sink_logit"), whole)


def test_a_cut_layer_leaves_the_residual_state_as_it_was_and_the_model_whole():
    run = untrained(layers=2)
    whole = measurements.measure_without([run])
    cut = measurements.measure_without([run], "attention", "mlp", layer=0)
    before, after = (cut.residual_norm.sel(residual_layer=i) for i in (0, 1))
    np.testing.assert_allclose(before, after, rtol=1e-6)
    xr.testing.assert_equal(measurements.measure_without([run]), whole)


def test_a_cut_at_one_position_spares_the_others():
    run = untrained(layers=1)
    whole = measurements.measure_without([run])
    cut = measurements.measure_without([run], "mlp", layer=0, position=0)
    assert not np.allclose(cut.residual_norm, whole.residual_norm)
    np.testing.assert_allclose(cut.other_residual_norm, whole.other_residual_norm)


def test_key_bars_show_the_first_kind_even_if_nobody_looks_at_it():
    values = xr.DataArray(
        [[0.0, 0.5, 0.1, 0.4]], dims=("seed", "key"), coords={"key": ["<s>", "a", "b", "c"]}
    )
    ax = figures.key_bars(values, colours={}, count=3)
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["<s>", "a", "c"]


def test_controls_of_the_pretraining_are_trained_as_long_and_differ_in_what_they_are_called_after():
    groups = experiments.pretrainings()
    base = groups["as it is"][0]
    for name, changes in experiments.PRETRAINING_CONTROLS.items():
        assert groups[name] == [dataclasses.replace(base, **changes)]


def test_the_seeds_that_are_kept_do_not_go_with_the_seed_of_the_settings():
    kept = [
        experiments.kept_seeds(settings, experiments.three_layers(settings))
        for settings in (Settings("quick"), Settings("quick", seed=7))
    ]
    assert kept[0] == kept[1]
    assert [config.seed for config in kept[0]] == list(range(42, 52))
