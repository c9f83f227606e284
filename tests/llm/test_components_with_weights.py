"""The dissection of SmolLM2 itself: what chapter 12 rests on, on a few short texts."""

import numpy as np
import pytest

from sinkbook.data import corpora
from sinkbook.llm import components, head_types, sink_location
from sinkbook.llm.neurons import unit_writes
from sinkbook.models import load
from sinkbook.models.interventions import zero

pytestmark = pytest.mark.weights

WRITER, DIMENSION = 11, 507


@pytest.fixture(scope="module")
def smollm2():
    return load("smollm2-135m")


@pytest.fixture(scope="module")
def tokens(smollm2):
    return smollm2.encode(corpora.texts("prose-en", count=2), length=32)


@pytest.fixture(scope="module")
def whole(smollm2, tokens):
    return components.symptoms(smollm2.model, tokens)


def test_one_mlp_writes_the_peak_of_smollm2_into_one_dimension(smollm2, tokens):
    written = components.writes(smollm2.model, tokens)
    along = written.along.mean("batch").stack(which=("part", "layer"))
    assert along.idxmax("which").item() == ("mlp", WRITER)
    assert written.share.isel(dimension=DIMENSION).min() > 0.95
    assert written.remainder.max() < 1e-5


def test_without_what_it_writes_at_one_position_the_symptoms_are_gone(smollm2, tokens, whole):
    with zero(smollm2.model, "mlp", layer=WRITER, position=0):
        cut = components.symptoms(smollm2.model, tokens)
    left = components.effects(cut.assign_coords(cut=WRITER), whole)
    assert left.peak_left.max() < 0.1
    assert left.sinks_left.max() < 0.25
    assert left.drain.min() > 0.8


def test_a_peak_a_tenth_as_high_still_makes_sinks(smollm2, tokens, whole):
    with zero(smollm2.model, "mlp", layer=WRITER - 2, position=0):
        cut = components.symptoms(smollm2.model, tokens)
    left = components.effects(cut.assign_coords(cut=WRITER - 2), whole)
    assert left.peak_left.max() < 0.2
    assert left.sinks_left.min() > 0.8


def test_without_the_first_stage_others_get_peaks_unless_they_look_away(smollm2, tokens):
    def peaks():
        ratio = sink_location.seen_by_all(smollm2.model, tokens).residual_peak_ratio
        return (ratio.sel(residual_layer=22) >= 5).sum("position").values

    assert (peaks() == 1).all()
    with zero(smollm2.model, "mlp", layer=2, position=0):
        assert (peaks() > 1).all()
        between = {"layer": range(3, WRITER), "position": range(1, 32)}
        with zero(smollm2.model, "attention", **between):
            assert (peaks() == 1).all()


def test_two_units_of_that_mlp_carry_the_peak(smollm2, tokens):
    share = unit_writes(smollm2.model, tokens, layer=WRITER).share.mean("batch")
    assert np.sort(share)[-2:].sum() > 0.95


def test_the_induction_heads_of_smollm2_rest_on_the_first_token_in_prose(smollm2, tokens):
    repeated = head_types.random_repeated(smollm2, count=2, length=16)
    scores = head_types.head_scores(smollm2, tokens, repeated).mean("batch")
    copying = scores.sel(kind="induction") > 0.4
    assert copying.sum() >= 4
    assert scores.sel(kind="first token").where(copying).min() > 0.5


@pytest.mark.book
def test_cuts_that_do_not_run_the_lower_layers_are_those_that_do(smollm2, tokens):
    together = components.cut_each(smollm2.model, tokens, parts=["mlp"])
    for layer in (2, 9, 20):
        with zero(smollm2.model, "mlp", layer=layer, position=0):
            alone = components.symptoms(smollm2.model, tokens)
        found = together.sel(part="mlp", cut=layer, drop=True)
        for name in alone:
            np.testing.assert_allclose(found[name], alone[name], rtol=1e-3, atol=1e-5)
