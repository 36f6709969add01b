"""How far a cell is, as its folder shows it. A file is read again only where it has changed."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from ablate.lock import is_locked
from ablate.metric_ends import Ends, read_ends
from ablate.plan import Cell
from ablate.record import Ledger, Record, Status, read_cell, read_json, read_record
from ablate.source import InputError

REMEMBERED = 1 << 15  # files whose content is kept, a few hundred bytes each

Stamp = tuple[int, int, int] | None  # what changes with a file: inode, time of change in ns, bytes; None for no file


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
    attempts: int = 0
    seconds: float = 0.0  # seconds x devices of all work so far, evaluation and checkpoints included

    @property
    def finished(self) -> bool:
        """Whether the cell is never run again."""
        return self.status in (Status.DONE, Status.DIVERGED)

    @property
    def failed(self) -> bool:
        """Whether the cell has ended otherwise than it should, or never comes to a result."""
        return self.status in (Status.FAILED, Status.REWARD_UNAVAILABLE, Status.DIVERGED)


def state_of(results: Path, cell: Cell) -> CellState:
    """Read a cell's state from its folder."""
    folder = results / cell.id
    record = _record(folder, _stamp(folder / "record.json"))
    ends = _ends(folder, _stamp(folder / "metrics.jsonl"))
    status = str(record.status) if record else "running" if is_locked(folder) else "waiting"
    if record is None and ends.last and status == "waiting":
        status = str(Status.INTERRUPTED)
    epoch, hours = ends.last.get("epoch", 0), ends.last.get("device_hours", 0.0)
    budget = cell.recipe.budget
    fractions = [spent / limit for spent, limit in ((epoch, budget.epochs), (hours, budget.device_hours)) if limit]
    cost = Ledger.of_line(ends.last)
    return CellState(
        cell=cell,
        status=status,
        message=record.message if record else "",
        epoch=epoch,
        device_hours=hours,
        reward=ends.trained.get("rollout/score"),
        base_accuracy=_held_out(ends.first),
        accuracy=_held_out(ends.evaluated),
        fraction=1.0 if record and record.status.final else min(1.0, max(fractions, default=0.0)),
        attempts=_attempts(folder, _stamp(folder / "attempts.jsonl")),
        seconds=cost.work + cost.checkpoint,
    )


def planned_cells(results: Path) -> list[Cell]:
    """The cells of a results folder by its plan. Raises InputError if it is none, or lacks the folder of a cell."""
    if not (results / "plan.json").exists():
        raise InputError(f"{results}: not a results folder, it has no plan.json; `ablate run GRID` writes one")
    return [read_cell(results / cell["id"]) for cell in read_json(results / "plan.json")["cells"]]


def _held_out(line: dict[str, float]) -> float | None:
    return line.get("eval/accuracy", line.get("eval/score"))


def _stamp(path: Path) -> Stamp:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size


@lru_cache(maxsize=REMEMBERED)
def _record(folder: Path, stamp: Stamp) -> Record | None:
    return read_record(folder) if stamp else None


@lru_cache(maxsize=REMEMBERED)
def _ends(folder: Path, stamp: Stamp) -> Ends:
    return read_ends(folder) if stamp else Ends()


@lru_cache(maxsize=REMEMBERED)
def _attempts(folder: Path, stamp: Stamp) -> int:
    return (folder / "attempts.jsonl").read_bytes().count(b"\n") if stamp else 0
