"""Effect sizes: the share of variance that each axis and interaction explains, with intervals. Study -> Figure."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from analysis.design import ALL
from analysis.factorial import SEEDS
from analysis.study import Study
from analysis.style import INK, MUTED, palette


def share_bars(study: Study) -> Figure:
    """A panel per response, a row per term: dot for omega squared, bar for its 95 % interval."""
    responses, colors = study.responses(), palette(study.axes)
    tables = [study.explained[response].set_index("term") for response in responses]
    names = [str(name) for name in tables[0].index if name != ALL and tables[0].loc[name, "df"] > 0]
    figure = Figure(figsize=(7.0, 1.1 + 0.27 * len(names)), layout="constrained")
    axes = figure.subplots(1, len(tables), sharex=True, sharey=True, squeeze=False)[0]
    for ax, table, words in zip(axes, tables, responses.values(), strict=True):
        for y, name in enumerate(names):
            if name not in table.index or np.isnan(table.loc[name, "omega2"]):
                ax.annotate("cannot be told", (1, y), fontsize=7, color=MUTED, va="center")
                continue
            value, low, high = 100 * table.loc[name, ["omega2", "low", "high"]].astype(float)
            color = colors[name] if name in study.axes else MUTED
            marker = "s" if name == SEEDS else "o" if name in study.axes else "D"
            ax.plot([low, high], [y, y], color=color, linewidth=1.6, marker="|", markersize=8)
            ax.plot(value, y, marker=marker, color=color, markersize=3.5)
            side = "left" if high < 55 else "right" if low > 45 else "center"  # where there is room for the numbers
            x, shift = {"left": (high, (6, 0)), "right": (low, (-6, 0)), "center": ((low + high) / 2, (0, 7))}[side]
            ax.annotate(
                f"{value:.0f} [{low:.0f}, {high:.0f}]", (x, y), shift, textcoords="offset points", ha=side, va="center",
                fontsize=7.5, color=INK,
            )  # fmt: skip
        ax.set_title(words, loc="left", fontsize=8)
        ax.set(xlim=(-2, 108), ylim=(len(names) - 0.5, -0.5))
        ax.set_xticks([0, 25, 50, 75, 100])
        ax.grid(axis="y", visible=False)
    axes[0].set_yticks(np.arange(len(names)), names)
    figure.supxlabel("share of the variance between runs, % (type II, omega squared, 95 % interval)", fontsize=9)
    return figure
