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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from ablate.plan import Cell, Plan
from ablate.record import Record, Status, read_json, read_metrics, read_record, write_atomic
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
    with _live(console, lambda: live_table(console, results, cells, running)) as refresh:
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


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Hold a cell's folder; the system releases it when the process dies. Raises InputError if it is taken."""
    with (folder / ".lock").open("w") as file:
        if not any(_acquired(file, fcntl.LOCK_EX, delay) for delay in (0, 0.1, 0.2)):  # outlasts a look by is_locked
            raise InputError(f"{folder}: another process is running this cell")
        yield


def is_locked(folder: Path) -> bool:
    """Whether a process is running this cell."""
    path = folder / ".lock"
    if not path.exists():
        return False
    with path.open() as file:
        return not _acquired(file, fcntl.LOCK_SH)


def _acquired(file: TextIO, kind: int, delay: float = 0) -> bool:
    time.sleep(delay)
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@dataclass(frozen=True, kw_only=True)
class _Running:
    """A cell and its process."""

    folder: Path
    cell: Cell
    process: subprocess.Popen[bytes]
    since: float  # time.monotonic() at its start


def _finished(folder: Path) -> bool:
    record = read_record(folder)
    return record is not None and record.status.final


def _start(folder: Path, cell: Cell, workers: int) -> _Running:
    (folder / "record.json").unlink(missing_ok=True)
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, (os.cpu_count() or 1) // workers))
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
    return _Running(folder=folder, cell=cell, process=process, since=time.monotonic())


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


@contextlib.contextmanager
def _live(console: Console, draw: Callable[[], Any]) -> Iterator[Callable[[], None]]:
    """A refresh function: redraws every two seconds in a terminal, and in a log prints the table once a minute."""
    pause = 2 if console.is_terminal else 60
    with Live(console=console, auto_refresh=False) if console.is_terminal else contextlib.nullcontext() as live:

        def show() -> None:
            if live is None:
                console.print(draw())
            else:
                live.update(draw(), refresh=True)

        last = [time.monotonic()]

        def occasionally() -> None:
            if time.monotonic() - last[0] >= pause:
                last[0] = time.monotonic()
                show()

        yield occasionally
        show()


def live_table(
    console: Console,
    results: Path,
    cells: Sequence[Cell],
    running: Mapping[str, _Running] | None = None,
    rows: int = 30,
) -> Group:
    """Cells with epoch, reward, held-out accuracy, device-hours and remaining time; the unfinished ones first.

    A narrow console loses columns, the least important first, and never a part of a word.
    """
    states = [state_of(results, cell) for cell in cells]
    rank = {"running": 0, "failed": 1, "diverged": 1, "interrupted": 2, "done": 3, "waiting": 4}
    listed = sorted(states, key=lambda s: rank.get(s.status, 2))[:rows]
    columns: dict[str, Sequence[Any]] = {
        "cell": [state.cell.id for state in listed],
        "status": [Text(state.status, style=_STYLES.get(state.status, "dim")) for state in listed],
        "epoch": [str(state.epoch or "") for state in listed],
        "reward": ["" if state.reward is None else f"{state.reward:.3f}" for state in listed],
        "held-out": [_held_out(state) for state in listed],
        "hours": [f"{state.device_hours:.3f}" if state.device_hours else "" for state in listed],
        "": [ProgressBar(total=1, completed=state.fraction, width=12) for state in listed],
        "left": [_left(state, (running or {}).get(state.cell.id)) for state in listed],
    }
    dropped = ["", "reward", "hours", "left"]
    unbounded = console.options.update(max_width=1000)
    while (table := _table(columns)) and dropped and console.measure(table, options=unbounded).maximum > console.width:
        del columns[dropped.pop(0)]
    counts = {status: sum(s.status == status for s in states) for status in dict.fromkeys(s.status for s in states)}
    summary = ", ".join(f"{counts[status]} {status}" for status in sorted(counts, key=lambda s: rank.get(s, 2)))
    hidden = f" ({len(states) - rows} more not shown)" if len(states) > rows else ""
    spent = sum(s.device_hours for s in states)
    return Group(table, Text(f"{len(states)} cells: {summary}{hidden}; {spent:.2f} device-hours", style="bold"))


_STYLES = {"done": "green", "running": "cyan", "failed": "red", "diverged": "red", "interrupted": "yellow"}


def _table(columns: Mapping[str, Sequence[Any]]) -> Table:
    table = Table(box=None, padding=(0, 1), pad_edge=False, header_style="bold")
    for name in columns:
        table.add_column(name, justify="left" if name in ("cell", "status", "") else "right", no_wrap=True)
    for row in zip(*columns.values(), strict=True):
        table.add_row(*row)
    return table


def _held_out(state: CellState) -> str:
    if state.accuracy is None or state.base_accuracy is None:
        return ""
    return f"{state.base_accuracy:.3f} → {state.accuracy:.3f}"


def _left(state: CellState, cell: _Running | None) -> str:
    if state.status != "running" or cell is None or state.fraction <= 0:
        return ""
    seconds = (time.monotonic() - cell.since) * (1 - state.fraction) / state.fraction
    return f"{int(seconds // 60)}:{int(seconds % 60):02d}"
