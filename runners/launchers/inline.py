"""Cells in this very process, one after the other: for tests and debuggers."""

from __future__ import annotations

import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ablate.record import Status
from ablate.source import InputError
from runners.cell import run_cell
from runners.launchers.protocol import Ended, Job


@dataclass(frozen=True)
class Finished:
    """A job that is over as soon as it is there."""

    ended: Ended

    def poll(self) -> Ended:
        return self.ended

    def cancel(self, *, force: bool = False) -> None:
        pass


class InlineLauncher:
    """One cell at a time; one that is killed takes the launcher with it."""

    places = 1

    def submit(self, folders: Sequence[Path]) -> list[Job]:
        return [Finished(Ended(code=self._run(folder))) for folder in folders]

    def taken_by(self, orphans: Sequence[Path]) -> int:
        return 0

    def close(self) -> None:
        pass

    def _run(self, folder: Path) -> int:
        """Exit codes of `ablate cell`. Raises KeyboardInterrupt for a cell that was asked to stop: so was the sweep."""
        try:
            record = run_cell(folder)
        except InputError as error:
            self._log(folder, str(error))
            return 2
        except Exception:
            self._log(folder, traceback.format_exc().strip())
            return 1
        if record.status is Status.INTERRUPTED:
            raise KeyboardInterrupt
        return 0 if record.status.final else 1

    @staticmethod
    def _log(folder: Path, text: str) -> None:
        with (folder / "log.txt").open("a", encoding="utf-8") as log:
            log.write(f"{text}\n")
