"""Small random models of any architecture with random switches, and random texts for them.

A strategy of hypothesis. What transformers does not let be made or run is no example.
"""

from dataclasses import dataclass
from functools import cache
from random import Random

import torch
from hypothesis import assume
from hypothesis import strategies as st
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel, logging

from architectures import ARCHITECTURES, OTHERS, settable, tiny_with
from sinkbook.models.partial_forward import logits_of

logging.set_verbosity_error()

EVERY = [*ARCHITECTURES, *OTHERS]
LARGEST = 3_000_000  # parameters
# What a switch may be turned to, beside whatever is true or false.
TURNED = {
    "num_key_value_heads": (1, 2, 4),
    "num_attention_heads": (2, 4),
    "num_kv_heads": (1, 2, 4),
    "head_dim": (4, 8, 16),
    "v_head_dim": (4, 8, 12),
    "sliding_window": (1, 3, 8, 40, None),
    "window_size": (3, 8),
    "sliding_window_size": (3, 8),
    "attention_chunk_size": (3, 8, 40),
    "local_attention": (4, 8),
    "max_window_layers": (0, 1),
    "num_kv_shared_layers": (0, 1),
    "attn_logit_softcapping": (None, 1.0, 30.0),
    "final_logit_softcapping": (None, 5.0),
    "logits_soft_cap": (5.0,),
    "query_pre_attn_scalar": (4, 64),
    "attention_multiplier": (0.05, 1.0),
    "residual_multiplier": (0.22, 1.0),
    "embedding_multiplier": (0.5, 12.0),
    "logits_scaling": (1.0, 8.0),
    "logit_scale": (0.06, 1.0),
    "attn_scale": (0.5,),
    "attention_value_scale": (0.5, 2.0),
    "key_multiplier": (0.5,),
    "attention_out_multiplier": (0.5,),
    "clip_qkv": (None, 0.5),
    "rotary_dim": (2, 4, 8),
    "no_rope_layers": ([1, 0], [0, 0]),
    "num_local_experts": (2, 4),
    "decoder_sparse_step": (1, 2),
    "mlp_only_layers": ([], [0]),
    "interleave_moe_layer_step": (1, 2),
    "first_k_dense_replace": (0, 1),
    "hidden_act": ("silu", "gelu", "relu"),
    "rope_parameters": (
        {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
        {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0},
        {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0},
        {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
        {
            **{"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0},
            "original_max_position_embeddings": 16,
        },
    ),
    "num_ln_in_parallel_attn": (1, 2),
    "n_inner": (24,),
}
# Of what is true or false, what changes another task or only what is handed back.
OTHER_TASKS = ("use_cache", "output", "summary", "add_cross", "is_", "causal", "use_mtp", "encoder")


@dataclass
class Case:
    """A small model and a text for it."""

    kind: str
    changes: dict
    texts: int
    length: int
    seed: int
    dtype: torch.dtype
    padding: str
    packed: bool
    training: bool
    implementation: str | None

    def tokens(self) -> torch.Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randint(3, 97, (self.texts, self.length), generator=generator)

    def mask(self) -> torch.Tensor | None:
        """Of padding, of another length in each text."""
        if self.padding == "none":
            return None
        mask = torch.ones(self.texts, self.length, dtype=torch.long)
        for row in range(self.texts):
            dropped = (self.seed + row) % max(1, self.length - 1)
            left = self.padding == "left" or (self.padding == "both" and row % 2)
            mask[row, slice(0, dropped) if left else slice(self.length - dropped, None)] = 0
        return mask

    def positions(self) -> torch.Tensor | None:
        """Of several documents in one text."""
        if not self.packed:
            return None
        rows = []
        for row in range(self.texts):
            cut = 1 + (self.seed + row) % max(1, self.length - 1)
            rows.append(torch.cat([torch.arange(cut), torch.arange(self.length - cut)]))
        return torch.stack(rows)[:, : self.length]

    def inputs(self) -> dict[str, torch.Tensor]:
        given = {"attention_mask": self.mask(), "position_ids": self.positions()}
        return {name: states for name, states in given.items() if states is not None}

    def model(self) -> PreTrainedModel:
        """The model, which transformers itself can run on the text; else no example."""
        model = None
        try:
            with torch.device("meta"):
                size = sum(p.numel() for p in tiny_with(self.kind, **self.changes).parameters())
            if size <= LARGEST:
                model = tiny_with(self.kind, **self.changes).to(self.dtype).requires_grad_(False)
                if self.implementation is not None:
                    model.set_attn_implementation(self.implementation)
                logits = logits_of(model, self.tokens())
                model(input_ids=self.tokens(), **self.inputs(), use_cache=False)
                model = model if logits.isfinite().all() else None
        except Exception:  # whatever transformers raises at a configuration that it does not know
            model = None
        assume(model is not None)
        return model.train(self.training)


@cache
def switches(kind: str) -> dict[str, tuple]:
    """What can be turned in a configuration."""
    default = CONFIG_MAPPING[kind]()
    default = default.get_text_config()
    base = vars(PreTrainedConfig())
    found = {name: to for name, to in TURNED.items() if settable(default, name)}
    for name, value in vars(default).items():
        other = name in base or any(word in name for word in OTHER_TASKS)
        if isinstance(value, bool) and (not other or name == "tie_word_embeddings"):
            found[name] = (not value, value)
    types = list(dict.fromkeys(vars(default).get("layer_types") or []))
    if types:
        found["layer_types"] = tuple([one, two] for one in types for two in types)
    return found


def random_case(chance: Random, *, whole: bool = False) -> Case:
    """Any architecture, up to four of its switches, and texts; `whole` ones if need be."""
    kind = chance.choice(EVERY)
    known = switches(kind)
    names = chance.sample(sorted(known), min(len(known), chance.randint(0, 4)))
    texts, length = chance.choice([(2, 12), (3, 9), (1, 16), (2, 2), (5, 5), (1, 1)])
    padding = "none" if whole else chance.choice(["none", "none", "left", "right", "both"])
    return Case(
        kind=kind,
        changes={name: chance.choice(known[name]) for name in names},
        texts=texts,
        length=length,
        seed=chance.randrange(100),
        dtype=chance.choice([torch.float64, torch.float32]),
        padding=padding,
        packed=not whole and padding == "none" and chance.random() < 0.5,
        training=chance.random() < 0.5,
        implementation=chance.choice([None, None, "eager"]),
    )


def cases(*, whole: bool = False) -> st.SearchStrategy[Case]:
    """Cases drawn evenly: what hypothesis draws itself comes back to the first of a list."""
    chance = st.randoms(use_true_random=True, note_method_calls=False)
    return chance.map(lambda chance: random_case(chance, whole=whole))
