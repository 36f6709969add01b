"""The grid of learning curves: a row per sampler, a column per estimator, a colour per objective. Frames -> Figure."""

from __future__ import annotations

import textwrap

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from analysis import effects
from analysis.curves import draw_base, draw_curves, draw_strands, legend_handles
from analysis.load import FINISHED, Results, values
from analysis.style import HATCH, INK, MUTED, PALE, Look, Unit, metric_label, palette, panel_looks


def panels(results: Results, metric: str, unit: Unit) -> Figure:
    """`metric` against `unit`, one panel per sampler and estimator; panels without a possible cell are hatched."""
    samplers, estimators = values(results, "sampler"), values(results, "estimator")
    looks = panel_looks(results)
    rows, columns = len(samplers), len(estimators)
    figure = Figure(figsize=(max(5.6, 1.2 + 2.5 * columns), 1.7 + 2.1 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for i, sampler in enumerate(samplers):
        for j, estimator in enumerate(estimators):
            ax = axes[i, j]
            _panel(ax, results, sampler, estimator, metric, unit, looks)
            if i == 0:
                ax.set_title(estimator, fontsize=10, fontweight="bold", color=INK, pad=14)
            if j == columns - 1:
                ax.annotate(
                    sampler, (1, 0.5), xytext=(8, 0), xycoords="axes fraction", textcoords="offset points",
                    rotation=-90, va="center", ha="left", fontsize=10, fontweight="bold", color=INK,
                )  # fmt: skip
    axes[0, 0].set_xlim(0, None)
    figure.supxlabel(unit.label, fontsize=9.5)
    figure.supylabel(metric_label(metric), fontsize=9.5)
    strands = effects.strands(results.cells, results.metrics, metric, unit.column)
    counts = effects.curves(results.cells, results.metrics, metric, unit.column)["n"]
    handles = legend_handles(_names(results, looks), strands, band=bool(counts.max() > 1))
    figure.legend(handles=handles, loc="outside upper center", ncols=max(2, 2 * columns))
    return figure


def _panel(
    ax: Axes, results: Results, sampler: str, estimator: str, metric: str, unit: Unit, looks: dict[str, Look]
) -> None:
    cells, excluded = (
        frame[(frame["sampler"] == sampler) & (frame["estimator"] == estimator)]
        for frame in (results.cells, results.excluded)
    )
    if cells.empty:
        _closed(ax, excluded)
        return
    rows = effects.finals(cells, results.metrics, metric)
    draw_curves(ax, effects.curves(cells, results.metrics, metric, unit.column), looks, unit)
    draw_strands(ax, effects.strands(cells, results.metrics, metric, unit.column), looks, unit)
    base = effects.base(cells, results.metrics, metric)
    if np.isfinite(base):
        draw_base(ax, base)
    ax.annotate(
        seeds_text(cells, rows), (1, 1), xytext=(0, 2), xycoords="axes fraction", textcoords="offset points",
        ha="right", va="bottom", fontsize=7, color=MUTED,
    )  # fmt: skip


def _closed(ax: Axes, excluded: pd.DataFrame) -> None:
    """A panel in which no cell can exist, and why."""
    if excluded.empty:
        ax.patch.set_facecolor(PALE)
    else:
        ax.patch.set(**{key: value for key, value in HATCH.items() if key != "linewidth"})
    ax.grid(visible=False)
    reasons = "\n".join(dict.fromkeys(excluded["reason"])) or "not in the grid"
    text = "excluded:\n" + textwrap.fill(reasons, 26) if len(excluded) else reasons
    ax.text(
        0.5, 0.5, text, transform=ax.transAxes, ha="center", va="center", fontsize=8, color=MUTED,
        bbox={"facecolor": "white" if len(excluded) else PALE, "linewidth": 0, "pad": 3},
    )  # fmt: skip


def seeds_text(cells: pd.DataFrame, finals: pd.DataFrame) -> str:
    """`n = 2 to 3 seeds; 1 failed`: seeds behind each curve, and cells that are not behind any."""
    counts = finals.groupby("configuration").size().reindex(cells["configuration"].unique(), fill_value=0)
    low, high = counts.min(), counts.max()
    n = f"n = {low}" if low == high else f"n = {low} to {high}"
    others = cells.loc[~cells["status"].isin(FINISHED[:1]), "status"].value_counts()
    return "; ".join([n, *(f"{count} {str(status).replace('_', ' ')}" for status, count in others.items())])


def _names(results: Results, looks: dict[str, Look]) -> dict[str, Look]:
    """Legend entries: objectives by colour, then recipe axes by line."""
    colors = palette(values(results, "objective"))
    names = {name: Look(color=color) for name, color in colors.items()}
    for axes in values(results, "axes") if results.cells["axes"].nunique() > 1 else []:
        configuration = results.cells.loc[results.cells["axes"] == axes, "configuration"]
        if len(configuration):
            names[axes] = Look(color=MUTED, linestyle=looks[configuration.iloc[0]].linestyle)
    return names
