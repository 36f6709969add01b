"""Device time to target: a bar per configuration with its interval; those that never arrive, to the horizon."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from analysis import arrival
from analysis.study import Study
from analysis.style import HATCH, INK, MUTED, overlay_looks

MOST = 16  # rows; of a larger grid, the fastest for each estimator and sampler


def arrival_bars(study: Study) -> Figure:
    """Restricted mean time to the target, the fastest above."""
    frame = arrival.times_to_target(study.times, study.end).sort_values(["bound", "time"], kind="stable")
    if len(frame) > MOST:
        frame = frame.groupby(["estimator", "sampler"], sort=False).head(1)
    shown = frame.head(MOST)
    looks, size = overlay_looks(shown), study.unit.size
    figure = Figure(figsize=(7.0, 1.2 + 0.27 * len(shown)), layout="constrained")
    ax = figure.add_subplot()
    for y, (_, row) in enumerate(shown.iterrows()):
        if row["bound"]:
            ax.barh(y, row["time"] / size, height=0.62, **{**HATCH, "linewidth": 0.6})
        else:
            ax.barh(y, row["time"] / size, height=0.62, color=looks[row["configuration"]].color, alpha=0.75)
        if not np.isnan(row["low"]):
            ax.plot([row["low"] / size, row["high"] / size], [y, y], color=INK, linewidth=1.3, marker="|", markersize=6)
        ax.annotate(
            _text(row, study), (1.01, y), xycoords=("axes fraction", "data"), fontsize=7.5, color=MUTED, va="center"
        )
    ax.axvline(study.end / size, color=MUTED, linewidth=1, linestyle=(0, (4, 3)))
    ax.set_yticks(np.arange(len(shown)), shown["configuration"])
    ax.set(xlim=(0, 1.03 * study.end / size), ylim=(len(shown) - 0.4, -0.6))
    ax.set_xlabel(f"{study.unit.short} to {study.target:.3g}, cells that do not arrive counted up to the dashed line")
    ax.grid(axis="y", visible=False)
    if shown["bound"].any():
        label = "no seed arrives"
        figure.legend(handles=[Patch(**{**HATCH, "linewidth": 0.6}, label=label)], loc="outside lower left", fontsize=8)
    return figure


def _text(row: pd.Series, study: Study) -> str:
    arrived = f"{row['arrived']} of {row['n']} arrive"
    if row["bound"]:
        return f"> {study.end / study.unit.size:.3g}; {arrived}"
    ends = "" if np.isnan(row["low"]) else f" [{row['low'] / study.unit.size:.3g}, {row['high'] / study.unit.size:.3g}]"
    return f"{row['time'] / study.unit.size:.3g}{ends}; {arrived}"
