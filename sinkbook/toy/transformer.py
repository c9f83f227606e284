"""The toy transformer of the Bigram-Backcopy experiments (arXiv 2410.13835, section 2).

Pre-LN: `x <- x + Attn(LN(x))`, then `x <- x + MLP(LN(x))`; a final LN and an untied linear head.
Parameters are created in the order of the paper's code, so that a seed gives its initial values.
The mitigations of extreme tokens are switches of `TransformerConfig`. What they add starts at zeros
or ones (but for the gated norm), so that a seed gives all of them the same other weights.
"""

from collections.abc import Collection
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sinkbook.annotations import check_arguments, check_fields
from sinkbook.arguments import check_layers, check_numbers, check_token_ids, check_whole_numbers
from sinkbook.errors import SinkbookError
from sinkbook.toy.attention import KERNELS, PARAMETERS
from sinkbook.toy.norms import NORMS

GATES = ("none", "head", "element", "value")
NORM_PLACES = ("pre", "post", "sandwich")
FIRST_VALUES = ("free", "ordinary")


@dataclass(frozen=True)
class TransformerConfig:
    """Sizes and switches of the toy transformer; the defaults are the paper's."""

    vocab_size: int = 67  # 65 characters, <s>, and the delimiter
    length: int = 256  # positions that have an embedding
    width: int = 256  # d in the paper
    layers: int = 1
    heads: int = 1  # the paper's toys have a single head of full width
    attention: str = "softmax"  # a name in attention.KERNELS
    null_slot_speed: float = 1.0  # learned null slots move this many times as fast
    qk_norm: bool = False  # root-mean-square norms of queries and keys
    gate: str = "none"  # sigmoid gate, one of GATES: on heads, their elements, or the values
    head_norm: bool = False  # root-mean-square norm of every head's output
    first_value: str = "free"  # or "ordinary": as long, once written, as the others' mean
    norm: str = "layer"  # a name in norms.NORMS: of layers and output
    norm_place: str = "pre"  # one of NORM_PLACES: before a part, after the sum, or on both sides
    without_attention: tuple[int, ...] = ()  # layers whose attention is left out
    without_mlp: tuple[int, ...] = ()  # layers whose MLP is left out
    linear_mlp: tuple[int, ...] = ()  # layers whose MLP is one linear map

    def __post_init__(self):
        check_fields(self)
        check_whole_numbers(self, vocab_size=1, length=1, width=1, layers=0, heads=1)
        check_numbers(self, null_slot_speed=0)
        check_layers("without_attention", self.without_attention, self.layers)
        check_layers("without_mlp", self.without_mlp, self.layers)
        check_layers("linear_mlp", self.linear_mlp, self.layers)
        _check_name("attention kernel", self.attention, KERNELS)
        _check_name("gate", self.gate, GATES)
        _check_name("first value", self.first_value, FIRST_VALUES)
        _check_name("norm", self.norm, NORMS)
        _check_name("place of a norm", self.norm_place, NORM_PLACES)
        if self.width % self.heads:
            raise SinkbookError(
                f"width {self.width} is not a multiple of {self.heads} heads. "
                "Choose a width that the number of heads divides."
            )


def _check_name(kind: str, name: str, known: Collection[str]) -> None:
    if name not in known:
        raise SinkbookError(f"no {kind} named {name!r}. Known: {', '.join(known)}.")


class SelfAttention(nn.Module):
    """Causal self-attention whose kernel is looked up by name.

    `attention_function` has the signature of transformers' attention functions; the probe and
    the interventions put their own in its place. Gates are those of Qiu et al. (arXiv 2505.06708)
    after the kernel, `y_h * sigmoid(W x)`, one number for each head or each element, and of the
    value gate (arXiv 2510.09017) before it, `v * sigmoid(W v)`; all begin half open. The norm of
    the heads is that of arXiv 2605.06611, `y_h / rms(y_h)`.
    """

    is_causal = True
    num_key_value_groups = 1

    def __init__(self, config: TransformerConfig, layer_idx: int):
        super().__init__()
        self.layer_idx = layer_idx
        self.heads = config.heads
        self.head_dim = config.width // config.heads
        self.scaling = self.head_dim**-0.5
        self.attention_function = KERNELS[config.attention]
        self.wq, self.wk, self.wv, self.wo = (
            nn.Linear(config.width, config.width, bias=False) for _ in range(4)
        )
        self.null_slot_speed = config.null_slot_speed
        self.first_value = config.first_value
        made = PARAMETERS.get(config.attention, lambda *_: {})(self.heads, self.head_dim, layer_idx)
        for name, start in made.items():
            self.register_parameter(name, nn.Parameter(start))
        self.query_norm = self.key_norm = self.head_norm = None
        if config.qk_norm:
            self.query_norm, self.key_norm = (nn.RMSNorm(self.head_dim) for _ in range(2))
        if config.head_norm:
            self.head_norm = nn.RMSNorm(self.head_dim)
        self.output_gate = self.value_gate = None
        if config.gate in ("head", "element"):
            gates = config.heads if config.gate == "head" else config.width
            self.output_gate = _half_open_gate(config.width, gates)
        elif config.gate == "value":
            self.value_gate = _half_open_gate(self.head_dim, self.head_dim)

    def forward(self, x: Float[Tensor, "batch position width"]):
        query, key, value = (
            w(x).unflatten(-1, (self.heads, self.head_dim)).transpose(1, 2)
            for w in (self.wq, self.wk, self.wv)
        )
        if self.query_norm is not None:
            query, key = self.query_norm(query), self.key_norm(key)
        if self.value_gate is not None:
            value = value * torch.sigmoid(self.value_gate(value))
        if self.first_value == "ordinary":
            value = self._with_ordinary_first(value)
        output, _ = self.attention_function(self, query, key, value, None, scaling=self.scaling)
        if self.head_norm is not None:
            output = self.head_norm(output)
        if self.output_gate is not None:
            output = output * torch.sigmoid(self.output_gate(x)).unflatten(-1, (self.heads, -1))
        return self.wo(output.flatten(-2))

    def _with_ordinary_first(
        self, value: Float[Tensor, "batch head position width"]
    ) -> Float[Tensor, "batch head position width"]:
        """The values, the first one as long as the others are on average, as W_O writes them.

        Its direction is learned; its length is not, and teaches the others nothing.
        """
        output = self.wo.weight.unflatten(1, (self.heads, self.head_dim))
        norms = torch.einsum("bhtd,whd->bhtw", value, output).float().norm(dim=-1, keepdim=True)
        ordinary = norms[:, :, 1:].mean(dim=2, keepdim=True).detach()
        scale = (ordinary / norms[:, :, :1].clamp(min=1e-12)).to(value)
        return torch.cat([value[:, :, :1] * scale, value[:, :, 1:]], dim=2)


def _half_open_gate(inputs: int, gates: int) -> nn.Linear:
    """What a sigmoid follows: zeros to begin with, for which no random number is drawn."""
    gate = nn.utils.skip_init(nn.Linear, inputs, gates)
    nn.init.zeros_(gate.weight)
    nn.init.zeros_(gate.bias)
    return gate


class MLP(nn.Module):
    """Two bias-free linear maps around a ReLU, four times as wide inside."""

    def __init__(self, width: int):
        super().__init__()
        self.w1 = nn.Linear(width, 4 * width, bias=False)
        self.w2 = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Float[Tensor, "batch position width"]):
        # In place: the widest states of a layer are written once instead of twice.
        return self.w2(self.w1(x).relu_())


class Block(nn.Module):
    """One layer, pre-LN by default. A switched-off part is absent: `attention` or `mlp` is `None`.

    With norms in the place "post" it is `x <- LN(x + f(x))`, with "sandwich" `x + LN(f(LN(x)))`.
    """

    def __init__(self, config: TransformerConfig, layer_idx: int):
        super().__init__()
        self.attention = self.mlp = None
        if layer_idx not in config.without_attention:
            self.attention = SelfAttention(config, layer_idx)
        if layer_idx in config.linear_mlp:
            self.mlp = nn.Linear(config.width, config.width, bias=False)
        elif layer_idx not in config.without_mlp:
            self.mlp = MLP(config.width)
        self.norm_place = config.norm_place
        self.attention_norm = NORMS[config.norm](config.width)
        self.mlp_norm = NORMS[config.norm](config.width)
        self.after_attention_norm = self.after_mlp_norm = None
        if config.norm_place == "sandwich":
            self.after_attention_norm = NORMS[config.norm](config.width)
            self.after_mlp_norm = NORMS[config.norm](config.width)

    def forward(self, x: Float[Tensor, "batch position width"]):
        if self.attention is not None:
            x = self._add(x, self.attention, self.attention_norm, self.after_attention_norm)
        if self.mlp is not None:
            x = self._add(x, self.mlp, self.mlp_norm, self.after_mlp_norm)
        return x

    def _add(self, x: Float[Tensor, "batch position width"], part, norm, after):
        if self.norm_place == "post":
            return norm(x + part(x))
        written = part(norm(x))
        return x + (written if after is None else after(written))


class Transformer(nn.Module):
    """The toy transformer: `model(tokens)` gives the next-token logits.

    Seeded with 42 at the paper's sizes it starts at the paper's own step-0 values.
    Raises `SinkbookError` for texts longer than `config.length`.

    >>> import torch
    >>> model = Transformer(TransformerConfig(vocab_size=9, length=16, width=8))
    >>> model(torch.zeros(2, 16, dtype=torch.long)).shape
    torch.Size([2, 16, 9])
    """

    @check_arguments
    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.width)
        self.position_embedding = nn.Embedding(config.length, config.width)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.layers))
        self.final_norm = NORMS[config.norm](config.width)
        self.output = nn.Linear(config.width, config.vocab_size, bias=False)

    def forward(
        self, tokens: Int[Tensor, "batch position"]
    ) -> Float[Tensor, "batch position vocab"]:
        check_token_ids("tokens", tokens, self.config.vocab_size)
        length = tokens.shape[1]
        if length > self.config.length:
            raise SinkbookError(
                f"{length} positions, but the model has {self.config.length}. "
                "Cut the texts, or make the model with a larger length."
            )
        x = self.token_embedding(tokens) + self.position_embedding.weight[:length]
        for layer in self.layers:
            x = layer(x)
        return self.output(self.final_norm(x))
