"""Differences between two levels of an axis, and the probability that one beats the other. Frames -> frames.

Only configurations that differ in nothing else are compared, each with its partner, seed by seed: cells of one seed
share prompts, first noise and evaluation noise. With d_m the mean difference of pair m over n_m seeds and s_m their
deviation,

    difference = mean_m d_m,    se^2 = 1/M^2 sum_m s_m^2 / n_m,

Student's t with sum(a_m)^2 / sum(a_m^2 / (n_m + 1)) - 2 degrees of freedom, a_m = s_m^2 / n_m (Welch 1947;
Satterthwaite's form has too few where n_m is 2 or 3). It is the difference over these M pairs, with seeds as all that
is random.

Probability of improvement: P(X > Y) + P(X = Y) / 2 within each pair (Mann & Whitney), mean over pairs. Interval: the
probabilities p with |found - p| <= z se(p), se of Hanley & McNeil 1982 taken at p (Newcombe 2006, method 5), which
stays honest where one level wins every time; it takes the two samples as independent, and is wide where they are not.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pandas as pd
from scipy import stats
from scipy.optimize import brentq

from analysis.bootstrap import Array
from analysis.moderated import half_widths, welch_df

_COLUMNS = ["axis", "first", "second", "pairs", "runs", "difference", "low", "high"]
_PROBABILITY = ["probability", "probability_low", "probability_high"]


def levels(runs: pd.DataFrame, axes: Sequence[str], axis: str, value: str) -> pd.DataFrame:
    """Every two levels of an axis: first minus second, the probability that first is higher; NaN without partners."""
    others = [other for other in axes if other != axis]
    rows = []
    for first, second in itertools.combinations(dict.fromkeys(runs[axis]), 2):
        pairs = _partners(runs, others, axis, (first, second), value)
        row = {"axis": axis, "first": first, "second": second, "pairs": len(pairs)}
        samples = [(a.to_numpy(float), b.to_numpy(float)) for a, b in pairs]
        row |= {"runs": sum(len(a) + len(b) for a, b in samples)}
        differences = [(a - b).dropna().to_numpy(float) for a, b in pairs]
        rows.append({**row, **_mean(differences), **_probability(samples)})
    return pd.DataFrame(rows, columns=[*_COLUMNS, *_PROBABILITY])


def to_best(runs: pd.DataFrame, value: str) -> pd.DataFrame:
    """Each configuration minus the one with the highest mean, over the seeds that both have: configuration, difference,
    low, high, n. Intervals with moderated variances; the best itself has difference 0.

    The best was chosen from the same seeds, so the differences are a little too large.
    """
    table = runs.pivot_table(index="configuration", columns="seed", values=value, sort=False)
    best = table.mean(axis=1).idxmax()
    differences = table - table.loc[best]
    n = differences.notna().sum(axis=1).to_numpy(float)
    variance = differences.var(axis=1, ddof=1).to_numpy(float)
    half = half_widths(np.where(n > 1, variance, np.nan), n)
    half[table.index.get_loc(best)] = 0
    mean = differences.mean(axis=1).to_numpy(float)
    return pd.DataFrame(
        {"configuration": table.index, "difference": mean, "low": mean - half, "high": mean + half, "n": n.astype(int)}
    )


def _partners(
    runs: pd.DataFrame, others: list[str], axis: str, names: tuple[str, str], value: str
) -> list[tuple[pd.Series, pd.Series]]:
    """Values by seed of the configurations that have both levels."""
    groups: dict[tuple[object, ...], dict[str, pd.Series]] = {}
    for key, group in runs.groupby([*others, axis], sort=False):
        groups.setdefault(key[:-1], {})[key[-1]] = group.set_index("seed")[value]
    return [(found[names[0]], found[names[1]]) for found in groups.values() if set(names) <= set(found)]


def _mean(differences: list[Array]) -> dict[str, float]:
    used = [d for d in differences if len(d)]
    if not used:
        return {"difference": np.nan, "low": np.nan, "high": np.nan}
    mean, n = float(np.mean([d.mean() for d in used])), np.array([len(d) for d in used])
    if (n < 2).any() or all(np.ptp(d) == 0 for d in used):
        return {"difference": mean, "low": np.nan, "high": np.nan}
    error = np.array([d.var(ddof=1) for d in used]) / n
    df = welch_df(error, n - 1)
    half = stats.t.ppf(0.975, df) * np.sqrt(error.sum()) / len(used)
    return {"difference": mean, "low": mean - half, "high": mean + half}


def _probability(samples: list[tuple[Array, Array]], z: float = 1.96) -> dict[str, float]:
    if not samples:
        return dict.fromkeys(_PROBABILITY, np.nan)
    found = float(np.mean([((a[:, None] > b) + 0.5 * (a[:, None] == b)).mean() for a, b in samples]))
    sizes = [(len(a), len(b)) for a, b in samples]

    def gap(p: float) -> float:
        variance = sum(
            p * (1 - p) * (1 + (m - 1) * (1 - p) / (2 - p) + (n - 1) * p / (1 + p)) / (m * n) for m, n in sizes
        )
        return abs(found - p) - z * float(np.sqrt(variance)) / len(samples)

    low = brentq(gap, 0, found * (1 - 1e-9)) if found > 0 else 0.0
    high = brentq(gap, found + 1e-9 * (1 - found), 1) if found < 1 else 1.0
    return dict(zip(_PROBABILITY, (found, float(low), float(high)), strict=True))
