"""Results of cells, gains over the base, means over seeds, and curves on a common axis. Frames -> frames.

Brackets: 95 % intervals by Student's t over the seeds of a configuration, with variances moderated over configurations
(moderated.py). Bands around curves: percentile bootstrap (bootstrap.py), with 2 or 3 seeds their range, and called so.
Both cover the seeds of training, not the choice of held-out prompts, which all cells share.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from analysis.bootstrap import bootstrap, iqm
from analysis.load import FINISHED, KEYS
from analysis.moderated import intervals

GROUP = [*KEYS, "configuration"]


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

    Columns: KEYS, configuration, planned, n, base, final, final_low, final_high, final_iqm, gain, gain_low, gain_high,
    device_hours, nfe (both means per cell), states: how many cells are in which status.
    """
    results = finals(cells, metrics, metric)
    rows, found = [], []
    by_configuration = dict(list(results.groupby("configuration", sort=False)))
    for key, group in cells.groupby(GROUP, sort=False):
        own = by_configuration.get(key[-1], results[:0])
        counts = group["status"].value_counts()
        row: dict[str, object] = dict(zip(GROUP, key, strict=True))
        row |= {"planned": len(group), "n": len(own), "base": own["base"].mean()}
        row |= {"device_hours": own["device_hours"].mean(), "nfe": own["nfe"].mean()}
        row["states"] = ", ".join(f"{count} {str(status).replace('_', ' ')}" for status, count in counts.items())
        rows.append(row)
        found.append(own)
    table = pd.DataFrame(rows)
    for column in ("final", "gain"):
        samples = [own[column].dropna().to_numpy(float) for own in found]
        table[column], table[f"{column}_low"], table[f"{column}_high"] = intervals(samples)
        table[f"{column}_iqm"] = [float(iqm(sample)) if len(sample) else np.nan for sample in samples]
    return table


def curves(cells: pd.DataFrame, metrics: pd.DataFrame, metric: str, x: str) -> pd.DataFrame:
    """Mean and interval over the finished seeds of each configuration at every `x` where one of them was evaluated.

    Between evaluations a seed is interpolated; after its last it keeps its result, so that n does not change along a
    curve and its end is the mean in the table. Columns: configuration, x, mean, iqm, low, high, n.
    """
    rows = evaluations(cells, metrics, metric)
    rows = rows[rows["status"].isin(FINISHED)]
    frames = []
    for configuration, group in rows.groupby("configuration", sort=False):
        grid = np.unique(group[x].to_numpy(float))
        seeds = [np.interp(grid, seed[x], seed["value"]) for _, seed in group.groupby("id", sort=False)]
        low, high = bootstrap(np.stack(seeds))
        columns = {"x": grid, "mean": np.mean(seeds, axis=0), "iqm": iqm(np.stack(seeds, -1)), "low": low, "high": high}
        frames.append(pd.DataFrame({"configuration": configuration, **columns, "n": len(seeds)}))
    empty = pd.DataFrame(columns=["configuration", "x", "mean", "iqm", "low", "high", "n"])
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
