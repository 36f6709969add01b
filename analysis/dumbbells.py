"""Single combinations side by side: from the base model's value to the final one, a row each. Frames -> Figure."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from analysis.overview import result_text
from analysis.style import INK, MUTED, metric_label, overlay_looks


def dumbbells(table: pd.DataFrame, metric: str) -> Figure:
    """A row per configuration of a summary, the highest result on top; those without a result at the bottom."""
    rows = table.sort_values("final", ascending=False, kind="stable", na_position="last")
    looks = overlay_looks(table)
    figure = Figure(figsize=(8.4, 1.5 + 0.42 * len(rows)), layout="constrained")
    ax = figure.add_subplot()
    for y, (_, row) in enumerate(rows.iterrows()):
        color = looks[row["configuration"]].color
        if row["n"]:
            ax.plot([row["base"], row["final"]], [y, y], color=color, linewidth=1.2, alpha=0.5)
            ax.plot(row["base"], y, marker="o", markersize=8, markerfacecolor="white", color=MUTED)
            ax.plot([row["final_low"], row["final_high"]], [y, y], color=color, linewidth=4, alpha=0.35)
            ax.plot(row["final"], y, marker="o", markersize=6, color=color)
        ax.annotate(
            result_text(row), (1.01, y), xycoords=("axes fraction", "data"), va="center", fontsize=8, color=MUTED
        )
    ax.set_yticks(np.arange(len(rows)), rows["configuration"])
    ax.set(ylim=(len(rows) - 0.5, -0.5), xlabel=metric_label(metric))
    ax.grid(axis="y", visible=False)
    handles = [
        Line2D([], [], linestyle="", marker="o", markerfacecolor="white", color=MUTED, label="base model"),
        Line2D([], [], linestyle="", marker="o", color=INK, label="after training"),
    ]
    if table["n"].max() > 1:
        handles.append(Line2D([], [], linewidth=4, alpha=0.35, color=INK, label="95 % interval over seeds"))
    figure.legend(handles=handles, loc="outside upper left", ncols=3)
    return figure
