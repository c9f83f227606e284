"""The reduced model of attention on Bigram-Backcopy: closed forms and gradient flow.

What the paper analyses in place of a transformer (arXiv 2410.13835, section 2 and Theorem 2). A
query that is no trigger gives `<s>` the attention logit α and every other key the logit 0, so with
n other keys in view

    a = e^α / (e^α + n),    z = a·β + (1 - a)·W/n,    q = softmax(log p + z),

where p is the bigram row of the query's token (what the MLP adds to the logits), β is the value
state of `<s>` and W the sum of the value states of the other keys. The loss is the excess bigram
risk, the mean of KL(p ‖ q). Times are those of gradient flow: learning rate times steps of SGD.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import xarray as xr
from jaxtyping import Float64, Int64
from scipy.integrate import solve_ivp
from scipy.special import expit

from sinkbook.annotations import check_arguments
from sinkbook.arguments import check_number, check_whole_number, names_of
from sinkbook.errors import SinkbookError
from sinkbook.fits import positive_times
from sinkbook.toy.tasks import Task

SINK_LOGITS, SINK_VALUE = "sink_logits", "sink_value"


@dataclass(frozen=True, eq=False)
class ReducedModel:
    """What stays fixed while the sink logits α and the value state β of `<s>` learn.

    Attributes:
        transition: p, the bigram row of each token that can be a dormant query.
        weights: π, how often each of these tokens occurs, as a share of all positions.
        values: W, the sum of the value states of the other keys, in each context.
        visible: n, the number of other keys in each context.

    Contexts are equally likely; with a single one this is the setting of Theorem 2. Raises
    `SinkbookError` for rows that are no distributions, for rows and columns that never occur, and
    for negative value states.
    """

    transition: Float64[np.ndarray, "row token"]
    weights: Float64[np.ndarray, " row"]
    values: Float64[np.ndarray, "context token"]
    visible: Float64[np.ndarray, " context"]

    def __post_init__(self) -> None:
        rows, tokens, contexts = *self.transition.shape, len(self.visible)
        shapes = {"weights": (rows,), "values": (contexts, tokens), "visible": (contexts,)}
        for name, shape in shapes.items():
            check_finite(name, getattr(self, name), shape)
        sums = self.transition.sum(axis=1)
        if (wrong := ~(np.abs(sums - 1) <= 1e-9)).any() or (self.transition < 0).any():
            row = int(np.argmax(wrong | (self.transition < 0).any(axis=1)))
            raise SinkbookError(
                f"row {row} of the transition is no distribution: it sums to {sums[row]:.6g}, its "
                f"smallest entry is {self.transition[row].min():.6g}. Normalise it."
            )
        if not (self.weights > 0).all():
            row = int(np.argmin(self.weights))
            raise SinkbookError(
                f"row {row} has the weight {self.weights[row]:.6g}: its token never occurs, so "
                "nothing is learnt about it. Leave the row out."
            )
        if (never := self.transition.sum(axis=0) == 0).any():
            raise SinkbookError(
                f"no row leads to token {int(np.argmax(never))}, so its value has no gradient. "
                "Leave the column out."
            )
        if (self.values < 0).any():
            raise SinkbookError(
                f"a value state is {self.values.min():.6g}; the theorems need ξ >= 0. "
                "Use values that are not negative."
            )
        if (self.visible < 1).any():
            raise SinkbookError(
                f"a context has {self.visible.min():.6g} other keys; a query sees at least itself."
            )

    def sink_attention(
        self, sink_logits: Float64[np.ndarray, " row"]
    ) -> Float64[np.ndarray, "context row"]:
        """a = e^α / (e^α + n): the attention that each row gives `<s>` in each context."""
        return expit(sink_logits - np.log(self.visible)[:, None])

    def average(self, values: Float64[np.ndarray, "*rest row"]) -> np.float64 | np.ndarray:
        """Mean over rows, each as often as its token occurs."""
        return values @ self.weights / self.weights.sum()

    def divergences(
        self, sink_logits: Float64[np.ndarray, " row"], sink_value: Float64[np.ndarray, " token"]
    ) -> Float64[np.ndarray, " row"]:
        """KL(p ‖ q) of each row, mean over contexts, in nats."""
        return self._forward(sink_logits, sink_value)[2].mean(axis=0)

    def loss(
        self, sink_logits: Float64[np.ndarray, " row"], sink_value: Float64[np.ndarray, " token"]
    ) -> float:
        """The excess bigram risk, Σ π KL(p ‖ q), in nats."""
        return float(self.weights @ self.divergences(sink_logits, sink_value))

    def gradients(
        self, sink_logits: Float64[np.ndarray, " row"], sink_value: Float64[np.ndarray, " token"]
    ) -> tuple[Float64[np.ndarray, " row"], Float64[np.ndarray, " token"]]:
        """∂L/∂α and ∂L/∂β.

        ∂L/∂α = π · mean over contexts of a(1 - a)·(q - p)·(β - W/n) and
        ∂L/∂β = Σ π · mean over contexts of a·(q - p).
        """
        attention, deviation, divergence = self._forward(sink_logits, sink_value)
        # q - p without subtracting two nearly equal numbers: q/p = exp(z - p·z - KL).
        error = self.transition * np.expm1(deviation - divergence[..., None])
        pull = sink_value - self.values / self.visible[:, None]
        by_logit = attention * (1 - attention) * np.einsum("crt,ct->cr", error, pull)
        by_value = np.einsum("r,cr,crt->ct", self.weights, attention, error)
        return self.weights * by_logit.mean(axis=0), by_value.mean(axis=0)

    def _forward(self, sink_logits, sink_value):
        attention = self.sink_attention(sink_logits)
        mean_value = (self.values / self.visible[:, None])[:, None, :]
        share = attention[..., None]
        added = share * sink_value + (1 - share) * mean_value
        deviation = added - np.einsum("rt,crt->cr", self.transition, added)[..., None]
        # KL = log E_p exp(z) - E_p z, exact also where it is far below the rounding of the logits.
        excess = np.einsum("rt,crt->cr", self.transition, np.expm1(deviation))
        return attention, deviation, np.log1p(excess)

    def growth_rates(self) -> Float64[np.ndarray, " row"]:
        """C = π·Var_p(W) of each row, mean over contexts: what drives its sink logit.

        A row with a single possible successor has C = 0: no context can mislead it.
        """
        mean = np.einsum("rt,ct->cr", self.transition, self.values)
        deviation = self.values[:, None, :] - mean[..., None]
        variance = np.einsum("rt,crt->cr", self.transition, deviation**2)
        return self.weights * variance.mean(axis=0)


def check_finite(name: str, values: np.ndarray, shape: tuple[int, ...]) -> None:
    """Refuse an array of another shape, or with entries that are NaN or infinite."""
    if np.shape(values) != shape:
        raise SinkbookError(f"{name} has the shape {np.shape(values)}. Give {shape}.")
    if not np.isfinite(values).all():
        raise SinkbookError(
            f"{name} has a value state, weight, logit or context that is not finite. Give numbers."
        )


@check_arguments
def asymptotic_sink_logits(
    model: ReducedModel, times: Float64[np.ndarray, " time"]
) -> Float64[np.ndarray, "time row"]:
    """α(t) = ½·log(2·C·t), which each sink logit approaches while β is constant (Theorem 2a).

    Raises `SinkbookError` for times that are not positive, and for a row with C = 0.
    """
    times, rates = positive_times(times), model.growth_rates()
    if not (rates > 0).all():
        raise SinkbookError(
            f"row {int(np.argmin(rates))} has C = 0: nothing in view can mislead it, and its sink "
            "logit does not grow. Leave the row out."
        )
    return 0.5 * np.log(2 * rates * times[:, None])


@check_arguments
def adam_sink_logits(
    model: ReducedModel,
    steps: Float64[np.ndarray, " step"],
    *,
    start: float,
    learning_rate: float,
    positions: int,
) -> Float64[np.ndarray, "step row"]:
    """Sink logits under Adam on sampled texts while β is constant: our law, not the paper's.

    `positions` is the number of positions B·T in a batch. Once `<s>` has most of the attention a
    row's gradient has the mean C·e^-2α, and the draw of next tokens gives it the standard
    deviation e^-α·sqrt(C/(B·T)). Adam divides the mean by the root mean square:

        dα/dstep = lr / sqrt(1 + e^2α / (C·B·T)),

    so α grows linearly while e^α < sqrt(C·B·T), and then as log(lr·sqrt(C·B·T)·step), with the
    slope 1 against the logarithm of steps where gradient flow has 1/2.
    """
    check_number("learning_rate", learning_rate, 1e-12)
    check_whole_number("positions", positions, 1)
    scales = np.sqrt(model.growth_rates() * positions)
    path = np.linspace(start, start + 30, 20_000)

    def when(scale):
        u = np.exp(path) / scale
        passed = np.hypot(1, u) - np.arcsinh(1 / u)
        return (passed - passed[0]) / learning_rate

    return np.array([np.interp(positive_times(steps), when(scale), path) for scale in scales]).T


@check_arguments
def settled_sink_value(
    model: ReducedModel, sink_logit: float, start: Float64[np.ndarray, " token"]
) -> Float64[np.ndarray, " token"]:
    """β* = [mean β(0) + e^-α·mean W]·1 - e^-α·W, where β ends while α is fixed (Theorem 2b).

    α is the same in all rows. Raises `SinkbookError` for more than one context: then no value
    state of `<s>` cancels all of them.
    """
    if len(model.visible) > 1:
        raise SinkbookError(
            f"{len(model.visible)} contexts: β cancels a single W. Give a model with one context."
        )
    others = np.exp(-sink_logit) * model.values[0]
    return start.mean() + others.mean() - others


@check_arguments
def settling_rate(model: ReducedModel, sink_logit: float) -> float:
    """The rate at which β approaches β* in the end: the smallest eigenvalue of the Hessian there.

    The Hessian is a²·Σ π (diag p - p pᵀ); its eigenvalue 0 belongs to adding a constant to β.
    """
    rows, weights = model.transition, model.weights
    covariance = np.diag(weights @ rows) - np.einsum("r,rs,rt->st", weights, rows, rows)
    attention = model.sink_attention(np.array([sink_logit]))[0, 0]
    return float(attention**2 * np.linalg.eigvalsh(covariance)[1])


@check_arguments
def gradient_flow(
    model: ReducedModel,
    times: Float64[np.ndarray, " time"],
    sink_logits: Float64[np.ndarray, " row"],
    sink_value: Float64[np.ndarray, " token"],
    moving: Sequence[str] = (SINK_LOGITS, SINK_VALUE),
) -> xr.Dataset:
    """Follow dα/dt = -∂L/∂α and dβ/dt = -∂L/∂β from t = 0, and report at the given times.

    `sink_logits` and `sink_value` are the state at t = 0; what is not in `moving` stays there. The
    result has `sink_logits` (time, row), `sink_value` (time, token) and `loss` (time), and the
    attribute `half_asleep`: the first time at which the rows give `<s>` half of their attention on
    average, or NaN. The solver is stiff, adapts its step over any number of decades, and gives the
    same bits at every call. Raises `SinkbookError` for times that are not positive and increasing.
    """
    times, parts = positive_times(times), {SINK_LOGITS: sink_logits, SINK_VALUE: sink_value}
    check_finite(SINK_LOGITS, sink_logits, model.weights.shape)
    check_finite(SINK_VALUE, sink_value, model.values.shape[1:])
    moving = names_of("moving part", moving, parts)
    names = [name for name in parts if name in moving]
    cuts = np.cumsum([len(parts[name]) for name in names])[:-1]

    def unpack(state):
        return parts | dict(zip(names, np.split(state, cuts), strict=True))

    def velocity(_time, state):
        slopes = dict(zip(parts, model.gradients(**unpack(state)), strict=True))
        return -np.concatenate([slopes[name] for name in names])

    def sleepiness(_time, state):
        attention = model.sink_attention(unpack(state)[SINK_LOGITS])
        return float(model.average(attention).mean()) - 0.5

    sleepiness.direction = 1
    # With β fixed the rows do not see each other, and the Jacobian is diagonal.
    band = {"lband": 0, "uband": 0} if names == [SINK_LOGITS] else {}
    solution = solve_ivp(
        velocity,
        (0.0, times[-1]),
        np.concatenate([parts[name] for name in names]),
        method="LSODA",
        t_eval=times,
        events=sleepiness,
        rtol=1e-9,
        atol=1e-11,
        **band,
    )
    if not solution.success:
        raise SinkbookError(f"the flow could not be followed: {solution.message}")
    states = [unpack(state) for state in solution.y.T]
    found = {name: np.array([state[name] for state in states]) for name in parts}
    return xr.Dataset(
        {
            SINK_LOGITS: (("time", "row"), found[SINK_LOGITS]),
            SINK_VALUE: (("time", "token"), found[SINK_VALUE]),
            "loss": ("time", [model.loss(**state) for state in states]),
        },
        coords={"time": times},
        attrs={"half_asleep": float(next(iter(solution.t_events[0]), np.nan))},
    )


@check_arguments
def frequencies(
    transition: Float64[np.ndarray, "token token"],
    triggers: Sequence[int],
    first: Float64[np.ndarray, " token"],
    length: int,
) -> Float64[np.ndarray, " token"]:
    """The share of each token among the `length` tokens that follow `<s>` in Bigram-Backcopy texts.

    `first` is the distribution of the first one. After a trigger the text is back at the token
    before it: two steps that lead from a token to itself. There need be no equilibrium: in
    Shakespeare `3` is always followed by a space, which is a trigger, so no text leaves a `3`.
    Raises `SinkbookError` for rows that do not sum to one, and for a trigger that never occurs.

    >>> coin = np.array([[0.5, 0.5], [1.0, 0.0]])
    >>> frequencies(coin, triggers=[1], first=np.array([1.0, 0.0]), length=2)
    array([0.75, 0.25])
    """
    sums = transition.sum(axis=1)
    if (np.abs(sums - 1) > 1e-9).any():
        row = int(np.argmax(np.abs(sums - 1)))
        raise SinkbookError(f"row {row} of the transition sums to {sums[row]:.6g}. Normalise it.")
    is_trigger = np.isin(np.arange(len(transition)), triggers)
    leaving = transition[:, is_trigger].sum(axis=1)
    # Shares of texts with a given token here: no trigger; a trigger; a trigger after that token.
    ordinary, trigger, detour = first, np.zeros_like(first), np.zeros_like(first)
    total = np.zeros_like(first)
    for _ in range(length):
        total += ordinary + trigger
        step = ordinary @ transition
        ordinary, trigger, detour = (
            np.where(is_trigger, 0.0, step) + detour,
            np.where(is_trigger, step, 0.0),
            ordinary * leaving,
        )
    if never := [t for t in triggers if total[t] == 0]:
        raise SinkbookError(
            f"trigger {never[0]} has probability zero after every token: it never occurs. "
            "Choose triggers that do."
        )
    return total / length


@check_arguments
def token_shares(task: Task) -> Float64[np.ndarray, " token"]:
    """`frequencies` in the texts of a Bigram-Backcopy task, as shares of all positions."""
    transition, length = task.transition.numpy(), task.config.length - 1
    share = frequencies(transition, task.triggers, transition[task.start], length)
    return share * length / task.config.length


@check_arguments
def rows_and_tokens(
    task: Task,
) -> tuple[Int64[np.ndarray, " row"], Int64[np.ndarray, " token"]]:
    """Token ids of the rows and of the columns of a task's reduced model.

    Rows are the tokens that occur, are no triggers, and have more than one possible successor (the
    others know what comes next and cannot be misled). Columns are the tokens that follow them.
    """
    transition = task.transition.numpy()
    uncertain = (transition > 0).sum(axis=1) > 1
    rows = (token_shares(task) > 0) & uncertain & ~task.is_trigger.numpy()
    return np.flatnonzero(rows), np.flatnonzero(transition[rows].sum(axis=0))


@check_arguments
def reduced_model(
    task: Task,
    value: float | Float64[np.ndarray, " token"],
    contexts: int | None = None,
    seed: int = 0,
) -> ReducedModel:
    """The reduced model of a Bigram-Backcopy task.

    `value` is ξ, the size of the value state of each token (or of all of them). Without `contexts`
    there is a single one, the average over positions; else so many are drawn from the task's texts.
    Raises `SinkbookError` for a negative ξ.
    """
    if contexts is not None:
        check_whole_number("contexts", contexts, 1)
    if not np.isfinite(value).all() or np.min(value) < 0:
        raise SinkbookError(f"a value state ξ is {np.min(value):.6g}; give ξ >= 0.")
    rows, tokens = rows_and_tokens(task)
    share, length = token_shares(task), task.config.length
    if contexts is None:
        visible = np.array([length / 2])
        counts = visible * share[None] * length / (length - 1)
    else:
        texts = task.batch_at(contexts, seed, 0)[:, :-1].numpy()
        visible = np.random.default_rng(seed).integers(1, length, contexts).astype(float)
        seen = np.arange(length) <= visible[:, None]
        counts = np.array(
            [
                np.bincount(t[1:][s[1:]], minlength=len(share))
                for t, s in zip(texts, seen, strict=True)
            ]
        )
    return ReducedModel(
        transition=task.transition.numpy()[np.ix_(rows, tokens)],
        weights=share[rows],
        values=(counts * value)[:, tokens],
        visible=visible,
    )
