"""One cell as a command: idempotent, alone in its folder, judged by the record it leaves."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from pathlib import Path

from ablate.lock import Taken, lock
from ablate.record import Record, is_damaged, read_cell, read_metrics, read_record, set_aside, write_ledger
from ablate.secrets import redacted_output
from ablate.source import InputError


def run_cell(folder: Path) -> Record:
    """Train a cell to its end, unless it has come to it before.

    Raises InputError where the folder has no cell, another process holds it, or the processes cannot share the cell.
    """
    from runners.distributed import is_main  # noqa: PLC0415  (with torch, and `finished` does without)

    read_cell(folder)
    with redacted_output(), lock(folder) if is_main() else nullcontext():
        if is_main():
            _mend(folder)
        if done := finished(folder):  # asked now that nobody else can finish it
            return done
        from runners.train import train_cell  # noqa: PLC0415

        return train_cell(folder)


def finished(folder: Path) -> Record | None:
    """The record of a cell that has come to its end; None for another, and for one whose files are damaged."""
    if is_damaged(folder / "record.json"):
        return None
    record = read_record(folder)
    return record if record and record.status.final and not _is_cut_short(folder, record) else None


def is_open(folder: Path) -> bool:
    """Whether a cell is to be run: it is not finished, and its files can be read."""
    try:
        return finished(folder) is None
    except InputError:
        return False


def mend(folder: Path) -> None:
    """Set a damaged record aside, which nobody could read, unless its cell runs."""
    if is_damaged(folder / "record.json"):
        try:
            with lock(folder):
                _mend(folder)
        except Taken:  # who has it writes a new one
            return


def _mend(folder: Path) -> None:
    path = folder / "record.json"
    if is_damaged(path):
        print(f"{folder}: record.json is damaged, kept as {set_aside(path).name}; the cell runs again", file=sys.stderr)
    record = read_record(folder)
    if record and record.status.final and _is_cut_short(folder, record):
        write_ledger(folder, record.cost)  # what it has spent, it has to spend again
        kept = set_aside(path).name
        print(
            f"{folder}: metrics.jsonl ends before epoch {record.epochs}, record.json is kept as {kept}; the cell runs "
            "again",
            file=sys.stderr,
        )


def _is_cut_short(folder: Path, record: Record) -> bool:
    lines = read_metrics(folder)
    return (lines[-1]["epoch"] if lines else 0) < record.epochs
