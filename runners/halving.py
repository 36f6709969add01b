"""Successive halving: cells run to a rung, the better half goes on; see ablate/halving.py for the choice itself."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console

from ablate.halving import FILE, Halving, arrived, judge, read_halving, shares
from ablate.limits import Limits, limit
from ablate.plan import Cell
from ablate.record import Record, Status, read_record, write_atomic, write_record
from ablate.source import counted
from runners.cell_state import state_of
from runners.live import live_table

Train = Callable[[Sequence[Cell]], object]  # trains cells until each is settled, as far as it can


def run_within_limits(
    results: Path,
    cells: Sequence[Cell],
    train: Train,
    console: Console,
    *,
    halvings: int | None = None,
    stop_when: str | None = None,
) -> None:
    """Train cells until their stop rule or their budget ends them, by successive halving if that is asked for."""
    if halvings is not None:
        run_halving(results, cells, halvings, train, console, stop_when)
        console.print(live_table(console, [state_of(results, cell) for cell in cells]))  # of all rungs
        return
    limit(results, cells, Limits(stop_when=stop_when))
    train(cells)


def run_halving(
    results: Path, cells: Sequence[Cell], halvings: int, train: Train, console: Console, stop_when: str | None = None
) -> None:
    """Train cells rung by rung; of those that do not go on, the record says so.

    What is decided is in halving.json before anything follows from it, so that a kill decides nothing twice. Ends early
    where a rung has to wait for a cell, because it failed or the budget of the whole grid is spent.
    """
    splits = tuple(dict.fromkeys(cell.recipe.evaluation.split for cell in cells))
    choice = read_halving(results) or Halving(halvings=halvings, splits=splits, cells=tuple(c.id for c in cells))
    _write(results, choice)
    for share in shares(halvings)[len(choice.rungs) :]:
        going = _going(cells, choice)
        records = _to_rung(results, going, share, train, stop_when)
        waiting = [cell.id for cell in going if cell.id not in records]
        if waiting:
            console.print(
                f"The rung at {share:g} of the budget waits for {counted(len(waiting), 'cell')}: {waiting[0]}"
            )
            return
        choice = choice.model_copy(update={"rungs": (*choice.rungs, judge(going, records, share))})
        _write(results, choice)
        kept = len(_going(cells, choice))
        console.print(f"After {share:g} of the budget {kept} of {counted(len(going), 'cell')} go on ({results / FILE})")
    _to_rung(results, _going(cells, choice), 1, train, stop_when)


def _to_rung(
    results: Path, cells: Sequence[Cell], share: float, train: Train, stop_when: str | None
) -> dict[str, Record]:
    """Train cells to a share of their budget; the records of those that are there."""
    todo = [cell for cell in cells if not arrived(cell, read_record(results / cell.id), share)]
    limit(results, todo, Limits(share=share, stop_when=stop_when))
    if todo:
        train(todo)
    found = [(cell, read_record(results / cell.id)) for cell in cells]
    return {cell.id: record for cell, record in found if record and arrived(cell, record, share)}


def _going(cells: Sequence[Cell], choice: Halving) -> list[Cell]:
    return [cell for cell in cells if cell.id not in choice.stopped]


def _write(results: Path, choice: Halving) -> None:
    """Keep what is decided, and say it in the records of the cells that do not go on."""
    write_atomic(results / FILE, choice.model_dump_json(indent=1) + "\n")
    for id, reason in choice.stopped.items():
        stop(results / id, reason)


def stop(folder: Path, reason: str, *, discard: bool = False) -> None:
    """Mark a cell that has not ended for good as stopped; with `discard`, without its checkpoint."""
    record = read_record(folder)
    if record is not None and not record.status.final:
        write_record(folder, record.model_copy(update={"status": Status.STOPPED, "message": reason}))
    if discard:
        shutil.rmtree(folder / "checkpoint", ignore_errors=True)
