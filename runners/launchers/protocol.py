"""What a launcher is: it takes cells' folders, runs `ablate cell FOLDER` somewhere, and says how that ended.

What became of a cell is in its folder. A launcher knows only of its processes.
"""

from __future__ import annotations

import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How the processes of a cell ended. Code 0: all by themselves; negative: the signal that killed one."""

    code: int = 0
    rank: int = 0  # of the process at fault, of as many as `size`
    size: int = 1
    started: bool = True  # false: taken back while it waited
    node_lost: str = ""  # what is known of it, where the machine and not the process has ended

    @property
    def signal(self) -> str | None:
        """The name of the signal that killed it."""
        return signal.Signals(-self.code).name if self.code < 0 else None

    @property
    def reason(self) -> str:
        """In words: process 1 of 2: killed by SIGKILL."""
        if self.node_lost:
            return self.node_lost
        ending = f"killed by {self.signal}" if self.code < 0 else f"exit code {self.code}"
        return f"process {self.rank} of {self.size}: {ending}" if self.size > 1 else ending


class Job(Protocol):
    """A cell that was handed over."""

    def poll(self) -> Ended | None:
        """None while it waits or runs. Does not wait."""

    def cancel(self, *, force: bool = False) -> None:
        """Ask it to save itself and end, a second time: to end at once; with `force` kill it. Does not wait."""


class Launcher(Protocol):
    """Where cells run."""

    places: int  # cells that it takes at a time

    def submit(self, folders: Sequence[Path]) -> list[Job]:
        """Hand over cells, at most as many as there are free places; a job for each."""

    def taken_by(self, orphans: Sequence[Path]) -> int:
        """Places that are taken by cells which a killed launcher has left at work on this machine."""

    def close(self) -> None:
        """Let go of what the launcher holds; no job is left."""
