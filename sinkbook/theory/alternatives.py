"""Other accounts of sinks and peaks, made testable: changed models, and a task of averaging.

Each function changes one thing that an account says matters. We know these accounts from what
their authors say of them in their abstracts; the tests are ours.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
import xarray as xr
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor, nn

from sinkbook.annotations import check_arguments
from sinkbook.arguments import check_some, check_token_ids, check_whole_number
from sinkbook.models.losses import next_token_loss
from sinkbook.probe.attention_maps import attention_weights
from sinkbook.toy.attention import KERNELS, relu_weights, scores_and_mask
from sinkbook.toy.optimizers import OPTIMIZERS
from sinkbook.toy.program import in_precision
from sinkbook.toy.runs import EVALUATION_SEED, TrainingConfig
from sinkbook.toy.tasks import Risks, Task, generator_at, task
from sinkbook.toy.training_loop import descend, schedule, train_measured, train_steps
from sinkbook.toy.transformer import SelfAttention, Transformer, TransformerConfig


@check_arguments
def with_damped_values(model: Transformer, factor: float) -> Transformer:
    """The same model, with the gradient through the value states multiplied by `factor`.

    The forward pass stays. After the V-scale of arXiv 2603.17771, whose formula we do not have.
    """
    for block in model.layers:
        original = block.attention.attention_function

        def damped(module, query, key, value, *rest, original=original, **keywords):
            value = factor * value + (1 - factor) * value.detach()
            return original(module, query, key, value, *rest, **keywords)

        block.attention.attention_function = damped
    return model


@check_arguments
def with_isolated_position(model: Transformer, position: int) -> Transformer:
    """The same model, with the query at `position` seeing itself alone, as position 0 does.

    Later queries still see it. Such a token averages nothing (arXiv 2605.06611).
    """
    for block in model.layers:
        original = block.attention.attention_function

        def isolated(module, query, key, value, _mask, original=original, **keywords):
            length = query.shape[-2]
            hidden = torch.ones(length, length, dtype=torch.bool).triu(diagonal=1)
            hidden[position, :position] = True
            mask = torch.zeros(1, 1, length, length).masked_fill(
                hidden, torch.finfo(torch.float32).min
            )
            return original(module, query, key, value, mask, **keywords)

        block.attention.attention_function = isolated
    return model


@check_arguments
def value_gradients(
    model: Transformer, task: Task, texts: Int[Tensor, "text position"]
) -> Float64[np.ndarray, "layer input"]:
    """Norm of the gradient of the mean loss with respect to each value state, mean over texts."""
    check_token_ids("texts", texts)
    kept: list[Tensor] = []
    hooks = [
        block.attention.wv.register_forward_hook(lambda _m, _i, value: kept.append(value))
        for block in model.layers
    ]
    try:
        with torch.enable_grad():
            embedded = model.token_embedding.weight.requires_grad_()
            logits = model(texts[:, :-1])
            gradients = torch.autograd.grad(next_token_loss(logits, texts), kept)
    finally:
        embedded.requires_grad_(False)
        for hook in hooks:
            hook.remove()
    return np.stack([g.norm(dim=-1).mean(dim=0).double().numpy() for g in gradients])


@check_arguments
def variance_by_position(
    config: TransformerConfig, tokens: Int[Tensor, "text position"], seed: int
) -> Float64[np.ndarray, " position"]:
    """Mean square of what the first layer's head writes, at each position, before any training."""
    check_token_ids("tokens", tokens)
    torch.manual_seed(seed)
    model = Transformer(config)
    with torch.no_grad():
        x = model.token_embedding(tokens)  # the positions' own vectors would not average out
        block = model.layers[0]
        return block.attention(block.attention_norm(x)).square().mean((0, 2)).double().numpy()


class AveragingTask:
    """After a trigger, write the average of what came before; elsewhere write nothing, or announce.

    Tokens are `kinds` first tokens, one trigger, and the symbols, all drawn uniformly (a trigger
    with probability a quarter); they enter as one-hot vectors, and a single attention head, without
    a residual stream, has to write vectors. After a trigger it is the mean of the symbols seen so
    far. Elsewhere it is zero (arXiv 2603.11487), or, if `announce`, the first token's own vector,
    which every position has to repeat (the broadcast of arXiv 2606.08105).
    """

    @check_arguments
    def __init__(self, length: int, symbols: int = 8, kinds: int = 4, announce: bool = False):
        for name, size in {"length": length, "symbols": symbols, "kinds": kinds}.items():
            check_whole_number(name, size, 1)
        self.length, self.symbols, self.kinds, self.announce = length, symbols, kinds, announce
        self.trigger = symbols
        self.vocab_size = symbols + 1 + kinds

    def batch_at(
        self, size: int, seed: int, step: int, device: torch.device | str = "cpu"
    ) -> Int[Tensor, "text position"]:
        """The texts of a training step: a function of (seed, step), as `Task.batch_at`."""
        generator = generator_at(seed, step, device)
        shape = (size, self.length)
        draw = {"generator": generator, "device": device}
        texts = torch.randint(self.symbols, shape, **draw)
        texts[torch.rand(shape, **draw) < 0.25] = self.trigger
        texts[:, 0] = self.symbols + 1 + torch.randint(self.kinds, (size,), **draw)
        return texts

    def vectors(self, texts: Int[Tensor, "text position"]) -> Float[Tensor, "text position vocab"]:
        """The inputs: each token's own direction."""
        return F.one_hot(texts, self.vocab_size).float()

    def targets(self, texts: Int[Tensor, "text position"]) -> Float[Tensor, "text position vocab"]:
        """What to write at each position."""
        vectors = self.vectors(texts)
        seen = vectors.clone()
        seen[..., self.symbols :] = 0.0
        sums = seen.cumsum(dim=1)
        averages = sums / sums.sum(dim=-1, keepdim=True).clamp(min=1)
        elsewhere = vectors[:, :1] * float(self.announce)
        return torch.where((texts == self.trigger).unsqueeze(-1), averages, elsewhere)

    def loss(self, head: nn.Module, texts: Int[Tensor, "text position"]) -> Tensor:
        """Mean squared distance from the target vectors."""
        return self.errors(head, texts).mean()

    def errors(
        self, head: nn.Module, texts: Int[Tensor, "text position"]
    ) -> Float[Tensor, "text position"]:
        """Squared distance from the target vector, at each position."""
        return (head(self.vectors(texts)) - self.targets(texts)).square().sum(dim=-1)


@check_arguments
def train_averaging(
    task: AveragingTask, attention: str, *, steps: int, batch_size: int, seed: int, **changes
) -> SelfAttention:
    """One attention head on the averaging task, trained by Adam.

    `changes` are other fields of its `TransformerConfig`.
    """
    check_whole_number("batch_size", batch_size, 1)
    torch.manual_seed(seed)
    sizes = {"width": task.vocab_size, "length": task.length} | changes
    head = SelfAttention(TransformerConfig(attention=attention, **sizes), layer_idx=0)
    optimizer = torch.optim.Adam(head.parameters(), lr=0.01, betas=(0.9, 0.99))
    batches = (task.batch_at(batch_size, seed, step) for step in range(steps))
    train_steps(descend(optimizer, partial(task.loss, head)), batches, steps=steps)
    return head.requires_grad_(False)


@check_arguments
def averaging_facts(task: AveragingTask, head: SelfAttention) -> dict[str, float]:
    """What the head does on 64 fresh texts, at positions that are no triggers and not the first.

    `error` and `trigger_error` are mean squared distances; `weight` is that on the first token,
    `total` the sum of all weights; `value_drain_ratio` compares the norm of what the first
    token and the symbols would write.
    """
    texts = task.batch_at(64, EVALUATION_SEED, 0)
    vectors, triggers = task.vectors(texts), texts == task.trigger
    other = ~triggers
    other[:, 0] = False
    query, key = (w(vectors).unsqueeze(1) for w in (head.wq, head.wk))
    scores = scores_and_mask(query, key, None, head.scaling)
    softmax = head.attention_function is KERNELS["softmax"]
    weights = (scores.softmax(dim=-1) if softmax else relu_weights(scores))[:, 0]
    errors = task.errors(head, texts)
    written = head.wo(head.wv(torch.eye(task.vocab_size))).norm(dim=-1)
    return {
        "error": errors[other].mean().item(),
        "trigger_error": errors[triggers].mean().item(),
        "weight": weights[..., 0][other].mean().item(),
        "total": weights.sum(dim=-1)[other].mean().item(),
        "value_drain_ratio": (
            written[task.trigger + 1 :].mean() / written[: task.symbols].mean()
        ).item(),
    }


@check_arguments
def averaging_heads(*, steps: int, batch_size: int, seed: int) -> dict[str, dict[str, float]]:
    """What three heads do that average after a trigger: `averaging_facts` of each, by its name.

    Two have to write nothing elsewhere, by softmax and by ReLU; the third, by softmax, has to
    repeat what the first token says.
    """
    cases = {
        "silence, softmax": (AveragingTask(length=32), "softmax"),
        "silence, ReLU": (AveragingTask(length=32), "relu"),
        "broadcast, softmax": (AveragingTask(length=32, announce=True), "softmax"),
    }
    sizes = {"steps": steps, "batch_size": batch_size, "seed": seed}
    return {
        name: averaging_facts(made, train_averaging(made, attention, **sizes))
        for name, (made, attention) in cases.items()
    }


def train_changed(
    config: TrainingConfig, change: Callable[[Transformer], Transformer]
) -> Transformer:
    """The training of a config with one thing changed: `change` gets the model before step 0.

    Initial weights, batches and optimizer are those of `training.train`; it runs in memory, on the
    CPU, and is not kept.
    """
    model, step, batches = changed_training(config, change)
    train_steps(step, batches, steps=config.steps)
    return model.eval().requires_grad_(False)


def changed_training(
    config: TrainingConfig, change: Callable[[Transformer], Transformer]
) -> tuple[Transformer, Callable[[Tensor], float | Tensor], Iterator[Tensor]]:
    """The model of `train_changed` before step 0, what its training does with a batch, its batches.

    The batches are texts, (text, position).
    """
    torch.manual_seed(config.seed)
    model = change(Transformer(config.model))
    optimizer = OPTIMIZERS[config.optimizer](model.parameters(), config)
    batches = task(config.task).batches(config.batch_size, config.seed, range(config.steps))

    def loss(texts: Int[Tensor, "text position"]) -> Tensor:
        with in_precision(config.precision, texts.device):
            logits = model(texts[:, :-1])
        return next_token_loss(logits, texts)

    return model, descend(optimizer, loss), batches


@check_arguments
def isolated_seeds(configs: Sequence[TrainingConfig], position: int) -> xr.Dataset:
    """Trainings in which a position sees itself alone, along `seed`; else they are as configured.

    - `attention`, over (seed, step, key): `attention_on` the position, and on `<s>` (key 0).
    - `excess_risk`, over (seed, step): nats over the rules of the language, mean over positions.
    """
    found = []
    for config in configs:
        made = task(config.task)
        model, step, batches = changed_training(
            config, partial(with_isolated_position, position=position)
        )
        measured = schedule(config.steps, config.measurements)
        look = partial(_looks, model, made, config.evaluation_tokens, (position, 0))
        found.append(train_measured(step, batches, look, measured=measured))
    return xr.concat(found, xr.Variable("seed", [config.seed for config in configs]))


@torch.no_grad()
def _looks(
    model: Transformer, task: Task, tokens: Int[Tensor, "text position"], keys: tuple[int, ...]
) -> xr.Dataset:
    excess = excess_risk(task.risks(model(tokens), tokens), task.at_triggers(tokens))
    attention = ("key", attention_on(model, task, tokens, keys))
    return xr.Dataset({"attention": attention, "excess_risk": excess}, {"key": [*keys]})


def excess_risk(risks: Risks, triggers: Bool[Tensor, "text position"]) -> float:
    """The risk over that of the language's own rules, mean over all positions, in nats."""
    share = triggers.float().mean()
    return (share * risks.backcopy_excess + (1 - share) * risks.bigram_excess).item()


@check_arguments
def attention_on(
    model: Transformer, task: Task, tokens: Int[Tensor, "text position"], keys: tuple[int, ...]
) -> list[float]:
    """Mean attention in the first layer on each of these positions, from tokens that are no
    triggers and come after all of them."""
    check_token_ids("tokens", tokens)
    check_some("keys", keys)
    for key in keys:
        check_whole_number("keys", key, 0, tokens.shape[1] - 1)
    weights = attention_weights(model, tokens, layer=0)[:, 0]
    queries = ~task.at_triggers(tokens)
    queries[:, : max(keys) + 1] = False
    return [weights[..., key][queries].mean().item() for key in keys]
