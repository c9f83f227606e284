"""The probe against transformers' own eager attention, on a tiny random model of each kind.

The reference runs each architecture's eager attention, in float64 where it can be watched, and
applies the definitions to the matrices. Which architecture takes which route is compared with
`book/architectures.json`, which the book shows; `REFRESH` writes that file anew. The list is of the
release of transformers that is pinned: what another one does otherwise is told, and not judged.
"""

import json
import os
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import jaxtyping
import numpy as np
import pytest
import torch
import transformers
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
    logging,
)

from architectures import ARCHITECTURES, OTHERS, TINY, tiny_with
from references import agree, definitions, eager
from sinkbook import measure
from sinkbook.data.corpora import texts
from sinkbook.errors import SinkbookError
from sinkbook.llm.checkpoint_metrics import last_query_logits, measure_checkpoint
from sinkbook.models import load
from sinkbook.models.interventions import zero
from sinkbook.models.layout import layers
from sinkbook.models.partial_forward import state_of
from sinkbook.probe.attention_maps import attention_maps, attention_weights

pytestmark = pytest.mark.weights

logging.set_verbosity_error()

ROUTES = ("fused", "chunked", "eager")
LIST = Path(__file__).resolve().parents[2] / "book" / "architectures.json"
LISTED = json.loads(LIST.read_text(encoding="utf-8"))
REFRESH = "SINKBOOK_ARCHITECTURES=1 pytest -n0 tests/probe/test_architectures.py"
PINNED = LISTED["transformers"] == transformers.__version__
WRITING = os.environ.get("SINKBOOK_ARCHITECTURES") == "1"
LENGTH = 20
PADDINGS = {
    "none": None,
    "left": torch.tensor([[1] * LENGTH, [0] * 4 + [1] * (LENGTH - 4)]),
    "right": torch.tensor([[1] * LENGTH, [1] * (LENGTH - 4) + [0] * 4]),
}
VARIABLES = (
    "sink_attention",
    "sink_logit",
    "attention_entropy",
    "key_importance",
    "even_importance",
    "value_norm",
    "head_output_norm",
    "residual_norm",
)


@pytest.fixture(scope="module")
def listed() -> Iterator[Callable[..., None]]:
    """Checks that the book lists what was found of an architecture; keeps it for `REFRESH`."""
    found, differing = {"transformers": transformers.__version__}, []

    def check(route: str, kind: str, says: str | None = None) -> None:
        found.setdefault(route, {})[kind] = says
        known = LISTED[route]
        same = kind in known and (says is None or says == known[kind])
        assert same or WRITING or not PINNED, f"{LIST.name} is out of date: {REFRESH}"
        if not same:
            differing.append(f"{kind} is {route}")

    yield check
    if differing and not WRITING:
        versions = f"{LIST.name} is of transformers {LISTED['transformers']}; in this one, "
        warnings.warn(f"{versions}{transformers.__version__}: {', '.join(differing)}", stacklevel=1)
    if WRITING:
        for route in ROUTES:
            found[route] = sorted(found[route])
        LIST.write_text(json.dumps(found, indent=2, sort_keys=True) + "\n", encoding="utf-8")


@pytest.mark.skipif(WRITING, reason="the list is being written")
def test_the_list_in_the_book_is_of_the_pinned_transformers_and_names_nothing_untested():
    kinds = {kind for route in (*ROUTES, "partly", "refused") for kind in LISTED[route]}
    classes = {kind for kind in kinds if "For" in kind}
    assert kinds - classes == {*ARCHITECTURES, *OTHERS}, REFRESH
    pinned = (LIST.parents[1] / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert f"transformers=={LISTED['transformers']}" in pinned, REFRESH


@cache
def tiny(kind: str) -> PreTrainedModel:
    """A random model of an architecture, with attention that is far from even."""
    return tiny_with(kind)


def token_ids() -> torch.Tensor:
    return torch.randint(3, 97, (2, LENGTH), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_the_probe_agrees_with_eager_attention(kind, listed):
    model, ids = tiny(kind), token_ids()
    before = model.config._attn_implementation
    for padding, mask in PADDINGS.items():
        if padding == "left" and not model._can_set_attn_implementation():
            continue  # its padded rows see nothing and cannot be undone
        inputs = {"input_ids": ids} | ({} if mask is None else {"attention_mask": mask})
        result = measure(model, ids, VARIABLES, attention_mask=mask)
        assert model.config._attn_implementation == before
        real = torch.ones_like(ids) if mask is None else mask
        agree(result, eager(model, **inputs), model, real.bool(), tolerance=1e-5)
    listed(result.attrs["route"].partition("+")[0], kind)


@pytest.mark.parametrize("kind", [*ARCHITECTURES, "glm_moe_dsa", "axk2"])
def test_what_a_model_computes_is_not_changed_by_measuring_it(kind):
    """By the implementation that it has, whatever it asks this one's name for."""
    model = tiny_with(kind, **({} if kind in ARCHITECTURES else {"num_key_value_heads": 4}))
    ids = token_ids()
    states = []
    hooks = [
        layer.block.register_forward_hook(lambda _, __, out: states.append(state_of(out)))
        for layer in layers(model)
    ]
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    measured = measure(model, ids, ("residual_max_abs",)).residual_max_abs
    for number, state in enumerate(states, start=1):
        expected = state.abs().amax(-1)
        np.testing.assert_allclose(
            measured.sel(residual_layer=number), expected, rtol=1e-4, atol=1e-5
        )


def test_layers_of_unlike_sizes_are_read_each_by_its_own_configuration():
    model, ids = tiny_with("dots3_note_text"), token_ids()
    assert [(layer.heads, layer.value_heads) for layer in layers(model)] == [(4, 4), (2, 2)]
    measured = measure(model, ids, VARIABLES)
    real = torch.ones_like(ids).bool()
    agree(measured, eager(model, input_ids=ids), model, real, tolerance=1e-5)
    with zero(model, "head", layer=1, head=1):
        norms = measure(model, ids, ("head_output_norm",)).head_output_norm.isel(layer=1)
    assert (norms[:, 1] == 0).all() and (norms[:, 0] > 0).all()


def test_layers_that_choose_blocks_of_keys_are_refused():
    kinds = {"layer_types": ["full_attention", "minimax_m3_sparse"], "index_block_size": 4}
    model = tiny_with("minimax_m3_vl_text", **kinds, index_topk_blocks=1, num_key_value_heads=4)
    with pytest.raises(SinkbookError, match="MiniMaxM3VLAttention chooses blocks of keys"):
        measure(model, token_ids())


@pytest.mark.parametrize("kind", OTHERS)
def test_other_architectures_are_read_or_answer_why_not(kind, listed, monkeypatch):
    """Random ones of all, with switches, are compared in `test_any_model.py`."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # refused in words
    model, ids = tiny_with(kind), token_ids()
    try:
        result = measure(model, ids, VARIABLES)
    except SinkbookError as refusal:
        try:
            measure(model, ids, ("sink_attention", "sink_logit", "key_importance"))
        except SinkbookError as other:
            listed("refused", kind, str(other))
        else:
            listed("partly", kind, str(refusal))
    else:
        listed(result.attrs["route"].partition("+")[0], kind)


# Where some weight goes to a learned sink, the logits of the keys do not make the weights alone.
LEARNED_SINKS = ("gpt_oss", "mimo_v2_flash")


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_maps_logits_and_heads_are_those_of_their_own_layer(kind):
    model, ids = tiny(kind), token_ids()
    maps, (reference, _) = attention_maps(model, ids), eager(model, input_ids=ids)
    attend = [number for number, found in enumerate(maps) if found is not None]
    assert attend == sorted(reference)
    last = last_query_logits(model, ids)
    for number in attend:
        weights, heads = reference[number].weights, layers(model)[number].heads
        assert weights.shape[1] == heads
        np.testing.assert_allclose(maps[number].weights, weights, atol=1e-5)
        np.testing.assert_allclose(attention_weights(model, ids, layer=number), weights, atol=1e-5)
        if kind not in LEARNED_SINKS:
            np.testing.assert_allclose(maps[number].logits.softmax(-1), weights, atol=1e-5)
            logits = last[:, number, :heads].nan_to_num(nan=-torch.inf)
            np.testing.assert_allclose(logits.softmax(-1), weights[:, :, -1], atol=1e-5)
    blank = [number for number in range(len(maps)) if number not in attend]
    assert last[:, blank].isnan().all()
    for number in blank:
        with pytest.raises(SinkbookError, match=f"in layer {number} .*that attend: {attend[0]}"):
            attention_weights(model, ids, layer=number)


HYBRIDS = {
    "bamba": {"attn_layer_indices": [1, 3]},
    "jamba": {"attn_layer_offset": 1, "attn_layer_period": 2, "expert_layer_offset": 1},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "qwen3_next": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2},
    "minimax": {"layer_types": ["linear_attention", "full_attention"] * 2},
}


@pytest.mark.parametrize("kind", HYBRIDS)
def test_in_a_hybrid_the_map_of_a_layer_is_not_that_of_its_place_among_those_that_attend(kind):
    model, ids = tiny_with(kind, num_hidden_layers=4, **HYBRIDS[kind]), token_ids()
    reference, _ = eager(model, input_ids=ids)
    assert sorted(reference) == [1, 3]
    for number in (1, 3):
        found = attention_weights(model, ids, layer=number)
        np.testing.assert_allclose(found, reference[number].weights, atol=1e-5)
    assert not np.allclose(reference[1].weights, reference[3].weights, atol=1e-2)


@pytest.mark.parametrize("kind", [kind for kind in LISTED["eager"] if kind in ARCHITECTURES])
def test_overheard_architectures_have_logits_at_every_checkpoint(kind):
    with torch.no_grad():
        found = measure_checkpoint(tiny(kind), token_ids(), random_queries=5, prefix=4)
    assert found.query_logit_mean.notnull().all() and (found.query_logit_std > 0).all()


@pytest.mark.parametrize("kind", ["llama", "gemma4_text", "gpt2", "gpt_bigcode", "openai-gpt"])
def test_a_value_head_is_cut_for_those_who_share_it(kind):
    model, ids = tiny(kind), token_ids()
    before = measure(model, ids, ("raw_value_norm",)).raw_value_norm
    for number, layer in enumerate(layers(model)):
        shared = layer.heads // layer.value_heads
        for head in range(layer.value_heads):
            with zero(model, "value", layer=number, head=head):
                after = measure(model, ids, ("raw_value_norm",)).raw_value_norm.isel(layer=number)
            cut = (after == 0).all(("batch", "position")).values
            assert cut.nonzero()[0].tolist() == [*range(head * shared, (head + 1) * shared)]
            same = before.isel(layer=number, head=~cut)
            np.testing.assert_allclose(after[:, ~cut], same, rtol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma2", "gemma3_text", "gpt_oss", "gpt2"])
def test_packed_documents_are_measured_as_eager_attention_sees_them(kind):
    model, ids = tiny(kind), token_ids()
    documents = torch.cat([torch.arange(7), torch.arange(LENGTH - 7)])
    positions = torch.stack([documents, torch.arange(LENGTH)])
    result = measure(model, ids, VARIABLES, position_ids=positions)
    reference = eager(model, input_ids=ids, position_ids=positions)
    agree(result, reference, model, torch.ones_like(ids).bool(), tolerance=1e-5)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2", "mistral", "deepseek_v3", "bloom"])
def test_half_precision_agrees_within_a_hundredth(kind):
    """Against eager attention in bfloat16: its own rounding is all that differs."""
    model, ids = tiny(kind), token_ids()
    real = torch.ones_like(ids).bool()
    rounded = {name: p.data.clone() for name, p in model.named_parameters()}
    try:
        model.bfloat16()
        result = measure(model, ids, ("sink_attention", "key_importance", "attention_entropy"))
        model.float()  # keeps the weights as bfloat16 has rounded them
        reference, _ = eager(model, input_ids=ids)
    finally:
        for name, parameter in model.float().named_parameters():
            parameter.data = rounded[name]
    for number, layer in reference.items():
        expected = definitions(layer, None, real)
        for name in result.data_vars:
            measured = result[name].isel(layer=number)
            np.testing.assert_allclose(measured, expected[name], rtol=1e-2, atol=1e-2)


def test_differential_attention_has_no_value_of_its_own(listed):
    model, ids = tiny("diffllama"), token_ids()
    result = measure(model, ids, ("sink_attention", "key_importance", "residual_norm"))
    reference, _ = eager(model, input_ids=ids)
    for number, layer in reference.items():
        expected = definitions(layer, None, torch.ones_like(ids).bool())
        np.testing.assert_allclose(
            result.key_importance.isel(layer=number), expected["key_importance"], atol=1e-5
        )
    with pytest.raises(SinkbookError, match="has no value_norm of its own") as refusal:
        measure(model, ids)
    listed("partly", "diffllama", str(refusal.value))


@pytest.mark.parametrize(
    "kind, message",
    [
        ("mamba", "has no softmax attention"),
        ("falcon_mamba", "has no softmax attention"),
        ("rwkv", "no softmax attention|no list of"),
    ],
)
def test_models_whose_attention_cannot_be_read_are_refused(kind, message, listed):
    with pytest.raises(SinkbookError, match=message) as refusal:
        measure(tiny(kind), token_ids())
    listed("refused", kind, str(refusal.value))


SMALL = {"vocab_size": 97, "d_model": 32, "num_layers": 2, "num_heads": 4, "d_kv": 8, "d_ff": 48}


@pytest.mark.parametrize(
    "model, message",
    [
        (lambda: BertForMaskedLM(BertConfig(**TINY | {"is_decoder": False})), "to later ones"),
        (lambda: BartForConditionalGeneration(BartConfig(**TINY)), "an encoder and a decoder"),
        (lambda: T5ForConditionalGeneration(T5Config(**SMALL)), "an encoder and a decoder"),
    ],
)
def test_models_that_are_not_causal_are_refused(model, message, listed):
    model = model()
    with pytest.raises(SinkbookError, match=message) as refusal:
        measure(model, token_ids())
    listed("refused", type(model).__name__, str(refusal.value))
    assert model.config._attn_implementation == "sdpa"  # put back


@pytest.mark.book
def test_the_probe_agrees_with_eager_attention_on_a_real_model():
    """SmolLM2 on 512 tokens of encyclopaedic prose: peaks of norm 20,000, sinks of 0.9."""
    language_model = load("smollm2-135m", device="cpu")
    ids = language_model.encode([" ".join(texts("prose-en", 8))], 512)
    model = language_model.model
    result = measure(model, ids, VARIABLES)
    reference = eager(model, input_ids=ids)
    agree(result, reference, model, torch.ones_like(ids).bool(), tolerance=1e-4)
