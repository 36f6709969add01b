"""What a launcher's word adds to a cell's folder, once the cell has ended: a record and the end of its attempt."""

from __future__ import annotations

import platform
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ablate.attempts import Attempt, complete, read_attempts, write_attempts
from ablate.lock import Taken, lock
from ablate.metric_ends import read_ends
from ablate.plan import Cell
from ablate.record import Failure, Record, Status, read_record, read_spent, write_record
from ablate.source import InputError
from runners.cell import finished
from runners.launchers.protocol import Ended


@dataclass(frozen=True)
class Before:
    """What a cell's folder held when the cell was handed over."""

    attempts: int
    stamp: tuple[int, int] | None  # of its record
    time: float  # seconds since 1970

    @classmethod
    def of(cls, folder: Path) -> Before:
        return cls(len(read_attempts(folder)), _stamp(folder), time.time())


def close(folder: Path, cell: Cell, ended: Ended, before: Before, *, stopped: bool = False) -> Record | None:
    """The record of a cell that has ended, written where the cell could not; None if another process has the cell.

    `stopped`: it ended as it was asked to.
    """
    if not ended.started:
        return None
    try:
        with lock(folder):
            return _close(folder, cell, ended, before, stopped=stopped)
    except Taken:  # another launcher was faster
        return None


def note_lost_node(folder: Path) -> None:
    """Note of an attempt that was left open that its machine has gone, which nobody was there to see."""
    with suppress(Taken), lock(folder):  # taken: it runs after all
        attempts = read_attempts(folder)
        if attempts and attempts[-1].status is None:
            attempts[-1] = complete(attempts[-1], status=Status.FAILED, failure=Failure.NODE_LOST)
            write_attempts(folder, attempts)


def _close(folder: Path, cell: Cell, ended: Ended, before: Before, *, stopped: bool) -> Record:
    if done := finished(folder):  # by whomever
        return done
    written = read_record(folder) if _stamp(folder) != before.stamp else None
    attempts = read_attempts(folder)
    if len(attempts) == before.attempts:  # it could not even note that it started
        attempts.append(Attempt(started=before.time, host=platform.node()))
    if written is None:
        status = Status.INTERRUPTED if stopped else Status.FAILED
        message = "" if stopped else _message(folder, ended)
        failure = None if stopped else _kind(ended)
        record = Record(
            id=folder.name, status=status, failure=failure, message=message, seed=cell.seed, **_so_far(folder)
        )
    elif written.status is Status.FAILED and ended.code < 0 and not stopped:  # written for want of the one killed
        record = written.model_copy(update={"message": ended.reason, "failure": Failure.KILLED})
    else:
        return written
    found: dict[str, Any] = {"status": record.status, "failure": record.failure, "signal": ended.signal}
    found["exit_code"] = ended.code if ended.code >= 0 and not ended.node_lost else None
    attempts[-1] = complete(attempts[-1], ended=time.time(), **found)
    write_attempts(folder, attempts)
    record = record.model_copy(update={"attempts": len(attempts)})
    write_record(folder, record)
    return record


def _so_far(folder: Path) -> dict[str, Any]:
    """Epochs, cost and last evaluation of a cell that could not write them; none of them where files are damaged."""
    try:
        ends, cost = read_ends(folder), read_spent(folder)
    except InputError:
        return {}
    metrics = {name: value for name, value in ends.evaluated.items() if name.startswith("eval/")}
    return {"epochs": ends.last.get("epoch", 0), "cost": cost, "metrics": metrics}


def _kind(ended: Ended) -> Failure:
    if ended.node_lost:
        return Failure.NODE_LOST
    if ended.code < 0:
        return Failure.KILLED
    return Failure.BAD_CONFIG if ended.code == 2 else Failure.ERROR  # 2: `ablate` refuses its input


def _message(folder: Path, ended: Ended) -> str:
    log = folder / "log.txt"
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() if log.exists() else []
    return f"{ended.reason}: {lines[-1]}" if lines and ended.code > 0 else ended.reason


def _stamp(folder: Path) -> tuple[int, int] | None:
    try:
        found = (folder / "record.json").stat()
    except FileNotFoundError:
        return None
    return found.st_mtime_ns, found.st_ino
