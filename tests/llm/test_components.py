"""A dissection finds the part, the dimension and the unit that were built to make the peak."""

from functools import partial

import numpy as np
import pytest
import torch
import xarray as xr
from transformers import LlamaForCausalLM

from sinkbook.errors import SinkbookError
from sinkbook.llm import components
from sinkbook.llm.neurons import cut_units, unit_writes
from sinkbook.models.interventions import reading, replace, zero
from tiny import tiny_model, tiny_toy

TOKENS = torch.randint(1, 50, (3, 12), generator=torch.Generator().manual_seed(0))
TOKENS[:, 0] = 0
DIMENSION, UNIT, WRITER = 5, 3, 1

SMALL = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 40,
    "num_hidden_layers": 4,
    "pad_token_id": None,
}
toy = partial(tiny_toy, vocab_size=50, width=16, layers=4)
llama = partial(tiny_model, "llama", **SMALL)
MODELS = {
    "toy": toy,
    "llama": llama,
    "gpt2": partial(tiny_model, "gpt2", **SMALL),
    "parallel": partial(tiny_model, "gpt_neox", **SMALL, use_parallel_residual=True),
    "norms after": partial(tiny_model, "olmo2", **SMALL),
    "norms before and after": partial(tiny_model, "gemma3_text", **SMALL, head_dim=4),
}


def fixed(make):
    return make().requires_grad_(False)


@pytest.fixture(params=MODELS.values(), ids=MODELS)
def model(request):
    return fixed(request.param)


@pytest.fixture(scope="module")
def peaked():
    """A Llama in which one unit of one MLP answers token 0 with a huge vector in one dimension."""
    model = fixed(llama)
    model.model.embed_tokens.weight[:, 0] = 0
    model.model.embed_tokens.weight[0, 0] = 0.1
    for layer in model.model.layers[: WRITER + 1]:  # nobody else comes to look like token 0
        layer.self_attn.o_proj.weight[0] = 0
        layer.mlp.down_proj.weight[0] = 0
    mlp = model.model.layers[WRITER].mlp
    for reads in (mlp.gate_proj, mlp.up_proj):
        reads.weight[UNIT] = 0
        reads.weight[UNIT, 0] = 5
    mlp.down_proj.weight[:, UNIT] = 0
    mlp.down_proj.weight[DIMENSION, UNIT] = 10
    return model


@pytest.fixture(scope="module")
def whole(peaked):
    return components.symptoms(peaked, TOKENS)


def test_the_writes_of_a_layer_add_up_to_what_it_changes(model):
    written = components.writes(model, TOKENS, position=4)
    assert dict(written.write.sizes) == {"batch": 3, "part": 2, "layer": 4, "dimension": 16}
    assert written.norm.min() > 0
    assert written.remainder.max() < 1e-5


def test_what_a_silenced_part_writes_is_nothing(model):
    with zero(model, "mlp", layer=2, position=4):
        written = components.writes(model, TOKENS, position=4)
    norms = written.norm.sel(part="mlp").max("batch")
    assert norms.argmin("layer") == 2
    assert norms.sel(layer=2) < 1e-6 * norms.sel(layer=1)


def test_a_part_that_is_absent_writes_nan():
    written = components.writes(toy(without_mlp=(1,)), TOKENS)
    missing = written.norm.isnull().all("batch").sel(part="mlp")
    assert missing.values.tolist() == [False, True, False, False]
    assert written.remainder.max() < 1e-5


def test_writes_name_the_layer_the_part_and_the_dimension_of_the_peak(peaked):
    written = components.writes(peaked, TOKENS)
    along = written.along.mean("batch").stack(which=("part", "layer"))
    assert along.idxmax("which").item() == ("mlp", WRITER)
    assert written.share.mean("batch").argmax("dimension") == DIMENSION
    assert written.share.isel(dimension=DIMENSION).min() > 0.99
    assert int(written.top) > WRITER


@pytest.mark.parametrize(
    ("name", "position"),
    [("toy", 0), ("llama", None), ("parallel", 3), ("norms before and after", 0)],
)
def test_cutting_each_part_is_cutting_one_after_the_other_by_hand(name, position):
    model = fixed(MODELS[name])
    together = components.cut_each(model, TOKENS, position=position)
    for part in components.PARTS:
        for layer in range(4):
            with zero(model, part, layer=layer, position=position):
                alone = components.symptoms(model, TOKENS)
            found = together.sel(part=part, cut=layer, drop=True)
            for name in alone:
                np.testing.assert_allclose(found[name], alone[name], rtol=2e-4, atol=1e-5)


def test_a_part_that_is_absent_is_not_cut():
    cuts = components.cut_each(toy(without_mlp=(1,)), TOKENS)
    missing = cuts.loss.isnull().all("batch")
    assert missing.sel(part="mlp").values.tolist() == [False, True, False, False]
    assert not missing.sel(part="attention").any()


def test_some_of_the_cuts_are_those_of_all(peaked):
    every = components.effects_of_each(peaked, TOKENS)
    some = components.effects_of_each(peaked, TOKENS, parts=["mlp"], cuts=[3, WRITER])
    xr.testing.assert_allclose(some, every.sel(part=["mlp"], cut=[3, WRITER]))
    with pytest.raises(SinkbookError, match="`cuts=4`"):
        components.cut_each(peaked, TOKENS, cuts=[4])


def test_the_model_is_as_before_after_all_cuts(peaked, whole):
    components.cut_each(peaked, TOKENS)
    cut_units(peaked, TOKENS, layer=WRITER, counts=[1])
    xr.testing.assert_equal(components.symptoms(peaked, TOKENS), whole)


def test_only_the_writer_takes_the_peak_away(peaked, whole):
    left = components.effects_of_each(peaked, TOKENS, TOKENS[:2, :9]).peak_left
    assert left.sizes["batch"] == 5
    lost = left.max("batch") < 0.05
    assert lost.sel(part="mlp").values.tolist() == [False, True, False, False]
    assert not lost.sel(part="attention").any()
    later = left.sel(cut=[2, 3])
    assert later.min() > 0.99 and later.max() < 1.01


def test_the_part_that_matters_most_is_the_one_that_was_built(peaked):
    left = components.effects_of_each(peaked, TOKENS)
    assert components.matters_most(left.peak_left) == ("mlp", WRITER)
    with pytest.raises(SinkbookError, match="This model has none at position 0"):
        components.matters_most(left.sinks_left.sel(cut=[3]))


def test_where_nothing_is_cut_everything_is_left(whole):
    left = components.effects(whole.expand_dims("part").assign_coords(cut=0), whole)
    for name in ("norm_left", "peak_left", "sinks_left"):
        assert np.allclose(left[name], 1)
    assert np.allclose(left.loss_gain, 0)


def test_sinks_are_only_judged_above_a_cut(peaked):
    left = components.effects_of_each(peaked, TOKENS)
    assert left.sinks_left.sel(cut=3).isnull().all()  # no layer lies above the last
    assert left.sinks_left.sel(cut=1).notnull().all()


def test_the_layers_that_read_the_peak_are_those_after_its_writer(whole):
    assert components.reads_peak(whole).values.tolist() == [False, False, True, True]


def test_units_add_up_to_what_the_mlp_writes(model):
    units = unit_writes(model, TOKENS, layer=2, position=4)
    np.testing.assert_allclose(units.share.sum("unit"), 1, rtol=1e-6)
    if isinstance(model, LlamaForCausalLM):  # no bias, and no norm between MLP and stream
        written = components.writes(model, TOKENS, position=4).norm.sel(part="mlp", layer=2)
        np.testing.assert_allclose(units.along.sum("unit"), written, rtol=1e-5)


def test_units_name_the_one_that_was_built(peaked):
    share = unit_writes(peaked, TOKENS, layer=WRITER).share
    assert share.mean("batch").argmax("unit") == UNIT
    assert share.isel(unit=UNIT).min() > 0.99


def test_one_unit_carries_the_peak_and_random_ones_do_not(peaked, whole):
    cuts = cut_units(peaked, TOKENS, layer=WRITER, counts=[1, 8], draws=2)
    left = components.effects(cuts, whole).peak_left
    assert left.chosen.values.tolist() == ["largest", "random 0", "random 1"]
    assert left.sel(chosen="largest").max() < 0.05
    assert left.sel(chosen=["random 0", "random 1"]).min() > 0.9


def test_more_units_than_there_are_cannot_be_compared(peaked):
    with pytest.raises(SinkbookError, match="has 40 units. Cut from 1 to 20"):
        cut_units(peaked, TOKENS, layer=1, counts=[21])


def test_a_mixture_of_experts_has_no_units_to_look_at():
    model = tiny_model("mixtral", **SMALL, num_local_experts=2)
    with pytest.raises(SinkbookError, match="layer 1 has no MLP that ends in one linear map"):
        unit_writes(model, TOKENS, layer=1)


def test_a_peak_is_the_first_direction_of_a_text_and_gone_without_its_token(peaked):
    squeezed = components.compression(peaked, TOKENS).mean("batch")
    after = squeezed.sel(residual_layer=slice(WRITER + 1, None))
    assert after.with_sink.min() > 0.99
    assert after.without_sink.max() < 0.9
    assert squeezed.with_sink.isel(residual_layer=0) < 0.9


# --- Other things than zero in a part's place ------------------------------------------------

OTHER_STARTS = TOKENS.clone()
OTHER_STARTS[:, 0] = torch.tensor([0, 4, 9])


def test_what_all_texts_have_written_in_first_place_can_be_exchanged_and_not_be_averaged(peaked):
    found = components.in_its_place(peaked, TOKENS, "mlp", layer=WRITER)
    assert found.way.values.tolist() == ["whole", "zero", "mean", "shuffled", "elsewhere"]
    height = found.residual_peak_ratio.isel(residual_layer=WRITER + 1).mean("batch")
    np.testing.assert_allclose(height.sel(way=["mean", "shuffled"]), height[0], rtol=1e-5)
    assert height[0] > 20
    assert height.sel(way=["zero", "elsewhere"]).max() < 3


def test_a_text_without_the_peak_gets_it_from_another(peaked):
    found = components.in_its_place(peaked, OTHER_STARTS, "mlp", layer=WRITER)
    height = found.residual_peak_ratio.isel(residual_layer=WRITER + 1)
    assert (height.sel(way="whole") > 20).values.tolist() == [True, False, False]
    assert (height.sel(way="shuffled") > 20).sum() == 1
    assert not height.sel(way="shuffled", batch=0) > 20
    assert (height.sel(way="mean") > 10).values.tolist() == [False, True, True]


def test_each_way_is_that_of_the_whole_model_with_the_same_in_its_place(model):
    ways = components.in_its_place(model, OTHER_STARTS, "mlp", layer=2).drop_vars("cut")
    with reading(model, "mlp", layer=2) as written:
        whole = components.symptoms(model, OTHER_STARTS)
    (mlp,) = written
    elsewhere = mlp[:, 1:].reshape(-1, mlp.shape[-1]).mean(0)
    mean = torch.stack([mlp[[1, 2], 0].mean(0), mlp[[0, 2], 0].mean(0), mlp[[0, 1], 0].mean(0)])
    xr.testing.assert_allclose(ways.sel(way="whole", drop=True), whole)
    for way, new in {"zero": 0.0, "mean": mean[:, None], "elsewhere": elsewhere}.items():
        with replace(model, "mlp", new, layer=2, position=0):
            by_hand = components.symptoms(model, OTHER_STARTS)
        xr.testing.assert_allclose(ways.sel(way=way, drop=True), by_hand, rtol=1e-4, atol=1e-5)


def test_another_word_for_a_way_is_refused(peaked):
    with pytest.raises(SinkbookError, match="no way 'average'.*shuffled, elsewhere"):
        components.in_its_place(peaked, TOKENS, "mlp", layer=1, ways=["average"])
