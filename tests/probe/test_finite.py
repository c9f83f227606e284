"""What counts is a number, and the probe's own arithmetic: damage, autocast, halves, masks, ids."""

import numpy as np
import pytest
import torch

from sinkbook import attention_weights, measure, zero
from sinkbook.errors import NotFiniteError, SinkbookError
from sinkbook.llm.checkpoint_metrics import measure_checkpoint
from sinkbook.models.losses import token_losses
from sinkbook.probe import VARIABLES, explicit
from sinkbook.probe.masks import shown
from sinkbook.report import report, summary
from sinkbook.toy.measurements import measure_toy
from sinkbook.toy.tasks import TaskConfig, task
from sinkbook.toy.transformer import Transformer, TransformerConfig
from tiny import loud_llama, tiny_model, tiny_reader, tiny_toy

IDS = torch.randint(3, 50, (2, 12), generator=torch.Generator().manual_seed(0))
EACH = {
    "fused": loud_llama,
    "chunked": lambda: tiny_model("gemma2", head_dim=8, initializer_range=0.3),
    "eager": lambda: tiny_model("ctrl", n_embd=32, dff=48, n_layer=2, n_head=4),
    "named": lambda: tiny_toy(vocab_size=97),
}


def weight_named(model, *endings):
    """The last of a model's matrices with such a name: in the last layer."""
    named = [w for name, w in model.named_parameters() if name.endswith(endings)]
    return named[-1].data


def test_a_damaged_query_is_not_taken_for_one_that_sees_what_comes_later():
    """Where the model forms its weights itself, as BLOOM does."""
    model = tiny_model("bloom", n_head=4, n_layer=2, initializer_range=0.3)
    weight_named(model, "query_key_value.weight")[0, 0] = float("nan")
    with pytest.raises(NotFiniteError, match="attention weight of layer 1 is NaN"):
        measure(model, IDS, ("sink_attention",))


VALUES = ("v_proj.weight", "wv.weight", "Wv.weight")


@pytest.mark.parametrize("route", EACH)
@pytest.mark.parametrize("damage", [float("nan"), float("inf")])
def test_a_damaged_weight_is_named_by_layer_and_position(route, damage):
    model = EACH[route]()
    weight_named(model, *VALUES)[0, 0] = damage
    with pytest.raises(NotFiniteError, match=r"of layer 1 is .* position \d+ of text 0"):
        measure(model, IDS)
    for variables in (("sink_attention",), ("raw_value_norm",), ("residual_max_abs",)):
        with pytest.raises(NotFiniteError, match="layer 1"):
            measure(model, IDS, variables)
    with pytest.raises(NotFiniteError, match="layer 1"):
        attention_weights(model, IDS, layer=0)


def test_one_broken_token_is_an_error_where_it_counts_and_none_at_padding():
    model, ids = loud_llama(), IDS.clone()
    embedding = model.model.embed_tokens.weight.data.clone()
    model.model.embed_tokens.weight.data[7] = float("nan")
    ids[ids == 7] = 8
    ids[1, 9] = 7
    with pytest.raises(NotFiniteError, match="the embeddings is NaN.* position 9 of text 1"):
        measure(model, ids)
    model.model.embed_tokens.weight.data = embedding
    mask = torch.ones_like(IDS)
    mask[1, 9:] = 0
    places = torch.tensor([9, 11])
    hook = model.model.layers[1].register_forward_hook(
        lambda layer, given, states: states.index_fill(1, places, float("nan"))
    )
    with pytest.raises(NotFiniteError, match="after layer 1 is NaN.* position 9 of text 0"):
        measure(model, IDS, attention_mask=mask)
    result = measure(model, IDS[1:], attention_mask=mask[1:])
    hook.remove()
    assert result.sink_attention.notnull().all()
    assert result.residual_norm.isnull().sum() == 3 * 3  # the padding alone


def test_a_model_whose_cut_hides_the_damage_is_still_broken():
    model = loud_llama()
    weight_named(model, "q_proj.weight")[0, 0] = float("nan")
    with zero(model, "attention", layer=1), pytest.raises(NotFiniteError, match="query of layer 1"):
        measure(model, IDS, ("sink_attention",))


def test_a_damaged_head_ends_the_losses_and_no_other_variable():
    model = loud_llama()
    model.lm_head.weight.data[11, 3] = float("nan")
    assert measure(model, IDS).sink_attention.notnull().all()
    for losses in (lambda: measure(model, IDS, ("loss",)), lambda: token_losses(model, IDS)):
        with pytest.raises(NotFiniteError, match="loss of the token at position 1 of text 0"):
            losses()


def test_nothing_to_measure_is_still_blank():
    one = measure(loud_llama(), IDS[:, :1], tuple(set(VARIABLES) - {"loss"}))
    assert one.sink_attention.isnull().all() and one.value_norm.notnull().all()
    config = TransformerConfig(vocab_size=50, length=16, width=16, heads=2, attention="relu")
    torch.manual_seed(0)
    result = measure(Transformer(config), IDS, ("sink_share", "attention_entropy"))
    assert set(result.sizes) >= {"head"}


def test_a_checkpoint_and_a_toy_that_are_broken_are_not_measured():
    model = loud_llama()
    weight_named(model, "up_proj.weight")[0, 0] = float("nan")
    with pytest.raises(NotFiniteError, match="residual state after layer 1 is NaN"):
        measure_checkpoint(model, IDS, random_queries=4)
    made = task(TaskConfig(length=16))
    toy = Transformer(TransformerConfig(vocab_size=made.vocab_size, length=16, width=16))
    toy.layers[0].attention.wv.weight.data[0, 0] = float("nan")
    with pytest.raises(NotFiniteError, match="layer 0"):
        measure_toy(toy, made, made.batch_at(2, 0, 0)[:, :-1])


def test_no_verdict_on_measurements_with_holes():
    result = report.measure_windows(tiny_reader(tiny_model()), IDS % 8)
    result.attrs["texts"] = "words"
    assert "first token" in summary.verdict(result)
    for name, hole in {
        "residual_norm": dict(residual_layer=1),
        "sink_attention": dict(layer=0, batch=0),
        "value_norm": dict(layer=1, head=2, position=5),
    }.items():
        broken = result.copy(deep=True)
        broken[name][hole] = float("nan")
        if name == "residual_norm":
            broken[name][dict(residual_layer=1, position=0)] = 1.0
        with pytest.raises(NotFiniteError, match=f"{name} is nan at .*ayer"):
            summary.verdict(broken)


# --- Arithmetic of its own -------------------------------------------------------------------


@pytest.mark.parametrize("route", EACH)
def test_under_autocast_the_probe_reads_what_the_model_computes_without_rounding_itself(route):
    """The states are rounded by the model; the logits and sums made of them are not."""
    model = EACH[route]()
    names = tuple(set(VARIABLES) - {"loss"})
    with torch.autocast("cpu", torch.bfloat16):
        result = measure(model, IDS, names)
        assert torch.is_autocast_enabled("cpu")
    exact = measure(model, IDS, names)
    for name in ("sink_attention", "value_norm", "residual_norm", "attention_row_sum"):
        np.testing.assert_allclose(result[name], exact[name], rtol=0.15, atol=0.05)
    if route in ("fused", "chunked", "eager"):  # a softmax row in bfloat16 sums to 1 +- 0.01
        np.testing.assert_allclose(result.attention_row_sum, 1, atol=2e-3)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_autocast_attention_is_that_of_the_very_queries_and_keys(kind):
    """Against float64, from the states that the model attends with."""
    model = tiny_model(kind, initializer_range=0.3)
    states = []

    def look(recorder, query, key, *arguments, **keywords):
        states.append((query, key, keywords["scaling"]))
        return attend(recorder, query, key, *arguments, **keywords)

    from sinkbook.probe.recorder import Recorder

    attend = Recorder.attend
    with pytest.MonkeyPatch.context() as patch, torch.autocast("cpu", torch.bfloat16):
        patch.setattr(Recorder, "attend", look)
        found = measure(model, IDS, ("sink_attention_by_query", "sink_logit_by_query"))
    hidden = torch.ones(12, 12, dtype=torch.bool).triu(1)
    for layer, (query, key, scaling) in enumerate(states):
        groups = query.shape[1] // key.shape[1]
        logits = scaling * query.double() @ key.double().repeat_interleave(groups, dim=1).mT
        weights = logits.masked_fill(hidden, float("-inf")).softmax(-1)[:, :, 1:, 0]
        on_sink = found.sink_attention_by_query.isel(layer=layer).values[..., 1:]
        np.testing.assert_allclose(on_sink, weights, atol=1e-5)
        others = logits.masked_fill(hidden, float("nan"))[..., 1:].nanmean(-1)
        contrast = (logits[..., 0] - others)[..., 1:]
        sink_logit = found.sink_logit_by_query.isel(layer=layer).values[..., 1:]
        np.testing.assert_allclose(sink_logit, contrast, atol=1e-3)


def test_norms_that_outgrow_half_precision_are_measured():
    model = tiny_model(num_hidden_layers=1, hidden_size=64).half()
    model.model.embed_tokens.weight.data[:] = 3e4  # 8 times that is no number of float16
    result = measure(model, IDS, ("residual_norm", "residual_max_abs"))
    np.testing.assert_allclose(result.residual_norm.isel(residual_layer=0), 2.4e5, rtol=1e-3)
    assert result.residual_max_abs.dtype == np.float32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_logits_that_outgrow_half_precision_are_measured(dtype):
    query, key = (300 * torch.randn(1, heads, 5, 16).to(dtype) for heads in (4, 2))
    logits = explicit.logits_of(query, key, torch.arange(5), 1.0)
    exact = query.double() @ key.double().repeat_interleave(2, dim=1).mT
    assert exact.abs().max() > torch.finfo(torch.float16).max and logits.dtype == torch.float32
    # Terms of float32 that cancel leave an error in proportion to the largest logits.
    torch.testing.assert_close(logits, exact.float(), rtol=0, atol=1e-6 * exact.abs().max().item())


# --- Masks and ids ---------------------------------------------------------------------------


@pytest.mark.parametrize("low", [-1e4, -9984.0, -3.3e4, -65504.0, -3.4e38, float("-inf")])
@pytest.mark.parametrize("route", ["fused", "chunked"])
def test_whatever_number_a_mask_hides_by_it_hides(low, route):
    model = EACH[route]()
    seen = torch.ones(12, 12, dtype=torch.bool).tril()[None, None].repeat(2, 1, 1, 1)
    seen[1, :, :, :3] = False  # padding on the left
    seen[1, :, 3:, 4] = False  # and a hole
    positions = torch.arange(12).expand(2, -1)
    names = ("sink_attention", "sink_logit", "key_importance")
    expected = measure(model, IDS, names, attention_mask=seen, position_ids=positions)
    additive = torch.zeros(seen.shape).masked_fill(~seen, low)
    found = measure(model, IDS, names, attention_mask=additive, position_ids=positions)
    for name in names:
        np.testing.assert_allclose(found[name], expected[name], atol=1e-5)
    assert expected.sink.values.tolist() == [0, 3]


def test_a_bias_that_falls_with_the_distance_hides_nothing():
    distance = torch.arange(20_000).float()
    alibi = -0.9 * distance[None]
    assert shown(alibi).all()
    assert shown(-1e4 * (distance > 30)).tolist() == (distance <= 30).tolist()
    assert shown(-0.5 * distance[:100] - 1e4 * (distance[:100] > 30)).sum() == 31
    logits = torch.randn(400) * 50
    assert shown(logits - 1e4 * (torch.arange(400) % 3 == 0)).sum() == 266


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_mask_with_what_is_no_number_is_refused(bad):
    additive = torch.zeros(2, 1, 12, 12).masked_fill(torch.ones(12, 12).triu(1) > 0, -1e4)
    additive[0, 0, 5, 2] = bad
    with pytest.raises(SinkbookError, match="NaN or infinite"):
        measure(loud_llama(), IDS, attention_mask=additive)


@pytest.mark.parametrize(
    ("mask", "told"),
    [
        (torch.zeros(2, 12).masked_fill(torch.arange(12) > 8, -1e4), "Give 1 for a token"),
        (torch.ones(2, 1, 12, 12).long().tril(), "Give truth values"),
        (torch.ones(2, 11), "one entry per token"),
    ],
)
def test_a_mask_of_another_kind_is_refused_with_the_kind_that_is_taken(mask, told):
    with pytest.raises(SinkbookError, match=told):
        measure(loud_llama(), IDS, attention_mask=mask)


@pytest.mark.parametrize("given", [torch.Tensor.tolist, torch.Tensor.numpy])
def test_lists_and_arrays_are_taken_as_ids_masks_and_queries(given):
    model = loud_llama()
    mask, queries = torch.ones_like(IDS), torch.ones_like(IDS, dtype=torch.bool)
    mask[1, 9:], queries[:, 4] = 0, False
    expected = measure(model, IDS, attention_mask=mask, queries=queries)
    found = measure(model, given(IDS), attention_mask=given(mask), queries=given(queries))
    np.testing.assert_array_equal(found.sink_attention, expected.sink_attention)
    np.testing.assert_array_equal(
        attention_weights(model, given(IDS), layer=1), attention_weights(model, IDS, layer=1)
    )


@pytest.mark.parametrize(
    ("ids", "told"),
    [
        ([[1, 2, 3], [4, 5]], "Give rows of one length"),
        ([1, 2, 3], r"shape \(3,\).*input_ids\[None\]"),
        ([[0.5, 1.0]], "Give integers"),
        ("to be or not", "Give rows of one length"),
        ([[]], "Give integers|one token at least"),
        (torch.zeros(2, 0, dtype=torch.long), "one token at least"),
    ],
)
def test_ids_that_are_none_are_refused_with_what_is_taken(ids, told):
    with pytest.raises(SinkbookError, match=told):
        measure(loud_llama(), ids)
