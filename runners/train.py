"""One cell, top to bottom: roll out, score, estimate, update. The file to read first; then collect.py and update.py.

`train_cell(folder)` needs nothing but the folder's cell.json, resumes from its checkpoint, and ends by writing
record.json, whatever happens.
"""

from __future__ import annotations

import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ablate.advantages import advantages
from ablate.plan import Cell
from ablate.record import Record, Status, read_json, read_metrics, write_atomic
from runners import checkpoint
from runners.checkpoint import Progress
from runners.collect import collect
from runners.evaluation import evaluate
from runners.export import export
from runners.provenance import note_attempt, provenance
from runners.run import Diverged, Run, set_up
from runners.update import update


def train_cell(folder: Path) -> Record:
    """Train the cell of a folder to its end and write its record. Bad states are records, not exceptions."""
    cell = Cell.model_validate(read_json(folder / "cell.json"))
    attempts = note_attempt(folder)
    (folder / "traceback.txt").unlink(missing_ok=True)
    progress, status, message = Progress(), Status.FAILED, ""
    try:
        with _interruption() as interrupted:
            run = set_up(folder, cell)
            progress = run.progress
            status = Status.DONE if _train(run, interrupted) else Status.INTERRUPTED
            if status.final and cell.recipe.export_weights:
                export(folder, cell, run.policy)
    except Diverged as divergence:
        status, message = Status.DIVERGED, str(divergence)
    except KeyboardInterrupt:
        status = Status.INTERRUPTED
    except Exception as error:
        message = f"{type(error).__name__}: {error}"
        (folder / "traceback.txt").write_text(traceback.format_exc())
    evaluated = [line for line in read_metrics(folder) if "eval/score" in line]
    last = evaluated[-1] if evaluated else {}
    record = Record(
        id=cell.id,
        status=status,
        message=message.splitlines()[-1] if message else "",
        seed=cell.seed,
        attempts=attempts,
        epochs=progress.epoch,
        cost=progress.cost,
        metrics={k: v for k, v in last.items() if k.startswith("eval/")},
        provenance=provenance(),
    )
    write_atomic(folder / "record.json", record.model_dump_json(indent=1) + "\n")
    if status.final:
        checkpoint.discard(folder)
    return record


def _train(run: Run, interrupted: list[int]) -> bool:
    """Epochs until the budget is spent; False when a signal asked to stop."""
    recipe, progress = run.recipe, run.progress
    if progress.epoch == 0:
        run.log(evaluate(run))
    while not run.spent:
        metrics = train_epoch(run)
        progress.epoch += 1
        if progress.epoch % recipe.evaluation.every == 0 or run.spent:
            metrics |= evaluate(run)
        run.log(metrics)
        if interrupted or progress.epoch % recipe.checkpoint_every == 0:
            with run.booked("checkpoint"):
                checkpoint.save(run.folder, progress, run.policy, run.optimizer, run.scaler)
        if interrupted and not run.spent:
            return False
    return True


def train_epoch(run: Run) -> dict[str, float]:
    """Roll out from the old policy, score, and update on the images' likelihoods under the shared probe."""
    samples = collect(run)
    advantage = advantages(samples.rewards, samples.group, run.recipe.advantage, samples.weights)
    with run.booked("update"):
        trained = update(run, samples, advantage.float())
    return {**samples.metrics, **{f"train/{name}": value for name, value in trained.items()}}


@contextmanager
def _interruption() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM: the first asks to stop after this epoch, the second stops at once."""
    received: list[int] = []

    def note(number: int, _: object) -> None:
        received.append(number)
        if len(received) > 1:
            raise KeyboardInterrupt

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    sys.exit(0 if train_cell(Path(sys.argv[1])).status.final else 1)
