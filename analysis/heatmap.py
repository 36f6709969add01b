"""The heat map: objective x estimator, a panel per sampler; every combination has a value, a status or a hatch."""

from __future__ import annotations

import itertools
import re
from textwrap import fill
from typing import Any

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize, to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from analysis.load import Results, values
from analysis.style import HATCH, INK, MUTED, PALE, metric_label

_COLOURS = ListedColormap(colormaps["YlGnBu"](np.linspace(0.08, 0.85, 256)))

Order = tuple[list[str], list[str]]


def heatmap(results: Results, table: pd.DataFrame, metric: str) -> Figure:
    """Final `metric` of a summary; a column of panels for each value of the recipe axes."""
    samplers, columns = values(results, "sampler"), values(results, "axes")
    objectives, estimators = values(results, "objective"), values(results, "estimator")
    norm = _norm(table)
    size = (1.9 + len(columns) * (0.3 + 1.05 * len(estimators)), 1.2 + len(samplers) * (0.3 + 0.66 * len(objectives)))
    figure = Figure(figsize=(max(5.0, size[0]), max(3.0, size[1])), layout="constrained")
    axes = figure.subplots(len(samplers), len(columns), sharex=True, sharey=True, squeeze=False)
    for i, sampler in enumerate(samplers):
        for j, column in enumerate(columns):
            here = {"sampler": sampler, "axes": column}
            ax = axes[i, j]
            draw_heatmap(ax, _at(table, here), _at(results.excluded, here), (objectives, estimators), norm)
            ax.set_title(" · ".join(filter(None, (sampler, column))), fontweight="bold", color=INK)
    if table["n"].any():
        bar = figure.colorbar(
            ScalarMappable(norm, _COLOURS), ax=axes, shrink=0.8, aspect=20 + 12 * len(samplers), pad=0.01
        )
        bar.set_label(metric_label(metric))
        bar.outline.set_visible(False)
        base = table["base"].mean()
        if np.isfinite(base):
            bar.ax.axhline(base, color="white", linewidth=2.5)
            bar.ax.axhline(base, color="#D55E00", linewidth=1.5)
            bar.ax.annotate(
                f"base {base:.3f}", (0, base), xycoords=("axes fraction", "data"), xytext=(-3, 0),
                textcoords="offset points", rotation=90, ha="right", va="center", fontsize=7.5, color="#D55E00",
            )  # fmt: skip
    handles = [Patch(facecolor=PALE, edgecolor="#d0d0d0", label="no seed finished")] if (table["n"] == 0).any() else []
    if len(results.excluded):
        width = int(14 * figure.get_figwidth())  # characters of the legend's size
        reasons = [fill(reason, width) for reason in dict.fromkeys(results.excluded["reason"])]
        handles.append(Patch(**HATCH, label="excluded: " + ";\n".join(reasons)))
    if handles:
        figure.legend(handles=handles, loc="outside lower left", ncols=1, fontsize=8)
    return figure


def draw_heatmap(ax: Axes, table: pd.DataFrame, excluded: pd.DataFrame, order: Order, norm: Normalize) -> Axes:
    """Summary rows and excluded combinations of one sampler; `order` is that of objectives and of estimators."""
    objectives, estimators = order
    for _, row in table.iterrows():
        at = (estimators.index(row["estimator"]), objectives.index(row["objective"]))
        color = _COLOURS(float(norm(row["final"]))) if row["n"] else to_rgba(PALE)
        ax.add_patch(Rectangle(at, 1, 1, facecolor=color, edgecolor="white", linewidth=1.5, gid="cell"))
        _write(ax, at, row, dark=row["n"] > 0 and luminance(color) < 0.5)
    for _, row in excluded.iterrows():
        at = (estimators.index(row["estimator"]), objectives.index(row["objective"]))
        ax.add_patch(Rectangle(at, 1, 1, **HATCH, gid="excluded"))
    for at in itertools.product(range(len(estimators)), range(len(objectives))):
        if not any(patch.get_xy() == at for patch in ax.patches if isinstance(patch, Rectangle)):
            ax.annotate(
                "not in\nthe grid", (at[0] + 0.5, at[1] + 0.5), fontsize=7, color=MUTED, ha="center", va="center"
            )
    ax.set(xlim=(0, len(estimators)), ylim=(len(objectives), 0))
    ax.set_xticks(np.arange(len(estimators)) + 0.5, [_broken(name) for name in estimators])
    ax.set_yticks(np.arange(len(objectives)) + 0.5, objectives)
    ax.tick_params(length=0)
    ax.grid(visible=False)
    ax.spines[:].set_visible(False)
    return ax


def _broken(name: str, most: int = 13) -> str:
    """A label in lines of about `most` characters, broken behind `-`, `.`, `_` or a space where it is longer."""
    lines = [""]
    for part in re.split(r"(?<=[-._ ])", name):
        if lines[-1] and len(lines[-1]) + len(part) > most:
            lines.append("")
        lines[-1] += part
    return "\n".join(lines)


def cell_text(row: pd.Series) -> tuple[str, list[str]]:
    """The value, and below it interval, n, and what became of seeds that are not `done`."""
    states = [part for part in row["states"].split(", ") if not part.endswith(" done")]
    if not row["n"]:
        return "", states
    interval = [f"[{row['final_low']:.3f}, {row['final_high']:.3f}]"] if row["final_low"] == row["final_low"] else []
    return f"{row['final']:.3f}", [*interval, f"n = {row['n']}", *states]


def _write(ax: Axes, at: tuple[int, int], row: pd.Series, *, dark: bool) -> None:
    value, notes = cell_text(row)
    color = "white" if dark else INK
    height = 8.0 * len(notes) + (11 if value else 0)  # points
    place: dict[str, Any] = {"textcoords": "offset points", "ha": "center", "va": "top"}
    center = (at[0] + 0.5, at[1] + 0.5)
    if value:
        ax.annotate(value, center, (0, height / 2), fontsize=9.5, fontweight="bold", color=color, **place)
    style: dict[str, Any] = {"fontsize": 6.6, "color": color if value else MUTED, "linespacing": 1.15}
    ax.annotate("\n".join(notes), center, (0, height / 2 - (11 if value else 0)), **style, **place)


def luminance(color: tuple[float, ...]) -> float:
    """Perceived brightness of an RGB colour, 0 to 1."""
    red, green, blue, *_ = color
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def _norm(table: pd.DataFrame) -> Normalize:
    found = pd.concat([table["final"], table["base"]]).dropna()
    low, high = (found.min(), found.max()) if len(found) else (0.0, 1.0)
    return Normalize(low, high if high > low else low + 1e-3)


def _at(frame: pd.DataFrame, where: dict[str, str]) -> pd.DataFrame:
    return frame[(frame[list(where)] == pd.Series(where)).all(axis=1)]
