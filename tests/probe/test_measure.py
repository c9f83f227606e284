"""The probe against plain formulas: toys, masks of every form, definitions, and its promises."""

from functools import partial

import numpy as np
import pytest
import torch
import xarray as xr
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from sinkbook import measure, probe
from sinkbook.errors import SinkbookError
from sinkbook.probe import explicit, fused
from sinkbook.probe.masks import Scope, causal_spans, find_spans
from sinkbook.probe.written import write_factor
from sinkbook.toy.transformer import Transformer, TransformerConfig
from tiny import BOS, WORDS, tiny_model, tiny_reader

NAN = float("nan")
# Logits with a soft cap, which no fused kernel knows.
tiny_gemma2 = partial(tiny_model, "gemma2", head_dim=8, layer_types=["full_attention"] * 2)


@pytest.fixture
def toy() -> Transformer:
    torch.manual_seed(0)
    config = TransformerConfig(vocab_size=11, length=32, width=16, layers=2, heads=2)
    return Transformer(config)


@pytest.fixture
def relu_toy() -> Transformer:
    torch.manual_seed(0)
    config = TransformerConfig(vocab_size=11, length=32, width=16, heads=2, attention="relu")
    return Transformer(config)


@pytest.fixture
def tokens():
    return torch.randint(11, (3, 32), generator=torch.Generator().manual_seed(1))


def first_layer(model: Transformer, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """What the first layer computes, in the plainest way: (batch, head, query, key) and so on."""
    block = model.layers[0]
    x = model.token_embedding(tokens) + model.position_embedding.weight[: tokens.shape[1]]
    normed = block.attention_norm(x)
    query, key, value = (
        w(normed).unflatten(-1, (2, 8)).transpose(1, 2)
        for w in (block.attention.wq, block.attention.wk, block.attention.wv)
    )
    scores = query @ key.mT / 8**0.5
    causal = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    written = block.attention.wo.weight.T.unflatten(0, (2, 8))  # (head, head width, width)
    states = {"embedding": x, "scores": scores, "causal": causal}
    return states | {"value": value, "write": value @ written, "written": written}


def close(measured: xr.DataArray, expected: torch.Tensor) -> None:
    np.testing.assert_allclose(measured.values, expected.detach().numpy(), rtol=1e-5, atol=1e-5)


def test_a_toy_is_measured_as_the_definitions_say(toy, tokens):
    result = measure(toy, tokens, tuple(probe.VARIABLES)).isel(layer=0)
    plain = first_layer(toy, tokens)
    weights = plain["scores"].masked_fill(~plain["causal"], -torch.inf).softmax(-1)
    later = slice(1, None)
    close(result.sink_attention, weights[:, :, later, 0].mean(-1))
    close(result.sink_attention_by_query[..., later], weights[:, :, later, 0])
    others = plain["scores"].masked_fill(~plain["causal"], NAN)[..., 1:].nanmean(-1)
    contrast = (plain["scores"][..., 0] - others)[..., later]
    close(result.sink_logit, contrast.mean(-1))
    close(result.sink_logit_by_query[..., later], contrast)
    close(result.attention_entropy, torch.special.entr(weights).sum(-1).mean(-1))
    close(result.attention_row_sum, torch.ones(3, 2))
    seen = torch.arange(32, 0, -1)
    close(result.key_importance, weights.sum(2) / seen)
    even = plain["causal"] / torch.arange(1, 33)[:, None]
    close(result.even_importance, (even.sum(0) / seen).expand(3, 2, 32))
    close(result.value_norm, plain["write"].norm(dim=-1))
    close(result.raw_value_norm, plain["value"].norm(dim=-1))
    close(result.head_output_norm, (weights @ plain["write"]).norm(dim=-1).mean(-1))
    close(result.residual_norm.sel(residual_layer=0), plain["embedding"].norm(dim=-1))
    close(result.residual_max_abs.sel(residual_layer=0), plain["embedding"].abs().amax(-1))
    assert result.attrs["route"] == "fused"


def test_the_residual_state_has_one_more_layer_than_attention(toy, tokens):
    states = []
    hooks = [
        block.register_forward_hook(lambda _m, _i, x: states.append(x)) for block in toy.layers
    ]
    result = measure(toy, tokens)
    for hook in hooks:
        hook.remove()
    assert result.sizes["layer"] == 2
    close(result.residual_norm.isel(residual_layer=[1, 2]), torch.stack(states, 1).norm(dim=-1))


def test_the_loss_is_the_models_own(toy, tokens):
    expected = nn.functional.cross_entropy(
        toy(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="none"
    )
    close(measure(toy, tokens, ("loss",)).loss, expected.unflatten(0, (3, 31)).mean(1))


def test_an_unnormalised_kernel_is_measured_by_its_own_weights(relu_toy, toy, tokens):
    result = measure(relu_toy, tokens, tuple(probe.VARIABLES)).isel(layer=0)
    plain = first_layer(relu_toy, tokens)
    count = torch.arange(1, 33)[:, None]
    weights = plain["scores"].relu() / count * plain["causal"]
    close(result.sink_attention, weights[:, :, 1:, 0].mean(-1))
    close(result.attention_row_sum, weights.sum(-1).mean(-1))
    close(result.key_importance, weights.sum(2) / torch.arange(32, 0, -1))
    even = measure(toy, tokens, ("even_importance",)).even_importance.isel(layer=0)
    close(result.even_importance, torch.as_tensor(even.values))
    close(result.head_output_norm, (weights @ plain["write"]).norm(dim=-1).mean(-1))
    shares = weights / weights.sum(-1, keepdim=True)
    close(result.attention_entropy, torch.special.entr(shares).sum(-1).nanmean(-1))
    assert result.attrs["route"] == "chunked"


def test_queries_restrict_the_means_and_not_what_a_query_sees(toy, tokens):
    chosen = torch.zeros(3, 32, dtype=torch.bool)
    chosen[:, [0, 5, 9]] = True
    names = ("sink_attention", "sink_attention_by_query", "attention_entropy", "key_importance")
    some = measure(toy, tokens, names, queries=chosen)
    every = measure(toy, tokens, names)
    np.testing.assert_allclose(
        some.sink_attention,
        every.sink_attention_by_query.isel(position=[5, 9]).mean("position"),
        rtol=1e-5,
    )
    assert some.sink_attention_by_query.notnull().sum() == 2 * 3 * 2 * 2
    weights = first_layer(toy, tokens)
    weights = weights["scores"].masked_fill(~weights["causal"], -torch.inf).softmax(-1)
    received = weights[:, :, [0, 5, 9]].sum(2) / torch.tensor([3] + [2] * 5 + [1] * 4 + [0] * 22)
    close(some.key_importance.isel(layer=0), received)
    assert some.key_importance.isel(position=slice(10, None)).isnull().all()
    seldom = measure(toy, tokens, ("even_importance",), queries=chosen).even_importance
    np.testing.assert_allclose(seldom.isel(position=0), (1 + 1 / 6 + 1 / 10) / 3, rtol=1e-6)
    assert seldom.isel(position=slice(10, None)).isnull().all()


def test_the_sink_can_be_any_position(toy, tokens):
    plain = first_layer(toy, tokens)
    weights = plain["scores"].masked_fill(~plain["causal"], -torch.inf).softmax(-1)
    result = measure(toy, tokens, sink=torch.tensor([0, 4, 7]))
    for row, position in enumerate((0, 4, 7)):
        expected = weights[row, :, position + 1 :, position].mean(-1)
        close(result.sink_attention.isel(layer=0, batch=row), expected)
    assert result.sink.values.tolist() == [0, 4, 7]
    same = measure(toy, tokens, sink=4).isel(batch=1)
    np.testing.assert_array_equal(same.sink_attention, result.sink_attention.isel(batch=1))


def test_one_token_has_no_query_after_its_sink(toy):
    result = measure(toy, torch.tensor([[3]]))
    assert result.sink_attention.isnull().all() and result.sink_logit.isnull().all()
    assert result.value_norm.notnull().all()


def test_layers_without_attention_are_blank(tokens):
    torch.manual_seed(0)
    config = TransformerConfig(vocab_size=11, length=32, width=16, layers=3, without_attention=(1,))
    result = measure(Transformer(config), tokens)
    assert result.sink_attention.isnull().any(("batch", "head")).values.tolist() == [0, 1, 0]
    assert result.residual_norm.notnull().all()


def masks(length: int) -> dict[str, torch.Tensor]:
    """What two texts' queries see, in every form that masks take: (batch, 1, query, key)."""
    query, key = torch.arange(length)[:, None], torch.arange(length)
    causal = (key <= query).expand(2, -1, -1)
    left = causal & (key >= torch.tensor([0, 5])[:, None, None])
    right = causal & (key < torch.tensor([length, length - 6])[:, None, None])
    document = torch.tensor([[0] * 9 + [1] * (length - 9), [0] * 4 + [1] * 8 + [2] * (length - 12)])
    packed = causal & (document[:, :, None] == document[:, None, :])
    streaming = causal & ((key < 2) | (key > query - 6))
    forms = {"causal": causal, "left": left, "right": right, "window": causal & (key > query - 7)}
    forms |= {"left window": left & (key > query - 7), "packed": packed}
    forms |= {"chunks": causal & (key // 8 == query // 8), "sinks and window": streaming}
    return {name: mask[:, None] for name, mask in forms.items()}


@pytest.mark.parametrize("form", masks(24))
@pytest.mark.parametrize("groups", [1, 3])
def test_log_sum_exp_reads_the_same_as_formed_weights(form, groups, monkeypatch):
    for module in ("fused", "masks"):
        monkeypatch.setattr(f"sinkbook.probe.{module}.ROWS", 7)  # several calls, the last one short
    monkeypatch.setattr(explicit, "ENTRIES", 7 * 2 * 6 * 24)
    torch.manual_seed(0)
    visible = masks(24)[form]
    real = visible[:, 0].diagonal(dim1=1, dim2=2)
    query = 4 * torch.randn(2, 6, 24, 8)
    key, value = 2 * torch.randn(2, 6 // groups, 24, 8), torch.randn(2, 6 // groups, 24, 5)
    scope = Scope(real.to(torch.uint8).argmax(1), real, real, frozenset(probe.VARIABLES))
    spans = find_spans(visible, real)
    if form == "sinks and window":
        assert spans is None  # the visible keys have a gap
        return
    learned_sink = torch.randn(6)
    output, reading = fused.read_fused(query, key, value, 0.3, spans, scope, learned_sink)
    rows = explicit.softmax_rows(query, key, 0.3, visible, learned_sink=learned_sink)
    expected_output, expected = explicit.read_formed(rows, value, scope)
    counted = real[:, None, :, None]
    torch.testing.assert_close(output * counted, expected_output * counted, atol=1e-5, rtol=1e-5)
    for name, values in reading.items():
        if name == "key_importance":
            values, expected[name] = values * real[:, None], expected[name] * real[:, None]
        torch.testing.assert_close(values, expected[name], equal_nan=True, atol=1e-5, rtol=1e-5)


def test_extreme_logits_stay_exact():
    torch.manual_seed(0)
    real = torch.ones(1, 40, dtype=torch.bool)
    scope = Scope(torch.tensor([0]), real, real, frozenset(probe.VARIABLES))
    query, key = 10 * torch.randn(1, 2, 40, 16), 10 * torch.randn(1, 2, 40, 16)
    key[:, :, 0] *= 10  # a sink whose logits are in the thousands
    spans = causal_spans(real)
    _, reading = fused.read_fused(query, key, key, 0.25, spans, scope)
    rows = explicit.softmax_rows(query.double(), key.double(), 0.25, spans)
    expected = explicit.read_rows(rows, scope)
    for name in ("sink_attention_by_query", "attention_entropy", "key_importance"):
        torch.testing.assert_close(
            reading[name], expected[name].float(), equal_nan=True, atol=1e-4, rtol=1e-3
        )


def test_a_drained_value_keeps_its_digits():
    """A value that W_O all but cancels: squaring W_O would leave noise of 1e-4 in its place."""
    torch.manual_seed(0)
    basis = torch.linalg.qr(torch.randn(64, 8)).Q.double()
    stretch = torch.logspace(0, -6, 8).double()
    rotation = torch.linalg.qr(torch.randn(8, 8)).Q.double()
    projection = nn.Linear(8, 64, bias=False)
    projection.weight.data = (basis * stretch @ rotation).float()
    value = rotation[-1].float()  # the direction that is written a million times weaker
    factor = write_factor(projection, 1, value)[0]
    exact = (projection.weight.double() @ value.double()).norm()
    torch.testing.assert_close((factor @ value).norm().double(), exact, rtol=0.2, atol=0)


def test_a_projection_that_hides_its_weights_is_tried_on_unit_vectors():
    class Adapted(nn.Module):
        def __init__(self):
            super().__init__()
            self.base, self.update = nn.Linear(12, 20), nn.Linear(12, 20, bias=False)

        def forward(self, states):
            return self.base(states) + self.update(states)

    adapted, plain = Adapted(), nn.Linear(12, 20)
    plain.weight.data = adapted.base.weight.data + adapted.update.weight.data
    value = torch.randn(3, 4)
    with torch.no_grad():
        norms = [
            (write_factor(module, 3, value) @ value[..., None]).norm(dim=1)
            for module in (adapted, plain)
        ]
    torch.testing.assert_close(*norms)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("widths", [(64, 64), (65, 65), (24, 16)])
def test_kernels_of_other_devices_are_asked_in_shapes_that_they_take(dtype, masked, widths):
    query = torch.empty(2, 4, 50, widths[0], device="meta", dtype=dtype)
    key, value = (torch.empty(2, 2, 50, width, device="meta", dtype=dtype) for width in widths)
    bias = torch.empty(2, 1, 50, 50, device="meta", dtype=dtype) if masked else None
    output, lse = fused._fused(query, key, value, bias, 0.1)
    assert output.shape == (2, 4, 50, widths[1]) and lse.shape == (2, 4, 50)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)])
def test_cuda_agrees_with_the_cpu(dtype, tolerance):
    model = tiny_model()
    ids = torch.randint(97, (2, 50))
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    names = tuple(set(probe.VARIABLES) - {"loss"})
    on_cpu = measure(model, ids, names, attention_mask=mask)
    on_gpu = measure(model.to("cuda", dtype), ids, names, attention_mask=mask)
    for name in names:
        np.testing.assert_allclose(on_gpu[name], on_cpu[name], rtol=tolerance, atol=tolerance)


class LargestTensor(TorchDispatchMode):
    """Remembers the largest tensor that any operation returned."""

    entries = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for part in result if isinstance(result, tuple | list) else (result,):
            if torch.is_tensor(part):
                self.entries = max(self.entries, part.numel())
        return result


@pytest.mark.parametrize("make", [tiny_model, tiny_gemma2])
def test_no_matrix_of_attention_is_ever_formed(make, monkeypatch):
    monkeypatch.setattr(explicit, "ENTRIES", 2**16)
    model, names = make(), tuple(probe.VARIABLES)
    sizes = []
    for length in (512, 1024):
        with LargestTensor() as largest:
            measure(model, torch.zeros(1, length, dtype=torch.long), names)
        sizes.append(largest.entries)
    assert sizes[1] < 1024**2 / 4
    assert sizes[1] <= 2.1 * sizes[0]  # linear in T


def test_the_probe_leaves_no_trace():
    model = tiny_model()
    model.train()
    model.lm_head.eval()
    ids = torch.randint(97, (2, 20))
    with torch.no_grad():
        before = model(ids).logits
    measure(model, ids)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, before)
    assert model.config._attn_implementation == "sdpa"
    assert model.training and model.model.layers[0].training and not model.lm_head.training
    hooks = [h for m in model.modules() for h in (*m._forward_hooks, *m._forward_pre_hooks)]
    assert not hooks


@pytest.mark.parametrize("make", [tiny_model, lambda: Transformer(TransformerConfig(width=16))])
def test_a_model_is_put_back_after_an_exception(make):
    model = make()
    last = [module for module in model.modules() if isinstance(module, nn.ModuleList)][0][-1]
    attention = {
        name: vars(module).get("attention_function") for name, module in model.named_modules()
    }

    def interrupt(*_):
        raise KeyboardInterrupt

    hook = last.register_forward_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        measure(model, torch.randint(60, (1, 8)))
    hook.remove()
    assert attention == {
        name: vars(module).get("attention_function") for name, module in model.named_modules()
    }
    assert getattr(model.config, "_attn_implementation", "sdpa") == "sdpa"
    measure(model, torch.randint(60, (1, 8)))


def test_measuring_while_measuring_keeps_the_two_apart(toy, tokens):
    inner = []
    model = tiny_model()
    ids = torch.randint(97, (1, 12))
    hook = toy.layers[0].register_forward_hook(lambda *_: inner.append(measure(model, ids)))
    outer = measure(toy, tokens)
    hook.remove()
    xr.testing.assert_equal(outer, measure(toy, tokens))
    xr.testing.assert_equal(inner[0], measure(model, ids))


def test_the_order_of_texts_does_not_matter(toy, tokens):
    order = [2, 0, 1]
    shuffled = measure(toy, tokens[order]).assign_coords(batch=order).sortby("batch")
    xr.testing.assert_allclose(shuffled, measure(toy, tokens), rtol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing_but_the_blanks(side):
    model, names = tiny_model(), tuple(probe.VARIABLES)
    text = torch.randint(3, 97, (1, 14))
    padding = torch.zeros(1, 5, dtype=torch.long)
    parts = [padding, text] if side == "left" else [text, padding]
    mask = torch.cat([torch.full_like(part, part is text) for part in parts], dim=1)
    padded = measure(model, torch.cat(parts, dim=1), names, attention_mask=mask)
    alone = measure(model, text, names)
    start = 5 if side == "left" else 0
    assert padded.sink.item() == start
    within = padded.isel(position=slice(start, start + 14)).assign_coords(position=alone.position)
    xr.testing.assert_allclose(within.drop_vars("sink"), alone.drop_vars("sink"), atol=1e-5)
    outside = padded.drop_sel(position=range(start, start + 14))
    assert outside.key_importance.isnull().all() and outside.residual_norm.isnull().all()


def test_packed_documents_count_only_where_the_sink_is_seen():
    model = tiny_model()
    first, second = torch.randint(3, 97, (1, 9)), torch.randint(3, 97, (1, 11))
    positions = torch.cat([torch.arange(9), torch.arange(11)])[None]
    packed = measure(model, torch.cat([first, second], 1), position_ids=positions)
    alone = measure(model, first)
    np.testing.assert_allclose(packed.sink_attention, alone.sink_attention, atol=1e-6)
    np.testing.assert_allclose(packed.sink_logit, alone.sink_logit, atol=1e-5)
    other = measure(model, torch.cat([first, second], 1), position_ids=positions, sink=9)
    np.testing.assert_allclose(
        other.sink_attention, measure(model, second).sink_attention, atol=1e-6
    )


def test_a_mask_over_pairs_is_followed():
    """A streaming cache as a mask: two sinks and a window, which are no neighbours."""
    model, ids = tiny_model(), torch.randint(97, (1, 24))
    streaming = masks(24)["sinks and window"][:1]
    result = measure(model, ids, ("sink_attention", "key_importance"), attention_mask=streaming)
    assert result.attrs["route"] == "chunked"
    additive = torch.zeros(1, 1, 24, 24).masked_fill(~streaming, torch.finfo(torch.float32).min)
    same = measure(model, ids, ("sink_attention", "key_importance"), attention_mask=additive)
    xr.testing.assert_allclose(result, same)
    dense = measure(model, ids, ("key_importance",)).key_importance.isel(layer=0, position=5)
    assert not np.allclose(dense, result.key_importance.isel(layer=0, position=5))


def test_results_go_to_a_file_and_back(toy, tokens, tmp_path):
    result = measure(toy, tokens, tuple(probe.VARIABLES))
    result.to_netcdf(tmp_path / "result.nc", engine="h5netcdf")
    with xr.open_dataset(tmp_path / "result.nc", engine="h5netcdf") as stored:
        xr.testing.assert_identical(stored.load(), result)


def test_texts_of_any_length_come_back_in_their_order():
    language_model = tiny_reader(tiny_model())
    texts = ["to be or not to be or not", "the", "be the or not to be to be " * 4, "or not"]
    result = probe.measure_texts(language_model, texts, length=24, batch_size=2)
    assert result.batch.values.tolist() == [0, 1, 2, 3] and result.attrs["model"] == "tiny"
    for row, text in enumerate(texts):
        words = text.split()[:23]
        ids = language_model.encode([text], len(words) + 1)
        assert ids[0].tolist() == [BOS, *map(WORDS.index, words)]
        alone, found = measure(language_model.model, ids), result.isel(batch=row)
        np.testing.assert_allclose(found.sink_attention, alone.sink_attention[0], atol=1e-6)
        size = ids.shape[1]
        np.testing.assert_allclose(
            found.value_norm[..., :size], alone.value_norm[0], rtol=1e-5, atol=1e-6
        )
        assert found.value_norm[..., size:].isnull().all()
    with pytest.raises(SinkbookError, match="there are no texts"):
        probe.measure_texts(language_model, [])
    for reader in (language_model, tiny_reader(tiny_model(), adds_bos=False)):
        with pytest.raises(SinkbookError, match="text number 1 holds no token"):
            probe.measure_texts(reader, ["the", ""])


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"variables": ("sink_atention",)}, "no variable 'sink_atention'. Known: sink_attention"),
        ({"sink": 12}, "no position 12 in a text of 12 tokens"),
        ({"attention_mask": torch.ones(1, 9)}, r"shape \(1, 9\)"),
        ({"attention_mask": torch.zeros(1, 12)}, "all padding"),
    ],
)
def test_what_does_not_fit_is_named(arguments, message):
    with pytest.raises(SinkbookError, match=message):
        measure(tiny_model(), torch.zeros(1, 12, dtype=torch.long), **arguments)


def test_tokens_that_the_model_does_not_have_are_named():
    with pytest.raises(SinkbookError, match="token ids go from 200 to 200"):
        measure(tiny_model(), torch.full((1, 4), 200))


def test_toys_take_padding_only_after_the_text(toy, tokens):
    mask = torch.ones_like(tokens)
    mask[0, :3] = 0
    with pytest.raises(SinkbookError, match="after the text"):
        measure(toy, tokens, attention_mask=mask)
    padded = measure(toy, tokens, attention_mask=mask.flip(1))
    alone = measure(toy, tokens[:, :29])
    np.testing.assert_allclose(padded.sink_attention[0], alone.sink_attention[0], rtol=1e-5)


@pytest.fixture
def extreme() -> xr.Dataset:
    """Two texts, two layers of one head, four tokens; the sink is token 0 and token 1."""
    values = np.array([[1, 4, 4, 4], [4, 2, 4, NAN]])[:, None, None].repeat(2, 1)
    norms = np.array([[90, 1, 3, 5], [2, 40, 2, NAN]])[:, None].repeat(3, 1)
    attention = np.array([[[0.9], [0.2]], [[0.4], [NAN]]])
    head = ("batch", "layer", "head")
    return xr.Dataset(
        {
            "sink_attention": (head, attention),
            "value_norm": ((*head, "position"), values),
            "residual_norm": (("batch", "residual_layer", "position"), norms),
        },
        coords={"sink": ("batch", [0, 1]), "position": range(4)},
    )


def test_phenomena_are_told_from_norms_and_attention(extreme):
    np.testing.assert_array_equal(probe.sink_rate(extreme), [[1, 0], [1, NAN]])
    np.testing.assert_array_equal(probe.sink_rate(extreme, 0.5), [[1, 0], [0, NAN]])
    assert float(probe.sink_rate(extreme).mean()) == pytest.approx(2 / 3)
    np.testing.assert_array_equal(probe.value_drain_ratio(extreme)[:, 0, 0], [0.25, 0.5])
    np.testing.assert_array_equal(probe.residual_peak_ratio(extreme)[:, 0], [30, 20])
    np.testing.assert_array_equal(probe.residual_peak_height(extreme)[:, 0], [87, 38])
    others = xr.DataArray([[1, 1, 0, 0], [1, 1, 0, 1]], dims=("batch", "position")) == 1
    np.testing.assert_array_equal(probe.residual_peak_ratio(extreme, others)[:, 0], [90, 20])


def by_matrices(weights: torch.Tensor) -> xr.Dataset:
    """What `measure` finds of given attention, (batch, layer, head, query, key)."""
    length = weights.shape[-1]
    seen = torch.arange(length, 0, -1)
    even = torch.ones(length, length).tril() / torch.arange(1, length + 1)[:, None]
    dims = ("batch", "layer", "head", "position")
    received = weights.sum(-2) / seen
    spread = (even.sum(0) / seen).expand_as(received)
    return xr.Dataset(
        {"key_importance": (dims, received.numpy()), "even_importance": (dims, spread.numpy())},
        coords={"sink": ("batch", [0] * len(weights)), "position": range(length)},
    )


def test_a_planted_sink_is_above_the_null_and_even_local_or_sharp_attention_is_not():
    length, generator = 64, torch.Generator().manual_seed(0)
    even = torch.ones(length, length).tril()
    sharp = (8 * torch.rand(2, 8, length, length, generator=generator)).exp() * even
    even, sharp = (rows / rows.sum(-1, keepdim=True) for rows in (even, sharp))
    layers = {"even": even.expand(2, 8, length, length), "sharp": sharp}
    layers["local"] = torch.eye(length).expand(2, 8, length, length)
    planted = sharp.clone()
    planted[:, 3] *= 0.8
    planted[:, 3, :, 0] += 0.2  # less than the usual 0.3
    layers["planted"] = planted
    found = probe.above_null(by_matrices(torch.stack(list(layers.values()), 1)))
    for number, name in enumerate(layers):
        rate = found.isel(layer=number).mean("batch")
        if name == "planted":
            assert rate[3] == 1 and rate.drop_isel(head=3).mean() <= 0.15
        else:
            assert rate.mean() <= (0.15 if name == "sharp" else 0)


@pytest.mark.parametrize("changes", [{}, {"sliding_window": 8}])
def test_heads_that_look_at_all_they_see_alike_are_never_above_the_null(changes):
    model = tiny_model("mistral" if changes else "llama", **changes)
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight.data.zero_()
    tokens = torch.randint(0, 97, (3, 48), generator=torch.Generator().manual_seed(0))
    names = ("key_importance", "even_importance")
    mask = torch.ones_like(tokens)
    mask[1, :7], mask[2, 40:] = 0, 0
    result = measure(model, tokens, names, attention_mask=mask)
    np.testing.assert_allclose(result.key_importance, result.even_importance, rtol=1e-4)
    assert (probe.above_null(result) == 0).all()


def test_layers_without_attention_have_no_null():
    weights = torch.ones(1, 2, 2, 16, 16).tril() / torch.arange(1, 17)[:, None]
    weights[:, 1] = NAN
    found = probe.above_null(by_matrices(weights))
    assert (found.isel(layer=0) == 0).all() and found.isel(layer=1).isnull().all()


def test_massive_activations_are_large_and_stand_out():
    hidden = torch.full((2, 5, 8), 0.05)
    hidden[0, 0, 3], hidden[0, 2, 1], hidden[1] = -120, 60, 150
    assert probe.massive_activations(hidden).nonzero().tolist() == [[0, 0, 3]]


def test_the_three_kurtoses_answer_different_questions():
    torch.manual_seed(0)
    gaussian = torch.randn(1, 512, 256)
    assert probe.kurtosis_of_text(gaussian).item() == pytest.approx(3, abs=0.1)
    assert probe.kurtosis_of_tokens(gaussian).mean().item() == pytest.approx(3, abs=0.1)
    assert probe.kurtosis_of_dimensions(gaussian).item() == pytest.approx(1, abs=0.05)
    token = gaussian.clone()
    token[0, 0] *= 100  # one large token: no entry stands out within it, no dimension among others
    assert probe.kurtosis_of_text(token).item() > 100
    assert probe.kurtosis_of_tokens(token).max().item() < 6
    assert probe.kurtosis_of_dimensions(token).item() < 4
    dimension = gaussian.clone()
    dimension[:, :, 7] *= 100
    assert probe.kurtosis_of_text(dimension).item() > 100
    assert probe.kurtosis_of_tokens(dimension).median().item() > 100
    assert probe.kurtosis_of_dimensions(dimension).item() > 100


def test_as_many_texts_as_tokens_are_measured_as_one_by_one():
    model = tiny_model(vocab_size=11).requires_grad_(False)  # which nothing has been tried on
    tokens = torch.randint(11, (8, 8), generator=torch.Generator().manual_seed(1))
    together = measure(model, tokens, ("sink_attention", "residual_norm"))
    for number, text in enumerate(tokens):
        alone = measure(model, text[None], ("sink_attention", "residual_norm"))
        for name in alone:
            close(together[name][number], torch.tensor(alone[name][0].values))
