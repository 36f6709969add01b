"""A grid as the statistics see it: one metric, a row per finished cell, axes that vary, a target. Results -> Study."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd

from analysis import arrival, effects, measures
from analysis.design import Design, design, projections
from analysis.factorial import shares
from analysis.load import KEYS, Results
from analysis.style import Unit


@dataclass(frozen=True, kw_only=True)
class Study:
    """What effects are computed from. `runs` has the columns of the axes, configuration, seed, and one per response."""

    metric: str
    unit: Unit
    axes: tuple[str, ...]  # with at least two values; none where a grid lists single combinations
    table: pd.DataFrame  # effects.summary
    runs: pd.DataFrame  # final, best, area, restricted
    times: pd.DataFrame  # arrival.arrivals, unfinished cells too
    target: float
    chosen: bool  # the target was not given, but taken from the results
    end: float  # horizon of times to target

    @cached_property
    def design(self) -> Design:
        return design(self.runs, self.axes)

    @cached_property
    def confounded(self) -> tuple[str, ...]:
        """The axes that change with another one always, so that their effects cannot be told apart."""
        terms = projections(self.design)
        return tuple(axis for axis in self.axes if terms[axis][1] == 0)

    @property
    def separable(self) -> bool:
        """Whether there is an axis whose effect can be told apart from the other axes'."""
        return len(self.confounded) < len(self.axes)

    @cached_property
    def explained(self) -> dict[str, pd.DataFrame]:
        """What the axes explain of each response, by its column: see `factorial.shares`."""
        return {column: shares(self.runs.dropna(subset=[column]), self.axes, column) for column in self.responses()}

    @property
    def arrives(self) -> bool:
        """Whether there is a target, and a cell that reaches it."""
        return bool(len(self.times) and self.times["arrived"].any())

    def responses(self) -> dict[str, str]:
        """Columns of `runs` that can be compared, with their names in words."""
        names = {"final": "final value", "best": "best value", "area": "area under the curve"}
        names |= {"restricted": f"time to {self.target:.3g}"}
        return {column: words for column, words in names.items() if self.runs[column].notna().any()}


def study(results: Results, metric: str, unit: Unit, target: float | None = None) -> Study:
    """`target` is of `metric`; without one it is taken from the results."""
    cells, metrics = results.cells, results.metrics
    table = effects.summary(cells, metrics, metric)
    goal = arrival.default_target(table) if target is None else target
    times = arrival.arrivals(cells, metrics, metric, goal, unit.column)
    reached = np.isfinite(goal) and times["arrived"].any()
    end = arrival.horizon(times) if reached else np.nan
    times = times.merge(cells[["id", *results.recipe_axes]], on="id")
    runs = measures.areas(cells, metrics, metric, unit.column)
    runs["restricted"] = np.nan
    if reached:
        values = arrival.restricted(times, end).set_index("id")["restricted"]
        runs["restricted"] = values.reindex(runs["id"]).to_numpy(float)
    runs = runs.merge(cells[["id", *results.recipe_axes]], on="id")
    factors = () if results.listed else (*KEYS[:3], *results.recipe_axes)
    return Study(
        metric=metric, unit=unit, axes=tuple(axis for axis in factors if runs[axis].nunique() > 1), table=table,
        runs=runs, times=times, target=goal, chosen=target is None, end=end,
    )  # fmt: skip
