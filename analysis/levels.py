"""Levels of an axis side by side, over combinations that all of them have. Frames -> frames.

A level that lacks a sampler (trajectory has no ode) would be averaged over other combinations than the rest: only
values of the other axes that every level has been run with are taken, and how many that are is said. Runs of these are
pooled: interquartile mean (mean of the middle half) with a bootstrap over seeds, stratified by configuration; and the
performance profile, the share of runs that end above tau, at every tau (Agarwal et al. 2021).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from analysis import effects, measures
from analysis.bootstrap import Array, iqm, stratified
from analysis.load import FINISHED


def shared(runs: pd.DataFrame, axes: Sequence[str], axis: str) -> pd.DataFrame:
    """The runs at values of the other axes that all levels have; all runs where none is shared."""
    others = [other for other in axes if other != axis]
    if not others:
        return runs
    found = runs.groupby(others, sort=False)[axis].transform("nunique") == runs[axis].nunique()
    return runs[found] if found.any() else runs


def curves(
    cells: pd.DataFrame, metrics: pd.DataFrame, metric: str, axes: Sequence[str], axis: str, x: str = "device_hours"
) -> pd.DataFrame:
    """IQM of every level at 41 points up to the common budget: level, x, iqm, low, high, configurations, runs."""
    rows = effects.evaluations(cells, metrics, metric)
    rows = rows[rows["status"].isin(FINISHED)].merge(cells[["id", *(a for a in axes if a not in rows)]], on="id")
    runs = shared(rows, axes, axis)
    where = np.linspace(0, measures.budget(rows, x), 41)
    frames = []
    for level, group in runs.groupby(axis, sort=False):
        strata = [measures.at(cell, x, where) for _, cell in group.groupby("configuration", sort=False)]
        estimate, low, high = stratified(strata)
        columns = {"level": level, "x": where, "iqm": estimate, "low": low, "high": high}
        frames.append(pd.DataFrame({**columns, "configurations": len(strata), "runs": sum(map(len, strata))}))
    return pd.concat(frames, ignore_index=True)


def profiles(runs: pd.DataFrame, axes: Sequence[str], axis: str, value: str = "final") -> pd.DataFrame:
    """Share of each level's runs above tau: level, tau, share, low, high, configurations, runs."""
    kept = shared(runs, axes, axis)
    spread = kept[value].max() - kept[value].min()
    taus = np.linspace(kept[value].min() - 0.02 * spread, kept[value].max() + 0.02 * spread, 101)

    def above(values: Array) -> Array:
        share: Array = (values[..., None] > taus).mean(-2)
        return share

    frames = []
    for level, group in kept.groupby(axis, sort=False):
        strata = [cell[value].to_numpy(float) for _, cell in group.groupby("configuration", sort=False)]
        estimate, low, high = stratified(strata, above)
        low, high = low.clip(0, 1), high.clip(0, 1)
        columns = {"level": level, "tau": taus, "share": estimate, "low": low, "high": high}
        frames.append(pd.DataFrame({**columns, "configurations": len(strata), "runs": sum(map(len, strata))}))
    return pd.concat(frames, ignore_index=True)


def means(runs: pd.DataFrame, axes: Sequence[str], axis: str, value: str) -> pd.DataFrame:
    """Mean and IQM of every level over shared combinations: level, mean, low, high, iqm, iqm_low, iqm_high, runs."""
    rows = []
    for level, group in shared(runs, axes, axis).groupby(axis, sort=False):
        strata = [cell[value].to_numpy(float) for _, cell in group.groupby("configuration", sort=False)]
        mean, middle = (map(float, stratified(strata, statistic)) for statistic in (_mean, iqm))
        named = dict(zip(("mean", "low", "high", "iqm", "iqm_low", "iqm_high"), (*mean, *middle), strict=True))
        rows.append({"level": level, **named, "configurations": len(strata), "runs": sum(map(len, strata))})
    return pd.DataFrame(rows)


def _mean(values: Array) -> Array:
    mean: Array = values.mean(-1)
    return mean
