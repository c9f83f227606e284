"""Calls that fit, and which odd values each of their arguments takes; all others are refused.

A line is a call and what its arguments take, `name=kind`, where a kind is one of `KINDS`, and `?`
stands for None. What is not named there takes none of them.
"""

import ast
import functools
import importlib
import inspect
from dataclasses import fields, is_dataclass

# What stands in the place of each argument in turn.
VALUES = [
    "None",
    "nan",
    "inf",
    "-1",
    "0",
    "True",
    "'x'",
    "b'x'",
    "[]",
    "[None, 'x', 0.5]",
    "10**30",
    "np.int64(1)",
    "np.float32(0.5)",
    "torch.tensor(1)",
]
# Those that mean the same as a number of Python's own: they give what that gives.
MEANT = {"np.int64(1)": "1", "torch.tensor(1)": "1", "np.float32(0.5)": "0.5"}

_WHOLE, _SHARE = {"np.int64(1)", "torch.tensor(1)"}, {"np.int64(1)", "np.float32(0.5)"}
KINDS = {
    "?": {"None"},
    "size": _WHOLE,  # a whole number from 1 on
    "count": {"0"} | _WHOLE,
    "counts": {"0", "[]"} | _WHOLE,  # or several
    "place": {"0"},  # a whole number below another, which is 1 here
    "places": {"-1", "0", "[]"} | _WHOLE,  # from the end as well, or several
    "share": {"0"} | _SHARE,
    "cosine": {"-1", "0"} | _SHARE,
    "below one": {"0", "np.float32(0.5)"},
    "positive": {"10**30"} | _SHARE,
    "rate": {"0", "10**30"} | _SHARE,
    "amount": {"0", "10**30", "inf"} | _SHARE,
    "number": {"-1", "0", "10**30"} | _SHARE,
    "time": {"-1", "0", "10**30", "inf"} | _SHARE,
    "measurement": {"-1", "0", "10**30", "inf", "nan", "True"} | _SHARE,
    "measurements": {"-1", "0", "10**30", "inf", "nan", "True", "torch.tensor(1)"} | _SHARE,
    "flag": {"True"},
    "list": {"[]"},
    "text": {"'x'"},
    # In a config, numbers are Python's own: its JSON is part of a run's name.
    "own count": {"0"},
    "own rate": {"0", "10**30"},
}

# What a message calls an argument, where that is not its name.
CALLED = {
    "activations": "ranges",
    "args": "tokens",
    "batch_size": "size",
    "claim_id": "claim",
    "counts": "Cut from",
    "first_value": "first value",
    "inputs": "token",
    "int8": "ranges",
    "norm_place": "place of a norm",
    "parts": "part",
    "text": "condition",
    "values": "claim",
    "window": "stride",
    "without": "part",
}

CALLS = {
    "measure(llama, ids, ['loss'], attention_mask=torch.ones_like(ids), position_ids=ids % 8, queries=torch.ones(2, 8).bool(), sink=0)": (
        "attention_mask=?, position_ids=?, queries=?, sink=count?"
    ),
    "measure(small_toy, ids, ['loss'], sink=0)": "sink=count?",
    "measure_texts(reader, ['to be'], ['loss'], length=9, batch_size=2)": "batch_size=size",
    "attention_weights(llama, ids, layer=0)": "layer=count",
    "attention_logits(llama, ids, layer=0)": "layer=count",
    "zero(llama, 'head', layer=0, head=0, position=0)": (
        "layer=count, head=counts, position=places?"
    ),
    "replace(llama, 'mlp', 0.0, layer=0, position=0)": (
        "with_=number, layer=count, position=places?"
    ),
    "reading(llama, 'mlp', layer=0)": "layer=count",
    "stand_in(torch.ones(2, 3, 4), 'shuffled', seed=0)": "seed=count",
    "sink_rate(measured, threshold=0.3)": "threshold=share",
    "above_null(important, level=0.95)": "level=share",
    "value_drain_ratio(measured, others=measured.value_norm)": "others=?",
    "residual_peak_ratio(measured, others=measured.residual_norm)": "others=?",
    "residual_peak_height(measured, others=measured.residual_norm)": "others=?",
    "massive_activations(hidden, floor=100.0, factor=1000.0)": "floor=rate, factor=rate",
    "kurtosis_of_text(hidden)": "",
    "kurtosis_of_tokens(hidden)": "",
    "kurtosis_of_dimensions(hidden)": "",
    "sink_metrics(llama, ids, tokenizer=None, attention_mask=torch.ones_like(ids), length=8)": (
        "tokenizer=?, attention_mask=?, length=size"
    ),
    "sink_metrics(llama, ['to be'], tokenizer=reader.tokenizer, length=8)": "length=size",
    "SinkCallback(ids, every=2, tokenizer=None, attention_mask=torch.ones_like(ids), length=8)": (
        "every=size, tokenizer=?, attention_mask=?, length=size"
    ),
    "SinkCache(llama, sinks=1, window=4)": "sinks=count, window=size",
    "streaming(llama, window=4, kept=1)": "window=size, kept=counts",
    "streaming_losses(llama, ids, window=4, sinks=[0], random=1, stride=2, seed=0)": (
        "sinks=list, random=count, stride=size, seed=count"
    ),
    "recomputed_losses(llama, ids, window=4, stride=2)": "stride=size",
    "quantized(llama, 'token', weights=True)": "activations=?, weights=flag",
    "int8_error(hidden, ranges='tensor', first=0)": "first=count",
    "layer_errors(llama, ids, first=1, batch_size=1)": "first=count, batch_size=size",
    "largest_and_error(llama, ids, batch_size=1)": "batch_size=size",
    "rounding_losses(llama, ids)": "",
    "eviction_losses(llama, ids, prompt=4, budgets=[3], sinks=1, seed=0)": "sinks=size, seed=count",
    "head_orders(llama, ids)": "",
    "without_heads(llama, np.array([0]), 4)": "per_layer=size",
    "pruning_losses(llama, ids, orders, [0.5], draws=1, seed=0)": "draws=size, seed=count",
    "without_early_or_late(llama, ids, np.array([0]), below=1)": "below=count",
    "token_losses(llama, ids, last=2)": "last=size?",
    "perplexity(losses, after=0)": "after=count",
    "writes(llama, ids, position=0)": "position=count",
    "compression(llama, ids)": "",
    "symptoms(llama, ids)": "",
    "cut_each(llama, ids, position=0, parts=['mlp'], cuts=[0])": "position=count?, cuts=?",
    "in_its_place(llama, ids, 'mlp', layer=1, position=0, ways=['zero'], seed=0)": (
        "layer=count, position=count, seed=count"
    ),
    "unit_writes(llama, ids, layer=1, position=0)": "layer=count, position=count",
    "cut_units(llama, ids, layer=1, counts=[1], draws=1, seed=0)": (
        "layer=count, draws=count, seed=count"
    ),
    "down_projection(llama, ids, layer=1)": "layer=count",
    "find_writer(llama, ids, share=0.99)": "share=amount",
    "cut_writer(tiny_model(), ids, share=0.99)": "share=amount",
    "repeated(ids, keep=1, times=2)": "keep=count, times=size",
    "halves(several, seed=0)": "seed=count",
    "scan(llama, several)": "",
    "gaps(scanned, by='sink_attention', pair=('a', 'b'))": "pair=?",
    "select(scanned, 2, by='sink_attention', pair=('a', 'b'))": "count=count, pair=?",
    "random_heads(scanned, 1, without=chosen, seed=0)": "count=count, seed=count",
    "loss_changes(llama, several[0], [(0, 0)], way='zero', seed=0)": "seed=count",
    "ablate(llama, several, chosen, everywhere=(0,), way='zero', other_ways=None, seed=0)": (
        "everywhere=list, other_ways=list?, seed=count"
    ),
    "random_repeated(reader, count=1, length=4, seed=0)": "count=size, length=size, seed=count",
    "head_scores(reader, ids % 8, repeated(ids % 8, times=2))": "",
    "writes_at_rest(llama, ids, least=0.5)": "least=share",
    "effective_rank(hidden)": "",
    "is_delimiter(reader, ids % 8)": "",
    "changed_texts(reader, ['to be or not to be the'] * 2, length=4, seed=0)": (
        "length=size, seed=count"
    ),
    "seen_by_all(llama, ids)": "",
    "random_query_logits(llama, ids, count=2, prefix=2, seed=0)": (
        "count=size, prefix=size, seed=count"
    ),
    "last_query_logits(llama, ids)": "",
    "logit_spread(checkpoint, pool_heads=False)": "pool_heads=flag",
    "concentration(checkpoint, pool_heads=False)": "pool_heads=flag",
    "of_document(reader, 'to be or not to be', count=1, length=4)": "count=size",
    "of_texts(reader, ['to be or not to be'], count=1, length=4)": "count=size, length=size",
    "measure_windows(reader, ids % 8)": "",
    "measure_one(reader, ids % 8, int8=None)": "int8=?",
    "train_all([training()], way='auto', device='cpu', checkpoint_seconds=30.0, executor=None, until=inf)": (
        "configs=list, checkpoint_seconds=amount, executor=?, until=time"
    ),
    "train(training(), device='cpu', checkpoint_seconds=30.0)": "checkpoint_seconds=amount",
    "seeds_of(training(), 2)": "count=count",
    "schedule(10, 4, first=1.0, every=2)": "steps=size, count=count, first=positive, every=size?",
    "Task(task.config)": "",
    "task.batch(2, generator=None)": "size=size, generator=?",
    "task.batch_at(2, 0, 0, device='cpu')": "size=size, seed=count, step=count",
    "task.oracle(batch)": "",
    "task.risks(torch.zeros(2, 16, 67), tokens)": "",
    "task.encode('to be')": "text=text",
    "task.labels(batch[0])": "",
    "Transformer(small_toy.config)": "",
    "measure_toy(small_toy, task, tokens)": "",
    "measure_with_sink_logit(small_toy, task, tokens)": "",
    "measure_writers(small_toy, task, tokens)": "",
    "excess_risks([run], without='mlp', layer=0)": "without=?, layer=place",
    "measure_without([run], 'mlp', layer=0, position=0)": "layer=place, position=count?",
    "attention_by_key([run], layer=0)": "layer=place",
    "attention_by_role(attention_by_key([run]).attention, task)": "",
    "example_map(run, text=0, layer=0, length=8)": "text=count, layer=place, length=size",
    "copying_layer(run)": "",
    "dormant_characters([long_run], cutoff=0.89)": "cutoff=share",
    "sink_logit_spread(run, layer=0)": "layer=place",
    "distance_moved(run, layer=0)": "layer=place",
    "at_loss(run, 'residual_norm', loss=4.2)": "loss=number",
    "transplants(deep_run, directions=2, position=2, texts=2)": (
        "directions=size, position=count, texts=size"
    ),
    "under_mitigations(training(), 1)": "count=count",
    "value_norms_before_gate(small_toy, tokens)": "",
    "gradient_flow(reduced, np.array([1.0, 10.0]), logits, value, moving=('sink_logits',))": "",
    "asymptotic_sink_logits(single, np.array([1.0]))": "",
    "adam_sink_logits(reduced, np.array([1.0]), start=1.0, learning_rate=0.1, positions=16)": (
        "start=number, learning_rate=positive, positions=size"
    ),
    "settled_sink_value(single, 1.0, value)": "sink_logit=number",
    "settling_rate(single, 1.0)": "sink_logit=number",
    "reduced_model(task, 1.0, contexts=2, seed=0)": "value=rate, contexts=size?, seed=count",
    "construction(task, 1.0, 1.0)": "logit=number, value=rate",
    "construction_excess(task, batch, 1.0, 1.0)": "logit=number, value=rate",
    "expected_excess(task, batch, 1.0, 1.0)": "logit=number, value=number",
    "risks_beside_law(task, batch, sink_logit=1.0, length=1.0)": "sink_logit=number, length=rate",
    "train_reduced(task, learning_rate=0.1, steps=1, batch_size=1, seed=0)": (
        "learning_rate=rate, steps=size, batch_size=size, seed=count"
    ),
    "train_sink(task, 'adam', value=1.0, start=1.0, learning_rate=0.1, steps=1, batch_size=1, seed=0, second_beta=0.99, moving=('sink_logits',))": (
        "value=rate, start=number, learning_rate=rate, steps=size, batch_size=size, seed=count, second_beta=below one"
    ),
    "peak_flow(np.array([1.0, 2.0]), 1.0, c=0.0)": "start=rate, c=cosine",
    "peak_closed_form(np.array([1.0]), 1.0, c=0.0)": "start=rate, c=cosine",
    "peak_coefficient(c=0.0)": "c=below one",
    "peak_steps(torch.optim.SGD, 2, 1.0, c=0.0)": "steps=size, start=rate, c=cosine",
    "with_damped_values(Transformer(small_toy.config), 0.5)": "factor=number",
    "with_isolated_position(Transformer(small_toy.config), 1)": "position=count",
    "value_gradients(Transformer(small_toy.config), task, batch)": "",
    "variance_by_position(TransformerConfig(length=16), batch, 0)": "seed=count",
    "AveragingTask(8, symbols=8, kinds=4, announce=False)": (
        "length=size, symbols=size, kinds=size, announce=flag"
    ),
    "train_averaging(AveragingTask(8), 'softmax', steps=1, batch_size=2, seed=0)": (
        "steps=count, batch_size=size, seed=count"
    ),
    "attention_on(small_toy, task, tokens, (0,))": "",
    "line(points, points, seed=0)": "seed=count",
    "log_slope(points, points[:, None])": "",
    "interval_of_mean(points)": "",
    "log_then_plateau(points, points, seed=0)": "seed=count",
    "halfway(series)": "",
    "first_step(series > 2)": "",
    "bootstrap_interval([1.0, 2.0])": "differences=list",
    "corrected([0.1, 0.2])": "p=list",
    "texts('numbers', 2, minimum_characters=600)": "count=size?, minimum_characters=count",
    "fetch('shakespeare', accept_license=False)": "accept_license=flag",
    "condition('sink_rate<0.4')": "",
    "satisfies('>= 1', 1.0)": "value=measurement",
    "judge(claim, [1.0], profile='quick')": "values=measurements",
    "Chapter('quick', 0)": "seed=own count",
    "reader.encode(['to be or'], 2)": "length=size",
    "reader.tokenize(['to be'])": "texts=list",
    "PretrainingConfig(steps=1, seed=0, repeated=0.5, learning_rate=1e-3, batch_size=1)": (
        "seed=own count, repeated=own count, learning_rate=own rate"
    ),
    "SmallLlama(steps=2, seed=0, learning_rate=1e-3)": "seed=own count, learning_rate=own rate",
    "Config(steps=2, seed=0, share=0.9, batch_size=2)": "seed=own count, share=own count",
    "SinkTask(2, register=False)": "announcing=count, register=flag",
    "attention_maps(llama, ids, queries=torch.tensor([1]), layer=0)": "queries=?, layer=count?",
    "running_texts(several, ['a', 'b'], length=7)": "length=size",
    "trace(llama, running, chosen)": "",
    "small_toy(tokens)": "",
    "TaskConfig(rule='backcopy', length=16, characters=10, triggers=3, starts=1, random_first=False, delimiter_probability=0.0, copy_probability=1.0)": (
        "triggers=own count, starts=own count, random_first=flag, delimiter_probability=own count, copy_probability=own count"
    ),
    "TransformerConfig(vocab_size=9, length=16, width=8, layers=1, heads=1, attention='softmax', null_slot_speed=1.0, qk_norm=False, gate='none', head_norm=False, first_value='free', norm='layer', norm_place='pre', without_attention=(), without_mlp=(), linear_mlp=())": (
        "layers=own count, null_slot_speed=own rate, qk_norm=flag, head_norm=flag"
    ),
    "training(task=task.config, model=small_toy.config, steps=2, batch_size=2, learning_rate=1e-3, weight_decay=0.0, measurements=1, evaluation_size=2, seed=0, precision='float32', optimizer='adamw', details=False)": (
        "learning_rate=own rate, weight_decay=own rate, seed=own count, details=flag"
    ),
}

# Contexts, which do what they do in a body.
CONTEXTS = {"quantized", "reading", "replace", "streaming", "without_heads", "zero"}

NAMES = {
    "sinkbook.fits": "halfway first_step interval_of_mean line log_then_plateau",
    "sinkbook.llm.checkpoint_metrics": "concentration logit_spread",
    "sinkbook.llm.dormant_head_tests": "corrected",
    "sinkbook.llm.dormant_heads": "gaps halves random_heads running_texts select",
    "sinkbook.llm.head_types": "effective_rank random_repeated",
    "sinkbook.llm.sink_location": "changed_texts",
    "sinkbook.mitigations.registry": "under_mitigations",
    "sinkbook.models.interventions": "reading",
    "sinkbook.models.losses": "perplexity",
    "sinkbook.probe.metrics": "above_null kurtosis_of_dimensions kurtosis_of_text "
    "kurtosis_of_tokens massive_activations residual_peak_height",
    "sinkbook.report.comparison": "bootstrap_interval",
    "sinkbook.theory.alternatives": "AveragingTask train_averaging value_gradients "
    "with_damped_values with_isolated_position",
    "sinkbook.theory.peak_growth": "peak_coefficient",
    "sinkbook.theory.reduced_model": "adam_sink_logits settled_sink_value settling_rate",
    "sinkbook.theory.reduced_network": "construction train_reduced train_sink",
    "sinkbook.theory.two_sinks": "SinkTask",
    "sinkbook.toy.measurements": "attention_by_key attention_by_role copying_layer "
    "dormant_characters example_map excess_risks measure_without sink_logit_spread",
    "sinkbook.toy.optimizer_dynamics": "at_loss distance_moved",
    "sinkbook.toy.peak_tests": "transplants",
}


def takes(written: str) -> dict[str, set[str]]:
    """The values that each argument takes."""
    found = {}
    for argument in filter(None, written.split(", ")):
        name, kind = argument.split("=")
        kinds = [kind.removesuffix("?"), *kind[len(kind.removesuffix("?")) :]]
        found[name] = set().union(*(KINDS[each] for each in kinds if each))
    return found


def with_values(call: str) -> dict[str, dict[str, str]]:
    """A call with each odd value in the place of each argument, by its place and the value.

    A place is a number, or the name of a keyword: only the function knows the others' names.
    """
    found: dict[str, dict[str, str]] = {}
    for number in range(len(ast.parse(call, mode="eval").body.args)):
        found[str(number)] = {}
    for keyword in ast.parse(call, mode="eval").body.keywords:
        found[keyword.arg] = {}
    for place, inputs in found.items():
        for value in VALUES:
            inputs[value] = f"tried({call!r}, {place!r}, {value!r}, {MEANT.get(value)!r})"
    return found


def names() -> dict:
    """All that the inputs name: `tried`."""
    known = _known()
    as_meant = functools.cache(lambda call: _made(call, known))

    def tried(call: str, place: str, value: str, meant: str | None):
        """What a call gives with a value in a place; the name of that is put before a message."""
        from sinkbook.errors import SinkbookError

        try:
            found = _made(_changed(call, place, value), known)
        except SinkbookError as error:
            raise SinkbookError(f"{_name(call, place, known)}: {error}") from error
        if meant is not None:
            same = as_meant(_changed(call, place, meant))
            assert alike(found, same), f"{found!r:.200} instead of {same!r:.200}"
        raise TakenError(f"{_name(call, place, known)}: taken")

    return {"tried": tried}


class TakenError(Exception):
    """A value was taken: the outcome of an input is an error, which has a message."""


def _changed(call: str, place: str, value: str) -> str:
    """A call with another value in one place, in a body if it is a context."""
    changed = ast.parse(call, mode="eval").body
    instead = ast.parse(value, mode="eval").body
    if place.isdecimal():
        changed.args[int(place)] = instead
    else:
        next(each for each in changed.keywords if each.arg == place).value = instead
    written = ast.unparse(changed)
    return f"within({written})" if ast.unparse(changed.func) in CONTEXTS else written


def _made(call: str, known: dict) -> object:
    import torch

    torch.manual_seed(0)
    found = eval(call, known)
    return list(found) if inspect.isgenerator(found) else found


def _name(call: str, place: str, known: dict) -> str:
    """The name of the argument in a place."""
    if not place.isdecimal():
        return place
    function = eval(ast.unparse(ast.parse(call, mode="eval").body.func), known)
    parameters = list(inspect.signature(function).parameters.values())
    several = [each for each in parameters if each.kind == each.VAR_POSITIONAL]
    number = int(place)
    if several and number >= parameters.index(several[0]):
        return several[0].name
    return parameters[number].name


def alike(found: object, wanted: object) -> bool:
    """Whether two results say the same."""
    import numpy as np
    import torch

    found, wanted = (
        each.item() if isinstance(each, np.generic) else each for each in (found, wanted)
    )
    if type(found) is not type(wanted):
        return False
    if is_dataclass(found):
        return all(alike(getattr(found, f.name), getattr(wanted, f.name)) for f in fields(found))
    if isinstance(found, torch.Tensor):
        return found.shape == wanted.shape and torch.allclose(found, wanted, equal_nan=True)
    if isinstance(found, np.ndarray):
        return bool(np.array_equal(found, wanted, equal_nan=found.dtype.kind == "f"))
    if isinstance(found, float):
        return found == wanted or (np.isnan(found) and np.isnan(wanted))
    if isinstance(found, dict):
        return found.keys() == wanted.keys() and all(alike(found[k], wanted[k]) for k in found)
    if isinstance(found, list | tuple):
        return len(found) == len(wanted) and all(map(alike, found, wanted))
    if hasattr(found, "identical"):  # of xarray
        return found.drop_attrs().identical(wanted.drop_attrs())
    if hasattr(found, "equals"):  # of pandas
        return bool(found.equals(wanted))
    plain = type(found).__eq__ is object.__eq__  # such as a module or a cache: made is enough
    return plain or bool(found == wanted)


def _known() -> dict:
    """What the calls name."""
    import numpy as np
    import torch
    import xarray as xr
    from arguments import names as of_arguments

    from sinkbook.toy.transformer import TransformerConfig

    found = of_arguments()
    for module, listed in NAMES.items():
        of_module = importlib.import_module(module)
        found |= {name: getattr(of_module, name) for name in listed.split()}
    llama, ids, training = found["llama"], found["ids"], found["training"]
    batch = found["task"].batch(2)
    several = xr.DataArray(
        torch.stack([torch.stack([ids[n], ids[n] + 1]) for n in (0, 1)]).numpy(),
        dims=("domain", "text", "position"),
        coords={"domain": ["a", "b"], "text": [0, 1], "position": range(8)},
    )
    scanned = found["scan"](llama, several)
    losses = xr.DataArray(
        found["token_losses"](llama, ids),
        dims=("text", "position"),
        coords={"position": range(1, 8)},
    )
    model = {size: TransformerConfig(length=size, width=8) for size in (16, 96)}
    deep = TransformerConfig(length=16, width=8, layers=3)
    return found | {
        "batch": batch,
        "tokens": batch[:, :-1],
        "hidden": torch.randn(2, 8, 16),
        "several": several,
        "scanned": scanned,
        "chosen": found["select"](scanned, 2),
        "running": found["running_texts"](several, ["a", "b"], length=7),
        "losses": losses,
        "important": found["measure"](
            llama, ids, ("sink_attention", "key_importance", "even_importance")
        ),
        "checkpoint": found["measure_checkpoint"](llama, ids, random_queries=2),
        "series": xr.DataArray(np.arange(5.0), dims="step", coords={"step": np.arange(5)}),
        "points": np.array([1.0, 2.0, 4.0, 8.0, 16.0]),
        "run": found["train"](training()),
        "long_run": found["train"](training(task=found["TaskConfig"](length=96), model=model[96])),
        "deep_run": found["train"](training(model=deep)),
        "single": found["reduced_model"](found["task"], 1.0),
    }
