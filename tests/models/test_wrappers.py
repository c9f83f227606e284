"""A wrapped model is measured and cut as the model inside, or refused; never as something else."""

import copy
from functools import partial
from types import SimpleNamespace

import accelerate
import numpy as np
import peft
import pytest
import torch
from torch import distributed, nn
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    Qwen2AudioConfig,
    Qwen2AudioEncoderConfig,
    Qwen2AudioForConditionalGeneration,
    Qwen2Config,
    ViTConfig,
    ViTModel,
)

from sinkbook import measure
from sinkbook.errors import SinkbookError
from sinkbook.mitigations.eviction import eviction_losses
from sinkbook.mitigations.quantization import layer_errors, quantized, rounding_losses
from sinkbook.mitigations.sink_cache import SinkCache, streaming, streaming_losses
from sinkbook.models.interventions import zero
from sinkbook.models.losses import token_losses
from sinkbook.models.partial_forward import can_resume, given, kept, logits_of, residual_states
from sinkbook.models.wrappers import uncompiled, unwrapped
from sinkbook.probe.attention_maps import attention_weights
from sinkbook.probe.written import write_factor
from tiny import LOUD_TOKENS, SIZES, loud_llama, tiny_reader

pytestmark = pytest.mark.weights

TOKENS = LOUD_TOKENS[:2, :20]


def compiled(model: nn.Module, how: str) -> nn.Module:
    """As training scripts compile, and called once, so that there is a graph."""
    if how == "whole":
        model = torch.compile(model, backend="eager")
    elif how == "in place":
        model.compile(backend="eager")
    else:
        for layer in model.model.layers:
            layer.compile(backend="eager")
    with torch.no_grad():
        model(TOKENS, use_cache=False)
    return model


WRAPPERS = {
    "DataParallel": nn.DataParallel,
    "compiled": partial(compiled, how="whole"),
    "compiled in place": partial(compiled, how="in place"),
    "compiled by layer": partial(compiled, how="by layer"),
    "all at once": lambda model: nn.DataParallel(
        torch.compile(with_adapter(model, peft.LoraConfig(r=2, target_modules=["q_proj"])))
    ),
}


def with_adapter(model: PreTrainedModel, config: peft.PeftConfig) -> peft.PeftModel:
    """Trained, in that what is trainable is no longer what it was at first."""
    config.task_type = "CAUSAL_LM"
    tuned = peft.get_peft_model(model, config).eval()
    generator = torch.Generator().manual_seed(3)
    for parameter in tuned.parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return tuned.requires_grad_(False)


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_wrapped_model_is_measured_as_the_model_inside(wrapper):
    plain = loud_llama()
    wrapped = WRAPPERS[wrapper](copy.deepcopy(plain))
    inside = copy.deepcopy(unwrapped(wrapped))
    variables = ("sink_attention", "value_norm", "residual_norm", "head_output_norm", "loss")
    found, expected = measure(wrapped, TOKENS, variables), measure(inside, TOKENS, variables)
    for name in variables:
        assert found[name].equals(expected[name]), name
    maps = [attention_weights(model, TOKENS, layer=1) for model in (wrapped, inside)]
    torch.testing.assert_close(*maps)
    assert (token_losses(wrapped, TOKENS) == token_losses(inside, TOKENS)).all()


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_cut_in_a_wrapped_model_cuts_the_model_inside(wrapper):
    plain = loud_llama()
    wrapped = WRAPPERS[wrapper](copy.deepcopy(plain))
    inside = copy.deepcopy(unwrapped(wrapped))
    for part in ({"part": "mlp"}, {"part": "head", "head": 1}, {"part": "attention"}):
        logits = []
        for model in (wrapped, inside):
            with torch.no_grad(), zero(model, **part, layer=1):
                logits.append(model(TOKENS).logits)
        torch.testing.assert_close(*logits)
        with torch.no_grad():
            assert not torch.allclose(logits[0], inside(TOKENS).logits, atol=1e-2)


@pytest.mark.parametrize("how", ["whole", "in place", "by layer"])
def test_states_of_a_compiled_model_are_kept_and_given(how):
    plain = loud_llama()
    model = compiled(copy.deepcopy(plain), how)
    with torch.no_grad():
        with residual_states(model) as states:
            model(TOKENS)
        with kept(model) as outputs:
            whole = model(TOKENS).logits
        with given(model, outputs, below=1):
            again = model(LOUD_TOKENS[1:, :20]).logits  # other texts: only what was kept counts
    assert len(states) == 3 and len(outputs) == 2
    torch.testing.assert_close(whole, logits_of(plain, TOKENS))
    torch.testing.assert_close(again, whole)
    assert can_resume(model, TOKENS)


def test_bodies_of_two_threads_leave_compiled_models_alone_only_when_both_are_out():
    model = compiled(loud_llama(), "whole")
    kept_open, left = uncompiled(), uncompiled()
    kept_open.__enter__(), left.__enter__(), kept_open.__exit__(None, None, None)
    seen = []  # the first is out, as a thread may be that was faster: the second still counts
    hook = unwrapped(model).model.layers[0].register_forward_hook(lambda *call: seen.append(call))
    with torch.no_grad():
        model(TOKENS, use_cache=False)
        assert len(seen) == 1
        left.__exit__(None, None, None)
        model(TOKENS, use_cache=False)
    hook.remove()
    assert len(seen) == 1  # and torch runs its graph again, which knows of no hook


@pytest.fixture
def alone_in_a_group(tmp_path):
    """A process group of one, as a script that `torchrun` started finds it."""
    distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1
    )
    yield
    distributed.destroy_process_group()


def test_a_replica_of_many_is_measured_and_a_shard_of_one_refused(alone_in_a_group):
    plain = loud_llama().requires_grad_(True)
    expected = measure(plain, TOKENS)
    replica = nn.parallel.DistributedDataParallel(copy.deepcopy(plain))
    found = measure(replica, TOKENS)
    for name, values in expected.items():
        assert found[name].equals(values), name
    mesh = distributed.device_mesh.init_device_mesh("cpu", (1,))
    sharded = distributed.fsdp.fully_shard(copy.deepcopy(plain), mesh=mesh)
    with pytest.raises(SinkbookError, match="sharded over processes"):
        measure(sharded, TOKENS)


# --- PEFT ------------------------------------------------------------------------------------

LINEAR = {"target_modules": ["q_proj", "v_proj", "o_proj"]}
ADAPTERS = {
    "lora": peft.LoraConfig(r=4, **LINEAR),
    "dora": peft.LoraConfig(r=4, use_dora=True, **LINEAR),
    "adalora": peft.AdaLoraConfig(r=4, total_step=10, **LINEAR),
    "loha": peft.LoHaConfig(r=4, **LINEAR),
    "ia3": peft.IA3Config(
        target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]
    ),
    "norms": peft.LNTuningConfig(target_modules=["input_layernorm"]),
}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_adapted_layers_are_measured_as_the_wrapper_computes_and_not_without_them(kind):
    base = loud_llama()
    tuned = with_adapter(copy.deepcopy(base), copy.deepcopy(ADAPTERS[kind]))
    with torch.no_grad():
        states = tuned(TOKENS, output_hidden_states=True, use_cache=False).hidden_states
    norms = torch.stack([state.norm(dim=-1) for state in states[:-1]], 1)
    found = measure(tuned, TOKENS, ("residual_norm", "value_norm", "sink_attention"))
    torch.testing.assert_close(torch.tensor(found.residual_norm.values[:, :-1]), norms)
    without = measure(base, TOKENS, ("residual_norm",)).residual_norm
    assert abs(found.residual_norm - without).max() > 1e-2
    if kind != "norms":
        merged = copy.deepcopy(tuned).merge_and_unload()
        expected = measure(merged, TOKENS, ("value_norm", "sink_attention"))
        for name in ("value_norm", "sink_attention"):
            assert abs(found[name] / expected[name] - 1).max() < 1e-3, name


MORE_THAN_LAYERS = {
    "prompt tuning": peft.PromptTuningConfig(num_virtual_tokens=5),
    "prefix tuning": peft.PrefixTuningConfig(num_virtual_tokens=5),
    "p-tuning": peft.PromptEncoderConfig(num_virtual_tokens=5, encoder_hidden_size=16),
    "adaption prompt": peft.AdaptionPromptConfig(adapter_len=4, adapter_layers=1),
    "an adapter that some tokens switch on": peft.LoraConfig(
        r=4, alora_invocation_tokens=[7], **LINEAR
    ),
    "skills by task": peft.PolyConfig(r=4, n_tasks=2, n_skills=2, n_splits=1, **LINEAR),
}


@pytest.mark.parametrize("kind", MORE_THAN_LAYERS)
def test_a_trained_prompt_is_refused_and_not_left_out(kind):
    tuned = with_adapter(loud_llama(), copy.deepcopy(MORE_THAN_LAYERS[kind]))
    uses = [
        lambda: measure(tuned, TOKENS, ("residual_norm",)),
        lambda: attention_weights(tuned, TOKENS, layer=0),
        lambda: token_losses(tuned, TOKENS),
        lambda: zero(tuned, "mlp", layer=0).__enter__(),
        lambda: logits_of(tuned, TOKENS),
    ]
    for use in uses:
        with pytest.raises(SinkbookError, match="more than adapted layers"):
            use()


# --- Weights that are elsewhere, packed or replaced -------------------------------------------


def test_weights_that_are_not_in_memory_are_refused_by_name(tmp_path):
    offloaded = accelerate.cpu_offload(loud_llama(), execution_device=torch.device("cpu"))
    places = {"model": "cpu", "model.layers.1": "disk", "lm_head": "cpu"}
    on_disk = accelerate.dispatch_model(
        loud_llama(), places, main_device="cpu", offload_dir=str(tmp_path)
    )
    for model, name in ((offloaded, "embed_tokens"), (on_disk, "layers.1.")):
        for use in (measure, partial(attention_weights, layer=0), token_losses):
            with pytest.raises(SinkbookError, match=f"{name}.* is not in memory"):
                use(model, TOKENS)


def test_weights_that_deepspeed_has_sharded_are_refused():
    model = loud_llama()
    model.model.norm.weight.ds_id = 0  # as ZeRO-3 marks what it has taken away
    with pytest.raises(SinkbookError, match="sharded over processes"):
        measure(model, TOKENS)


def test_a_model_that_is_called_through_hooks_of_accelerate_is_measured():
    plain = loud_llama()
    hooked = copy.deepcopy(plain)
    accelerate.hooks.add_hook_to_module(hooked, accelerate.hooks.AlignDevicesHook("cpu"))
    attention = hooked.model.layers[0].self_attn
    accelerate.hooks.add_hook_to_module(attention.o_proj, accelerate.hooks.AlignDevicesHook("cpu"))
    expected = measure(plain, TOKENS)
    for name, values in measure(hooked, TOKENS).items():
        assert abs(values / expected[name] - 1).max() < 1e-4, name


def test_a_replaced_forward_counts_and_not_what_lies_under_it():
    """Of the whole model, which is then called whole, and of W_O, which is then tried out."""
    plain = loud_llama()
    louder, doubled = copy.deepcopy(plain), copy.deepcopy(plain)
    own = louder.forward
    louder.forward = lambda input_ids, **more: own(
        inputs_embeds=2 * louder.get_input_embeddings()(input_ids), **more
    )
    ratio = measure(louder, TOKENS).residual_norm / measure(plain, TOKENS).residual_norm
    assert abs(ratio.sel(residual_layer=0) - 2).max() < 1e-5
    projection = doubled.model.layers[1].self_attn.o_proj
    projection.forward = lambda states: 2 * nn.functional.linear(states, projection.weight)
    ratio = measure(doubled, TOKENS).value_norm / measure(plain, TOKENS).value_norm
    assert abs(ratio.sel(layer=1) - 2).max() < 1e-4


class BuffersOnly(nn.Module):
    """A quantised linear map, as many libraries write it: whole numbers and scales in buffers."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        scales = linear.weight.abs().amax(1, keepdim=True) / 127
        self.register_buffer("packed", (linear.weight / scales).round().to(torch.int8))
        self.register_buffer("scales", scales.detach())

    def forward(self, states):
        return nn.functional.linear(states, (self.packed * self.scales).to(states))


def test_a_quantised_projection_without_parameters_is_tried_out():
    linear, value = nn.Linear(12, 20, bias=False), torch.randn(3, 4)
    factor = write_factor(BuffersOnly(linear), 3, value)
    for head, columns in enumerate(linear.weight.split(4, dim=1)):
        exact = (columns @ value[head]).norm()
        torch.testing.assert_close((factor[head] @ value[head]).norm(), exact, rtol=0.02, atol=0)


def test_packed_weights_that_nobody_can_read_are_refused_where_they_are_asked_for():
    quantise = torch.ao.quantization.quantize_dynamic
    model = quantise(loud_llama(), {nn.Linear}, dtype=torch.qint8)
    with pytest.raises(SinkbookError, match="Leave value_norm and head_output_norm out"):
        measure(model, TOKENS)
    assert measure(model, TOKENS, ("sink_attention",)).sink_attention.notnull().all()


# --- Towers beside the text ------------------------------------------------------------------


def llava(layers: int) -> PreTrainedModel:
    tower = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        image_size=16,
        patch_size=8,
    )
    text = LlamaConfig(**SIZES, initializer_range=0.3)
    config = LlavaConfig(vision_config=tower, text_config=text, image_token_index=96)
    return LlavaForConditionalGeneration(config)


def qwen_audio(layers: int) -> PreTrainedModel:
    tower = Qwen2AudioEncoderConfig(
        d_model=32, encoder_layers=layers, encoder_attention_heads=4, encoder_ffn_dim=48
    )
    text = Qwen2Config(**SIZES, initializer_range=0.3)
    config = Qwen2AudioConfig(audio_config=tower, text_config=text, audio_token_index=96)
    return Qwen2AudioForConditionalGeneration(config)


@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("build", [llava, qwen_audio])
def test_beside_a_tower_of_any_depth_the_layers_of_the_text_are_measured_and_cut(build, layers):
    torch.manual_seed(0)
    model = build(layers).eval().requires_grad_(False)
    eager = copy.deepcopy(model).double()
    eager.set_attn_implementation("eager")
    weights = eager(TOKENS, output_attentions=True, use_cache=False).attentions
    expected = torch.stack([layer[:, :, 1:, 0].mean(-1) for layer in weights], 1).float()
    found = measure(model, TOKENS, ("sink_attention",)).sink_attention
    torch.testing.assert_close(torch.tensor(found.values), expected, atol=1e-5, rtol=0)
    whole = model(TOKENS).logits
    with zero(model, "mlp", layer=1):
        assert not torch.allclose(model(TOKENS).logits, whole, atol=1e-3)


def test_two_text_models_of_one_kind_and_depth_are_refused_and_not_chosen_from():
    model = loud_llama()
    model.draft = loud_llama().model
    with pytest.raises(SinkbookError, match="found: model.layers, draft.layers"):
        measure(model, TOKENS)


USES = {
    "measure": lambda model: measure(model, TOKENS).sink_attention.values,
    "attention_weights": lambda model: attention_weights(model, TOKENS, layer=1).numpy(),
    "token_losses": lambda model: token_losses(model, TOKENS),
    "layer_errors": lambda model: layer_errors(model, TOKENS).values,
    "eviction_losses": lambda model: eviction_losses(model, TOKENS, prompt=12, budgets=[6]).values,
    "rounding_losses": lambda model: rounding_losses(model, TOKENS).values,
    "streaming_losses": lambda model: (
        streaming_losses(model, TOKENS, window=5, sinks=[1], stride=5).values
    ),
    "SinkCache": lambda model: len(SinkCache(model, sinks=1, window=3).layers),
}
BODIES = {
    "zero": lambda model: zero(model, "mlp", layer=0),
    "quantized": quantized,
    "streaming": lambda model: streaming(model, window=4, kept=1),
}


@pytest.mark.parametrize("use", USES)
def test_what_load_returns_stands_for_its_model(use):
    reader = tiny_reader(loud_llama())
    np.testing.assert_array_equal(USES[use](reader), USES[use](reader.model))


@pytest.mark.parametrize("body", BODIES)
def test_what_load_returns_is_changed_as_its_model(body):
    reader = tiny_reader(loud_llama())
    with BODIES[body](reader):
        found = token_losses(reader, TOKENS)
    with BODIES[body](reader.model):
        np.testing.assert_array_equal(found, token_losses(reader.model, TOKENS))
    assert not np.array_equal(found, token_losses(reader.model, TOKENS))


@pytest.mark.parametrize("use", USES | BODIES)
def test_what_is_no_model_is_refused(use):
    with pytest.raises(SinkbookError, match="a SimpleNamespace is no model"):
        given = (USES | BODIES)[use](SimpleNamespace(model="gpt2"))
        given.__enter__()


def test_a_model_that_reads_no_tokens_is_refused():
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    tower = ViTModel(ViTConfig(**sizes, intermediate_size=48, image_size=16, patch_size=8))
    with pytest.raises(SinkbookError, match="ViTModel reads pixel_values and no tokens"):
        measure(tower, TOKENS)
