"""On real weights: the cache is its twin, and forgetting the first token is what hurts."""

import numpy as np
import pytest
import torch

from sinkbook.data.corpora import texts
from sinkbook.mitigations.sink_cache import SinkCache, streaming
from sinkbook.models import load
from sinkbook.models.losses import token_losses

pytestmark = pytest.mark.weights


@pytest.fixture(scope="module")
def smollm2():
    return load("smollm2-135m")


@pytest.fixture(scope="module")
def tokens(smollm2):
    return smollm2.encode(texts("prose-en", count=1), length=80)


def test_cache_and_twin_give_smollm2_the_same_probabilities_past_the_window(smollm2, tokens):
    model, read = smollm2.model, tokens[:, :48]
    cache = SinkCache(model, sinks=4, window=16)
    with torch.no_grad():
        steps = [model(read[:, i : i + 1], past_key_values=cache).logits for i in range(48)]
        with streaming(model, window=16, kept=4):
            at_once = model(read, use_cache=False).logits
    one_by_one = torch.cat(steps, dim=1)
    difference = one_by_one.softmax(-1) - at_once.softmax(-1)
    assert difference.abs().max() < 1e-4
    torch.testing.assert_close(one_by_one, at_once, atol=2e-3, rtol=1e-3)


def test_smollm2_writes_on_past_the_window_and_the_twin_agrees_word_by_word(smollm2, tokens):
    cache = SinkCache(smollm2.model, sinks=4, window=12)
    written = smollm2.model.generate(
        tokens[:, :10], past_key_values=cache, max_new_tokens=24, do_sample=False
    )
    with torch.no_grad(), streaming(smollm2.model, window=12, kept=4):
        predicted = smollm2.model(written[:, :-1], use_cache=False).logits.argmax(-1)
    assert torch.equal(predicted[:, 9:], written[:, 10:])
    assert cache.layers[0].keys.shape[2] == 4 + 12 - 1


def test_one_first_token_is_what_a_window_lacks(smollm2, tokens):
    with streaming(smollm2.model, window=32, kept=0):
        without = token_losses(smollm2.model, tokens)[:, 40:].mean()
    with streaming(smollm2.model, window=32, kept=1):
        with_one = token_losses(smollm2.model, tokens)[:, 40:].mean()
    whole = token_losses(smollm2.model, tokens)[:, 40:].mean()
    assert without - whole > np.log(2) > 0.3 > abs(with_one - whole)
