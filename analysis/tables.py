"""The table of results: one frame, written as CSV (numbers), Markdown and LaTeX (text). DataFrame -> DataFrame, str."""

from __future__ import annotations

import math
import re

import pandas as pd

from analysis import effects
from analysis.load import KEYS, Results
from analysis.style import Unit, metric_label

_LATEX = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "·": r"$\cdot$",
}
_PARTS = {"final": "", "final_low": "_low", "final_high": "_high", "base": "_base"} | {
    f"gain{end}": f"_gain{end}" for end in ("", "_low", "_high")
}


def table(results: Results, metrics: list[str]) -> pd.DataFrame:
    """A row per configuration of the plan, then one per excluded combination; numbers in their own units.

    Columns: KEYS, planned, n, states, device_hours, nfe, and of each metric its end, interval, base and gain:
    accuracy, accuracy_low, accuracy_high, accuracy_base, accuracy_gain, accuracy_gain_low, accuracy_gain_high.
    """
    start = [*KEYS, "planned", "n", "states", "device_hours", "nfe"]
    frames = {metric: effects.summary(results.cells, results.metrics, metric) for metric in metrics or ["eval/score"]}
    frame = next(iter(frames.values()))[start]
    for metric, summary in frames.items():
        name = metric.removeprefix("eval/")
        frame = frame.join(summary[list(_PARTS)].rename(columns={part: name + end for part, end in _PARTS.items()}))
    excluded = results.excluded[KEYS].assign(planned=0, n=0, states="excluded: " + results.excluded["reason"])
    return pd.concat([frame, excluded], ignore_index=True) if len(excluded) else frame


def text(frame: pd.DataFrame, unit: Unit) -> pd.DataFrame:
    """The frame in words, as it is printed: every mean with its interval, and n beside it."""
    shown = frame[KEYS[:3]].copy()
    if frame["axes"].any():
        shown["recipe axes"] = frame["axes"]
    for name in ("accuracy", "score"):
        if name in frame:
            label = metric_label(f"eval/{name}")
            shown[label] = [_interval(row, name, "") for _, row in frame.iterrows()]
            shown[f"gain over base, {name}"] = [_interval(row, f"{name}_gain", "+") for _, row in frame.iterrows()]
    shown["n"] = [str(n) for n in frame["n"]]
    shown[f"{unit.short} per cell"] = ["" if math.isnan(h) else f"{h / unit.size:.3g}" for h in frame["device_hours"]]
    shown["NFE per cell"] = ["" if math.isnan(nfe) else f"{nfe:,.0f}" for nfe in frame["nfe"]]
    shown["cells"] = frame["states"]
    return shown


def to_csv(frame: pd.DataFrame) -> str:
    return str(frame.to_csv(index=False, lineterminator="\n", float_format="%.6g"))


def to_markdown(shown: pd.DataFrame) -> str:
    rows = [list(shown.columns), ["---"] * len(shown.columns), *shown.to_numpy().tolist()]
    return "".join("| " + " | ".join(str(value).replace("|", r"\|") for value in row) + " |\n" for row in rows)


def to_latex(shown: pd.DataFrame) -> str:
    r"""A tabular for \usepackage{booktabs}."""
    header, *rows = [
        " & ".join(latex_escape(str(value)) for value in row) + r" \\"
        for row in [list(shown.columns), *shown.to_numpy().tolist()]
    ]
    lines = [rf"\begin{{tabular}}{{{'l' * len(shown.columns)}}}", r"\toprule", header, r"\midrule", *rows]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])


def latex_escape(text: str) -> str:
    return re.sub("|".join(map(re.escape, _LATEX)), lambda match: _LATEX[match[0]], text)


def _interval(row: pd.Series, name: str, sign: str) -> str:
    if math.isnan(row[name]):
        return ""
    low, high = row[f"{name}_low"], row[f"{name}_high"]
    value = f"{row[name]:{sign}.3f}"
    return value if math.isnan(low) else f"{value} [{low:{sign}.3f}, {high:{sign}.3f}]"
