"""Many cells: one process each, a finished one never again, an interrupted one from its checkpoint.

The folders under results/ are the state; there is no other. A failed cell ends its own process and is tried again by
the next `ablate run`.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console, Group
from rich.text import Text

from ablate.lock import is_locked
from ablate.plan import Cell, Plan
from ablate.record import Record, Status, read_json, read_record, write_atomic
from ablate.source import InputError
from runners.cell_state import CellState, state_of
from runners.live import live, live_table


def freeze(results: Path, plan: Plan, grid_text: str) -> None:
    """Write the plan and a folder with its cell.json for every cell; existing folders are left alone."""
    if (results / "plan.json").exists():
        read_json(results / "plan.json")  # refuses results of another version
    try:
        results.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{results}: cannot be made a folder: {error.strerror}") from None
    write_atomic(results / "grid.yaml", grid_text)
    write_atomic(results / "plan.json", plan.to_json())
    for cell in plan.cells:
        path = results / cell.id / "cell.json"
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            write_atomic(path, cell.model_dump_json(indent=1) + "\n")


def run_cells(results: Path, cells: Sequence[Cell], *, workers: int, console: Console) -> list[CellState]:
    """Run the cells that are not finished, `workers` at a time, and show them live. Raises KeyboardInterrupt when
    asked to stop, by SIGINT or SIGTERM, once every running cell has saved itself."""
    todo = [cell for cell in in_order(cells) if not _finished(results / cell.id)]
    running: dict[str, _Running] = {}

    def table() -> Group:
        return live_table(console, results, cells, {name: cell.start for name, cell in running.items()})

    with live(console, table) as refresh:
        try:
            with _termination():
                while todo or running:
                    while todo and len(running) < workers:
                        cell = todo.pop(0)
                        if is_locked(results / cell.id):
                            console.print(f"{cell.id}: left to the process that is running it")
                            continue
                        running[cell.id] = _start(results / cell.id, cell, workers)
                    for name in [name for name, cell in running.items() if cell.process.poll() is not None]:
                        _close(running.pop(name), console)
                    refresh()
                    time.sleep(0.5)
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                console.print("Stopping: each running cell finishes its epoch and saves. Again Ctrl-C: at once.")
            _stop(running, console)
            raise
    return [state_of(results, cell) for cell in cells]


def in_order(cells: Sequence[Cell]) -> list[Cell]:
    """Round-robin over seeds, so that a grid stopped early is a balanced design."""
    return sorted(cells, key=lambda cell: cell.seed)


@dataclass(frozen=True, kw_only=True)
class _Running:
    """A cell and its process."""

    folder: Path
    cell: Cell
    process: subprocess.Popen[bytes]
    start: tuple[float, float]  # time.monotonic() and the share of the budget that was spent


def _finished(folder: Path) -> bool:
    record = read_record(folder)
    return record is not None and record.status.final


def _start(folder: Path, cell: Cell, workers: int) -> _Running:
    (folder / "record.json").unlink(missing_ok=True)
    fraction = state_of(folder.parent, cell).fraction
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, len(os.sched_getaffinity(0)) // workers))
    quiet = {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "PYTHONWARNINGS": "ignore"}
    with (folder / "log.txt").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "ablate.cli", "cell", str(folder)],
            stdout=log,
            stderr=log,
            stdin=subprocess.DEVNULL,
            env={**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, **quiet},
            start_new_session=True,  # a Ctrl-C in the terminal is ours to pass on
        )
    return _Running(folder=folder, cell=cell, process=process, start=(time.monotonic(), fraction))


def _close(ended: _Running, console: Console, *, stopped: bool = False) -> None:
    """Make sure an ended cell has a record, and say so at once if it failed."""
    folder, code = ended.folder, ended.process.returncode
    record = read_record(folder)
    if record is None and is_locked(folder):  # another `ablate run` was faster
        return
    if record is None:
        lines = (folder / "log.txt").read_text(encoding="utf-8", errors="replace").strip().splitlines()
        ending = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        starts = folder / "attempts.jsonl"
        record = Record(
            id=folder.name,
            status=Status.INTERRUPTED if stopped else Status.FAILED,
            message="" if stopped else f"{ending}: {lines[-1]}" if lines and code > 0 else ending,
            seed=ended.cell.seed,
            attempts=len(starts.read_text().splitlines()) if starts.exists() else 0,
        )
        write_atomic(folder / "record.json", record.model_dump_json(indent=1) + "\n")
    if record.status in (Status.FAILED, Status.DIVERGED, Status.REWARD_UNAVAILABLE):
        console.print(Text(f"{folder.name} {record.status}: {record.message} (see {folder}/)", style="red"))


def _stop(running: dict[str, _Running], console: Console) -> None:
    processes = [cell.process for cell in running.values()]
    for process in processes:
        process.terminate()  # not SIGINT: a sweep started in the background hands on that it is ignored
    try:
        for process in processes:
            process.wait()
    except KeyboardInterrupt:
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait(timeout=60)
    for cell in running.values():
        _close(cell, console, stopped=True)


@contextlib.contextmanager
def _termination() -> Iterator[None]:
    """SIGTERM, as batch systems send it, stops like Ctrl-C."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
