"""How far a cell may go, as whoever starts it decides: limits.json in its folder, read when the cell starts.

Limits are no part of what a cell is: they can only end it before its budget does, and its record says that they did.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated

from pydantic import Field

from ablate.plan import FORMAT, Cell
from ablate.recipe import BudgetRecipe, Strict
from ablate.record import read_record, read_validated, write_atomic
from ablate.source import InputError

FILE = "limits.json"


class Limits(Strict):
    """What ends a cell before its budget does."""

    format: int = FORMAT
    stop_when: str | None = None
    """A rule of stop_rule.py: the cell that fulfils it is done."""
    share: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Of the budget, after which the cell saves itself and pauses."""


def read_limits(folder: Path) -> Limits:
    """The limits of a cell's folder; none where it has no such file. Raises InputError for a damaged one."""
    path = folder / FILE
    return read_validated(Limits, path) if path.exists() else Limits()


def write_limits(folder: Path, limits: Limits) -> None:
    """Limit the next start of a cell; without limits, remove the file."""
    if limits == Limits():
        (folder / FILE).unlink(missing_ok=True)
    else:
        write_atomic(folder / FILE, limits.model_dump_json() + "\n")


def limit(results: Path, cells: Sequence[Cell], limits: Limits) -> None:
    """Limit the next start of all cells that have not ended for good, and whose record can be read."""
    for cell in cells:
        with suppress(InputError):
            record = read_record(results / cell.id)
            if record is None or not record.status.final:
                write_limits(results / cell.id, limits)


def reached(budget: BudgetRecipe, share: float, epoch: int, device_hours: float) -> bool:
    """Whether a share of the budget is spent: of its epochs, rounded up, or of its device-hours, as either comes."""
    if budget.epochs is not None and epoch >= math.ceil(share * budget.epochs):
        return True
    return budget.device_hours is not None and device_hours >= share * budget.device_hours
