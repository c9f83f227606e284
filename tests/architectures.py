"""A tiny random model of each architecture of transformers, for tests of what holds for all."""

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

# Small sizes under all the names that configurations give them.
TINY = {
    **{"vocab_size": 97, "max_position_embeddings": 64, "n_positions": 64, "n_ctx": 64},
    **{"max_target_positions": 64, "max_source_positions": 64},
    **{"hidden_size": 32, "n_embd": 32, "d_model": 32, "word_embed_proj_dim": 32},
    **{"num_hidden_layers": 2, "n_layer": 2, "n_layers": 2, "num_layers": 2, "decoder_layers": 2},
    **{"num_attention_heads": 4, "n_head": 4, "n_heads": 4, "decoder_attention_heads": 4},
    **{"num_heads": 4, "attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8},
    **{"intermediate_size": 48, "ffn_dim": 48, "decoder_ffn_dim": 48, "dff": 48},
    **{"ffn_hidden_size": 48, "moe_intermediate_size": 16, "expert_ffn_hidden_size": 16},
    **{"num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4},
    **{"num_experts_per_tok": 2, "moe_k": 2, "moe_topk": 2, "n_shared_experts": 1, "n_group": 1},
    **{"topk_group": 1, "first_k_dense_replace": 1, "shared_expert_intermediate_size": 16},
    **{"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8},
    **{"v_head_dim": 12, "index_topk": 4, "index_n_heads": 2, "index_head_dim": 16},
    **{"sliding_window": 8, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    **{"is_decoder": True, "mamba_d_state": 8, "mamba_n_heads": 4, "mamba_d_head": 16},
    **{"mamba_n_groups": 1, "rotary_dim": 4},
}

LATENT = {"num_key_value_heads": 4}  # latent attention shares a code, not heads
# Each architecture with what its tiny model needs beyond TINY.
ARCHITECTURES: dict[str, dict] = {
    **dict.fromkeys(["apertus", "arcee", "bart", "bert", "biogpt", "bitnet", "bloom"], {}),
    **dict.fromkeys(["codegen", "cohere", "cohere2", "ctrl", "doge", "dots1", "electra"], {}),
    **dict.fromkeys(["ernie4_5", "exaone4", "falcon", "flex_olmo", "gemma", "gemma2"], {}),
    **dict.fromkeys(["gemma3_text", "glm", "glm4", "glm4_moe", "gpt2", "gpt_bigcode"], {}),
    **dict.fromkeys(["gpt_neox", "gpt_neox_japanese", "gpt_oss", "gptj", "granite"], {}),
    **dict.fromkeys(["granitemoe", "helium", "hunyuan_v1_dense", "inkling_text", "lfm2"], {}),
    **dict.fromkeys(["llama", "llama4_text", "mbart", "megatron-bert", "mimo_v2_flash"], {}),
    **dict.fromkeys(["minimax", "ministral", "mistral", "mixtral", "moshi", "mpt"], {}),
    **dict.fromkeys(["nanochat", "nemotron", "olmo", "olmo2", "olmo3", "olmoe"], {}),
    **dict.fromkeys(["openai-gpt", "opt", "persimmon", "phi", "phi3", "phimoe", "qwen2"], {}),
    **dict.fromkeys(["qwen2_moe", "qwen3", "qwen3_moe", "qwen3_next", "rembert"], {}),
    **dict.fromkeys(["roberta", "roformer", "seed_oss", "smollm3", "stablelm"], {}),
    **dict.fromkeys(["starcoder2", "trocr", "vaultgemma", "xglm"], {}),
    **dict.fromkeys(["deepseek_v2", "deepseek_v3", "deepseek_v32", "minicpm3"], LATENT),
    "bamba": {"attn_layer_indices": [1]},
    "gemma4_text": {
        **{"global_head_dim": 16, "num_kv_shared_layers": 0, "hidden_size_per_layer_input": 8},
        **{"layer_types": ["sliding_attention", "full_attention"]},
        "vocab_size_per_layer_input": 97,
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 8},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "jamba": {"attn_layer_offset": 1, "attn_layer_period": 2, "expert_layer_offset": 1},
}

# Beside these, what transformers loads as a causal language model: for the long search.
OTHERS: dict[str, dict] = {
    **dict.fromkeys(["afmoe", "aria_text", "beam", "bert-generation", "big_bird"], {}),
    **dict.fromkeys(["bigbird_pegasus", "blenderbot", "blenderbot-small", "camembert"], {}),
    **dict.fromkeys(["cohere2_moe", "cpmant", "cwm", "data2vec-text", "deepseek_v4"], {}),
    **dict.fromkeys(["diffllama", "ernie", "ernie4_5_moe", "exaone_moe", "falcon_mamba"], {}),
    **dict.fromkeys(["flint", "gemma4_unified_text", "gpt-sw3", "granite_swa"], {}),
    **dict.fromkeys(["granitemoe_swa", "granitemoeshared", "hrm_text", "hunyuan_v1_moe"], {}),
    **dict.fromkeys(["hy_v3", "hy_v4", "hyperclovax", "inkling2_text", "internlm3"], {}),
    **dict.fromkeys(["iquestcoder", "jais2", "jetmoe", "kolibri1", "laguna", "lfm3"], {}),
    **dict.fromkeys(["mamba", "marian", "mellum", "minimax_m2", "minimax_m3_vl_text"], {}),
    **dict.fromkeys(["ministral3", "modernbert-decoder", "mvp", "nemotron_h", "olmo_hybrid"], {}),
    **dict.fromkeys(["pegasus", "plbart", "qwen3_5_moe_text", "roberta-prelayernorm"], {}),
    **dict.fromkeys(["rwkv", "solar_open", "whisper", "xlm", "xlm-roberta", "xlm-roberta-xl"], {}),
    **dict.fromkeys(["axk1", "axk2", "bailing_hybrid", "glm4_moe_lite", "glm_moe_dsa"], LATENT),
    **dict.fromkeys(["kimi_linear", "longcat_flash", "youtu"], LATENT),
    # In its second layer, heads of their own number and sizes.
    "dots3_note_text": LATENT
    | {
        "per_layer_config": {
            1: {
                **{"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 12},
                **{"kv_lora_rank": 8, "qk_nope_head_dim": 4},
            }
        }
    },
    "falcon_h1": {"mamba_d_ssm": 64},
    "gemma3n_text": {
        **{"num_kv_shared_layers": 0, "hidden_size_per_layer_input": 8},
        "vocab_size_per_layer_input": 97,
    },
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 4, "head_dim": 16, "n_groups": 1, "state_size": 8},
    "qwen3_5_text": {
        **{"linear_num_value_heads": 4, "linear_num_key_heads": 2},
        **{"linear_key_head_dim": 8, "linear_value_head_dim": 8},
    },
    "recurrent_gemma": {"block_types": ["recurrent", "attention"], "lru_width": 32},
    "reformer": {
        **{"axial_pos_embds_dim": [16, 16], "axial_pos_shape": [8, 8]},
        **{"attention_head_size": 8, "attn_layers": ["local", "local"]},
    },
    "xmod": {"default_language": "en_XX"},
    "zamba2": {"layers_block_type": ["mamba", "hybrid"], "num_mem_blocks": 1, "n_mamba_heads": 4},
    "zaya": {"num_experts_per_tok": 1},
}


def tiny_with(kind: str, **changes) -> PreTrainedModel:
    """The model of an architecture, with attention that is far from even; some `changes` to it."""
    default = CONFIG_MAPPING[kind]()
    config = type(default.get_text_config())
    sizes = {name: size for name, size in TINY.items() if settable(default, name)}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        config(**sizes | _layer_types(default) | (ARCHITECTURES | OTHERS).get(kind, {}) | changes)
    )
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # the grouped kernels take no float64
    for parameter in model.parameters():
        if parameter.ndim > 1 and model._can_set_attn_implementation():  # heads far from even
            parameter.data.mul_(3)
    return model.eval()


def settable(config, name: str) -> bool:
    attribute = getattr(type(config), name, None)
    if isinstance(attribute, property):
        return attribute.fset is not None
    return name in vars(config) or name in getattr(config, "attribute_map", {}) or bool(attribute)


def _layer_types(config) -> dict[str, list[str]]:
    """One layer of each kind, where a model mixes them."""
    types = vars(config).get("layer_types")
    return {"layer_types": (list(dict.fromkeys(types)) * 2)[:2]} if types else {}
