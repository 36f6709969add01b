"""What a plan will cost: network calls per image and device-hours per cell."""

from __future__ import annotations

from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from ablate.plan import FORMAT, Cell, Passes, Plan, passes


def device_hours(cell: Cell, cost: Passes, rate: float | None) -> float | None:
    """Hours of one device until the cell's budget is spent; None without a rate if only epochs bound it."""
    budget, rollout = cell.recipe.budget, cell.recipe.rollout
    limits = [] if budget.device_hours is None else [budget.device_hours]
    if rate is not None and budget.epochs is not None:
        calls = budget.epochs * rollout.num_groups * rollout.group_size * cost.nfe
        limits.append(calls / rate / 3600)
    return min(limits) if limits else None


def plan_json(plan: Plan, rate: float | None) -> dict[str, Any]:
    """The plan as `ablate plan --json` prints it; other tools rely on these names."""
    cells = []
    for cell in plan.cells:
        cost = passes(cell)
        cells.append(
            {
                **cell.model_dump(mode="json", include={"id", "objective", "estimator", "sampler", "seed", "axes"}),
                "rollout_forwards": cost.rollout,
                "forwards": cost.forward,
                "backwards": cost.backward,
                "device_hours": device_hours(cell, cost, rate),
            }
        )
    return {
        "format": FORMAT,
        "grid": plan.grid,
        "cells": cells,
        "excluded": [combination.model_dump(mode="json") for combination in plan.excluded],
    }


def plan_table(plan: Plan, rate: float | None) -> Group:
    """The plan for people: one row per combination, with its seeds, network calls per image and device-hours."""
    table = Table(box=None, padding=(0, 1), header_style="bold")
    for name in ("objective", "estimator", "sampler"):
        table.add_column(name, overflow="fold")
    for name in ("seeds", "rollout", "forward", "backward", "device-hours"):
        table.add_column(name, justify="right")
    rows: dict[str, list[Cell]] = {}
    for cell in plan.cells:
        rows.setdefault(str((cell.objective, cell.estimator, cell.sampler, cell.axes)), []).append(cell)
    total, unknown = 0.0, False
    for cells in rows.values():
        cell, cost = cells[0], passes(cells[0])
        hours = device_hours(cell, cost, rate)
        unknown |= hours is None
        total += (hours or 0.0) * len(cells)
        axes = "".join(f" {name}={value}" for name, value in cell.axes.items())
        table.add_row(
            cell.objective + axes,
            cell.estimator,
            cell.sampler,
            str(len(cells)),
            *(f"{n:g}" for n in (cost.rollout, cost.forward, cost.backward)),
            "?" if hours is None else f"{hours:.2f}",
        )
    lines = [
        f"{len(plan.cells)} cells: {len(rows)} combinations, "
        f"{len({c.seed for c in plan.cells})} seeds; {len(plan.excluded)} combinations excluded:"
    ]
    lines += [f"  {e.objective} x {e.estimator} x {e.sampler}: {e.reason}" for e in plan.excluded]
    lines.append("Network calls are per image: rollout, then without and with gradient.")
    if unknown:
        lines.append("Device-hours need a rate: --rate CALLS_PER_SECOND, or --calibrate to measure it here.")
    else:
        lines.append(f"{total:.1f} device-hours in all, without evaluation.")
    return Group(table, Text("\n".join(lines)))
