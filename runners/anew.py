"""A cell that starts anew: what it has left behind is set aside, and what it has spent is booked as lost."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import count
from pathlib import Path

from ablate.attempts import book_lost
from ablate.lock import lock
from ablate.record import LEDGER, Ledger, Status, read_record, read_spent, write_ledger

SET_ASIDE = "earlier-"  # folders in a cell's, with a number
LEFT_BEHIND = ("record.json", "metrics.jsonl", "traceback.txt", "log.txt", "samples")  # beside the checkpoints


def failed_cells(cells: Iterable[Path], *, diverged: bool = False) -> list[Path]:
    """Those that have failed, or whose reward is unavailable, and if asked for those that have diverged."""
    statuses = {Status.FAILED, Status.REWARD_UNAVAILABLE, *([Status.DIVERGED] if diverged else [])}
    return [folder for folder in cells if (record := read_record(folder)) and record.status in statuses]


def start_anew(folder: Path) -> Path:
    """Take a cell back to before its first epoch; the folder that now holds what it had. Its attempts stay.

    Raises Taken, an InputError, if a process runs it.
    """
    with lock(folder):
        spent = read_spent(folder).undone(Ledger())
        write_ledger(folder, spent)  # first, so that nothing that comes between forgets it
        book_lost(folder, spent.lost)
        kept = next(path for n in count(1) if not (path := folder / f"{SET_ASIDE}{n}").exists())
        kept.mkdir()
        checkpoints = [path for path in sorted((folder / LEDGER).parent.iterdir()) if path.name != LEDGER.name]
        for path in [*checkpoints, *(path for name in LEFT_BEHIND if (path := folder / name).exists())]:
            path.rename(kept / path.name)
    return kept
