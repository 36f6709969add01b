"""Time to target, with cells that never arrive. Frames -> frames.

T is where a cell's curve, linear between evaluations, first reaches the target. Without that the cell is

    diverged     it never arrives: T = infinity. That is its result; censoring it where it broke would say that it had
                 the same chances from there on as the others.
    done         censored at the end of its budget
    stopped      by successive halving: censored at its last evaluation. All seeds of a configuration stop together,
                 and it is compared up to there alone
    otherwise    censored at its last evaluation: what stopped it says nothing of when it would have arrived

and it is not dropped: the mean over those that arrived flatters what arrives rarely. Reported is the restricted mean

    E[min(T, h)] = integral_0^h S(x) dx,    S: Kaplan & Meier 1958,

up to the horizon h that all configurations share. Interval: on the logarithm, from the spread of the jackknife's
pseudo-values (Andersen et al. 2004; without censoring before h they are min(T, h) themselves) over their mean, with
Student's t of moderated.py. Ratios of configurations: the same for differences of logarithms. A configuration in
which no seed arrives has no interval; its restricted mean is h, and its ratios are lower bounds. So are those of a
configuration that is followed to f < h alone, with the area up to f.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy import stats

from analysis import effects
from analysis.bootstrap import Array
from analysis.load import FINISHED
from analysis.moderated import moderate, welch_df

DIVERGED = FINISHED[1]


def default_target(summary: pd.DataFrame, share: float = 0.5) -> float:
    """The value half of the way from the base to the highest mean of a configuration, to two digits; NaN if none.

    Chosen after the fact and from the same data: a target that was named beforehand is better.
    """
    best, base = summary["final"].max(), summary["base"].mean()
    return float(np.floor(100 * (base + share * (best - base))) / 100) if best > base else np.nan


def arrivals(cells: pd.DataFrame, metrics: pd.DataFrame, metric: str, target: float, x: str) -> pd.DataFrame:
    """A row per evaluated cell: id, GROUP, seed, status, time, arrived. `time` is where it arrived or was censored."""
    rows = effects.evaluations(cells, metrics, metric)
    found = []
    for _, curve in rows.groupby("id", sort=False):
        time = crossing(curve[x].to_numpy(float), curve["value"].to_numpy(float), target)
        arrived = bool(np.isfinite(time))
        if not arrived and curve["status"].iloc[0] != DIVERGED:
            time = float(curve[x].iloc[-1])
        row = curve.iloc[0][["id", *effects.GROUP, "seed", "status"]].to_dict()
        found.append({**row, "time": time, "arrived": arrived})
    return pd.DataFrame(found, columns=["id", *effects.GROUP, "seed", "status", "time", "arrived"])


def crossing(x: Array, value: Array, target: float) -> float:
    """Where a piecewise linear curve first reaches the target; infinity if it does not."""
    above = np.flatnonzero(value >= target)
    if not len(above):
        return np.inf
    i = above[0]
    if i == 0:
        return float(x[0])
    share = (target - value[i - 1]) / (value[i] - value[i - 1])
    return float(x[i - 1] + share * (x[i] - x[i - 1]))


def horizon(times: pd.DataFrame) -> float:
    """The largest h at which every configuration with a finished cell is still followed, or has arrived whole."""
    ends = []
    for _, group in times.groupby("configuration", sort=False):
        if group["status"].isin(FINISHED).any():
            followed = group.loc[~group["arrived"], "time"]
            ends.append(followed.max() if len(followed) else np.inf)
    finite = [end for end in ends if np.isfinite(end)]
    return float(min(finite)) if finite else float(times.loc[times["arrived"], "time"].max())


def followed(group: pd.DataFrame, end: float) -> float:
    """Up to where the survival curve of a configuration is known: `end`, or the last cell's censoring before it."""
    known = group[group["status"] != DIVERGED].sort_values(["time", "arrived"], kind="stable")
    if known.empty or known["arrived"].iloc[-1]:
        return end
    return min(end, float(known["time"].iloc[-1]))


def survival(time: Array, arrived: Array) -> tuple[Array, Array]:
    """Kaplan and Meier: the distinct times of arrival, and the share of cells that has not arrived right after each."""
    steps = np.unique(time[arrived])
    at_risk = (time[None] >= steps[:, None]).sum(1)
    events = ((time[None] == steps[:, None]) & arrived[None]).sum(1)
    return steps, np.cumprod(1 - events / at_risk)


def restricted_mean(time: Array, arrived: Array, end: float) -> float:
    """The area under the survival curve up to `end`."""
    steps, left = survival(time, arrived)
    edges = np.concatenate([[0], steps[steps < end], [end]])
    heights = np.concatenate([[1], left[steps < end]])
    return float((np.diff(edges) * heights).sum())


def pseudo_values(time: Array, arrived: Array, end: float) -> Array:
    """n mean - (n - 1) mean without the cell, for each cell: [n]. Their mean is taken for the restricted mean."""
    n, whole = len(time), restricted_mean(time, arrived, end)
    if n == 1:
        return np.array([whole])
    others = [restricted_mean(np.delete(time, i), np.delete(arrived, i), end) for i in range(n)]
    return n * whole - (n - 1) * np.array(others)


def times_to_target(times: pd.DataFrame, end: float) -> pd.DataFrame:
    """By configuration: GROUP, n, arrived, never (diverged), time, low, high, ratio, ratio_low, ratio_high, bound.

    `time` is the restricted mean; `ratio` is to the fastest configuration, chosen from the same seeds, which makes it a
    little too large; with `bound`, no seed arrives before `end`, or none is followed so far, and time and ratio are
    lower bounds.
    """
    rows = []
    for key, group in times.groupby(effects.GROUP, sort=False):
        time, arrived = group["time"].to_numpy(float), group["arrived"].to_numpy(bool)
        seen, until = int((arrived & (time <= end)).sum()), followed(group, end)
        row: dict[str, object] = dict(zip(effects.GROUP, key, strict=True))
        row |= {"n": len(group), "arrived": seen, "never": int((group["status"] == DIVERGED).sum())}
        rows.append({**row, "time": restricted_mean(time, arrived, until), "bound": seen == 0 or until < end})
    frame = pd.DataFrame(rows)
    spread, n = _spreads(times, end)
    variance, df = moderate(spread, n - 1)
    error = variance / n
    half = _half(error[:, None], df[:, None])
    frame["low"], frame["high"] = frame["time"] * np.exp(-half), (frame["time"] * np.exp(half)).clip(upper=end)
    fastest = int(frame["time"].mask(frame["bound"] & ~frame["bound"].all()).argmin())
    first = np.full(len(frame), fastest)
    half = _half(np.stack([error, error[first]], -1), np.stack([df, df[first]], -1))
    half[fastest] = 0
    frame["ratio"] = frame["time"] / frame["time"].iloc[fastest]
    frame["ratio_low"], frame["ratio_high"] = frame["ratio"] * np.exp(-half), frame["ratio"] * np.exp(half)
    return frame


def ratios(times: pd.DataFrame, axes: Sequence[str], axis: str, end: float) -> pd.DataFrame:
    """How many times as long one level takes as another: axis, first, second, pairs, ratio, low, high, bound.

    The geometric mean over configurations that differ in nothing else. With `bound`, one of them never arrives: if it
    has the first level the ratio is at least this, and where the second never arrives either the pair is left out.
    """
    frame = times_to_target(times, end)
    spread, n = _spreads(times, end)
    settings = times.drop_duplicates("configuration")[list(axes)]
    at = {tuple(row): i for i, row in enumerate(settings.to_numpy())}
    place, bounds = list(axes).index(axis), frame["bound"].to_numpy(bool)
    rows = []
    for first, second in itertools.permutations(dict.fromkeys(settings[axis]), 2):
        partners = [
            (i, at.get((*key[:place], second, *key[place + 1 :]))) for key, i in at.items() if key[place] == first
        ]
        pairs = [(i, j) for i, j in partners if j is not None and not bounds[j]]
        if not pairs:
            continue
        flat = np.array(pairs).T.ravel()
        logs = [np.log(frame["time"].iloc[i] / frame["time"].iloc[j]) for i, j in pairs]
        bound = bool(bounds[[i for i, _ in pairs]].any())
        half = np.nan if bound else float(_half((spread / n)[flat], (n - 1)[flat])) / len(pairs)
        mean = float(np.mean(logs))
        row = {"axis": axis, "first": first, "second": second, "pairs": len(pairs), "ratio": np.exp(mean)}
        rows.append({**row, "low": np.exp(mean - half), "high": np.exp(mean + half), "bound": bound})
    return pd.DataFrame(rows, columns=["axis", "first", "second", "pairs", "ratio", "low", "high", "bound"])


def _spreads(times: pd.DataFrame, end: float) -> tuple[Array, Array]:
    """Variance of pseudo-values over their squared mean, that of their logarithm, of each configuration; and seeds."""
    spread, n = [], []
    for _, group in times.groupby(effects.GROUP, sort=False):
        values = pseudo_values(group["time"].to_numpy(float), group["arrived"].to_numpy(bool), end)
        whole = followed(group, end) == end
        known = whole and len(values) > 1 and values.mean() > 0 and values.std() > 0
        spread.append(values.var(ddof=1) / values.mean() ** 2 if known else np.nan)
        n.append(len(values))
    return np.array(spread), np.array(n, float)


def _half(error: Array, df: Array) -> Array:
    """Half the interval of a sum of estimates with these squared errors [..., parts]; NaN where one is not known."""
    half: Array = stats.t.ppf(0.975, welch_df(error, df)) * np.sqrt(error.sum(-1))
    return half


def restricted(times: pd.DataFrame, end: float) -> pd.DataFrame:
    """`times` with one more column, restricted: each cell's pseudo-value, a response for factorial designs."""
    parts = [
        group.assign(restricted=pseudo_values(group["time"].to_numpy(float), group["arrived"].to_numpy(bool), end))
        for _, group in times.groupby("configuration", sort=False)
    ]
    return pd.concat(parts, ignore_index=True) if parts else times.assign(restricted=[])
