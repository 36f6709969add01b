"""Many cells: one process each, a finished one never again, an interrupted one from its checkpoint.

The folders under results/ are the state; there is no other. A failed cell ends its own process and is tried again by
the next `ablate run`.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from ablate.plan import Cell, Plan
from ablate.record import Record, Status, read_metrics, read_record, write_atomic
from ablate.source import InputError


@dataclass(frozen=True, kw_only=True)
class CellState:
    """A cell as its folder shows it."""

    cell: Cell
    status: str  # a Status, `running` or `waiting`
    message: str = ""
    epoch: int = 0
    device_hours: float = 0.0
    reward: float | None = None
    base_accuracy: float | None = None
    accuracy: float | None = None
    fraction: float = 0.0  # of the budget


def state_of(results: Path, cell: Cell) -> CellState:
    """Read a cell's state from its folder."""
    folder = results / cell.id
    record, lines = read_record(folder), read_metrics(folder)
    status = str(record.status) if record else "running" if is_locked(folder) else "waiting"
    if record is None and lines and status == "waiting":
        status = str(Status.INTERRUPTED)
    last = lines[-1] if lines else {}
    measured = [line.get("eval/accuracy", line.get("eval/score")) for line in lines if "eval/score" in line]
    rewards = [line["rollout/score"] for line in lines if "rollout/score" in line]
    budget = cell.recipe.budget
    fractions = [
        spent / limit
        for spent, limit in ((last.get("epoch", 0), budget.epochs), (last.get("device_hours", 0), budget.device_hours))
        if limit
    ]
    return CellState(
        cell=cell,
        status=status,
        message=record.message if record else "",
        epoch=last.get("epoch", 0),
        device_hours=last.get("device_hours", 0.0),
        reward=rewards[-1] if rewards else None,
        base_accuracy=measured[0] if measured else None,
        accuracy=measured[-1] if measured else None,
        fraction=1.0 if record and record.status.final else min(1.0, max(fractions, default=0.0)),
    )


def freeze(results: Path, plan: Plan, grid_text: str) -> None:
    """Write the plan and a folder with its cell.json for every cell; existing folders are left alone."""
    results.mkdir(parents=True, exist_ok=True)
    write_atomic(results / "grid.yaml", grid_text)
    write_atomic(results / "plan.json", plan.to_json())
    for cell in plan.cells:
        path = results / cell.id / "cell.json"
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            write_atomic(path, cell.model_dump_json(indent=1) + "\n")


def run_cells(results: Path, cells: Sequence[Cell], *, workers: int, console: Console) -> list[CellState]:
    """Run the cells that are not finished, `workers` at a time, and show them live. Raises KeyboardInterrupt when
    asked to stop, once every running cell has saved itself."""
    todo = [cell for cell in in_order(cells) if not _finished(results / cell.id)]
    running: dict[str, subprocess.Popen[bytes]] = {}
    started: dict[str, float] = {}
    with _live(console, lambda: live_table(results, cells, started)) as refresh:
        try:
            while todo or running:
                while todo and len(running) < workers:
                    cell = todo.pop(0)
                    running[cell.id] = _start(results / cell.id, workers)
                    started[cell.id] = time.monotonic()
                for name in [name for name, process in running.items() if process.poll() is not None]:
                    _close(results / name, running.pop(name), console)
                refresh()
                time.sleep(0.5)
        except KeyboardInterrupt:
            console.print("Stopping: each running cell finishes its epoch and saves. Ctrl-C again ends them at once.")
            _stop(results, running, console)
            raise
    return [state_of(results, cell) for cell in cells]


def in_order(cells: Sequence[Cell]) -> list[Cell]:
    """Round-robin over seeds, so that a grid stopped early is a balanced design."""
    return sorted(cells, key=lambda cell: cell.seed)


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Hold a cell's folder; the system releases it when the process dies. Raises InputError if it is taken."""
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(f"{folder}: another process is running this cell") from None
        yield


def is_locked(folder: Path) -> bool:
    """Whether a process is running this cell."""
    if not (folder / ".lock").exists():
        return False
    try:
        with lock(folder):
            return False
    except InputError:
        return True


def _finished(folder: Path) -> bool:
    record = read_record(folder)
    return record is not None and record.status.final


def _start(folder: Path, workers: int) -> subprocess.Popen[bytes]:
    (folder / "record.json").unlink(missing_ok=True)
    threads = str(max(1, (os.cpu_count() or 1) // workers))
    quiet = {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "PYTHONWARNINGS": "ignore"}
    with (folder / "log.txt").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "ablate.cli", "cell", str(folder)],
            stdout=log,
            stderr=log,
            stdin=subprocess.DEVNULL,
            env={**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, **quiet},
            start_new_session=True,  # a Ctrl-C in the terminal is ours to pass on
        )


def _close(folder: Path, process: subprocess.Popen[bytes], console: Console) -> None:
    """Make sure an ended cell has a record, and say so at once if it failed."""
    if read_record(folder) is None:
        lines = (folder / "log.txt").read_text(encoding="utf-8", errors="replace").strip().splitlines()
        code = process.returncode
        ending = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        message = f"{ending}: {lines[-1]}" if lines and code > 0 else ending
        cell = Cell.model_validate_json((folder / "cell.json").read_text())
        attempts = len((folder / "attempts.jsonl").read_text().splitlines()) if code < 0 else 1
        record = Record(id=folder.name, status=Status.FAILED, message=message, seed=cell.seed, attempts=attempts)
        write_atomic(folder / "record.json", record.model_dump_json(indent=1) + "\n")
    record = read_record(folder) or record
    if record.status in (Status.FAILED, Status.DIVERGED, Status.REWARD_UNAVAILABLE):
        console.print(Text(f"{folder.name} {record.status}: {record.message} (see {folder}/)", style="red"))


def _stop(results: Path, running: dict[str, subprocess.Popen[bytes]], console: Console) -> None:
    for process in running.values():
        process.send_signal(signal.SIGINT)
    try:
        for process in running.values():
            process.wait()
    except KeyboardInterrupt:
        for process in running.values():
            process.send_signal(signal.SIGINT)
        for process in running.values():
            process.wait(timeout=60)
    for name, process in running.items():
        _close(results / name, process, console)


@contextlib.contextmanager
def _live(console: Console, draw: Callable[[], Any]) -> Iterator[Callable[[], None]]:
    """A refresh function: redraws in a terminal, and in a log prints the table once a minute."""
    if console.is_terminal:
        with Live(console=console, auto_refresh=False) as live:
            yield lambda: live.update(draw(), refresh=True)
            live.update(draw(), refresh=True)
        return
    last = [time.monotonic()]

    def occasionally() -> None:
        if time.monotonic() - last[0] >= 60:
            last[0] = time.monotonic()
            console.print(draw())

    yield occasionally
    console.print(draw())


def live_table(results: Path, cells: Sequence[Cell], started: dict[str, float] | None = None, rows: int = 30) -> Group:
    """Cells with epoch, reward, held-out accuracy, device-hours and remaining time; the unfinished ones first."""
    states = [state_of(results, cell) for cell in cells]
    table = Table(box=None, padding=(0, 1), header_style="bold")
    for name in ("cell", "status", "epoch", "reward", "held-out", "device-hours", "", "left"):
        table.add_column(name, justify="left" if name in ("cell", "status", "") else "right", no_wrap=True)
    styles = {"done": "green", "running": "cyan", "failed": "red", "diverged": "red", "interrupted": "yellow"}
    rank = {"running": 0, "failed": 1, "diverged": 1, "interrupted": 2, "done": 3, "waiting": 4}
    for state in sorted(states, key=lambda s: rank.get(s.status, 2))[:rows]:
        held_out = ""
        if state.accuracy is not None and state.base_accuracy is not None:
            held_out = f"{state.base_accuracy:.3f} → {state.accuracy:.3f}"
        table.add_row(
            state.cell.id,
            Text(state.status, style=styles.get(state.status, "dim")),
            str(state.epoch or ""),
            f"{state.reward:.3f}" if state.reward is not None else "",
            held_out,
            f"{state.device_hours:.3f}" if state.device_hours else "",
            ProgressBar(total=1, completed=state.fraction, width=12),
            _left(state, (started or {}).get(state.cell.id)),
        )
    counts = {status: sum(s.status == status for s in states) for status in rank}
    summary = ", ".join(f"{n} {status}" for status, n in counts.items() if n)
    hidden = f" ({len(states) - rows} more not shown)" if len(states) > rows else ""
    spent = sum(s.device_hours for s in states)
    return Group(table, Text(f"{len(states)} cells: {summary}{hidden}; {spent:.2f} device-hours", style="bold"))


def _left(state: CellState, started: float | None) -> str:
    if state.status != "running" or started is None or state.fraction <= 0:
        return ""
    seconds = (time.monotonic() - started) * (1 - state.fraction) / state.fraction
    return f"{int(seconds // 60)}:{int(seconds % 60):02d}"
