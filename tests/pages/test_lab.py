"""What a chapter hands to a page, and what it may not."""

import json
from base64 import b64decode
from dataclasses import replace

import numpy as np
import pytest

from sinkbook.book import experiments
from sinkbook.errors import SinkbookError
from sinkbook.pages import lab
from sinkbook.toy.training import Run


def of(run: Run, **changes) -> Run:
    """The run as if it were that of another config."""
    return replace(run, config=replace(run.config, **changes))


def about(made: lab.Lab) -> dict:
    text = made._repr_html_().partition('<script type="application/json">')[2]
    return json.loads(text.partition("</script>")[0])


def test_nothing_in_a_lab_strikes_the_page_out_or_ends_its_script(runs):
    softmax = runs["softmax"]
    for made in (lab.typed(runs, "vt&$"), lab.training(softmax), lab.recorded(softmax)):
        html = made._repr_html_()
        assert "<s>" not in html and html.count("</script>") == 1
        assert "\n\n" not in html  # Markdown would end the block there
    assert about(lab.recorded(softmax))["labels"][0] == "<s>"


def test_the_settings_of_a_training_are_those_of_the_run(runs):
    config = runs["softmax"].config
    settings = about(lab.training(runs["softmax"]))["settings"]
    assert settings["rate"] == config.learning_rate and settings["batch"] == config.batch_size
    assert settings["length"] == config.task.length and settings["width"] == config.model.width
    assert settings["steps"] == config.steps


@pytest.mark.parametrize("what", ["layers", "width", "norm", "kernel", "task", "optimizer"])
def test_a_toy_that_the_page_does_not_have_is_refused(runs, what):
    run = runs["softmax"]
    model, task = run.config.model, run.config.task
    changes = {
        "layers": {"model": replace(model, layers=2)},
        "width": {"model": replace(model, width=30)},
        "norm": {"model": replace(model, norm_place="post")},
        "kernel": {"model": replace(model, attention="sigmoid")},
        "task": {"task": replace(task, triggers=2)},
        "optimizer": {"optimizer": "muon"},
    }[what]
    with pytest.raises(SinkbookError, match="one layer with one head"):
        lab.training(of(run, **changes))


def test_models_of_two_sizes_are_no_lab(runs):
    run = runs["softmax"]
    wide = of(run, model=replace(run.config.model, width=64))
    with pytest.raises(SinkbookError, match="differ in size"):
        lab.typed({"softmax": run, "wide": wide}, "vt")


def test_recorded_maps_are_those_of_the_weights_along_the_way(runs):
    run = runs["softmax"]
    found = about(lab.recorded(run))
    assert found["steps"] == run.measurements.step.values.tolist()
    count = len(found["labels"])
    maps = np.frombuffer(b64decode(found["maps"]), np.uint8) / 255
    maps = maps.reshape(len(found["steps"]), count * (count + 1) // 2)
    below = np.tril_indices(count)
    last = lab.read(run, run.evaluation_tokens[:1, : lab.TOKENS_SHOWN]).weights[below]
    np.testing.assert_allclose(maps[-1], last, atol=0.5 / 255 + 1e-6)
    rows = np.zeros((len(maps), count))
    np.add.at(rows.T, below[0], maps.T)
    np.testing.assert_allclose(rows, 1, atol=count / 255)
    assert np.abs(maps[0] - maps[-1]).max() > 0.5


def test_a_run_that_kept_nothing_along_the_way_is_refused(runs):
    run = runs["softmax"]
    without = replace(run, facts=run.facts | {"files": {}})
    with pytest.raises(SinkbookError, match="kept its weights"):
        lab.recorded(without)


def test_the_toys_in_the_page_differ_in_their_kernel_alone():
    softmax, relu = experiments.in_the_page().values()
    assert replace(relu, model=replace(relu.model, attention="softmax")) == softmax
