"""The first figure one sees: configurations overlaid in one panel, each labelled at its end. Frames -> Figure."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.optimize import isotonic_regression

from analysis import effects
from analysis.bootstrap import Array, band_name
from analysis.curves import draw_base, draw_curves, draw_strands, legend_handles
from analysis.load import Results
from analysis.style import INK, MUTED, Look, Unit, metric_label, overlay_looks

MOST = 12  # curves in one panel


def choose(table: pd.DataFrame, *, listed: bool = False) -> tuple[pd.DataFrame, str]:
    """What the overview shows of a summary, and in words: everything, or the best of each estimator and sampler.

    Of combinations that a grid lists one by one, the highest.
    """
    if len(table) <= MOST:
        return table, ""
    if listed:
        shown = table.sort_values("final", ascending=False, kind="stable").head(MOST).sort_index()
        return shown, f"the {MOST} highest of {len(table)} combinations, by their last held-out evaluation"
    shown = effects.best(table, ["estimator", "sampler"])
    finished = (table["n"] > 0).sum()
    words = f"the best of {finished} configurations for each estimator and sampler, by their last held-out evaluation"
    if len(shown) > MOST:
        shown = shown.sort_values("final", ascending=False, kind="stable").head(MOST).sort_index()
        words = f"the {MOST} highest of {words}"
    return shown, words


def overview(results: Results, table: pd.DataFrame, metric: str, unit: Unit) -> Figure:
    """`metric` against `unit` for the chosen rows of a summary."""
    shown, choice = choose(table, listed=results.listed)
    looks = overlay_looks(shown)
    names = list(shown["configuration"])
    cells = results.cells[results.cells["configuration"].isin(names)]
    curves = effects.curves(cells, results.metrics, metric, unit.column)
    strands = effects.strands(cells, results.metrics, metric, unit.column)
    figure = Figure(figsize=(8.4, max(4.4, 1.4 + 0.42 * len(names))))
    figure.set_layout_engine("constrained", rect=(0.01, 0.01, 0.98, 0.98))
    ax = figure.add_subplot()
    draw_curves(ax, curves, looks, unit)
    draw_strands(ax, strands, looks, unit)
    ax.set(xlabel=unit.label, ylabel=metric_label(metric), xlim=(0, None))
    ax.margins(y=0.08)
    base = effects.base(results.cells, results.metrics, metric)
    alike = table["base"].dropna().round(9).nunique() <= 1  # else they are evaluated in different ways
    if np.isfinite(base) and alike:
        draw_base(ax, base)
        ax.annotate(
            f"base model {base:.3f}",
            (0.99, base),
            xycoords=("axes fraction", "data"),
            xytext=(0, -3),
            textcoords="offset points",
            ha="right",
            va="top",
            fontsize=8,
            color=MUTED,
        )
    _label_ends(ax, shown, curves, strands, looks, unit)
    word = unit.short.split("-")[0]
    subtitle = _subtitle(results, shown, choice)
    title = f"{metric_label(metric).capitalize()} against {word} time"
    ax.set_title(
        title, loc="left", fontsize=12.5, fontweight="bold", color=INK, pad=10 + 11 * (1 + subtitle.count("\n"))
    )
    ax.annotate(
        subtitle, (0, 1), xytext=(0, 7), xycoords="axes fraction", textcoords="offset points",
        fontsize=8, color=MUTED, va="bottom",
    )  # fmt: skip
    marks = legend_handles({}, strands, band=False)[1:]
    if marks:
        figure.legend(handles=marks, loc="outside lower center", ncols=2)
    return figure


def _subtitle(results: Results, shown: pd.DataFrame, choice: str) -> str:
    most = shown["n"].max()
    seeds = f"line: mean, band: {band_name(most)}" if most > 1 else "one finished seed each: no interval"
    if not shown["n"].any():
        seeds = "no cell has finished yet"
    return "\n".join(part for part in (choice, f"grid {results.grid}; {seeds}") if part)


def _label_ends(
    ax: Axes, shown: pd.DataFrame, curves: pd.DataFrame, strands: pd.DataFrame, looks: dict[str, Look], unit: Unit
) -> None:
    """Name, result, interval and n beside the axes, at the height of the curve's end or as near as there is room."""
    ends = {}
    for frame, column in ((strands, "value"), (curves, "mean")):
        for name, curve in frame.groupby("configuration", sort=False):
            ends[str(name)] = (curve["x"].iloc[-1] / unit.size, curve[column].iloc[-1])
    low, high = ax.get_ylim()
    rows = [(row, *ends.get(row["configuration"], (np.nan, low))) for _, row in shown.iterrows()]
    rows.sort(key=lambda item: item[2])
    figure = ax.get_figure()
    assert figure is not None
    inches = figure.bbox.height / figure.dpi - 1.5  # what title, ticks and legend leave to the axes
    heights = spread(np.array([(y - low) / (high - low) for *_, y in rows]), gap=0.38 / inches)
    for (row, x, y), height in zip(rows, heights, strict=True):
        look = looks[row["configuration"]]
        if np.isfinite(x):
            line = {"arrowstyle": "-", "color": look.color, "linewidth": 0.6, "alpha": 0.6, "shrinkB": 4}
            ax.annotate("", (x, y), (1.03, height), textcoords="axes fraction", arrowprops=line, annotation_clip=False)
        text: dict[str, Any] = {
            "xycoords": "axes fraction",
            "textcoords": "offset points",
            "ha": "left",
            "annotation_clip": False,
        }
        at = (1.04, height)
        ax.annotate(row["configuration"], at, xytext=(0, 0.5), va="bottom", fontsize=9, color=look.color,
                    fontweight="bold", **text)  # fmt: skip
        ax.annotate(result_text(row), at, xytext=(0, -0.5), va="top", fontsize=8, color=MUTED, **text)


def result_text(row: pd.Series) -> str:
    """`0.612 [0.598, 0.630], n = 3`, and what happened to the other seeds."""
    others = "" if row["states"] == f"{row['planned']} done" else f" ({row['states']})"
    if not row["n"]:
        return str(row["states"])
    interval = f" [{row['final_low']:.3f}, {row['final_high']:.3f}]" if row["final_low"] == row["final_low"] else ""
    return f"{row['final']:.3f}{interval}, n = {row['n']}{others}"


def spread(heights: Array, gap: float) -> Array:
    """Ascending heights in [0, 1] moved apart to at least `gap`, by the least sum of squares; evenly if too many."""
    steps = np.arange(len(heights))
    gap = min(gap, 1 / max(len(heights) - 1, 1))
    starts = isotonic_regression(heights - gap * steps).x
    placed: Array = starts.clip(0, 1 - gap * (len(heights) - 1)) + gap * steps
    return placed
