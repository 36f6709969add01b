"""Levels of each axis side by side: IQM against device time, and performance profiles. Study -> Figure."""

from __future__ import annotations

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis import levels
from analysis.load import Results, values
from analysis.study import Study
from analysis.style import INK, MUTED, Look, looks_of, metric_label


def level_panels(results: Results, study: Study) -> Figure:
    """A column per axis; above the curves, below the share of runs that end above tau."""
    figure = Figure(figsize=(max(3.6, 2.35 * len(study.axes)), 4.6), layout="constrained")
    axes = figure.subplots(2, len(study.axes), sharey="row", squeeze=False)
    for column, axis in enumerate(study.axes):
        upper, lower = axes[:, column]
        order = values(results, axis)
        looks = looks_of(order)
        cells = results.cells
        curves = levels.curves(cells, results.metrics, study.metric, study.axes, axis, study.unit.column)
        _lines(upper, curves.assign(x=curves["x"] / study.unit.size), ("x", "iqm"), order, looks)
        _lines(lower, levels.profiles(study.runs, study.axes, axis), ("tau", "share"), order, looks)
        counts = curves.groupby("level")["configurations"].first()
        upper.set_title(axis, loc="left", fontweight="bold", color=INK)
        upper.set_xlabel(study.unit.short)
        lower.set_xlabel(f"final {metric_label(study.metric)}")
        upper.legend(loc="upper left", fontsize=7.5, handlelength=2.4, borderaxespad=0.2, labelspacing=0.3)
        number = f"{counts.min()}" if counts.min() == counts.max() else f"{counts.min()} to {counts.max()}"
        text = f"{number} configuration{'' if number == '1' else 's'} each"
        place = {"xycoords": "axes fraction", "textcoords": "offset points", "ha": "right"}
        upper.annotate(text, (1, 0), (0, 3), fontsize=7, color=MUTED, **place)
    low, high = axes[0, 0].get_ylim()
    most = max(len(values(results, axis)) for axis in study.axes)
    axes[0, 0].set_ylim(low, high + 0.09 * most * (high - low))  # room for the legends
    axes[0, 0].set_ylabel(f"{metric_label(study.metric)}, IQM")
    axes[1, 0].set_ylabel("share of runs above")
    return figure


def _lines(ax: Axes, frame: pd.DataFrame, xy: tuple[str, str], order: list[str], looks: dict[str, Look]) -> None:
    x, y = xy
    for i, level in enumerate(name for name in order if (frame["level"] == name).any()):
        line, look = frame[frame["level"] == level], looks[level]
        ax.fill_between(line[x], line["low"], line["high"], color=look.color, alpha=0.15, linewidth=0)
        ax.plot(line[x], line[y], color=look.color, linestyle=look.linestyle, marker=look.marker, markersize=4,
                markevery=(4 + 3 * i, max(len(line) // 4, 1)), linewidth=1.5, label=level)  # fmt: skip
