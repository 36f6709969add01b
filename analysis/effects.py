"""Estimates with intervals: results of cells, gains over the base, means over seeds, curves on a common axis.

Interval: percentile bootstrap of the mean over seeds, 95 %. Up to 5 seeds all n^n resamples are enumerated, so the
interval has no randomness of its own; with more, 4000 are drawn from a fixed seed. For 2 and 3 seeds it is their range,
and is called so: it holds the true mean in 50 and 74 % of cases only (84 % with 5 seeds).
It covers the seeds of training, not the choice of held-out prompts, which all cells share.
"""

from __future__ import annotations

import itertools

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from analysis.load import FINISHED, KEYS

Array = NDArray[np.float64]
GROUP = [*KEYS, "configuration"]


def bootstrap(samples: Array, level: float = 0.95) -> tuple[Array, Array]:
    """Lower and upper end for the mean of samples [n, ...] over the first dimension; NaN for n = 1."""
    n = len(samples)
    if n == 1:
        return np.full(samples.shape[1:], np.nan), np.full(samples.shape[1:], np.nan)
    means = np.tensordot(shares(n), samples, axes=1)  # [resamples, ...]
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2], axis=0, method="inverted_cdf")
    return low, high


def interval_name(most_seeds: int) -> str:
    """What an interval over so many seeds is to be called."""
    return "range over seeds" if most_seeds <= 3 else "95 % bootstrap interval over seeds"


def shares(n: int) -> Array:
    """The share of each sample in each resample, [resamples, n]."""
    if n <= 5:
        picks = np.array(list(itertools.product(range(n), repeat=n)))
    else:
        picks = np.random.default_rng(0).integers(n, size=(4000, n))
    shares: Array = (picks[:, :, None] == np.arange(n)).mean(1)
    return shares


def evaluations(cells: pd.DataFrame, metrics: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Finite values of one metric with the columns of their cell, in order of epochs."""
    rows = metrics[(metrics["metric"] == metric) & np.isfinite(metrics["value"])]
    joined: pd.DataFrame = rows.merge(cells[["id", *GROUP, "seed", "status"]], on="id", validate="many_to_one")
    return joined.sort_values(["id", "epoch"], ignore_index=True)


def base(cells: pd.DataFrame, metrics: pd.DataFrame, metric: str) -> float:
    """Mean evaluation at epoch 0, of finished and unfinished cells alike; NaN before the first."""
    rows = evaluations(cells, metrics, metric)
    return float(rows.loc[rows["epoch"] == 0, "value"].mean())


def finals(cells: pd.DataFrame, metrics: pd.DataFrame, metric: str) -> pd.DataFrame:
    """The result of every finished cell: last evaluation, epoch 0, and their difference (same prompts and noise).

    A diverged cell counts with its last finite evaluation: leaving it out would flatter unstable configurations.
    """
    rows = evaluations(cells, metrics, metric)
    rows = rows[rows["status"].isin(FINISHED)]
    last = rows.groupby("id", sort=False).tail(1).rename(columns={"value": "final"})
    first = rows.loc[rows["epoch"] == 0].set_index("id")["value"]
    last = last.assign(base=first.reindex(last["id"]).to_numpy(float))
    return last.assign(gain=last["final"] - last["base"])[
        ["id", *GROUP, "seed", "status", "device_hours", "nfe", "base", "final", "gain"]
    ]


def summary(cells: pd.DataFrame, metrics: pd.DataFrame, metric: str) -> pd.DataFrame:
    """One row per configuration of the plan, finished or not: means with intervals over `n` finished seeds.

    Columns: KEYS, configuration, planned, n, base, final, final_low, final_high, gain, gain_low, gain_high,
    device_hours, nfe (both means per cell), states: how many cells are in which status.
    """
    results = finals(cells, metrics, metric)
    rows = []
    for key, group in cells.groupby(GROUP, sort=False):
        found = results[results["id"].isin(group["id"])]
        counts = group["status"].value_counts()
        row: dict[str, object] = dict(zip(GROUP, key, strict=True))
        row |= {"planned": len(group), "n": len(found), "base": found["base"].mean()}
        for column in ("final", "gain"):
            sample = found[column].dropna().to_numpy(float)
            low, high = bootstrap(sample) if len(sample) else (np.array(np.nan), np.array(np.nan))
            row |= {column: found[column].mean(), f"{column}_low": float(low), f"{column}_high": float(high)}
        row |= {"device_hours": found["device_hours"].mean(), "nfe": found["nfe"].mean()}
        row["states"] = ", ".join(f"{count} {str(status).replace('_', ' ')}" for status, count in counts.items())
        rows.append(row)
    return pd.DataFrame(rows)


def curves(cells: pd.DataFrame, metrics: pd.DataFrame, metric: str, x: str) -> pd.DataFrame:
    """Mean and interval over the finished seeds of each configuration at every `x` where one of them was evaluated.

    Between evaluations a seed is interpolated; after its last it keeps its result, so that n does not change along a
    curve and its end is the mean in the table. Columns: configuration, x, mean, low, high, n.
    """
    rows = evaluations(cells, metrics, metric)
    rows = rows[rows["status"].isin(FINISHED)]
    frames = []
    for configuration, group in rows.groupby("configuration", sort=False):
        grid = np.unique(group[x].to_numpy(float))
        seeds = [np.interp(grid, seed[x], seed["value"]) for _, seed in group.groupby("id", sort=False)]
        low, high = bootstrap(np.stack(seeds))
        columns = {"x": grid, "mean": np.mean(seeds, axis=0), "low": low, "high": high}
        frames.append(pd.DataFrame({"configuration": configuration, **columns, "n": len(seeds)}))
    empty = pd.DataFrame(columns=["configuration", "x", "mean", "low", "high", "n"])
    return pd.concat(frames, ignore_index=True) if frames else empty


def strands(cells: pd.DataFrame, metrics: pd.DataFrame, metric: str, x: str) -> pd.DataFrame:
    """Curves of the cells that no mean holds, and the ends of diverged ones: id, configuration, status, x, value."""
    rows = evaluations(cells, metrics, metric)
    rows = rows[rows["status"] != "done"].rename(columns={x: "x"})
    return rows[["id", "configuration", "status", "x", "value"]]


def best(table: pd.DataFrame, by: list[str]) -> pd.DataFrame:
    """The rows of a summary with the highest final mean within each group; groups without a result are left out."""
    ranked = table[table["n"] > 0].sort_values("final", ascending=False, kind="stable")
    return ranked.groupby(by, sort=False).head(1).sort_index()
