"""How far a cell is, as its folder shows it. A file is read again only where it has changed."""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

from ablate.attempts import read_attempts
from ablate.lock import is_locked
from ablate.metric_ends import Ends, read_ends
from ablate.plan import Cell
from ablate.record import Ledger, Record, Status, last_record, read_cell, read_plan
from ablate.source import InputError

DAMAGED = "damaged"
REMEMBERED = 1 << 15  # files whose content is kept, a few hundred bytes each

FAILED = (Status.FAILED, Status.REWARD_UNAVAILABLE, Status.DIVERGED)

Stamp = tuple[int, int, int] | None  # what changes with a file: inode, time of change in ns, bytes; None for no file


@dataclass(frozen=True, kw_only=True)
class CellState:
    """A cell as its folder shows it."""

    cell: Cell
    status: str  # a Status, `running`, `waiting` or `damaged`
    failure: str | None = None  # the kind of the last failure, of an attempt before this one too
    message: str = ""  # the last line of the last error; of a cell that was stopped or paused, why
    epoch: int = 0
    device_hours: float = 0.0
    lost_device_hours: float = 0.0  # of work that had to be done again
    reward: float | None = None
    base_accuracy: float | None = None
    accuracy: float | None = None
    fraction: float = 0.0  # of the budget
    attempts: int = 0
    left: float | None = None  # seconds to its end at the pace so far; None where it does not run, or has no pace yet

    @property
    def finished(self) -> bool:
        """Whether the cell is never run again."""
        return any(self.status == status for status in Status if status.final)

    @property
    def failed(self) -> bool:
        """Whether the cell has ended otherwise than it should."""
        return self.status in (*FAILED, DAMAGED)

    def to_json(self) -> dict[str, Any]:
        """What scripts read: `ablate status --json`."""
        values = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "cell"}
        return {"id": self.cell.id, **values}


def state_of(results: Path, cell: Cell) -> CellState:
    """Read a cell's state from its folder; `damaged` is that of one whose files cannot be read."""
    try:
        return _state_of(results, cell)
    except InputError as error:
        return CellState(cell=cell, status=DAMAGED, message=str(error))


def _state_of(results: Path, cell: Cell) -> CellState:
    folder = results / cell.id
    attempts = _attempts(folder, _stamp(folder / "attempts.jsonl"))
    last = _record(folder, _stamp(folder / "record.json"))
    record = last if last and (last.status.final or attempts.number <= last.attempts) else None
    ends = _ends(folder, _stamp(folder / "metrics.jsonl"))
    status = str(record.status) if record else "running" if is_locked(folder) else "waiting"
    if status == "waiting" and (ends.last or attempts.left_open):
        status = str(Status.INTERRUPTED)
    epoch, hours = ends.last.get("epoch", 0), ends.last.get("device_hours", 0.0)
    budget = cell.recipe.budget
    fractions = [spent / limit for spent, limit in ((epoch, budget.epochs), (hours, budget.device_hours)) if limit]
    fraction = 1.0 if record and record.status.final else min(1.0, max(fractions, default=0.0))
    cost = record.cost if record else Ledger.of_line(ends.last)
    failed = last is not None and last.status in FAILED
    return CellState(
        cell=cell,
        status=status,
        failure=str(last.failure or last.status) if last and failed else None,
        message=last.message if last and (record or failed) else "",
        epoch=epoch,
        device_hours=hours,
        lost_device_hours=cost.lost / 3600,
        reward=ends.trained.get("rollout/score"),
        base_accuracy=_held_out(ends.first),
        accuracy=_held_out(ends.evaluated),
        fraction=fraction,
        attempts=attempts.number,
        left=_left(cost, fraction, attempts.processes) if status == "running" else None,
    )


def planned_cells(results: Path) -> list[Cell]:
    """The cells of a results folder by its plan. Raises InputError if it is none, its plan is damaged, or a cell has no
    folder.
    """
    if not (results / "plan.json").exists():
        raise InputError(f"{results}: not a results folder, it has no plan.json; `ablate run GRID` writes one")
    return [read_cell(results / cell.id) for cell in read_plan(results).cells]


def _left(cost: Ledger, fraction: float, processes: int) -> float | None:
    """Seconds to the end, if the rest of the budget costs as much per part of it as what is spent."""
    return (cost.work + cost.checkpoint) / processes * (1 - fraction) / fraction if fraction else None


def _held_out(line: dict[str, float]) -> float | None:
    return line.get("eval/accuracy", line.get("eval/score"))


def _stamp(path: Path) -> Stamp:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size


@dataclass(frozen=True)
class _Attempts:
    """The starts of a cell."""

    number: int = 0
    processes: int = 1  # of the last
    left_open: bool = False  # of the last nobody knows how it ended


@lru_cache(maxsize=REMEMBERED)
def _record(folder: Path, stamp: Stamp) -> Record | None:
    return last_record(folder) if stamp else None


@lru_cache(maxsize=REMEMBERED)
def _ends(folder: Path, stamp: Stamp) -> Ends:
    return read_ends(folder) if stamp else Ends()


@lru_cache(maxsize=REMEMBERED)
def _attempts(folder: Path, stamp: Stamp) -> _Attempts:
    attempts = read_attempts(folder) if stamp else []
    if not attempts:
        return _Attempts()
    last = attempts[-1]
    return _Attempts(number=len(attempts), processes=len(last.devices) or 1, left_open=last.status is None)
