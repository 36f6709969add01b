"""How far a cell is, as its folder shows it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ablate.lock import is_locked
from ablate.plan import Cell
from ablate.record import Status, read_metrics, read_record


@dataclass(frozen=True, kw_only=True)
class CellState:
    """A cell as its folder shows it."""

    cell: Cell
    status: str  # a Status, `running` or `waiting`
    message: str = ""
    epoch: int = 0
    device_hours: float = 0.0
    reward: float | None = None
    base_accuracy: float | None = None
    accuracy: float | None = None
    fraction: float = 0.0  # of the budget


def state_of(results: Path, cell: Cell) -> CellState:
    """Read a cell's state from its folder."""
    folder = results / cell.id
    record, lines = read_record(folder), read_metrics(folder)
    status = str(record.status) if record else "running" if is_locked(folder) else "waiting"
    if record is None and lines and status == "waiting":
        status = str(Status.INTERRUPTED)
    last = lines[-1] if lines else {}
    measured = [line.get("eval/accuracy", line.get("eval/score")) for line in lines if "eval/score" in line]
    rewards = [line["rollout/score"] for line in lines if "rollout/score" in line]
    budget = cell.recipe.budget
    fractions = [
        spent / limit
        for spent, limit in ((last.get("epoch", 0), budget.epochs), (last.get("device_hours", 0), budget.device_hours))
        if limit
    ]
    return CellState(
        cell=cell,
        status=status,
        message=record.message if record else "",
        epoch=last.get("epoch", 0),
        device_hours=last.get("device_hours", 0.0),
        reward=rewards[-1] if rewards else None,
        base_accuracy=measured[0] if measured else None,
        accuracy=measured[-1] if measured else None,
        fraction=1.0 if record and record.status.final else min(1.0, max(fractions, default=0.0)),
    )
