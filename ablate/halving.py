"""Successive halving over the configurations of a grid: who goes on at each rung, and halving.json, which keeps it.

All configurations train to a share of the budget; the better half goes on to twice the share, and so on. A
configuration is judged by the mean over its seeds of the last held-out value. Jamieson & Talwalkar 2016, AISTATS,
arXiv 1502.07943, algorithm 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Annotated

from pydantic import Field

from ablate.limits import reached
from ablate.plan import FORMAT, Cell
from ablate.recipe import Strict
from ablate.record import Record, read_validated
from ablate.source import InputError

FILE = "halving.json"
MEASURES = ("eval/accuracy", "eval/score")  # the first that all cells have


class Judged(Strict):
    """A configuration at a rung."""

    configuration: str
    cells: tuple[str, ...]
    score: float | None
    """Mean over the seeds; null where a seed diverged before its first evaluation, which puts it last."""
    goes_on: bool


class Rung(Strict):
    """A share of the budget at which it was decided who goes on."""

    share: Annotated[float, Field(gt=0, lt=1)]
    metric: str
    configurations: tuple[Judged, ...]
    """The best first."""


class Halving(Strict):
    """halving.json: the choice, written before the first cell starts, and what was decided since."""

    format: int = FORMAT
    halvings: Annotated[int, Field(ge=1)]
    splits: tuple[str, ...]
    """Of the held-out prompts that configurations are judged by."""
    cells: tuple[str, ...]
    rungs: tuple[Rung, ...] = ()

    @property
    def stopped(self) -> dict[str, str]:
        """Why each cell does not go on, by its id."""
        reasons: dict[str, str] = {}
        for rung in self.rungs:
            kept = sum(judged.goes_on for judged in rung.configurations)
            for place, judged in enumerate(rung.configurations, start=1):
                score = "no value" if judged.score is None else f"{rung.metric} {judged.score:.4g}"
                where = f"{score} after {Fraction(rung.share)} of the budget"
                reason = f"successive halving: {where}, place {place} of {len(rung.configurations)}; {kept} went on"
                reasons |= {} if judged.goes_on else dict.fromkeys(judged.cells, reason)
        return reasons


def shares(halvings: int) -> list[float]:
    """The shares of the budget at which configurations are halved: 1/8, 1/4, 1/2 for three halvings."""
    return [0.5**n for n in range(halvings, 0, -1)]


def arrived(cell: Cell, record: Record | None, share: float) -> bool:
    """Whether a cell has its value for a rung: it waits there, or has ended for good before."""
    if record is None or not record.status.settled:
        return False
    return record.status.final or reached(cell.recipe.budget, share, record.epochs, record.cost.device_hours)


def judge(cells: Sequence[Cell], records: Mapping[str, Record], share: float) -> Rung:
    """Rank the configurations of these cells, all of which have arrived, and let the better half go on.

    With an odd number the one in the middle goes on too; of equals, those that the grid lists first.
    """
    groups: dict[str, list[str]] = {}
    for cell in cells:
        groups.setdefault(_configuration(cell), []).append(cell.id)
    metrics = [metric for metric in MEASURES if all(metric in r.metrics for r in records.values() if r.metrics)]
    metric = (metrics or MEASURES)[0]
    values = {name: [records[id].metrics.get(metric, -math.inf) for id in ids] for name, ids in groups.items()}
    scores = {name: sum(found) / len(found) for name, found in values.items()}
    ranked = sorted(groups, key=lambda name: -scores[name])
    kept = ranked[: math.ceil(len(ranked) / 2)]
    judged = (
        Judged(
            configuration=name,
            cells=tuple(groups[name]),
            score=scores[name] if math.isfinite(scores[name]) else None,
            goes_on=name in kept,
        )
        for name in ranked
    )
    return Rung(share=share, metric=metric, configurations=tuple(judged))


def read_halving(results: Path) -> Halving | None:
    """The halving of a grid's results; None without one. Raises InputError for a damaged file."""
    path = results / FILE
    return read_validated(Halving, path) if path.exists() else None


def check_choice(results: Path, halvings: int | None, cells: Sequence[Cell]) -> None:
    """Raises InputError where a run would not go on as the results were begun."""
    found = read_halving(results)
    asked = [cell.id for cell in cells]
    path = results / FILE
    if found is None:
        begun = [id for id in asked if halvings and (results / id / "metrics.jsonl").exists()]
        if begun:
            raise InputError(
                f"--halving {halvings}: {begun[0]} has been trained without it; take another --results, or another "
                "name for the grid"
            )
        return
    if halvings != found.halvings:
        raise InputError(
            f"{path}: these results are chosen by successive halving; go on with --halving {found.halvings}, or take "
            "another --results"
        )
    if sorted(asked) != sorted(found.cells):
        raise InputError(
            f"--halving {halvings}: {path} compares {len(found.cells)} cells, and {len(asked)} other ones are asked "
            "for; give the same grid, --set, --only and --seeds, or take another --results"
        )


def _configuration(cell: Cell) -> str:
    axes = ", ".join(f"{field}={value}" for field, value in cell.axes.items())
    return " · ".join(filter(None, [cell.objective, cell.estimator, cell.sampler, axes]))
