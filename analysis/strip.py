"""The strip of a numeric recipe axis, such as the learning rate: the final value against it. Study -> Figure."""

from __future__ import annotations

import pandas as pd
from matplotlib.figure import Figure

from analysis.load import Results
from analysis.moderated import intervals
from analysis.study import Study
from analysis.style import looks_of, metric_label


def numeric_axes(results: Results, study: Study) -> list[str]:
    """Recipe axes of at least two numbers."""
    numbers = {field: pd.to_numeric(results.cells[field], errors="coerce") for field in results.recipe_axes}
    return [field for field, found in numbers.items() if found.notna().all() and field in study.axes]


def strip(study: Study, field: str) -> Figure:
    """Mean and 95 % interval at every value of `field`; other recipe axes are part of the line's name."""
    runs = study.runs.assign(at=pd.to_numeric(study.runs[field]))
    others = [axis for axis in study.axes if axis != field]
    lines = runs[others].agg(" · ".join, axis=1) if others else pd.Series("all", index=runs.index)
    figure = Figure(figsize=(7.0, 3.2), layout="constrained")
    ax = figure.add_subplot()
    places = list(runs.assign(line=lines).groupby(["line", "at"], sort=False))
    mean, low, high = intervals([group["final"].to_numpy(float) for _, group in places])
    frame = pd.DataFrame([key for key, _ in places], columns=["line", "at"]).assign(mean=mean, low=low, high=high)
    looks = looks_of(list(dict.fromkeys(frame["line"])))
    for name, line in frame.sort_values("at", kind="stable").groupby("line", sort=False):
        look = looks[str(name)]
        ax.fill_between(line["at"], line["low"], line["high"], color=look.color, alpha=0.13, linewidth=0)
        ax.plot(line["at"], line["mean"], color=look.color, linestyle=look.linestyle, marker=look.marker, markersize=5,
                label=name)  # fmt: skip
    if (runs["at"] > 0).all() and runs["at"].max() / runs["at"].min() >= 5:
        ax.set_xscale("log")
    ax.set(xlabel=field, ylabel=f"final {metric_label(study.metric)}")
    figure.legend(loc="outside right upper", fontsize=8)
    return figure
