"""The cells of a grid in HTML: per configuration its seeds with curves, ledger and failures, samples, recipe card."""

from __future__ import annotations

import base64
from html import escape
from pathlib import Path

import numpy as np
import pandas as pd
from ruamel.yaml import YAML
from ruamel.yaml.compat import StringIO

from ablate.record import read_cell
from analysis import effects
from analysis.bootstrap import Array
from analysis.load import PHASES, Results
from analysis.style import Unit

_SECONDS = [phase for phase in PHASES if phase not in ("forwards", "backwards")]


def cell_sections(results: Results, metric: str | None, unit: Unit) -> str:
    """A section that unfolds for every configuration of the plan."""
    rows = effects.evaluations(results.cells, results.metrics, metric or "")
    x = unit.column
    curves = {id: (curve[x].to_numpy(float), curve["value"].to_numpy(float)) for id, curve in rows.groupby("id")}
    span = (rows[x].max(), rows["value"].min(), rows["value"].max()) if len(rows) else (1.0, 0.0, 1.0)
    sections = []
    for name, cells in results.cells.groupby("configuration", sort=False):
        states = ", ".join(f"{n} {str(s).replace('_', ' ')}" for s, n in cells["status"].value_counts().items())
        body = "\n".join([_seeds(cells, curves, span, unit), _samples(results, cells), _recipe(results, cells)])
        sections.append(f"<details><summary>{escape(str(name))}: {escape(states)}</summary>\n{body}\n</details>")
    return "\n".join(sections)


def _seeds(
    cells: pd.DataFrame, curves: dict[str, tuple[Array, Array]], span: tuple[float, float, float], unit: Unit
) -> str:
    ledger = [f"{phase}, s" for phase in _SECONDS]
    head = ["cell", "status", "curve", "last", unit.short, "network calls", *ledger, "message"]
    body = []
    for _, cell in cells.iterrows():
        x, value = curves.get(cell["id"], (np.array([]), np.array([])))
        texts = [escape(cell["id"]), escape(str(cell["status"]).replace("_", " ")), sparkline(x, value, span)]
        texts += [f"{value[-1]:.3f}", f"{x[-1] / unit.size:.3g}"] if len(x) else ["", ""]
        calls = cell["cost/forwards"] + 3 * cell["cost/backwards"]
        texts.append("" if pd.isna(calls) else f"{calls:,.0f}")
        texts += ["" if pd.isna(cell[f"cost/{phase}"]) else f"{cell[f'cost/{phase}']:.1f}" for phase in _SECONDS]
        body.append("<tr>" + "".join(f"<td>{text}</td>" for text in [*texts, escape(cell["message"])]) + "</tr>")
    header = "".join(f'<th scope="col">{escape(name)}</th>' for name in head)
    table = f"<table><thead><tr>{header}</tr></thead><tbody>{''.join(body)}</tbody></table>"
    return f'<div class="scroll" tabindex="0" role="region" aria-label="cells">{table}</div>'


def sparkline(x: Array, value: Array, span: tuple[float, float, float], width: int = 120, height: int = 28) -> str:
    """A small curve as SVG; `span` is the largest x, the lowest and the highest value of all cells of the page."""
    if not len(x):
        return ""
    most, low, high = span
    across = 2 + (width - 4) * x / (most or 1)
    up = height - 2 - (height - 4) * (value - low) / ((high - low) or 1)
    points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(across, up, strict=True))
    label = f"from {value[0]:.3f} to {value[-1]:.3f} in {len(x)} evaluations"
    line = f'<polyline points="{points}" fill="none" stroke="#0072B2" stroke-width="1.5"/>'
    return f'<svg width="{width}" height="{height}" role="img" aria-label="{label}">{line}</svg>'


def _samples(results: Results, cells: pd.DataFrame) -> str:
    """Images of the same prompts and noise before and after, of the first seed that has both."""
    for id in cells["id"]:
        folder = results.folder / id / "samples"
        if (folder / "before.png").exists() and (folder / "after.png").exists():
            images = "".join(
                f'<figure><img loading="lazy" src="{embedded(folder / f"{word}.png")}" alt="samples {word} training">'
                f"<figcaption>{word} training</figcaption></figure>"
                for word in ("before", "after")
            )
            return f'<div class="pair">{images}</div>'
    return ""


def _recipe(results: Results, cells: pd.DataFrame) -> str:
    """The resolved cell of the first seed that was started, as YAML."""
    for id in cells["id"]:
        if (results.folder / id / "cell.json").exists():
            cell = read_cell(results.folder / id)
            content = cell.model_dump(mode="json", include={"components", "recipe", "versions"})
            text = StringIO()
            yaml = YAML()
            yaml.default_flow_style = False
            yaml.dump(content, text)
            return f"<details><summary>Recipe card</summary><pre>{escape(text.getvalue())}</pre></details>"
    return ""


def embedded(path: Path) -> str:
    """A picture as a data URI, so that the page is one file."""
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
