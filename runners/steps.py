"""Long work step by step: a bar with the remaining time in a terminal, a line for each step in a log."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class Steps:
    """Steps of so many units of work together."""

    def __init__(self, progress: Progress, total: float) -> None:
        self._progress, self._total = progress, total
        self._bar = progress.add_task("", total=round(total))
        self._done = 0.0  # by the steps that have ended

    def advance(self, units: float) -> None:
        """Some of the work of the step in progress is done."""
        self._progress.advance(self._bar, units)

    @contextmanager
    def step(self, what: str, units: float = 1) -> Iterator[None]:
        """One of them."""
        console = self._progress.console
        if not console.is_terminal:
            console.print(f"{self._done / self._total:4.0%} {what}", markup=False, highlight=False)
        self._progress.update(self._bar, description=what)
        yield
        self._done += units
        self._progress.update(self._bar, completed=round(self._done))


@contextmanager
def steps(console: Console, total: float) -> Iterator[Steps]:
    """What shows them, in a console."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    times = (TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, *times, console=console, disable=not console.is_terminal) as progress:
        yield Steps(progress, total)
