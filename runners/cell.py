"""One cell as a command: idempotent, alone in its folder, judged by the record it leaves."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from pathlib import Path

from ablate.lock import lock
from ablate.record import Record, read_cell, read_metrics, read_record, set_aside_if_damaged, write_ledger


def run_cell(folder: Path) -> Record:
    """Train a cell to its end, unless it has come to it before.

    Raises InputError where the folder has no cell, another process holds it, or the processes cannot share the cell.
    """
    from runners.distributed import is_main  # noqa: PLC0415  (with torch, and `finished` does without)

    read_cell(folder)
    with lock(folder) if is_main() else nullcontext():
        if done := finished(folder):
            return done
        before = read_record(folder)
        if before and before.status.final and is_main():  # damaged: what it has spent, it has to spend again
            write_ledger(folder, before.cost)
        from runners.train import train_cell  # noqa: PLC0415

        return train_cell(folder)


def finished(folder: Path) -> Record | None:
    """The record of a cell that has come to its end; None for another, and for one whose files are damaged."""
    if kept := set_aside_if_damaged(folder / "record.json"):
        print(f"{folder}: record.json is damaged, kept as {kept.name}; the cell runs again", file=sys.stderr)
    record = read_record(folder)
    if record is None or not record.status.final:
        return None
    lines = read_metrics(folder)
    if (lines[-1]["epoch"] if lines else 0) < record.epochs:
        print(f"{folder}: metrics.jsonl ends before epoch {record.epochs}; the cell runs again", file=sys.stderr)
        return None
    return record
