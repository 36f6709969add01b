"""Learning curves: mean and band of finished seeds, thin strands for cells that did not finish. Frames -> Axes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from analysis.load import FINISHED
from analysis.style import INK, MUTED, Look, Unit

_ENDS = {"diverged": "x", "failed": "x"}  # every other unfinished status ends in an open circle


def draw_curves(ax: Axes, curves: pd.DataFrame, looks: Mapping[str, Look], unit: Unit) -> Axes:
    """A line per configuration, and a band where there is more than one seed."""
    alpha = 0.18 if curves["configuration"].nunique() <= 6 else 0.12  # many bands lie over each other
    for name, curve in curves.groupby("configuration", sort=False):
        look, x = looks[str(name)], curve["x"] / unit.size
        if curve["n"].iloc[0] > 1:
            ax.fill_between(x, curve["low"], curve["high"], color=look.color, alpha=alpha, linewidth=0)
        ax.plot(x, curve["mean"], color=look.color, linestyle=look.linestyle, label=str(name))
        ax.plot(
            x.iloc[-1:], curve["mean"].iloc[-1:], color=look.color, marker=look.marker, markersize=4.5, clip_on=False
        )
    return ax


def draw_strands(ax: Axes, strands: pd.DataFrame, looks: Mapping[str, Look], unit: Unit) -> Axes:
    """Thin lines for cells outside the means, up to their last evaluation; of diverged cells, the end alone."""
    for _, strand in strands.groupby("id", sort=False):
        last = strand.iloc[-1]
        look, x = looks[last["configuration"]], strand["x"] / unit.size
        if last["status"] not in FINISHED:
            ax.plot(x, strand["value"], color=look.color, linewidth=0.9, alpha=0.75, linestyle=look.linestyle)
        marker = _ENDS.get(last["status"], "o")
        ax.plot(
            x.iloc[-1:], [last["value"]], color=look.color, marker=marker, markersize=5, clip_on=False, **_open(marker)
        )
    return ax


def _open(marker: str) -> dict[str, Any]:
    return {"markerfacecolor": "white", "markeredgewidth": 1.1} if marker == "o" else {"markeredgewidth": 1.6}


def draw_base(ax: Axes, base: float) -> Axes:
    """The base model: the evaluation before training."""
    ax.axhline(base, color=MUTED, linewidth=1.1, linestyle=(0, (4, 3)), zorder=1.5)
    return ax


def legend_handles(looks: Mapping[str, Look], strands: pd.DataFrame, *, band: bool) -> list[Line2D | Patch]:
    """Entries for names, the base model, the band, and the marks of cells that did not finish, as far as they occur."""
    handles: list[Line2D | Patch] = [
        Line2D([], [], color=look.color, linestyle=look.linestyle, label=name) for name, look in looks.items()
    ]
    handles.append(Line2D([], [], color=MUTED, linewidth=1.1, linestyle=(0, (4, 3)), label="base model"))
    if band:
        handles.append(Patch(color=MUTED, alpha=0.25, linewidth=0, label="interval over seeds"))
    marks = {"x" if status in _ENDS else "o" for status in strands["status"]}
    for marker, label in (("x", "failed or diverged here"), ("o", "not finished")):
        if marker in marks:
            style: dict[str, Any] = {"color": INK, "linewidth": 0.9, "marker": marker, "markersize": 5, **_open(marker)}
            handles.append(Line2D([], [], label=label, **style))
    return handles
