"""Images of the same prompts and the same noise: the base model, then a row per configuration. Files -> Figure."""

from __future__ import annotations

import json
from pathlib import Path
from textwrap import fill

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from PIL import Image

from analysis.load import Results
from analysis.style import INK, MUTED

COLUMNS, MOST = 6, 9  # tiles in a row of a contact sheet; rows below the base


def sheets(results: Results, table: pd.DataFrame) -> list[tuple[str, Path]]:
    """The best configurations of a summary with the sheet of their first seed that has one."""
    found = []
    for name in table[table["n"] > 0].sort_values("final", ascending=False, kind="stable")["configuration"]:
        ids = results.cells.loc[results.cells["configuration"] == name, "id"]
        paths = [results.folder / id / "samples" / "after.png" for id in ids]
        found += [(str(name), path) for path in paths if path.exists()][:1]
    return found


def sample_grid(rows: list[tuple[str, Path]]) -> Figure:
    """The first row of tiles of each sheet, below that of the first sheet before training."""
    shown = rows if len(rows) <= MOST else [rows[round(i)] for i in np.linspace(0, len(rows) - 1, MOST)]
    first = shown[0][1].with_name("before.png")
    pictures = [("base model", first), *shown] if first.exists() else shown
    tile = 0.74  # inches
    label = 0.2 + 0.07 * max(len(name) for name, _ in pictures)
    figure = Figure(figsize=(label + COLUMNS * tile, 0.5 + tile * len(pictures)), layout="constrained")
    axes = figure.subplots(len(pictures), 1, squeeze=False)[:, 0]
    for ax, (name, path) in zip(axes, pictures, strict=True):
        sheet = np.asarray(Image.open(path).convert("RGB"))
        ax.imshow(sheet[: sheet.shape[1] // COLUMNS], interpolation="nearest")
        ax.set(xticks=[], yticks=[])
        ax.spines[:].set_visible(False)
        ax.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8, color=INK)
    for i, prompt in enumerate(prompts(first.with_suffix(".jsonl"))):
        axes[0].annotate(fill(prompt, 15), ((i + 0.5) / COLUMNS, 1.03), xycoords="axes fraction", ha="center",
                         va="bottom", fontsize=6, color=MUTED)  # fmt: skip
    return figure


def prompts(path: Path) -> list[str]:
    """Of the first row of a sheet; none where they were not kept."""
    if not path.exists():
        return []
    return [str(json.loads(line)["prompt"]) for line in path.read_text(encoding="utf-8").splitlines()[:COLUMNS]]
