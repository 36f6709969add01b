"""What a short grid is worth: does the order of configurations at a share of the budget predict the order at the end?

At each share of the common budget: Kendall's tau-b between the means of configurations there and at the end, and the
regret, what the end loses if the leader at that moment is chosen instead of the leader at the end. Both are of means
over the seeds that the grid has, and noise lowers tau: it is what a grid with as many seeds sees, not what many seeds
would.

Interval: seeds are resampled within each configuration, a seed with its whole curve (bootstrap.py, residuals
stretched); the deviation of atanh(tau) over resamples gives atanh(tau) +- 1.96 se. Percentiles would lie too low:
resampling adds the noise a second time.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from scipy.stats import kendalltau

from analysis import effects, measures
from analysis.bootstrap import Array, resamples
from analysis.load import FINISHED

SHARES = (0.05, 0.1, 0.2, 0.3, 0.5, 0.75)


def stability(
    cells: pd.DataFrame, metrics: pd.DataFrame, metric: str, x: str = "device_hours", shares: tuple[float, ...] = SHARES
) -> pd.DataFrame:
    """A row per share of the budget: share, x, tau, low, high, regret, configurations. Empty for fewer than 3."""
    columns = ["share", "x", "tau", "low", "high", "regret", "configurations"]
    rows = effects.evaluations(cells, metrics, metric)
    rows = rows[rows["status"].isin(FINISHED)]
    if rows["configuration"].nunique() < 3:
        return pd.DataFrame(columns=columns)
    end = measures.budget(rows, x)
    where = end * np.array([*shares, 1])
    strata = [measures.at(group, x, where) for _, group in rows.groupby("configuration", sort=False)]
    means = np.stack([s.mean(0) for s in strata])  # [configurations, shares + 1]
    tau = _taus(means)
    spread = np.full(len(shares), np.nan)
    if any(len(s) > 1 for s in strata):
        edges = np.cumsum([0, *map(len, strata)])[:-1]
        sizes = np.array([len(s) for s in strata])
        drawn = resamples(strata, 200)  # [resamples, cells, shares + 1]
        drawn_means = np.add.reduceat(drawn, edges, axis=1) / sizes[None, :, None]
        spread = np.std([_atanh(_taus(m)) for m in drawn_means], axis=0, ddof=1)
    low, high = np.tanh(_atanh(tau) - 1.96 * spread), np.tanh(_atanh(tau) + 1.96 * spread)
    low, high = np.minimum(low, tau), np.maximum(high, tau)  # atanh stops short of tau = 1
    leaders = means[:, :-1].argmax(0)
    regret = means[:, -1].max() - means[leaders, -1]
    parts = (shares, where[:-1], tau, low, high, regret, [len(strata)] * len(shares))
    return pd.DataFrame(dict(zip(columns, parts, strict=True)))


def _taus(means: Array) -> Array:
    return np.array([kendalltau(column, means[:, -1]).statistic for column in means[:, :-1].T])


def _atanh(tau: Array) -> Array:
    clipped: Array = np.arctanh(tau.clip(-0.999, 0.999))
    return clipped
