"""The search for dormant heads, on real weights: cheap passes are exact, known heads are found."""

import numpy as np
import pytest
import torch

from sinkbook.llm import dormant_heads
from sinkbook.models import load
from sinkbook.models.interventions import zero
from sinkbook.models.partial_forward import can_resume
from sinkbook.probe import measure

pytestmark = pytest.mark.weights

LANGUAGES = (23, 4)  # a head of SmolLM2 that works in French and Spanish
INDUCTION = (23, 7)  # one that copies what followed the last time


@pytest.fixture(scope="module")
def reader():
    return load("smollm2-135m")


@pytest.fixture(scope="module")
def tokens(reader):
    return dormant_heads.domain_tokens(reader, count=4, length=96)


def test_heads_taken_away_in_upper_layers_only_change_the_loss_as_in_the_whole_model(
    reader, tokens
):
    texts = tokens.sel(domain="French").isel(text=slice(2))
    ids = torch.as_tensor(texts.values)
    assert can_resume(reader.model, ids)
    changes = dormant_heads.loss_changes(reader.model, texts, [LANGUAGES, (0, 8)])
    whole = measure(reader.model, ids, ("loss",)).loss
    for (layer, head), change in zip([LANGUAGES, (0, 8)], changes, strict=True):
        with zero(reader.model, "head", layer=layer, head=head):
            without = measure(reader.model, ids, ("loss",)).loss
        np.testing.assert_allclose(change.mean("position"), without - whole, atol=1e-4)


def test_each_head_sleeps_in_the_domain_where_the_other_works(reader, tokens):
    few = tokens.sel(domain=["French", "repeated random"])
    scanned = dormant_heads.scan(reader.model, few)
    attention = [scanned.sink_attention.sel(layer=x, head=y) for x, y in (LANGUAGES, INDUCTION)]
    french, repeated = (
        [a.sel(domain=domain).mean("text").item() for a in attention] for domain in few.domain
    )
    assert repeated[0] - french[0] > 0.2 and french[1] - repeated[1] > 0.4
    for domain, (needed, idle) in {"French": (0, 1), "repeated random": (1, 0)}.items():
        rise = dormant_heads.loss_changes(
            reader.model, few.sel(domain=domain), [LANGUAGES, INDUCTION]
        ).mean(("text", "position"))
        assert rise[needed] > 0.1 and abs(rise[idle]) < 0.05
