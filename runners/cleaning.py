"""What a grid's results no longer need: found first, removed when that is asked for."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from ablate.lock import Taken, is_locked, lock
from runners.anew import SET_ASIDE
from runners.cell import finished

HALF = "half written by a process that was killed"
PATTERNS = (  # in a cell's folder, and why nothing reads what they match
    (f"{SET_ASIDE}[0-9]*", "set aside by `ablate retry`"),
    ("damaged-*", "damaged, and replaced"),
    (".*.json.*", HALF),
    (".*.jsonl.*", HALF),
    ("..stop.*", HALF),
    (".clock.*", HALF),
)


@dataclass(frozen=True)
class Leftover:
    """A file or folder of a cell that nothing will read again."""

    path: Path
    why: str
    cell: Path  # its folder

    @property
    def size(self) -> int:
        """Bytes."""
        files = self.path.rglob("*") if self.path.is_dir() else [self.path]
        return sum(file.lstat().st_size for file in files if not file.is_dir())


def leftovers(cells: Sequence[Path], strays: Sequence[Path] = ()) -> list[Leftover]:
    """What cells that do not run have left over; of `strays`, all."""
    idle = [folder for folder in cells if folder not in strays and not is_locked(folder)]
    found = [leftover for folder in idle for leftover in _of_cell(folder)]
    return found + [Leftover(folder, "not in the plan", folder) for folder in strays if not is_locked(folder)]


def _of_cell(folder: Path) -> Iterator[Leftover]:
    reasons = {path: why for pattern, why in PATTERNS for path in sorted(folder.glob(pattern))}
    if (folder / "checkpoint").exists() and finished(folder):
        reasons[folder / "checkpoint"] = "the cell is finished"
    return (Leftover(path, why, folder) for path, why in reasons.items())


def remove(found: Sequence[Leftover]) -> Iterator[tuple[Leftover, bool]]:
    """Delete them one by one; each, and whether it is gone: not where a process has started to run its cell."""
    for cell, own in groupby(found, key=lambda leftover: leftover.cell):
        every = list(own)
        try:
            with lock(cell):
                for leftover in every:
                    _delete(leftover.path)
                    yield leftover, True
        except Taken:
            yield from ((leftover, False) for leftover in every)


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
