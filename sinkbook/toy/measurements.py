"""The three extreme-token phenomena and the two risks of a toy model, in one dataset."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import xarray as xr
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from sinkbook.annotations import check_arguments
from sinkbook.arguments import check_number, check_some, check_token_ids, check_whole_number
from sinkbook.models.interventions import zero
from sinkbook.models.token_labels import token_label
from sinkbook.probe.attention_maps import attention_logits, attention_weights
from sinkbook.probe.measure import measure
from sinkbook.toy.runs import Run
from sinkbook.toy.tasks import Risks, Task
from sinkbook.toy.transformer import Transformer


@check_arguments
def measure_toy(model: Transformer, task: Task, tokens: Int[Tensor, "text position"]) -> xr.Dataset:
    """The three extreme-token phenomena and the two risks of a toy model, on given texts.

    The sink token is position 0. Its own query, and keys that a query cannot see, never count.
    Variables, with `layer`, `head` and, for residual states, `residual_layer` dimensions:

    - `backcopy_risk`, `bigram_risk`, `backcopy_excess`, `bigram_excess`: nats.
    - `sink_attention`, `sink_attention_triggers`: mean attention on the sink token, over queries
      that are not triggers, and over those that are.
    - `sink_logit_by_token`: Δlogit of the paper, averaged over the occurrences of each token id.
    - `value_norm`, `other_value_norm`: of the sink token; mean over other non-triggers.
    - `residual_norm`, `other_residual_norm`: of the sink token; median over other tokens.
    - `residual_peak_height`: norm at the sink token minus the mean over other tokens.
    """
    check_token_ids("tokens", tokens)
    with torch.no_grad():
        risks = task.risks(model(tokens), tokens)
    probed = measure(
        model,
        tokens,
        ("sink_attention_by_query", "sink_logit_by_query", "value_norm", "residual_norm"),
    )
    triggers = xr.DataArray(task.at_triggers(tokens).cpu().numpy(), dims=("batch", "position"))
    later = xr.DataArray(np.arange(tokens.shape[1]) > 0, dims="position")
    ordinary = later & ~triggers
    over_texts = ("batch", "position")
    token = xr.DataArray(tokens.cpu().numpy(), dims=over_texts, name="token")
    attention, value = probed.sink_attention_by_query, probed.value_norm
    residual = probed.residual_norm
    others = residual.where(later)
    sink_residual = residual.isel(position=0).mean("batch")
    by_token = _mean_by(probed.sink_logit_by_query.where(later), token, task.vocab_size)
    return xr.Dataset(
        {
            **{name: risk.item() for name, risk in _named(risks).items()},
            "sink_attention": attention.where(ordinary).mean(over_texts),
            "sink_attention_triggers": attention.where(triggers & later).mean(over_texts),
            "sink_logit_by_token": by_token,
            "value_norm": value.isel(position=0).mean("batch"),
            "other_value_norm": value.where(ordinary).mean(over_texts),
            "residual_norm": sink_residual,
            "other_residual_norm": others.median(over_texts),
            "residual_peak_height": sink_residual - others.mean(over_texts),
        }
    )


@check_arguments
@torch.no_grad()
def measure_writers(
    model: Transformer, task: Task, tokens: Int[Tensor, "text position"]
) -> xr.Dataset:
    """Who writes at the first token, and how its own query and the others read it, by `layer`.

    - `attention_write`, `mlp_write`: norm of what the part adds to the residual state there;
      `other_attention_write`, `other_mlp_write`: mean over the other positions.
    - `first_self_logit`: the logit of the first token on itself, mean over heads.
    - `paper_sink_logit`: Δlogit as the paper's code has it, without the query's own key among the
      others; averaged over the occurrences of each character that is no trigger, then over those.

    NaN where a layer has no such part. Norms are means over texts.
    """
    check_token_ids("tokens", tokens)
    written: dict[str, Tensor] = {}
    with ExitStack() as hooks:
        for i, block in enumerate(model.layers):
            for name, part in (("attention", block.attention), ("mlp", block.mlp)):
                if part is not None:
                    hook = part.register_forward_hook(
                        lambda _, __, output, key=f"{name} {i}": written.update({key: output})
                    )
                    hooks.callback(hook.remove)
        model(tokens)
    layers = range(len(model.layers))
    norms = {key: states.norm(dim=-1).mean(0) for key, states in written.items()}
    nothing = tokens.new_full((tokens.shape[1],), math.nan, dtype=torch.float32)
    found: dict[str, list[float]] = {}
    for name in ("attention", "mlp"):
        of_layers = [norms.get(f"{name} {i}", nothing) for i in layers]
        found[f"{name}_write"] = [n[0].item() for n in of_layers]
        found[f"other_{name}_write"] = [n[1:].mean().item() for n in of_layers]
    logits = [
        attention_logits(model, tokens, layer=i) if model.layers[i].attention is not None else None
        for i in layers
    ]
    found["first_self_logit"] = [
        math.nan if s is None else s[:, :, 0, 0].mean().item() for s in logits
    ]
    found["paper_sink_logit"] = [
        math.nan if s is None else _paper_sink_logit(s, task, tokens) for s in logits
    ]
    return xr.Dataset({name: ("layer", np.array(values)) for name, values in found.items()})


def _paper_sink_logit(
    logits: Float[Tensor, "text head query key"], task: Task, tokens: Int[Tensor, "text position"]
) -> float:
    """`S[n, 0]` minus the mean of `S[n, i]` over `0 < i < n`, the mean over kinds of query."""
    length = tokens.shape[1]
    between = torch.ones(length, length, dtype=torch.bool, device=tokens.device).tril(-1)
    between[:, 0] = False
    mean = logits.masked_fill(~between, 0.0).sum(-1) / between.sum(-1)
    contrast = (logits[..., 0] - mean).mean(1)[:, 2:].flatten()
    kinds = F.one_hot(tokens[:, 2:].flatten(), task.vocab_size).to(contrast)
    of_kinds = (contrast @ kinds) / kinds.sum(0)
    characters = torch.arange(task.config.characters, device=tokens.device)
    ordinary = characters[~task.at_triggers(characters)]
    return of_kinds[ordinary].nanmean().item()


@check_arguments
def excess_risks(
    runs: list[Run], *, without: str | None = None, layer: int = 0
) -> dict[str, Float[np.ndarray, " seed"]]:
    """Excess backcopy and bigram risk of every run, in nats, whole or with a part cut.

    `without` is "attention" or "mlp", whose output in `layer` is set to zero (Figure 4a of
    arXiv 2410.13835).
    """
    check_some("runs", runs)
    found = []
    for run in runs:
        cut = zero(run.model, without, layer=layer) if without else nullcontext()
        with cut, torch.no_grad():
            found.append(run.task.risks(run.model(run.evaluation_tokens), run.evaluation_tokens))
    return {
        "backcopy": np.array([risks.backcopy_excess.item() for risks in found]),
        "bigram": np.array([risks.bigram_excess.item() for risks in found]),
    }


@check_arguments
def bigram_excess(
    toys: dict[str, list[Run]],
    changes: dict[str, Callable[[nn.Module], AbstractContextManager]],
) -> dict[str, dict[str, Float[np.ndarray, " seed"]]]:
    """Excess bigram risk of the runs of each toy under each change, in nats, by change and toy.

    A change is a context manager made of the model, such as `partial(streaming, window=8, kept=1)`
    or `quantized`. The risk is about tokens on which a head has nothing to do.
    """
    found: dict[str, dict[str, np.ndarray]] = {}
    for label, change in changes.items():
        found[label] = {}
        for name, runs in toys.items():
            with ExitStack() as changed:
                for run in runs:
                    changed.enter_context(change(run.model))
                found[label][name] = excess_risks(runs)["bigram"]
    return found


@check_arguments
def measure_with_sink_logit(
    model: Transformer, task: Task, tokens: Int[Tensor, "text position"]
) -> xr.Dataset:
    """`measure_toy`, and `sink_logit`: the mean of `sink_logit_by_token` over the characters that
    are no triggers."""
    characters = torch.arange(task.config.characters)
    ordinary = characters[~task.at_triggers(characters)].numpy()
    measured = measure_toy(model, task, tokens)
    sink_logit = measured.sink_logit_by_token.isel(token=ordinary).mean("token")
    return measured.assign(sink_logit=sink_logit)


@check_arguments
def measure_without(
    runs: list[Run], *parts: str, layer: int = 0, position: int | None = None
) -> xr.Dataset:
    """`measure_with_sink_logit` of every run, along `seed`, with parts of a layer cut.

    The `parts`, "attention" or "mlp", write zeros at one position or at all of them; without any
    part the models are measured as they are (Figure 7b of arXiv 2410.13835).
    """
    check_some("runs", runs)
    found = []
    for run in runs:
        with ExitStack() as cuts:
            for part in parts:
                cuts.enter_context(zero(run.model, part, layer=layer, position=position))
            found.append(measure_with_sink_logit(run.model, run.task, run.evaluation_tokens))
    return xr.concat(found, dim=_seeds(runs))


@check_arguments
def attention_by_key(runs: list[Run], *, layer: int | Int[np.ndarray, " seed"] = 0) -> xr.Dataset:
    """Where one layer's head looks from tokens that are not triggers, by the kind of key.

    A kind is a token, by its label. Position 0 is a kind of its own, the first one: `<s>`, or
    "first" in a task without it. Queries are those after the start tokens. `layer` is the same for
    all runs, or one for each. Over (seed, key):

    - `attention`: mean attention on all keys of the kind together; the kinds add up to 1.
    - `attention_where_visible`: the same over the queries that see such a key, themselves included.
    - `value_norm`: mean norm of the kind's value states.
    """
    check_some("runs", runs)
    found = []
    for run, layer_of_run in zip(runs, np.broadcast_to(layer, len(runs)).tolist(), strict=True):
        made, tokens = run.task, run.evaluation_tokens
        kinds = tokens.clone()
        kinds[:, 0] = made.vocab_size
        kinds = F.one_hot(kinds, made.vocab_size + 1).float()
        queries = ~made.at_triggers(tokens)
        queries[:, : max(made.config.starts, 1)] = False
        on_kinds = attention_weights(run.model, tokens, layer=layer_of_run)[:, 0] @ kinds
        sums, seen = on_kinds[queries].sum(0), (kinds.cumsum(1)[queries] > 0).sum(0)
        values = measure(run.model, tokens, ("value_norm",)).value_norm.values[:, layer_of_run, 0]
        values = torch.from_numpy(values).float()
        norms = torch.einsum("bt,btk->k", values, kinds) / kinds.sum((0, 1))
        labels = [*made.labels(torch.arange(made.vocab_size)), "first"]
        if made.start is not None:
            labels[made.start], labels[-1] = "never", "<s>"
        dataset = xr.Dataset(
            {
                "attention": ("key", (sums / queries.sum()).numpy()),
                "attention_where_visible": ("key", (sums / seen).numpy()),
                "value_norm": ("key", norms.numpy()),
            },
            coords={"key": labels},
        )
        kept = [labels[-1], *(label for label in labels[:-1] if label != "never")]
        found.append(dataset.sel(key=kept))
    return xr.concat(found, dim=_seeds(runs))


@check_arguments
def attention_by_role(
    attention: Float[xr.DataArray, "seed key"], made: Task
) -> dict[str, Float[np.ndarray, " seed"]]:
    """The `attention_by_key` by what keys are for: position 0, `<s2>`, `<d>`, triggers and so on.

    Roles that the task does not have are left out; the others add up to 1.
    """
    roles = {"position 0": ["first" if made.start is None else "<s>"]}
    if made.config.starts == 2:
        roles["<s2>"] = ["<s2>"]
    if made.config.delimiter_probability:
        roles["<d>"] = ["<d>"]
    if made.triggers:
        roles["triggers"] = made.labels(torch.tensor(made.triggers))
    roles["line break"] = [token_label("\n")]
    shares = {role: attention.sel(key=keys).sum("key").values for role, keys in roles.items()}
    return shares | {"others": 1 - sum(shares.values())}


class ExampleMap(NamedTuple):
    """The beginning of one text, and how a head attends while it reads it."""

    weights: Float[np.ndarray, "query key"]
    labels: list[str]
    triggers: Bool[np.ndarray, " query"]


@check_arguments
def example_map(run: Run, *, text: int = 0, layer: int = 0, length: int = 14) -> ExampleMap:
    """How one layer's head attends on the first tokens of one evaluation text."""
    check_whole_number("length", length, 1)
    tokens = run.evaluation_tokens[text : text + 1, :length]
    weights = attention_weights(run.model, tokens, layer=layer)[0, 0]
    triggers = run.task.at_triggers(tokens[0])
    return ExampleMap(weights.numpy(), run.task.labels(tokens[0]), triggers.numpy())


@check_arguments
def copying_layer(run: Run) -> int:
    """The layer in which triggers look most at the token before them, the one to be copied."""
    tokens = run.evaluation_tokens
    triggers = run.task.at_triggers(tokens)[:, 1:]
    looks_back = [
        attention_weights(run.model, tokens, layer=layer)[:, 0].diagonal(-1, 1, 2)[triggers].mean()
        for layer in range(len(run.model.layers))
    ]
    return int(torch.stack(looks_back).argmax())


@check_arguments
@torch.no_grad()
def dormant_characters(runs: list[Run], cutoff: float = 0.89) -> Float[np.ndarray, " seed"]:
    """The share of the characters that are not triggers on which the first head is dormant.

    Each is read at the end of `<s>` and all such characters in their order; the head is dormant if
    it gives `<s>` more than `cutoff` there. Test and cutoff are those of the paper's code.
    """
    check_number("cutoff", cutoff, 0, 1)
    check_some("runs", runs)
    shares = []
    for run in runs:
        made = run.task
        characters = torch.arange(made.config.characters)
        characters = characters[~made.at_triggers(characters)]
        prompt = torch.cat([torch.tensor([made.start]), characters])
        prompts = torch.cat([prompt.expand(len(characters), -1), characters[:, None]], dim=1)
        on_start = attention_weights(run.model, prompts, layer=0)[:, 0, -1, 0]
        shares.append((on_start > cutoff).float().mean().item())
    return np.array(shares)


@check_arguments
def sink_logit_spread(run: Run, *, layer: int = 0) -> float:
    """The standard deviation of logits towards the first token, over that towards other keys.

    Both over queries that are no triggers, on the evaluation texts; the first query has no other
    key. Concentration (Theorem 2c of arXiv 2410.13835) makes it small.
    """
    tokens = run.evaluation_tokens
    logits = attention_logits(run.model, tokens, layer=layer)[:, 0]
    asking = logits[:, 1:][~run.task.at_triggers(tokens[:, 1:])]
    others = asking[:, 1:]
    return (asking[:, 0].std() / others[torch.isfinite(others)].std()).item()


def _seeds(runs: list[Run]) -> xr.Variable:
    return xr.Variable("seed", [run.config.seed for run in runs])


def _named(risks: Risks) -> dict[str, Tensor]:
    names = {"backcopy": "backcopy_risk", "bigram": "bigram_risk"}
    return {names.get(name, name): value for name, value in risks._asdict().items()}


def _mean_by(values: xr.DataArray, token: xr.DataArray, vocab_size: int) -> xr.DataArray:
    """Mean over texts and positions for each token id; NaN for ids that do not occur."""
    values = values.transpose("layer", "head", "batch", "position")
    array, ids = values.values.reshape(*values.shape[:2], -1), token.values.reshape(-1)
    sums = np.zeros((*array.shape[:2], vocab_size))
    counts = np.zeros_like(sums)
    for index in np.ndindex(array.shape[:2]):
        known = np.isfinite(array[index])
        counts[index] = np.bincount(ids[known], minlength=vocab_size)
        sums[index] = np.bincount(ids[known], array[index][known], minlength=vocab_size)
    with np.errstate(invalid="ignore"):
        means = sums / counts
    return xr.DataArray(means, dims=("layer", "head", "token"))
