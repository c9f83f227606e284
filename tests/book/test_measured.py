"""Kept measurements: the very same call is read, any other is measured, a part is tried again."""

import pandas as pd
import pytest
import torch
import xarray as xr
from torch import nn

from sinkbook.book.records import measured
from sinkbook.errors import SinkbookError
from sinkbook.toy.runs import TrainingConfig


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A copy of the book without chapters, where what is measured is kept."""
    (tmp_path / "book").mkdir()
    (tmp_path / "_toc.yml").touch()
    (tmp_path / "book" / "claims.yml").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(measured.KEEP, "sinkbook run 13 --keep")
    return tmp_path


@pytest.fixture
def sums():
    """A measurement, and how often it was made."""
    made = []

    def sums(model, texts, *, scale=1.0, table=None):
        made.append(texts)
        with torch.no_grad():
            values = scale * model(texts).sum(-1)
        return xr.DataArray(values.numpy(), dims=("text", "position"))

    return sums, made


def arguments():
    torch.manual_seed(1)
    return nn.Linear(4, 4), torch.arange(24.0).reshape(2, 3, 4)


def test_the_same_call_is_read_with_its_provenance_and_measures_nothing(
    repository, sums, monkeypatch
):
    measure, made = sums
    first = measured.kept("sums", measure)(*arguments())
    monkeypatch.delenv(measured.KEEP)
    model, texts = arguments()
    reader = measured.kept("sums", measure)
    again = reader(texts=texts, model=model)
    assert len(made) == 1
    xr.testing.assert_identical(first, again)
    assert reader.facts["command"] == "sinkbook run 13 --keep"
    assert {"date", "device", "seconds", "versions"} < set(reader.facts)
    reader(model, texts + 1)
    assert reader.facts is None


def other_weights(model, texts):
    with torch.no_grad():
        model.weight[0, 0] += 1e-6
    return (model, texts), {}


def hooked(model, texts):
    model.register_forward_hook(lambda *_: None)
    return (model, texts), {}


def replaced(model, texts):
    model.forward = model.forward
    return (model, texts), {}


@pytest.mark.parametrize(
    "changed",
    [
        other_weights,
        hooked,
        replaced,
        lambda model, texts: ((model, texts + 1), {}),
        lambda model, texts: ((model, texts.double().float()[:1]), {}),
        lambda model, texts: ((model, texts), {"scale": 2}),
        lambda model, texts: ((model, texts), {"table": pd.DataFrame({"head": [1]})}),
        lambda model, texts: ((model.eval(), texts), {}),
    ],
)
def test_any_other_call_is_measured(repository, sums, monkeypatch, changed):
    measure, made = sums
    measured.kept("sums", measure)(*arguments())
    monkeypatch.delenv(measured.KEEP)
    given, keywords = changed(*arguments())
    measured.kept("sums", measure)(*given, **keywords)
    assert len(made) == 2


def test_rounding_of_computed_columns_makes_no_other_call(repository, sums, monkeypatch):
    measure, made = sums
    for gap in (0.123456, 0.1234563):
        measured.kept("sums", measure)(*arguments(), table=pd.DataFrame({"gap": [gap]}))
        monkeypatch.delenv(measured.KEEP, raising=False)
    assert len(made) == 1


def test_a_training_is_told_apart_by_its_configuration(repository, sums, monkeypatch):
    measure, made = sums
    for seed in (0, 0, 1):
        measured.kept("sums", measure)(*arguments(), table=[TrainingConfig(seed=seed)])
        monkeypatch.delenv(measured.KEEP, raising=False)
    assert len(made) == 2


def test_nothing_is_kept_or_read_outside_of_the_repository(sums, monkeypatch):
    measure, made = sums
    monkeypatch.setattr(measured, "repository", lambda: None)
    for _ in range(2):
        measured.kept("sums", measure)(*arguments())
    assert len(made) == 2


def test_what_cannot_be_told_apart_is_refused(repository, sums):
    measure, _ = sums
    with pytest.raises(SinkbookError, match="a function is no argument"):
        measured.kept("sums", measure)(*arguments(), table=lambda: 1)


def test_a_damaged_file_is_named(repository, sums, monkeypatch):
    measure, _ = sums
    measured.kept("sums", measure)(*arguments())
    (path,) = (repository / "book" / "records" / "measured").iterdir()
    path.write_bytes(path.read_bytes()[:200])
    monkeypatch.delenv(measured.KEEP)
    with pytest.raises(SinkbookError, match=path.name):
        measured.kept("sums", measure)(*arguments())


def of(*numbers, name="loss"):
    return xr.DataArray(list(numbers), dims="text", coords={"text": range(len(numbers))}, name=name)


def test_a_part_that_is_measured_again_meets_what_was_kept_and_an_altered_number_is_found():
    nothing = float("nan")
    assert "2 of these numbers" in measured.meet(of(1.0, 0.5, nothing), of(1.0004, 0.5, 3.0))
    for stored in (of(1.01, 0.5, 3.0), of(nothing, 0.5, 3.0)):
        with pytest.raises(SinkbookError, match="loss differs by"):
            measured.meet(of(1.0, 0.5, nothing), stored)
    with pytest.raises(SinkbookError, match="drain differs by"):
        both = of(1.0).to_dataset().assign(drain=of(2.0))
        measured.meet(both, both.assign(drain=of(2.1)))
    with pytest.raises(SinkbookError, match="nothing was measured again"):
        measured.meet(of(nothing), of(1.0))
