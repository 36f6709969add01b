"""A cell that a launcher has: handed over, closed when it has ended, stopped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ablate.plan import Cell
from ablate.record import Record
from ablate.source import InputError
from runners.closing import Before, close
from runners.launchers.protocol import Ended, Job, Launcher
from runners.stopping import stop_jobs


@dataclass(frozen=True, kw_only=True)
class Handed:
    """A cell that a launcher has."""

    folder: Path
    cell: Cell
    job: Job
    before: Before

    def close(self, ended: Ended, *, stopped: bool = False) -> Record | None:
        """What closing.close says of it."""
        return close(self.folder, self.cell, ended, self.before, stopped=stopped)


def hand_over(launcher: Launcher, results: Path, cells: Sequence[Cell]) -> list[Handed]:
    """Submit cells, for which there is room."""
    folders = [results / cell.id for cell in cells]
    before = [Before.of(folder) for folder in folders]
    jobs = launcher.submit(folders)
    return [
        Handed(folder=folder, cell=cell, job=job, before=found)
        for folder, cell, job, found in zip(folders, cells, jobs, before, strict=True)
    ]


def stop_all(handed: Sequence[Handed], requests: Sequence[float]) -> list[tuple[Handed, Exception]]:
    """Stop cells as `stop_jobs` does, and close them; those that cannot be closed, and why."""
    problems: list[tuple[Handed, Exception]] = []
    for one, ended in zip(handed, stop_jobs([one.job for one in handed], requests), strict=True):
        try:
            one.close(ended, stopped=True)
        except (OSError, InputError) as error:  # a full disk, which has ended the others too
            problems.append((one, error))
    return problems
