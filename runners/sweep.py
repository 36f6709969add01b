"""Many cells: what is to be done and in which order; handed to a launcher, watched, closed, tried again.

The folders under results/ are the state; there is no other. A finished cell never runs again, an interrupted one goes
on from its checkpoint, and a failed one ends its own processes alone.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console, Group
from rich.text import Text

from ablate.attempts import read_attempts
from ablate.lock import held_by, is_locked, is_orphan
from ablate.plan import Cell, Plan
from ablate.record import Record, is_damaged, read_json, read_plan, read_spent, write_atomic
from ablate.source import InputError
from runners.cell import is_open, mend
from runners.cell_state import FAILED, CellState, state_of
from runners.closing import Before
from runners.handed import Handed, hand_over, stop_all
from runners.launchers.local import LocalLauncher
from runners.launchers.protocol import Launcher
from runners.live import live, live_table
from runners.retries import answer
from runners.stop_files import launcher_requests
from runners.stopping import ONE_REQUEST, stop_requests

LOOK = 10  # turns of half a second between looks at what other launchers do, and at what has been spent


def freeze(results: Path, plan: Plan, grid_text: str) -> None:
    """Write the plan and a folder with its cell.json for every cell.

    Of an existing one only what is no part of its id is written anew, while the cell is not finished; a record that
    nobody could read is set aside.
    """
    if (results / "plan.json").exists() and not is_damaged(results / "plan.json"):  # which is written anew
        read_json(results / "plan.json")  # refuses results of another version
    try:
        results.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{results}: cannot be made a folder: {error.strerror}") from None
    try:
        write_atomic(results / "grid.yaml", grid_text)
        write_atomic(results / "plan.json", plan.to_json())
        for cell in plan.cells:
            _freeze_cell(results / cell.id, cell)
    except OSError as error:
        raise InputError(f"{results}: cannot be written: {error.strerror}") from None


def _freeze_cell(folder: Path, cell: Cell) -> None:
    path, text = folder / "cell.json", cell.model_dump_json(indent=1) + "\n"
    if not path.exists() or (path.read_bytes() != text.encode() and (is_damaged(path) or is_open(folder))):
        folder.mkdir(exist_ok=True)
        write_atomic(path, text)
    mend(folder)


def run_cells(
    results: Path,
    cells: Sequence[Cell],
    *,
    console: Console,
    launcher: Launcher | None = None,
    workers: int = 1,
    attempts: int = 1,
    device_hours: float | None = None,
    asked: Callable[[], bool] | None = None,
) -> list[CellState]:
    """Run the cells that are not finished, and show them live, until none is left to run, here or by another launcher.

    `launcher`: where; by default here, `workers` at a time. `attempts`: how often each may fail before it is left to
    the next run. Once all cells of the plan, not these alone, have spent `device_hours`, with what was lost, none is
    started, and running ones are asked to stop. Raises KeyboardInterrupt when asked to stop, by any of SIGNALS or as
    `asked` says (by default by a request for the grid from now on), once every running cell has saved itself.
    """
    launcher = launcher or LocalLauncher(workers, most_devices(cells))
    sweep = _Sweep(results=results, cells=cells, console=console, launcher=launcher, attempts=attempts)
    planned = [cell.id for cell in read_plan(results).cells] if device_hours is not None else []
    asked, turns = asked or launcher_requests(results), itertools.count()
    with live(console, sweep.table) as refresh, stop_requests() as requests:
        try:
            while sweep.goes_on:
                looks = next(turns) % LOOK == 0
                if requests or asked():  # here, and not in the midst of starting a process, which nobody would know of
                    raise KeyboardInterrupt
                if device_hours is not None and looks and _spent(results, planned) >= device_hours:
                    console.print(f"The grid has spent its {device_hours:g} device-hours; every cell saves itself.")
                    sweep.stop(requests)
                    break
                if looks:
                    sweep.look()
                sweep.submit()
                sweep.close()
                refresh()
                time.sleep(0.5)
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                console.print(
                    "Stopping: each running cell finishes its epoch and saves. "
                    f"Ctrl-C, {ONE_REQUEST} seconds from now or later: at once."
                )
            sweep.stop(requests)
            raise
        finally:
            sweep.pool.shutdown()
    return [state_of(results, cell) for cell in cells]


def most_devices(cells: Sequence[Cell]) -> int:
    """The devices of the cell that asks for most of them."""
    return max((cell.recipe.devices for cell in cells), default=1)


def in_order(cells: Sequence[Cell]) -> list[Cell]:
    """Round-robin over seeds, so that a grid stopped early is a balanced design."""
    return sorted(cells, key=lambda cell: cell.seed)


@dataclass(kw_only=True)
class _Sweep:
    """What is still to be done, and what is being done."""

    results: Path
    cells: Sequence[Cell]
    console: Console
    launcher: Launcher
    attempts: int
    todo: list[Cell] = field(init=False)
    later: list[tuple[float, Cell]] = field(default_factory=list)  # not before this time.monotonic()
    elsewhere: list[tuple[Cell, Before]] = field(default_factory=list)  # that another process runs
    running: dict[str, Handed] = field(default_factory=dict)
    ending: list[tuple[Handed, Future[Record | None]]] = field(default_factory=list)  # being closed
    pool: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(8))  # a dead node's lock is waited for
    starts: dict[str, int] = field(init=False)  # of each cell before this run

    def __post_init__(self) -> None:
        self.todo = [cell for cell in in_order(self.cells) if is_open(self.results / cell.id)]
        self.starts = {cell.id: len(read_attempts(self.results / cell.id)) for cell in self.todo}

    @property
    def goes_on(self) -> bool:
        return bool(self.todo or self.later or self.elsewhere or self.running or self.ending)

    def table(self, height: int | None = None) -> Group:
        return live_table(self.console, [state_of(self.results, cell) for cell in self.cells], height=height)

    def look(self) -> None:
        """Leave cells that another process runs to it; take over those whose process was killed."""
        for cell in [cell for cell in self.todo if is_locked(self.results / cell.id)]:
            self.todo.remove(cell)
            self._leave(cell)
        for cell, before in self.elsewhere[:]:
            folder = self.results / cell.id
            if not is_locked(folder):
                self.elsewhere.remove((cell, before))
                if Before.of(folder).stamp == before.stamp and is_open(folder):  # it could not write its record
                    self.todo.append(cell)

    def submit(self) -> None:
        """Hand over as many cells as there is room for."""
        now = time.monotonic()
        self.todo += [cell for due, cell in self.later if due <= now]
        self.later = [(due, cell) for due, cell in self.later if due > now]
        orphans = [folder for cell, _ in self.elsewhere if is_orphan(folder := self.results / cell.id)]
        room = self.launcher.places - self.launcher.taken_by(orphans) - len(self.running)
        taken: list[Cell] = []
        while self.todo and len(taken) < room:
            cell = self.todo.pop(0)
            folder = self.results / cell.id
            if is_locked(folder):
                self._leave(cell)
            elif is_open(folder):  # not finished by another launcher, meanwhile
                taken.append(cell)
        if not taken:
            return
        self.running |= {one.cell.id: one for one in hand_over(self.launcher, self.results, taken)}

    def _leave(self, cell: Cell) -> None:
        folder = self.results / cell.id
        self.console.print(f"{cell.id}: left to the process that is running it{held_by(folder)}")
        self.elsewhere.append((cell, Before.of(folder)))

    def close(self) -> None:
        """Close the cells that have ended."""
        for name, running in list(self.running.items()):
            if ended := running.job.poll():
                del self.running[name]
                self.ending.append((running, self.pool.submit(running.close, ended)))
        for running, closing in [pair for pair in self.ending if pair[1].done()]:
            self.ending.remove((running, closing))
            self._closed(running, closing)

    def _closed(self, running: Handed, closing: Future[Record | None]) -> None:
        """Say so at once if a cell has failed, and try it again where that helps."""
        folder = running.folder
        try:
            record = closing.result()
        except (OSError, InputError) as error:  # a full disk
            self._complain(running, error)
            return
        if record is None:  # another process has it
            self._leave(running.cell)
            return
        if record.status not in FAILED:
            return
        failures = sum(attempt.failed for attempt in read_attempts(folder)[self.starts[folder.name] :])
        again = answer(record, failures, self.attempts)
        after = f"; again in {again[0]:g} s, {again[1]} (attempt {failures + 1} of {self.attempts})" if again else ""
        self.console.print(Text(f"{folder.name} {record.status}: {record.message} (see {folder}/){after}", style="red"))
        if again:
            self.later.append((time.monotonic() + again[0], running.cell))

    def stop(self, requests: Sequence[float]) -> None:
        """Stop all cells, and close them."""
        for running, error in stop_all(list(self.running.values()), requests):
            self._complain(running, error)

    def _complain(self, running: Handed, error: Exception) -> None:
        self.console.print(Text(f"{running.folder.name}: cannot be closed: {error}", style="red"))


def _spent(results: Path, planned: Sequence[str]) -> float:
    """Device-hours that cells have spent so far, with what was lost."""
    return sum(_hours(results / name) for name in planned)


def _hours(folder: Path) -> float:
    """Device-hours of one cell; none of one whose files are damaged."""
    try:
        return read_spent(folder).all_hours
    except InputError:
        return 0.0
