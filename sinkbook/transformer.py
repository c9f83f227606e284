"""The toy transformer of the Bigram-Backcopy experiments (arXiv 2410.13835, section 2).

Pre-LN: `x <- x + Attn(LN(x))`, then `x <- x + MLP(LN(x))`; a final LN and an untied linear head.
Parameters are created in the order of the paper's code, so that a seed gives its initial values.
"""

from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor, nn

from sinkbook.attention import KERNELS
from sinkbook.errors import SinkbookError


@dataclass(frozen=True)
class TransformerConfig:
    """Sizes and switches of the toy transformer; the defaults are the paper's."""

    vocab_size: int = 67  # 65 characters, <s>, and the delimiter
    length: int = 256  # positions that have an embedding
    width: int = 256  # d in the paper
    layers: int = 1
    heads: int = 1  # the paper's toys have a single head of full width
    attention: str = "softmax"  # a name in attention.KERNELS
    without_attention: tuple[int, ...] = ()  # layers whose attention is left out
    without_mlp: tuple[int, ...] = ()  # layers whose MLP is left out
    linear_mlp: tuple[int, ...] = ()  # layers whose MLP is one linear map


class SelfAttention(nn.Module):
    """Causal self-attention whose kernel is looked up by name.

    `attention_function` has the signature of transformers' attention functions; the probe and
    the interventions put their own in its place.
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

    def forward(self, x: Float[Tensor, "batch position width"]):
        query, key, value = (
            w(x).unflatten(-1, (self.heads, self.head_dim)).transpose(1, 2)
            for w in (self.wq, self.wk, self.wv)
        )
        output, _ = self.attention_function(self, query, key, value, None, scaling=self.scaling)
        return self.wo(output.flatten(-2))


class MLP(nn.Module):
    """Two bias-free linear maps around a ReLU, four times as wide inside."""

    def __init__(self, width: int):
        super().__init__()
        self.w1 = nn.Linear(width, 4 * width, bias=False)
        self.w2 = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Float[Tensor, "batch position width"]):
        return self.w2(self.w1(x).relu())


class Block(nn.Module):
    """One pre-LN layer. A switched-off part is absent: `attention` or `mlp` is then `None`."""

    def __init__(self, config: TransformerConfig, layer_idx: int):
        super().__init__()
        self.attention = self.mlp = None
        if layer_idx not in config.without_attention:
            self.attention = SelfAttention(config, layer_idx)
        if layer_idx in config.linear_mlp:
            self.mlp = nn.Linear(config.width, config.width, bias=False)
        elif layer_idx not in config.without_mlp:
            self.mlp = MLP(config.width)
        self.attention_norm = nn.LayerNorm(config.width)
        self.mlp_norm = nn.LayerNorm(config.width)

    def forward(self, x: Float[Tensor, "batch position width"]):
        if self.attention is not None:
            x = x + self.attention(self.attention_norm(x))
        if self.mlp is not None:
            x = x + self.mlp(self.mlp_norm(x))
        return x


class Transformer(nn.Module):
    """The toy transformer: `model(tokens)` gives the next-token logits.

    Seeded with 42 at the paper's sizes it starts at the paper's own step-0 values.
    Raises `SinkbookError` for an unknown kernel and for texts longer than `config.length`.

    >>> import torch
    >>> model = Transformer(TransformerConfig(vocab_size=9, length=16, width=8))
    >>> model(torch.zeros(2, 16, dtype=torch.long)).shape
    torch.Size([2, 16, 9])
    """

    def __init__(self, config: TransformerConfig):
        super().__init__()
        if config.attention not in KERNELS:
            raise SinkbookError(
                f"no attention kernel named {config.attention!r}. Known: {', '.join(KERNELS)}."
            )
        if config.width % config.heads:
            raise SinkbookError(
                f"width {config.width} is not a multiple of {config.heads} heads. "
                "Choose a width that the number of heads divides."
            )
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.width)
        self.position_embedding = nn.Embedding(config.length, config.width)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.layers))
        self.final_norm = nn.LayerNorm(config.width)
        self.output = nn.Linear(config.width, config.vocab_size, bias=False)

    def forward(
        self, tokens: Int[Tensor, "batch position"]
    ) -> Float[Tensor, "batch position vocab"]:
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
