"""How figures look: fonts, colours that stay apart for colour-blind readers, and units one can read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import pandas as pd
from matplotlib.colors import to_hex
from matplotlib.figure import Figure

from analysis.load import KEYS, Results, values

RC: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.labelsize": 9,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.fontsize": 8.5,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#666666",
    "axes.linewidth": 0.8,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.7,
    "xtick.color": "#444444",
    "ytick.color": "#444444",
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
    "hatch.linewidth": 0.6,
    "figure.dpi": 100,
    "savefig.dpi": 200,
    "pdf.fonttype": 42,
}
INK, MUTED, PALE = "#222222", "#666666", "#f0f0f0"
HATCH: dict[str, Any] = {"hatch": "////", "facecolor": "#fafafa", "edgecolor": "#b0b0b0", "linewidth": 0}
# Okabe and Ito 2008, without the yellow that vanishes on white
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_LINES = ("-", (0, (5, 2)), (0, (1.2, 1.6)), (0, (5, 1.6, 1.2, 1.6)))
_MARKERS = ("o", "s", "^", "D", "v", "P")
_METRICS = {"eval/accuracy": "held-out accuracy", "eval/score": "held-out reward score"}


@dataclass(frozen=True, kw_only=True)
class Look:
    """How a configuration is drawn."""

    color: str
    linestyle: Any = "-"
    marker: str = "o"


@dataclass(frozen=True, kw_only=True)
class Unit:
    """An x-axis: column of the metrics, how many of its unit make one shown unit, and the label."""

    column: str
    size: float
    label: str
    short: str  # behind a number: `0.33 GPU-hours`


def palette(names: Sequence[str]) -> dict[str, str]:
    """A colour for each name, by its place."""
    if len(names) <= len(_COLOURS):
        return dict(zip(names, _COLOURS, strict=False))
    shades = matplotlib.colormaps["turbo"]
    return {name: to_hex(shades((i + 0.5) / len(names))) for i, name in enumerate(names)}


def looks_of(names: Sequence[str]) -> dict[str, Look]:
    """A colour, a line and a marker for each name, so that they stay apart in grey too."""
    colors = palette(names)
    return {
        name: Look(color=colors[name], linestyle=_LINES[i % len(_LINES)], marker=_MARKERS[i % len(_MARKERS)])
        for i, name in enumerate(names)
    }


def panel_looks(results: Results) -> dict[str, Look]:
    """Inside a panel of one estimator and one sampler: colour is the objective, the line is the recipe axes."""
    colors = palette(values(results, "objective"))
    axes = values(results, "axes")
    return {
        row["configuration"]: Look(color=colors[row["objective"]], linestyle=_LINES[axes.index(row["axes"]) % 4])
        for _, row in results.cells.drop_duplicates("configuration").iterrows()
    }


def overlay_looks(table: pd.DataFrame) -> dict[str, Look]:
    """All in one panel: the axis with most values takes the colour, the second the line, the third the marker."""
    names = {key: list(dict.fromkeys(table[key])) for key in KEYS}
    first, second, third, _ = sorted(KEYS, key=lambda key: -len(names[key]))
    colors = palette(names[first])
    return {
        row["configuration"]: Look(
            color=colors[row[first]],
            linestyle=_LINES[names[second].index(row[second]) % len(_LINES)] if len(table) > len(names[first]) else "-",
            marker=_MARKERS[names[third].index(row[third]) % len(_MARKERS)],
        )
        for _, row in table.iterrows()
    }


def metric_label(metric: str) -> str:
    return _METRICS[metric]


def device_word(cells: pd.DataFrame) -> str:
    """`GPU` if every record was written on one, else `device`."""
    devices = cells["device"].dropna()
    return "GPU" if len(devices) and all(str(device).startswith("cuda") for device in devices) else "device"


def hours_unit(results: Results) -> Unit:
    """Hours of device time, in minutes or seconds where hours would be mostly zeros."""
    longest, word = results.metrics["device_hours"].max(), device_word(results.cells)
    size, name = (1.0, "hours") if not longest < 0.5 else (1 / 60, "minutes")
    if longest < 1 / 60:
        size, name = 1 / 3600, "seconds"
    short = f"{word}-{name}"
    return Unit(column="device_hours", size=size, label=f"{short}, without evaluation", short=short)


def nfe_unit(results: Results) -> Unit:
    """Network calls, in thousands or millions."""
    most = results.metrics["nfe"].max()
    size, name = next(
        ((s, n) for s, n in ((1e9, "billion "), (1e6, "million "), (1e3, "thousand ")) if most >= s), (1, "")
    )
    return Unit(column="nfe", size=size, label=f"NFE ({name}network calls)", short=f"{name}network calls")


def save(figure: Figure, stem: Path) -> list[Path]:
    """Write PNG and PDF, without dates, so that the same results give the same bytes."""
    paths = [stem.with_name(f"{stem.name}.{kind}") for kind in ("png", "pdf")]
    dates: tuple[dict[str, Any], ...] = ({"Software": None}, {"CreationDate": None})
    for path, metadata in zip(paths, dates, strict=True):
        figure.savefig(path, metadata=metadata, facecolor="white")
        figure.set_layout_engine("none")  # the layout of the first holds for the second
    return paths
