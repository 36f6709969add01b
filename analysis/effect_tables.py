"""Effects as tables: shares of variance, differences of levels, times to target, ranks, hacking. Study -> frames."""

from __future__ import annotations

import numpy as np
import pandas as pd

from analysis import arrival, hacking, levels, pairs, ranks
from analysis.load import KEYS, Results
from analysis.study import Study


def effect_tables(results: Results, study: Study) -> dict[str, pd.DataFrame]:
    """By the name of the file; numbers in their own units, empty tables left out."""
    runs, axes = study.runs, study.axes
    found = {
        "effects": _stack(
            [
                study.explained[response].assign(response=words)
                for response, words in study.responses().items()
                if study.separable
            ]
        ),
        "levels": _stack([levels.means(runs, axes, axis, "final").assign(axis=axis) for axis in axes]),
        "pairs": _stack([pairs.levels(runs, axes, axis, "final") for axis in axes]),
        "ranks": ranks.stability(results.cells, results.metrics, study.metric, study.unit.column),
        "hacking": hacking.changes(results.cells, results.metrics).drop(columns=KEYS),
    }
    if study.arrives:
        found["time-to-target"] = arrival.times_to_target(study.times, study.end).drop(columns=KEYS)
        calls = arrival.arrivals(results.cells, results.metrics, study.metric, study.target, "nfe")
        nfe = arrival.times_to_target(calls, arrival.horizon(calls)).drop(columns=KEYS)
        found["nfe-to-target"] = nfe.rename(columns={"time": "nfe", "low": "nfe_low", "high": "nfe_high"})
        found["ratios"] = _stack([arrival.ratios(study.times, axes, axis, study.end) for axis in axes])
    return {name: frame for name, frame in found.items() if len(frame)}


def in_words(effects: pd.DataFrame) -> pd.DataFrame:
    """The table of shares as it is printed: a row per term, a column per response, `62 % [55, 68]`."""
    words = [percent(row, digits=1, unknown="cannot be told apart") for _, row in effects.iterrows()]
    shown = effects.assign(text=words)
    wide = shown.pivot(index="term", columns="response", values="text")
    wide = wide.reindex(index=effects["term"].unique(), columns=effects["response"].unique()).fillna("")
    first = effects.drop_duplicates("term").set_index("term")["df"]
    return wide.rename_axis(columns=None).reset_index().assign(df=[str(first[term]) for term in wide.index])


def percent(row: pd.Series, digits: int = 0, unknown: str = "a share that cannot be told") -> str:
    """A row of shares in words: `62 % [55, 68]`."""
    if np.isnan(row["omega2"]):
        return unknown
    value, low, high = (f"{100 * row[name]:.{digits}f}" for name in ("omega2", "low", "high"))
    return f"{value} % [{low}, {high}]"


def _stack(frames: list[pd.DataFrame]) -> pd.DataFrame:
    kept = [frame for frame in frames if len(frame)]
    return pd.concat(kept, ignore_index=True) if kept else pd.DataFrame()
