"""The live table of a sweep: a line per cell, redrawn in a terminal, printed now and then in a log."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.cells import cell_len
from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from ablate.plan import Cell
from ablate.source import counted
from runners.cell_state import CellState, state_of

ROWS = 30  # of a table that is printed again and again; cells that failed are beside it
BAR = 12  # columns of a progress bar
PAUSE, LOG_PAUSE = 2, 60  # seconds between looks in a terminal, and in a log

Draw = Callable[[int | None], Any]  # what fits into so many lines; None: all of it


@contextlib.contextmanager
def live(console: Console, draw: Draw) -> Iterator[Callable[[], None]]:
    """A refresh function: redraws every two seconds in a terminal, and in a log prints the table once a minute."""
    pause = PAUSE if console.is_terminal else LOG_PAUSE
    with Live(console=console, auto_refresh=False) if console.is_terminal else contextlib.nullcontext() as screen:

        def show(height: int | None) -> None:
            if screen is None:
                console.print(draw(None))
            else:
                screen.update(draw(height), refresh=True)

        last = [time.monotonic()]

        def occasionally() -> None:
            if time.monotonic() - last[0] >= pause:
                last[0] = time.monotonic()
                show(console.height)

        yield occasionally
        show(None)


def watch(console: Console, results: Path, cells: Sequence[Cell]) -> list[CellState]:
    """Show cells until all of them are finished; their states then, or when a KeyboardInterrupt comes."""

    def draw(height: int | None) -> Group:
        return live_table(console, states(), height=height)

    def states() -> list[CellState]:
        return [state_of(results, cell) for cell in cells]

    with contextlib.suppress(KeyboardInterrupt), live(console, draw) as refresh:
        if not console.is_terminal:
            console.print(draw(None))
        while not all(state.finished for state in states()):
            refresh()
            time.sleep(PAUSE / 2)
    return states()


def live_table(
    console: Console, states: Sequence[CellState], *, rows: int | None = ROWS, height: int | None = None
) -> Group:
    """Cells with epoch, reward, held-out accuracy, device-hours and remaining time, then errors, then a summary.

    Cells that have failed come first, with their errors, and unfinished ones next. `rows`: more are not shown, unless
    they have failed; `height`: as many lines as there are, of which the summary is one. A narrow console loses columns,
    the least important first, and never a part of a word.
    """
    ordered = sorted(states, key=_rank)
    failed = sum(state.failed for state in states)
    errors = [state for state in ordered if state.message and state.status not in ("done", "paused")]
    if height is not None:
        errors = errors[: max(1, height // 2 - 1)]
        rows = max(1, height - len(errors) - 3)
    elif rows is not None:
        rows = max(rows, failed)
        errors = errors[: max(rows, failed)]
    listed = ordered[:rows]
    lines = [_error(state, whole=height is None) for state in errors]
    return Group(_fitting(_columns(listed), console.width), *lines, _summary(states, len(states) - len(listed)))


_STYLES = {"running": "cyan", "interrupted": "yellow", "paused": "yellow", "waiting": "dim"}
_STYLES |= {"done": "green", "stopped": "green"}
_RANKS = {"running": 1, "interrupted": 2, "paused": 3, "stopped": 4, "done": 5, "waiting": 6}
_DROPPED = ("", "attempts", "reward", "hours", "left")  # columns, the first of which is dropped first


def _rank(state: CellState) -> int:
    return _RANKS.get(state.status, 0)


def _style(status: str) -> str:
    return _STYLES.get(status, "red")


def _columns(states: Sequence[CellState]) -> dict[str, list[Text | ProgressBar]]:
    return {
        "cell": [Text(state.cell.id) for state in states],
        "status": [Text(state.status, style=_style(state.status)) for state in states],
        "epoch": [Text(str(state.epoch or "")) for state in states],
        "reward": [Text("" if state.reward is None else f"{state.reward:.3f}") for state in states],
        "held-out": [Text(_held_out(state)) for state in states],
        "hours": [Text(f"{state.device_hours:.3f}" if state.device_hours else "") for state in states],
        "": [ProgressBar(total=1, completed=state.fraction, width=BAR) for state in states],
        "left": [Text("" if state.left is None else clock(state.left)) for state in states],
        "attempts": [Text(str(state.attempts or "")) for state in states],
    }


def _fitting(columns: Mapping[str, Sequence[Text | ProgressBar]], width: int) -> Table:
    """A table of as many of the columns as fit."""
    widths = {name: max([cell_len(name), *map(_width, values)]) + 2 for name, values in columns.items()}
    dropped = iter(_DROPPED)
    while sum(widths.values()) - 2 > width and (name := next(dropped, None)) is not None:
        del widths[name]
    table = Table(box=None, padding=(0, 1), pad_edge=False, header_style="bold")
    for name in widths:
        table.add_column(name, justify="left" if name in ("cell", "status", "") else "right", no_wrap=True)
    for row in zip(*(columns[name] for name in widths), strict=True):
        table.add_row(*row)
    return table


def _width(value: Text | ProgressBar) -> int:
    return value.cell_len if isinstance(value, Text) else BAR


def _error(state: CellState, *, whole: bool) -> Text:
    """The last error of a cell, or why it was stopped, in one line, which may be folded if it is to be shown as a
    `whole`.
    """
    before = "earlier, " if state.failure and not state.failed else ""  # it has been started again, or will be
    text = f"{state.cell.id} {before}{state.failure or state.status}: {state.message}"
    style = "red" if state.failed else "yellow"
    return Text(text, style=style, no_wrap=not whole, overflow="fold" if whole else "ellipsis")


def _summary(states: Sequence[CellState], hidden: int) -> Text:
    """How many cells are in which state: of all cells, shown or not."""
    ranks = {state.status: _rank(state) for state in states}
    counts = {status: sum(s.status == status for s in states) for status in ranks}
    words = ", ".join(f"{counts[status]} {status}" for status in sorted(counts, key=ranks.__getitem__))
    more = f" ({hidden} more not shown)" if hidden else ""
    spent, lost = sum(s.device_hours for s in states), sum(s.lost_device_hours for s in states)
    repeated = f", and {lost:.2f} lost" if lost >= 0.005 else ""
    return Text(f"{counted(len(states), 'cell')}: {words}{more}; {spent:.2f} device-hours{repeated}", style="bold")


def _held_out(state: CellState) -> str:
    if state.accuracy is None or state.base_accuracy is None:
        return ""
    return f"{state.base_accuracy:.3f} → {state.accuracy:.3f}"


def clock(seconds: float) -> str:
    """Minutes and seconds, or hours, minutes and seconds: 2:05, 1:02:05."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
