"""Records say where they come from, and making one again is one command."""

import json
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import xarray as xr

from sinkbook.book import experiments, records
from sinkbook.book.settings import Settings
from sinkbook.errors import SinkbookError
from sinkbook.mitigations.registry import MITIGATIONS

NAMES = ("softmax", "relu", "key-bias")


@pytest.mark.parametrize("name", records.RECORDS)
def test_a_record_tells_its_provenance(name):
    record = records.load(name)
    assert record.attrs["command"] == f"sinkbook record {record.attrs['record']}"
    assert record.attrs["record"] == name
    assert json.loads(record.attrs["config"]) and json.loads(record.attrs["versions"])
    assert record.attrs["seconds"] > 0 and record.attrs["device"] and record.attrs["date"]
    assert record.attrs["date"][:10] in records.about(name)
    assert any(np.isfinite(values).any() for values in record.data_vars.values())


def test_unknown_and_missing_records_say_what_to_do(tmp_path, monkeypatch):
    with pytest.raises(SinkbookError, match="no record named 'lague'. Known: .*league"):
        records.load("lague")
    monkeypatch.setattr(records, "path_of", lambda name: tmp_path / f"{name}.nc")
    with pytest.raises(SinkbookError, match="sinkbook record league"):
        records.load("league")
    assert records.about("league") == "league: not made yet"


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """Runs and records go to a folder of the test."""
    monkeypatch.setenv("SINKBOOK_RUNS", str(tmp_path / "runs"))
    monkeypatch.setattr(records, "path_of", lambda name: tmp_path / f"{name}.nc")
    return tmp_path


def test_the_record_of_the_league_is_made_of_its_runs(elsewhere, monkeypatch):
    few = {name: MITIGATIONS[name] for name in NAMES}
    monkeypatch.setattr(experiments, "MITIGATIONS", few)
    (deep, *_) = experiments.three_layers(Settings("quick"))
    small = replace(
        deep,
        model=replace(deep.model, width=8),
        batch_size=4,
        steps=4,
        measurements=2,
        evaluation_size=2,
    )
    monkeypatch.setattr(records, "three_layers", lambda settings: [small])
    monkeypatch.setitem(records.RECORDS, "league", lambda: records._league(seeds=2))
    made = xr.load_dataset(records.make("league"), engine="h5netcdf")
    assert made.sizes["mitigation"] == 3 and made.sizes["seed"] == 2
    assert made.depth.values.tolist() == [1, 3]
    assert made.sink_mass.sel(depth=1).isel(layer=slice(1, None)).isnull().all()
    np.testing.assert_allclose(made.destinations.sum("destination"), 1, atol=1e-5)
    trained = len(list((elsewhere / "runs").glob("*/run.json")))
    assert trained == 2 * (2 * 3 + 3)  # both depths, and the three controls of the key bias
    xr.testing.assert_identical(records.load("league"), made)


def test_the_record_of_the_optimizers_is_made_of_its_runs(elsewhere, monkeypatch):
    whole = experiments.optimizer_sweep(Settings("quick"))
    small = {
        name: replace(c, model=replace(c.model, width=8), batch_size=4, evaluation_size=2)
        for name, c in whole.items()
        if name in ("AdamW", "SGD")
    }
    monkeypatch.setattr(records, "optimizer_sweep", lambda settings: small)
    making = partial(records._optimizers, seeds=2, steps=4)
    monkeypatch.setitem(records.RECORDS, "optimizers", making)
    made = xr.load_dataset(records.make("optimizers"), engine="h5netcdf")
    assert made.optimizer.values.tolist() == list(small)
    assert made.step.values.tolist() == [0, 1, 2, 3, 4]
    assert made.norm_step.values.tolist() == [1, 2, 3, 4]
    assert made.damped_peak.dims == ("seed", "residual_layer")
    assert np.isfinite(made.damped_peak).all() and (made.update_norm > 0).all()
    xr.testing.assert_identical(records.load("optimizers"), made)
