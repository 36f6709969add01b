"""What a cell is worth in one number: its final and its best value, and the area under its curve. Frames -> frame.

area = 1/B integral_0^B value dx: the mean height of the piecewise linear curve up to the common budget B, the
shortest that a finished cell has used. It rewards what is learned early, and is less noisy than the end. A diverged
cell keeps its last finite evaluation, as in finals. The best value is the highest of all evaluations, as of a paper
that reports its best checkpoint: it forgives what is lost afterwards, and grows with their noise and number.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from analysis import effects
from analysis.bootstrap import Array
from analysis.load import FINISHED


def budget(rows: pd.DataFrame, x: str) -> float:
    """The `x` that every cell that is done has reached; NaN without any."""
    done = rows[rows["status"] == FINISHED[0]]
    return float(done.groupby("id")[x].max().min()) if len(done) else np.nan


def areas(cells: pd.DataFrame, metrics: pd.DataFrame, metric: str, x: str = "device_hours") -> pd.DataFrame:
    """`finals`, a row per cell, with two more columns: best, and area, NaN where no cell is done."""
    results = effects.finals(cells, metrics, metric)
    rows = effects.evaluations(cells, metrics, metric)
    end = budget(rows, x)
    curves = {id: (curve[x].to_numpy(float), curve["value"].to_numpy(float)) for id, curve in rows.groupby("id")}
    best = [curves[id][1].max() for id in results["id"]]
    return results.assign(best=best, area=[area(*curves[id], end) for id in results["id"]])


def area(x: Array, value: Array, end: float) -> float:
    """Mean height of a curve on [x[0], end]; beyond its last point it keeps its value."""
    if not end > x[0]:
        return np.nan
    grid = np.append(x[x < end], end)
    return float(np.trapezoid(np.interp(grid, x, value), grid) / (end - x[0]))


def at(rows: pd.DataFrame, x: str, where: Array) -> Array:
    """Each cell's curve at `where`, in the order of first appearance: [cells, points]."""
    curves = [np.interp(where, curve[x], curve["value"]) for _, curve in rows.groupby("id", sort=False)]
    return np.stack(curves) if curves else np.empty((0, len(where)))
