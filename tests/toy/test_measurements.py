"""What is measured of a toy is measured of the toy as it is at that moment."""

from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
import xarray as xr

from sinkbook.book import experiments
from sinkbook.book.settings import Settings
from sinkbook.mitigations.sink_cache import streaming
from sinkbook.probe.attention_maps import attention_logits
from sinkbook.toy.measurements import bigram_excess, excess_risks, sink_logit_spread
from sinkbook.toy.runs import Run
from sinkbook.toy.transformer import Transformer
from tiny import assert_close


def test_bigram_excess_is_measured_while_a_change_holds():
    config = experiments.one_layer(Settings("quick"))[0]
    config = replace(config, evaluation_size=8)
    model = Transformer(config.model).requires_grad_(False)
    with torch.no_grad():
        model.layers[0].attention.wo.weight.mul_(30)  # an untrained head, loud enough to matter
    runs = [Run(config, model, xr.Dataset(), {})]
    changes = {"whole": nullcontext, "window": partial(streaming, window=4, kept=0)}
    found = bigram_excess({"toy": runs}, changes)
    assert_close(found["whole"]["toy"], excess_risks(runs)["bigram"], 0)
    assert abs(found["window"]["toy"] - found["whole"]["toy"]) > 1e-3
    assert_close(excess_risks(runs)["bigram"], found["whole"]["toy"], 0)


def test_the_spread_of_sink_logits_is_that_of_logits_read_one_by_one():
    config = replace(experiments.one_layer(Settings("quick"))[0], evaluation_size=2)
    model = Transformer(config.model).requires_grad_(False)
    run = Run(config, model, xr.Dataset(), {})
    tokens = run.evaluation_tokens
    logits = attention_logits(model, tokens, layer=0)
    to_start, to_others = [], []
    for text in range(len(tokens)):
        for query in range(1, tokens.shape[1]):
            if tokens[text, query].item() in run.task.triggers:
                continue
            to_start.append(logits[text, 0, query, 0].item())
            to_others += logits[text, 0, query, 1 : query + 1].tolist()
    expected = np.std(to_start, ddof=1) / np.std(to_others, ddof=1)
    assert sink_logit_spread(run) == pytest.approx(expected, rel=1e-4)
