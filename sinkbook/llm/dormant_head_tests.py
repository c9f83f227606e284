"""What held-out texts say about heads that were chosen on others: sizes, errors, corrections.

    found = evidence(candidates, scan(reader.model, held_out), changes)

Texts that had a say in choosing a head never judge it: `evidence` refuses them. Candidates, scans
and changes of loss come from `dormant_heads.py`.
"""

import numpy as np
import pandas as pd
import xarray as xr
from jaxtyping import Float
from scipy import stats

from sinkbook.annotations import check_arguments
from sinkbook.errors import SinkbookError
from sinkbook.llm.dormant_heads import SIDES

# What makes a head dormant in one domain and active in another: the criteria of the claims.
LEAST_GAP = 0.4  # of sink attention
LEAST_RISE = 0.05  # nats that the active domain loses without the head,
LEAST_RATIO = 5  # and in standard errors
MOST_RISE = 0.01  # nats, either way, in the dormant domain

Changes = Float[xr.DataArray, "candidate domain text"]


@check_arguments
def evidence(candidates: pd.DataFrame, scanned: xr.Dataset, changes: Changes) -> pd.DataFrame:
    """What texts say about candidates that they did not choose: a row for each.

    - `gap`: sink attention in the dormant domain minus that in the active one;
    - `active_change`, `dormant_change`: rise of the mean loss without the head, in nats;
    - `gap_error`, `active_error`, `dormant_error`: their standard errors over texts; with `_low`
      and `_high` in the place of `_error`, the ends of their 95 % intervals;
    - `active_ratio`: the active change over its standard error;
    - `active_p`: of a t-test that the active change is 0, `corrected_p`: the same corrected for
      all rows of the table (see `corrected`);
    - `meets`: whether all four criteria at the head of this module are met, `meets_surely`:
      whether they are by both ends of the intervals.

    Raises `SinkbookError` if a text had a say.
    """
    seen = set().union(*candidates.chosen_on) & set(scanned.text.values.tolist())
    if seen:
        raise SinkbookError(
            f"text {min(seen)} had a say in choosing the heads that it should judge. "
            "Give a scan and changes of the other half of the texts."
        )
    return _judged(candidates, scanned, changes)


@check_arguments
def shortlist(
    candidates: pd.DataFrame, scanned: xr.Dataset, changes: Changes, count: int
) -> pd.DataFrame:
    """The `count` most promising candidates by the texts that they were chosen on, best first.

    Those that surely meet the criteria there come before the others, and those whose loss rises
    more on the active domain, by the lower end of its interval, before those where it rises less.
    """
    found = _judged(candidates, scanned, changes)
    order = found.sort_values(["meets_surely", "active_low"], ascending=False).index[:count]
    return candidates.loc[order].reset_index(drop=True)


def _judged(candidates: pd.DataFrame, scanned: xr.Dataset, changes: xr.DataArray) -> pd.DataFrame:
    count = changes.sizes["text"]
    scanned = scanned.sel(text=changes.text)
    attention = {side: at(scanned.sink_attention, candidates, side) for side in SIDES}
    change = {side: at(changes, candidates, side) for side in SIDES}
    spread = sum(values.var(axis=1, ddof=1) for values in attention.values())
    gap = (attention["dormant"] - attention["active"]).mean(axis=1)
    found = candidates.assign(gap=gap)
    _add_interval(found, "gap", gap, np.sqrt(spread / count), count)
    for side in SIDES:
        mean, error = change[side].mean(axis=1), stats.sem(change[side], axis=1)
        found[f"{side}_change"] = mean
        _add_interval(found, side, mean, error, count)
    found["active_ratio"] = found.active_change / found.active_error
    p = stats.ttest_1samp(change["active"], 0, axis=1).pvalue
    found["active_p"] = np.nan_to_num(p, nan=1.0)  # not a single loss has moved
    found["corrected_p"] = corrected(found.active_p)
    enough = found.active_ratio >= LEAST_RATIO
    found["meets"] = enough & _meet(found.gap, found.active_change, found.dormant_change.abs())
    farthest = found[["dormant_low", "dormant_high"]].abs().max(axis=1)
    found["meets_surely"] = enough & _meet(found.gap_low, found.active_low, farthest)
    return found


def _add_interval(
    found: pd.DataFrame, name: str, mean: np.ndarray, error: np.ndarray, count: int
) -> None:
    reach = stats.t.ppf(0.975, count - 1) * error
    found[f"{name}_error"] = error
    found[f"{name}_low"], found[f"{name}_high"] = mean - reach, mean + reach


def _meet(gap: pd.Series, active: pd.Series, dormant: pd.Series) -> pd.Series:
    return (gap >= LEAST_GAP) & (active >= LEAST_RISE) & (dormant <= MOST_RISE)


@check_arguments
def at(
    values: xr.DataArray, candidates: pd.DataFrame, side: str
) -> Float[np.ndarray, "candidate text"]:
    """A variable of `scan`, or what `ablate` found, in each candidate's domain of that side."""
    names = ["layer", "head"] if "layer" in values.dims else ["candidate"]
    table = candidates.rename_axis("candidate").reset_index()
    where = {name: xr.DataArray(table[name], dims="row") for name in names}
    where["domain"] = xr.DataArray(table[side], dims="row")
    return values.sel(where).transpose("row", "text").values


# --- Having searched ---------------------------------------------------------------------------


@check_arguments
def corrected(p: np.ndarray | pd.Series | list[float]) -> Float[np.ndarray, " test"]:
    """P values corrected for there being many: Benjamini and Yekutieli's false discovery rate.

    Theirs holds however the tests depend on each other, as those on the same texts do.

    >>> corrected([0.001, 0.5]).round(4).tolist()
    [0.003, 0.75]
    """
    return stats.false_discovery_control(p, method="by")


@check_arguments
def chance_gaps(
    scanned: xr.Dataset,
    *,
    pair: tuple[str, str] | None = None,
    count: int = 1000,
    seed: int = 0,
) -> Float[np.ndarray, " shuffle"]:
    """The largest gap of all heads if texts had nothing to do with domains.

    Shuffles which text belongs to which domain, `count` times, for all heads together, and takes
    the largest gap that any head then has (as `dormant_heads.gaps` defines it, of sink attention).
    A head whose gap lies above 95 % of them stands out although hundreds were searched.
    """
    domains = scanned.domain if pair is None else list(pair)
    attention = scanned.sink_attention.sel(domain=domains)
    attention = attention.stack(row=("domain", "text")).stack(unit=("layer", "head"))
    values = attention.transpose("row", "unit").dropna("unit").values
    generator = np.random.default_rng(seed)
    largest = []
    for _ in range(count):
        shuffled = values[generator.permutation(len(values))]
        means = shuffled.reshape(len(domains), -1, shuffled.shape[1]).mean(axis=1)
        gap = np.ptp(means, axis=0) if pair is None else means[1] - means[0]
        largest.append(gap.max())
    return np.array(largest)


# --- Telling without taking away -----------------------------------------------------------------

DETECTORS = {
    "attention kept from the sink": lambda case: 1 - case.sink_attention,
    "norm of its output": lambda case: case.head_output_norm,
    "output norm / layer's mean": lambda case: case.output_share,
}


@check_arguments
def cases(candidates: pd.DataFrame, scanned: xr.Dataset, changes: Changes) -> pd.DataFrame:
    """Every candidate in each of its two domains: what detectors say, and what it is worth.

    A row for each, `candidate` and `side` first, then the means over texts of the variables of
    `scan`, and `effect`, the size of the mean change of loss in nats, rise or fall.
    """
    scanned = scanned.sel(text=changes.text)
    rows = []
    for side in SIDES:
        means = {name: at(values, candidates, side).mean(1) for name, values in scanned.items()}
        effect = np.abs(at(changes, candidates, side).mean(axis=1))
        rows.append(pd.DataFrame({"candidate": candidates.index, "side": side, **means}))
        rows[-1]["effect"] = effect
    return pd.concat(rows, ignore_index=True)


@check_arguments
def agreement(found: pd.DataFrame, *, count: int = 2000, seed: int = 0) -> xr.DataArray:
    """Spearman's correlation of each detector with the effect, over (detector, draw).

    Draw 0 is of all `cases`; the others resample heads, each with both of its domains, for an
    interval.
    """
    sides = [found[found.side == side].set_index("candidate") for side in SIDES]
    effect = np.stack([side.effect for side in sides])
    generator = np.random.default_rng(seed)
    heads = effect.shape[1]
    draws = np.vstack([np.arange(heads), generator.integers(heads, size=(count - 1, heads))])
    ranks = {"effect": stats.rankdata(effect[:, draws].swapaxes(0, 1).reshape(count, -1), axis=1)}
    for name, detector in DETECTORS.items():
        values = np.stack([detector(side) for side in sides])[:, draws]
        ranks[name] = stats.rankdata(values.swapaxes(0, 1).reshape(count, -1), axis=1)
    centred = {name: r - r.mean(axis=1, keepdims=True) for name, r in ranks.items()}
    size = {name: np.sqrt(np.square(c).sum(axis=1)) for name, c in centred.items()}
    correlations = [
        (centred[name] * centred["effect"]).sum(axis=1) / (size[name] * size["effect"])
        for name in DETECTORS
    ]
    return xr.DataArray(
        correlations, dims=("detector", "draw"), coords={"detector": list(DETECTORS)}
    )
