"""A results folder as data frames: one row per cell, one per (cell, epoch, metric), one per excluded combination."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from sys import intern
from typing import Any

import pandas as pd

from ablate.json_lines import line_of
from ablate.lock import is_locked
from ablate.plan import Excluded
from ablate.record import Ledger, PlannedCell, Record, Status, read_cell, read_metrics, read_plan, read_record
from ablate.source import InputError, as_yaml, choices, read_text, shown

KEYS = ["objective", "estimator", "sampler", "axes"]  # together they are a configuration; a seed makes it a cell
FINISHED = (Status.DONE.value, Status.DIVERGED.value)  # statuses whose last evaluation is the cell's result
RUNNING, NOT_STARTED = "running", "not started"  # what a cell without a record can be
STATUSES = (
    *(status.value for status in Status if status is not Status.EXCLUDED),
    RUNNING,
    NOT_STARTED,
)
PHASES = Ledger.phases()
_CELLS = ["id", *KEYS, "configuration", "seed", "status", "message", "attempts", "device", "num_prompts"]
_CELLS += ["model", "reward"]
_READ = ("eval/", "rollout/score")  # how the metrics begin that reports read, of many more that are logged
_METRICS = ["id", "epoch", "device_hours", "nfe", "metric", "value"]


@dataclass(frozen=True, kw_only=True)
class Results:
    """What a grid has left behind so far."""

    grid: str
    folder: Path
    cells: (
        pd.DataFrame
    )  # columns _CELLS, recipe_axes, and seconds x devices or counts by cost/<phase>; NaN without a record
    metrics: pd.DataFrame  # columns _METRICS
    excluded: pd.DataFrame  # columns KEYS, reason
    order: Mapping[str, Sequence[str]]  # the values of each component axis as the grid lists them
    recipe_axes: tuple[str, ...]  # dotted paths; together they are the key `axes`
    listed: bool  # single combinations, not a product of axes
    strays: tuple[str, ...]  # folders of cells that the plan does not hold


def load(folder: Path) -> Results:
    """Read results/<grid>/. Raises InputError for a folder that is not results, and for files of another format."""
    path = folder / "plan.json"
    if not path.exists():
        raise InputError(f"{folder}: not a results folder, it has no plan.json{_nearby(folder)}")
    plan = read_plan(folder)
    planned = {cell.id for cell in plan.cells}
    fields = tuple(dict.fromkeys(field for cell in plan.cells for field in cell.axes))
    names = _short_names(plan.cells) if plan.listed else {cell.id: " · ".join(_parts(cell)) for cell in plan.cells}
    return Results(
        grid=plan.grid,
        folder=folder,
        cells=pd.DataFrame(
            [_cell(cell, names[cell.id], folder / cell.id) for cell in plan.cells],
            columns=[*_CELLS, *fields, *(f"cost/{phase}" for phase in PHASES)],
        ),
        metrics=_metrics(plan.cells, folder),
        excluded=pd.DataFrame([_excluded(e) for e in plan.excluded], columns=[*KEYS, "reason"]),
        order=plan.order,
        recipe_axes=fields,
        listed=plan.listed,
        strays=tuple(sorted(p.parent.name for p in folder.glob("*/cell.json") if p.parent.name not in planned)),
    )


def axes_label(axes: Mapping[str, Any]) -> str:
    """Values of recipe axes in words: `kl.coef=0.0, rollout.num_steps=10`; empty without any."""
    return ", ".join(f"{key}={value}" for key, value in axes.items())


def values(results: Results, axis: str) -> list[str]:
    """The values of an axis that cells or excluded combinations have, in the order of the grid."""
    present = list(dict.fromkeys([*results.cells[axis], *results.excluded.get(axis, [])]))
    listed = list(results.order.get(axis, ()))
    return sorted(present, key=lambda value: listed.index(value) if value in listed else len(listed))


def _parts(planned: PlannedCell) -> list[str]:
    axes = axes_label(planned.axes)
    return [planned.objective, planned.estimator, planned.sampler, *([axes] if axes else [])]


def _short_names(cells: Sequence[PlannedCell]) -> dict[str, str]:
    """Names of single combinations by cell id: the recipe, or else the components, and what else tells them apart."""
    if not cells:
        return {}
    told = ["recipe"] if "recipe" in cells[0].axes else KEYS[:3]
    described = {
        cell.id: {
            **{axis: getattr(cell, axis) for axis in KEYS[:3]},
            **{key: value if key == "recipe" else f"{key}={value}" for key, value in cell.axes.items()},
        }
        for cell in cells
    }
    names = dict.fromkeys(described, "")
    for key in [*told, *(key for key in described[cells[0].id] if key not in told)]:
        alike = {name: {described[id].get(key) for id in names if names[id] == name} for name in names.values()}
        for id, name in names.items():
            if key in told or len(alike[name]) > 1:
                names[id] = " · ".join(filter(None, [name, described[id].get(key)]))
    return names


def _cell(planned: PlannedCell, name: str, folder: Path) -> dict[str, Any]:
    record = read_record(folder)
    spec = read_cell(folder) if (folder / "cell.json").exists() else None
    for file, found in (("record.json", record), ("cell.json", spec)):
        if found is not None and found.id != planned.id:
            path = folder / file
            where = f"{path}:{line_of(read_text(path), ('id',))}"
            raise InputError(f"{where}: is of the cell {shown(found.id)}; was the folder renamed or copied?")
    return {
        **dict(zip(KEYS, [*_parts(planned)[:3], axes_label(planned.axes)], strict=True)),
        **{field: str(value) for field, value in planned.axes.items()},
        "id": planned.id,
        "configuration": name,
        "seed": planned.seed,
        "num_prompts": spec.recipe.evaluation.num_prompts if spec else None,
        "model": spec.recipe.model.path if spec else None,
        "reward": as_yaml(spec.recipe.reward) if spec else None,
        **_ending(record, folder),
    }


def _ending(record: Record | None, folder: Path) -> dict[str, Any]:
    """Status and ledger. A cell has its folder before it starts; starting again outdates its record."""
    if record is None:
        started = any((folder / name).exists() for name in ("attempts.jsonl", "metrics.jsonl"))
        status = RUNNING if is_locked(folder) else Status.INTERRUPTED.value if started else NOT_STARTED
        return {"status": status, "message": "", "attempts": None, "device": None}
    return {
        "status": record.status.value,
        "message": record.message,
        "attempts": record.attempts,
        "device": record.provenance.device if record.provenance else None,
        **{f"cost/{phase}": getattr(record.cost, phase) for phase in PHASES},
    }


def _metrics(cells: Iterable[PlannedCell], folder: Path) -> pd.DataFrame:
    """Rows of all cells, of the metrics that reports read. Columns are filled one cell at a time, so that lines need
    not be in memory together.
    """
    columns: dict[str, list[Any]] = {name: [] for name in _METRICS}
    for cell in cells:
        for line in _lines(folder / cell.id):
            for name, value in line.items():
                if name.startswith(_READ) and isinstance(value, int | float):
                    place = (cell.id, *(line[key] for key in _METRICS[1:4]), intern(name), float(value))
                    for column, found in zip(_METRICS, place, strict=True):
                        columns[column].append(found)
    return pd.DataFrame(columns).astype({"epoch": int, "device_hours": float, "nfe": float, "value": float})


def _lines(folder: Path) -> list[dict[str, Any]]:
    """The lines of a cell. A resumed cell writes epochs again: an epoch replaces all that was written from it on."""
    kept: list[dict[str, Any]] = []
    for number, line in enumerate(read_metrics(folder), start=1):
        if missing := [key for key in _METRICS[1:4] if key not in line]:
            raise InputError(f"{folder / 'metrics.jsonl'}:{number}: has no {missing[0]!r}")
        while kept and kept[-1]["epoch"] >= line["epoch"]:
            kept.pop()
        kept.append(line)
    return kept


def _excluded(excluded: Excluded) -> dict[str, str]:
    return {**excluded.model_dump(include={*KEYS[:3], "reason"}), "axes": axes_label(excluded.axes)}


def _nearby(folder: Path) -> str:
    """The results folders one could have meant: below, or beside."""
    if not folder.is_dir():
        folder = folder.parent
    names = [str(p.parent) for p in sorted(folder.glob("*/plan.json"))]
    return choices(str(folder), names) if names else ""
