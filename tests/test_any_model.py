"""Any model of transformers, with any switches: right numbers or a true refusal, nothing else.

Few random models are tried in every run, always the same; `SINKBOOK_EXAMPLES=1000` tries as many,
other ones each time, of every architecture.
"""

import os

import jaxtyping
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from architectures import tiny_with
from random_models import Case, cases
from references import afresh, agree, around, eager, in_eight_bits
from sinkbook import measure
from sinkbook.errors import SinkbookError
from sinkbook.mitigations.quantization import quantized
from sinkbook.mitigations.sink_cache import SinkCache, streaming
from sinkbook.models.attention_interface import unknown
from sinkbook.models.interventions import replace, zero
from sinkbook.models.layout import layers
from sinkbook.models.partial_forward import logits_of, residual_states
from sinkbook.models.trials.heads import heads

pytestmark = pytest.mark.weights

TEXTS = torch.randint(3, 97, (3, 12), generator=torch.Generator().manual_seed(0))
SEARCHING = "SINKBOOK_EXAMPLES" in os.environ
EXAMPLES = int(os.environ.get("SINKBOOK_EXAMPLES", 0))
VARIABLES = (
    "sink_attention",
    "sink_logit",
    "attention_entropy",
    "attention_row_sum",
    "key_importance",
    "raw_value_norm",
    "value_norm",
    "head_output_norm",
    "residual_norm",
)


@pytest.fixture(autouse=True, scope="module")
def as_for_a_reader():
    """Without the types that are checked while tests run: what is refused is refused in words."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jaxtyping.config, "jaxtyping_disable", True)
        yield


def searched(few: int):
    """Few examples, the same ones each time; or as many new ones as the environment says."""
    return settings(
        max_examples=EXAMPLES or few,
        derandomize=not SEARCHING,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


def same(found: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    size = 1 + float(expected.abs().max())
    torch.testing.assert_close(found, expected, atol=tolerance * size, rtol=0)


def check_probe(case: Case, asked: int, at: int) -> str:
    """`asked` draws the queries that count and `at` the sink, if not 0."""
    model, tokens, inputs = case.model(), case.tokens(), case.inputs()
    before = logits_of(model.eval(), tokens)
    mode = [module.training for module in model.train(case.training).modules()]
    real = inputs.get("attention_mask", torch.ones_like(tokens)).bool()
    scope = {}
    if asked:
        generator = torch.Generator().manual_seed(asked)
        scope["queries"] = torch.rand(tokens.shape, generator=generator) < 0.7
    if at:
        scope["sink"] = torch.full((case.texts,), at % case.length)
    plain = model.eval()._can_set_attn_implementation() or "attention_mask" not in inputs
    try:
        with torch.no_grad():
            reference = eager(model, input_ids=tokens, **inputs) if plain else None
    except Exception:
        reference = None  # what the model itself does not do, or does not show
    model.train(case.training)
    try:
        result = measure(model, tokens, VARIABLES, **inputs, **scope)
    except SinkbookError as refusal:
        check_true(str(refusal), case, model, reference)
        return str(refusal)
    assert [module.training for module in model.modules()] == mode
    same(logits_of(model.eval(), tokens), before, 0.0)
    own = states_of(model, tokens, inputs)[real]
    norms = torch.from_numpy(result.residual_norm.transpose("batch", "position", ...).values)
    if own.isfinite().all():  # else its own attention is of padding alone
        same(norms[real].double(), own, 1e-5 if case.dtype == torch.float64 else 1e-3)
    if reference is None or not all(states.isfinite().all() for states in (reference[1],)):
        return "without reference"
    agree(result, reference, model, real, 1e-5 if case.dtype == torch.float64 else 2e-3, **scope)
    return result.attrs["route"]


def states_of(model, tokens: torch.Tensor, inputs: dict) -> torch.Tensor:
    """Norms of the residual states in the model's own implementation: (text, position, state)."""
    with residual_states(model) as states, torch.no_grad():
        model(input_ids=tokens, **inputs, use_cache=False)
    return torch.stack([state.double().norm(dim=-1) for state in states], dim=-1)


TRUE = {
    "has an encoder and a decoder": lambda case, model, found: model.config.is_encoder_decoder,
    "LM lets tokens attend to later ones": lambda case, model, found: not causal(case, model),
    "has no softmax attention, so": lambda case, model, found: not found or not found[0],
}


def causal(case: Case, model) -> bool:
    tokens = case.tokens()
    changed = tokens.clone()
    changed[:, -1] = (changed[:, -1] + 1) % 97
    one, other = (logits_of(model.eval(), given)[:, :-1] for given in (tokens, changed))
    return bool(torch.allclose(one, other, atol=1e-6))


def check_true(says: str, case: Case, model, reference) -> None:
    for part, holds in TRUE.items():
        if part in says:
            assert holds(case, model, reference), says


def check_cuts(case: Case, number: int, part: str) -> str:
    model, tokens = case.model().eval(), case.tokens()
    try:
        number %= len(layers(model))
    except SinkbookError as refusal:
        return str(refusal)
    exact = 1e-9 if case.dtype == torch.float64 else 1e-4
    width = model.config.get_text_config().hidden_size
    vectors = torch.randn(*tokens.shape, width, generator=torch.Generator().manual_seed(2))
    vectors = vectors.to(case.dtype)
    whole = logits_of(model, tokens)
    said = "cut"
    if part in ("attention", "mlp"):
        other = "mlp" if part == "attention" else "attention"
        try:
            with zero(model, other, layer=number), zero(model, part, layer=number):
                entered, left = around(model, number, tokens)
                same(left, entered, exact)
            with zero(model, other, layer=number), replace(model, part, vectors, layer=number):
                entered, left = around(model, number, tokens)
                same(left - entered, vectors, 30 * exact)
            with zero(model, other, layer=number):
                entered, left = around(model, number, tokens)
            own = left - entered
            with zero(model, other, layer=number), replace(model, part, own, layer=number):
                same(around(model, number, tokens)[1], left, 30 * exact)
            with zero(model, other, layer=number), zero(model, part, layer=number, position=0):
                entered, left = around(model, number, tokens)
                same(left - entered, own * (torch.arange(case.length) > 0)[:, None], 30 * exact)
        except SinkbookError as refusal:
            said = str(refusal)
    elif part == "residual":
        try:
            with replace(model, part, vectors, layer=number):
                same(around(model, number, tokens)[1], vectors, exact)
        except SinkbookError as refusal:
            said = str(refusal)
    else:
        said = check_head(case, model, tokens, number, part, exact)
    same(logits_of(model, tokens), whole, 0.0)
    return said


def check_head(case, model, tokens, number, part, exact) -> str:
    layer, known = layers(model)[number], heads(model)[number]
    if part == "value":
        try:
            with zero(model, "value", layer=number):
                silent = logits_of(model, tokens)
        except SinkbookError as refusal:
            return str(refusal)
        if known.no_heads:
            return "value"
        with zero(model, "head", layer=number, head=range(known.count)):
            same(silent, logits_of(model, tokens), exact)
        shared = known.count // known.values
        for head in range(known.values):
            with zero(model, "value", layer=number, head=head):
                silent = logits_of(model, tokens)
            those = range(head * shared, (head + 1) * shared)
            with zero(model, "head", layer=number, head=those):
                same(silent, logits_of(model, tokens), exact)
        return "value"
    if known.no_heads:
        with pytest.raises(SinkbookError, match="no head to replace"):
            zero(model, "head", layer=number, head=0).__enter__()
        return f"no head: {known.no_heads}"
    if not hasattr(layer.output, "weight"):
        return "head"
    weight = layer.output.weight
    weight = weight if type(layer.output).__name__ == "Conv1D" else weight.T
    for head in range(known.count):
        with zero(model, "head", layer=number, head=head):
            cut = logits_of(model, tokens)
        kept = weight.clone()
        weight.unflatten(0, (known.count, -1))[head] = 0
        same(cut, logits_of(model, tokens), exact)
        weight.copy_(kept)
    return "head"


def check_streams(case: Case, sinks: int, window: int) -> str:
    model, tokens = case.model().eval(), case.tokens()
    whole = logits_of(model, tokens)
    try:
        expected = afresh(model, tokens, sinks=sinks, window=window)
    except Exception:
        expected = None
    exact, said = 2e-5 if case.dtype == torch.float64 else 2e-3, []
    with torch.no_grad():
        try:
            cache = SinkCache(model, sinks=sinks, window=window)
            steps = [model(t, past_key_values=cache).logits for t in tokens.split(1, dim=1)]
        except SinkbookError as refusal:
            said.append(str(refusal))
        else:
            assert expected is not None
            same(torch.cat(steps, dim=1), expected, exact)
            said.append("cache")
        try:
            with streaming(model, window=window, kept=sinks):
                at_once = logits_of(model, tokens)
        except SinkbookError as refusal:
            said.append(str(refusal))
        else:
            assert expected is not None
            same(at_once, expected, exact)
            said.append("twin")
    same(logits_of(model, tokens), whole, 0.0)
    return " | ".join(said)


def check_int8(case: Case, ranges: str) -> str:
    model, tokens = case.model().eval(), case.tokens()
    exact = logits_of(model, tokens)
    try:
        with quantized(model, ranges):
            found = logits_of(model, tokens)
    except SinkbookError as refusal:
        return str(refusal)
    expected = in_eight_bits(model, tokens, ranges)
    lost = (exact - expected).norm(dim=-1)
    # A last digit may tip a number over to the next step, which later tokens then read.
    off = (found - expected).norm(dim=-1) / (lost + 1e-6 * exact.norm(dim=-1))
    assert off.median() < 0.05, f"{off}"
    same(logits_of(model, tokens), exact, 0.0)
    return "int8"


@searched(few=24)
@given(case=cases(), asked=st.integers(0, 3), at=st.sampled_from([0, 0, 1, 4]))
def test_the_probe_measures_what_eager_attention_does_or_says_why_not(case, asked, at):
    check_probe(case, asked, at)


PARTS = st.sampled_from(["attention", "mlp", "residual", "head", "value"])


@searched(few=24)
@given(case=cases(whole=True), number=st.integers(0, 2), part=PARTS)
def test_cuts_do_what_they_say_or_say_why_not(case, number, part):
    check_cuts(case, number, part)


@searched(few=16)
@given(case=cases(whole=True), sinks=st.integers(0, 3), window=st.integers(1, 6))
def test_streams_are_texts_read_afresh_or_are_refused(case, sinks, window):
    check_streams(case, sinks, window)


@searched(few=16)
@given(case=cases(whole=True), ranges=st.sampled_from(["tensor", "token"]))
def test_eight_bits_are_those_of_each_text_by_itself_or_are_refused(case, ranges):
    check_int8(case, ranges)


# --- What the search has found ---------------------------------------------------------------


def test_as_many_texts_as_they_have_tokens_are_measured_as_each_alone():
    model, tokens = tiny_with("llama"), TEXTS[:, :3]
    together = measure(model, tokens, VARIABLES)
    for row, text in enumerate(tokens.split(1)):
        alone = measure(model, text, VARIABLES)
        for name in VARIABLES:
            one, other = (torch.from_numpy(x[name].values) for x in (together, alone))
            torch.testing.assert_close(one[row], other[0], equal_nan=True)


def test_attention_that_is_given_what_sinkbook_does_not_know_is_refused():
    model, tokens = tiny_with("inkling2_text"), TEXTS[:2]
    with pytest.raises(SinkbookError, match="hands its attention function sinks"):
        measure(model, tokens)
    for name, given_ in (("sinks", torch.ones(2)), ("temperature", 0.5)):
        assert unknown({name: given_, "dropout": 0.0, "sliding_window": 4}) == [name]


def test_linear_maps_that_layers_do_not_call_are_exact_or_refused():
    model, tokens = tiny_with("jamba").requires_grad_(False), TEXTS[:2]
    with pytest.raises(SinkbookError, match="weights of layers.0..mamba.dt_proj without calling"):
        quantized(model, "token").__enter__()
    with quantized(model, None):
        assert logits_of(model, tokens).isfinite().all()


def test_latent_attention_is_rounded_text_by_text():
    model, tokens = tiny_with("deepseek_v3").double().requires_grad_(False), TEXTS
    exact = logits_of(model, tokens)
    for ranges in ("tensor", "token"):
        with quantized(model, ranges):
            found = logits_of(model, tokens)
        same(found, in_eight_bits(model, tokens, ranges), 1e-3)
        assert not torch.equal(found, exact)
