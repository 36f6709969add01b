"""The live table of a sweep: a line per cell, redrawn in a terminal, printed now and then in a log."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from ablate.plan import Cell
from ablate.source import counted
from runners.cell_state import CellState, state_of


@contextlib.contextmanager
def live(console: Console, draw: Callable[[], Any]) -> Iterator[Callable[[], None]]:
    """A refresh function: redraws every two seconds in a terminal, and in a log prints the table once a minute."""
    pause = 2 if console.is_terminal else 60
    with Live(console=console, auto_refresh=False) if console.is_terminal else contextlib.nullcontext() as screen:

        def show() -> None:
            if screen is None:
                console.print(draw())
            else:
                screen.update(draw(), refresh=True)

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
    starts: Mapping[str, tuple[float, float]] | None = None,
    rows: int = 30,
) -> Group:
    """Cells with epoch, reward, held-out accuracy, device-hours and remaining time; the unfinished ones first.

    `starts`: of the cells that run here, time.monotonic() and the spent share of the budget at their start. A narrow
    console loses columns, the least important first, and never a part of a word.
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
        "left": [_left(state, (starts or {}).get(state.cell.id)) for state in listed],
    }
    dropped = ["", "reward", "hours", "left"]
    unbounded = console.options.update(max_width=1000)
    while (table := _table(columns)) and dropped and console.measure(table, options=unbounded).maximum > console.width:
        del columns[dropped.pop(0)]
    counts = {status: sum(s.status == status for s in states) for status in dict.fromkeys(s.status for s in states)}
    summary = ", ".join(f"{counts[status]} {status}" for status in sorted(counts, key=lambda s: rank.get(s, 2)))
    hidden = f" ({len(states) - rows} more not shown)" if len(states) > rows else ""
    spent = sum(s.device_hours for s in states)
    line = f"{counted(len(states), 'cell')}: {summary}{hidden}; {spent:.2f} device-hours"
    return Group(table, Text(line, style="bold"))


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


def _left(state: CellState, start: tuple[float, float] | None) -> str:
    if state.status != "running" or start is None or state.fraction <= start[1]:
        return ""
    seconds = (time.monotonic() - start[0]) * (1 - state.fraction) / (state.fraction - start[1])
    return f"{int(seconds // 60)}:{int(seconds % 60):02d}"
