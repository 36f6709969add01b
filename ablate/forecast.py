"""What a plan will cost: network calls per image and device-hours per cell."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError
from rich.console import Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from ablate.json_lines import line_of
from ablate.part import COMPONENT_AXES
from ablate.passes import Passes, passes
from ablate.plan import FORMAT, Cell, Plan
from ablate.source import InputError, as_yaml, counted, dotted, parse_json, read_text, shown

WITH_RECIPES = 110  # columns of a terminal that leave room for one more
CHECKPOINTED = 5  # times the trained weights: current, old, average, and Adam's two moments
WIDEST = 20  # characters of a word that a column always has room for; longer names of one's own classes fold

Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]


@dataclass(frozen=True, kw_only=True)
class Speed:
    """What a bench has measured on one device."""

    seconds_per_call: Seconds  # of the network; a call with gradient counts three
    seconds_per_image: Seconds = 0.0  # of everything else: decoding, reward, bookkeeping
    trained_bytes: Annotated[int, Field(ge=0, lt=2**63)] | None = None  # of the weights that a finished cell keeps


def read_bench(path: Path) -> Speed:
    """The result of `ablate bench --json`. Raises InputError where it is none."""
    text = read_text(path)
    try:
        found = parse_json(text, str(path))
        return TypeAdapter(Speed).validate_python({field.name: found[field.name] for field in fields(Speed)})
    except KeyError as missing:
        raise InputError(f"{path}:1: not the result of `ablate bench GRID --json`: it has no {missing}") from None
    except ValidationError as error:
        problem = error.errors()[0]
        line = line_of(text, problem["loc"])
        where = f"{path}:{line}: not the result of `ablate bench GRID --json`: {dotted(problem['loc'])}"
        raise InputError(f"{where}: got {shown(problem['input'])}: {problem['msg']}") from None


def device_hours(cell: Cell, cost: Passes, speed: Speed | None) -> float | None:
    """Hours of one device until the cell's budget is spent; None without a speed if only epochs bound it."""
    budget, rollout = cell.recipe.budget, cell.recipe.rollout
    limits = [] if budget.device_hours is None else [budget.device_hours]
    if speed is not None and budget.epochs is not None:
        images = budget.epochs * rollout.num_groups * rollout.group_size
        limits.append(images * (cost.nfe * speed.seconds_per_call + speed.seconds_per_image) / 3600)
    return min(limits) if limits else None


def disk_bytes(cells: Sequence[Cell], trained_bytes: int) -> tuple[int, int]:
    """What the weights of all cells take when they are finished, and the two checkpoints of one at work."""
    return sum(cell.recipe.export_weights for cell in cells) * trained_bytes, 2 * CHECKPOINTED * trained_bytes


def _disk(cells: Sequence[Cell], speed: Speed | None) -> tuple[int, int] | tuple[None, None]:
    """What `disk_bytes` returns, where a bench has measured the weights."""
    if speed is None or speed.trained_bytes is None:
        return None, None
    return disk_bytes(cells, speed.trained_bytes)


def plan_json(plan: Plan, speed: Speed | None) -> dict[str, Any]:
    """The plan as `ablate plan --json` prints it; other tools rely on these names.

    `weights_bytes` stay when a cell is finished, `checkpoint_bytes` are there while it is at work.
    """
    cells = []
    for cell in plan.cells:
        cost, (weights, checkpoints) = passes(cell), _disk([cell], speed)
        cells.append(
            {
                **cell.model_dump(mode="json", include={"id", "objective", "estimator", "sampler", "seed", "axes"}),
                "rollout_forwards": cost.rollout,
                "forwards": cost.forward,
                "backwards": cost.backward,
                "device_hours": device_hours(cell, cost, speed),
                "weights_bytes": weights,
                "checkpoint_bytes": checkpoints,
            }
        )
    hours = [cell["device_hours"] for cell in cells]
    return {
        "format": FORMAT,
        "grid": plan.grid,
        "device_hours": None if None in hours else sum(hours),
        "weights_bytes": _disk(plan.cells, speed)[0],
        "cells": cells,
        "excluded": [combination.model_dump(mode="json") for combination in plan.excluded],
    }


def plan_table(plan: Plan, speed: Speed | None, width: int = 80) -> Group:
    """The plan for people: one row per combination, with its seeds, network calls per image and device-hours.

    Values of recipe axes stand above a table of their own, so that 80 columns are enough; recipes are a column where
    the width has room for one.
    """
    in_rows = {"recipe"} if width >= WITH_RECIPES else set()
    settings: dict[str, dict[str, list[Cell]]] = {}  # by recipe axes, then by components: the cells of all seeds
    for cell in plan.cells:
        rows = settings.setdefault(_axes({k: v for k, v in cell.axes.items() if k not in in_rows}), {})
        rows.setdefault(str([_named(cell, name) for name in ("recipe", *COMPONENT_AXES)]), []).append(cell)
    tables = [_table(axes, list(rows.values()), speed, bool(in_rows)) for axes, rows in settings.items()]
    hours = [device_hours(cell, passes(cell), speed) for cell in plan.cells]
    num_seeds = len({cell.seed for cell in plan.cells})
    lines = [
        f"{counted(len(plan.cells), 'cell')}: {counted(sum(map(len, settings.values())), 'combination')}, "
        f"{counted(num_seeds, 'seed')}.",
        "Network calls are per trained image: of the rollout, then of updates without and with gradient.",
    ]
    if None in hours:
        lines.append("Hours need a speed: --bench FILE, --rate CALLS_PER_SECOND, or --calibrate to measure it here.")
    else:
        total = sum(filter(None, hours))
        lines.append(f"Hours are of one cell on one device; {total:.1f} device-hours in all, without evaluation.")
    kept, at_work = _disk(plan.cells, speed)
    if kept is not None and at_work is not None:
        lines.append(
            f"GiB are of one finished cell's weights, {kept / 2**30:.2g} in all; the two checkpoints of each cell at "
            f"work take {at_work / 2**30:.2g}."
        )
    return Group(*tables, Text("\n".join(lines)), *_excluded(plan))


def _axes(values: dict[str, Any]) -> str:
    return ", ".join(f"{name}={as_yaml(value)}" for name, value in values.items())


def _named(cell: Cell, name: str) -> str:
    """A cell's recipe, where a grid has several, or its label on a component axis."""
    return str(cell.axes.get("recipe", "")) if name == "recipe" else getattr(cell, name)


def _table(axes: str, rows: list[list[Cell]], speed: Speed | None, with_recipe: bool) -> Group:
    table = Table(box=None, padding=(0, 1), pad_edge=False, header_style="bold")
    names = [*(["recipe"] if with_recipe and "recipe" in rows[0][0].axes else []), *COMPONENT_AXES]
    for name in names:
        # a label may break between its parameters, never inside a word
        words = [name, *(word for cells in rows for word in _named(cells[0], name).split())]
        table.add_column(name, min_width=min(max(map(len, words)), WIDEST), overflow="fold")
    on_disk = _disk([], speed)[0] is not None
    for name in ("seeds", "rollout", "no grad", "grad", "hours", *(["GiB"] if on_disk else [])):
        table.add_column(name, justify="right", no_wrap=True)
    for cells in rows:
        cell, cost = cells[0], passes(cells[0])
        hours, kept = device_hours(cell, cost, speed), _disk([cell], speed)[0]
        table.add_row(
            *(_named(cell, name) for name in names),
            str(len(cells)),
            *(f"{n:.4g}" for n in (cost.rollout, cost.forward, cost.backward)),
            "?" if hours is None else f"{hours:.2f}",
            *([] if kept is None else [f"{kept / 2**30:.2g}"]),
        )
    return Group(*([Text(axes, style="bold cyan")] if axes else []), table, Text())


def _excluded(plan: Plan) -> Iterator[Padding | Text]:
    """Each reason with the combinations that it excludes."""
    reasons: dict[str, dict[str, list[str]]] = {}
    for e in plan.excluded:
        combinations = reasons.setdefault(e.reason, {})
        combinations.setdefault(f"{e.objective} x {e.estimator} x {e.sampler}", []).append(_axes(e.axes))
    if reasons:
        are = "is" if len(plan.excluded) == 1 else "are"
        yield Text(f"\n{counted(len(plan.excluded), 'combination')} {are} excluded:")
    for reason, combinations in reasons.items():
        yield Padding(Text(f"{reason}:"), (0, 0, 0, 2))
        for combination, axes in combinations.items():
            under = "" if axes == [""] else f" ({'; '.join(axes)})" if len(axes) < 3 else f" ({len(axes)} settings)"
            yield Padding(Text(combination + under), (0, 0, 0, 4))
