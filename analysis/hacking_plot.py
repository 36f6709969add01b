"""Reward hacking: training reward against held-out change, a panel per measure, a mark per cell. Frames -> Figure."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from analysis.load import Results, values
from analysis.style import INK, MUTED, looks_of


def hacking_plot(results: Results, changed: pd.DataFrame) -> Figure:
    """`changed` is hacking.changes. Filled: the reward rises and the measure falls by more than its noise."""
    names, estimators = list(changed["measure"].unique()), values(results, "estimator")
    looks, columns = looks_of(estimators), min(len(names), 4)
    rows = -(-len(names) // columns)
    figure = Figure(figsize=(max(3.6, 1.9 * columns), 0.9 + 2.0 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for ax, name in zip(axes.flat, names, strict=False):
        here = changed[changed["measure"] == name]
        flagged = here["falls"] & here["rises"].eq(True)
        for estimator in estimators:
            for fill, part in ((True, here[flagged]), (False, here[~flagged])):
                own, look = part[part["estimator"] == estimator], looks[estimator]
                face = look.color if fill else "white"
                style: dict[str, Any] = {"marker": look.marker, "markersize": 4.5, "markerfacecolor": face}
                ax.plot(own["reward_change"], own["change"], linestyle="", color=look.color, alpha=0.8, **style)
        noise = here["noise"].median()
        if np.isfinite(noise):
            ax.axhspan(-noise, noise, color=MUTED, alpha=0.13, linewidth=0)
        ax.axhline(0, color=MUTED, linewidth=0.9)
        ax.set_title(f"{name}: {flagged.sum()} of {len(here)}", loc="left", color=INK, fontsize=8)
    for ax in axes.flat[len(names) :]:
        ax.set_visible(False)
    figure.supxlabel("training reward, last fifth minus first fifth of epochs", fontsize=9)
    figure.supylabel("held-out change", fontsize=9)
    handles = [
        axes[0, 0].plot([], [], linestyle="", marker=looks[e].marker, color=looks[e].color, markersize=5, label=e)[0]
        for e in estimators
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=min(len(estimators), 5))
    return figure
