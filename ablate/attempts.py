"""Every start of a cell: attempts.jsonl, one object per start, completed when its end is known.

Only who holds the lock of the cell's folder writes it, whole each time.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ablate.recipe import Strict
from ablate.record import Failure, Status, write_atomic


class Attempt(Strict):
    """One start of a cell's processes. None: not known, or not yet."""

    started: float = 0.0  # seconds since 1970, by the clock of `host`
    host: str = ""
    pid: int | None = None  # of the first process
    devices: tuple[str, ...] = ()  # GPUs by index, or `cpu`, one per process
    halvings: int = 0  # how often every batch size was halved from the start, as attempts before ran out of memory
    ended: float | None = None
    exit_code: int | None = None
    signal: str | None = None  # that killed it, as in SIGKILL
    status: Status | None = None
    failure: Failure | None = None  # of which kind, where status is `failed`
    lost_device_hours: float = 0.0  # of work that had to be done again

    @property
    def failed(self) -> bool:
        """Whether it counts against the number of attempts."""
        return self.status in (Status.FAILED, Status.REWARD_UNAVAILABLE)


def read_attempts(folder: Path) -> list[Attempt]:
    """The starts of a cell, oldest first; a line cut short or damaged is an attempt of which nothing is known."""
    path = folder / "attempts.jsonl"
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    return [_attempt(line) for line in lines if line.strip()]


def _attempt(line: str) -> Attempt:
    try:
        return Attempt.model_validate_json(line)
    except ValidationError:
        return Attempt()


def write_attempts(folder: Path, attempts: Sequence[Attempt]) -> None:
    """Replace all lines."""
    lines = [json.dumps(attempt.model_dump(mode="json", exclude_defaults=True)) for attempt in attempts]
    write_atomic(folder / "attempts.jsonl", "".join(f"{line}\n" for line in lines))


def begin(folder: Path, attempt: Attempt) -> list[Attempt]:
    """Note a start; all starts with this one. Those that were left open were killed with nobody to see it."""
    before = [
        a if a.status else complete(a, status=Status.FAILED, failure=Failure.KILLED) for a in read_attempts(folder)
    ]
    attempts = [*before, attempt.model_copy(update={"halvings": _halvings(before)})]
    write_attempts(folder, attempts)
    return attempts


def _halvings(before: Sequence[Attempt]) -> int:
    """Once more than in the last attempt, if that one ran out of memory."""
    return before[-1].halvings + (before[-1].failure is Failure.OUT_OF_MEMORY) if before else 0


def complete(attempt: Attempt, **found: Any) -> Attempt:
    """With what has been found out about its end."""
    return attempt.model_copy(update=found)


def complete_last(folder: Path, **found: Any) -> None:
    """Complete the newest attempt."""
    *before, last = read_attempts(folder)
    write_attempts(folder, [*before, complete(last, **found)])


def book_lost(folder: Path, total: float, index: int = -1) -> None:
    """Book on one attempt what of the `total` seconds x devices that a cell has lost is on no other."""
    attempts = read_attempts(folder)
    if not -len(attempts) <= index < len(attempts):
        return
    chosen = attempts[index]
    elsewhere = sum(a.lost_device_hours for a in attempts if a is not chosen)
    attempts[index] = complete(chosen, lost_device_hours=max(0.0, total / 3600 - elsewhere))
    write_attempts(folder, attempts)
