"""One cell, top to bottom: roll out, score, estimate, update. The file to read first; then collect.py and update.py.

`train_cell(folder)` needs nothing but the folder's cell.json, resumes from its checkpoint, and ends by writing
record.json, whatever happens. Several processes may share a cell (distributed.py); the first of them writes its files.
"""

from __future__ import annotations

import sys
import traceback
from pathlib import Path

from ablate.advantages import advantages
from ablate.geometry import check_devices
from ablate.record import Record, Status, read_cell, read_metrics, read_spent, write_atomic
from runners import checkpoint
from runners.checkpoint import Progress
from runners.collect import collect
from runners.distributed import join, leave
from runners.evaluation import evaluate
from runners.export import export
from runners.provenance import note_attempt, provenance
from runners.rewards import RewardUnavailable
from runners.run import Diverged, Run, rewards_of, set_up
from runners.stopping import stop_requests
from runners.update import update


def train_cell(folder: Path) -> Record:
    """Train the cell of a folder to its end and write its record. Bad states are records, not exceptions.

    Raises InputError, with nothing done, where the processes that there are cannot share the cell's groups.
    """
    cell, world = read_cell(folder), join()
    check_devices(cell.recipe, world.size)
    attempts = note_attempt(folder) if world.main else 0
    if world.main:
        for name in ("traceback.txt", "record.json"):  # of an attempt before
            (folder / name).unlink(missing_ok=True)
    attempts = world.everyone(attempts)[0]  # nobody goes on, and nobody fails, before
    lines = read_metrics(folder)
    progress = Progress(epoch=lines[-1]["epoch"] if lines else 0, cost=read_spent(folder))  # until it is restored
    status, message = Status.FAILED, ""
    identities: dict[str, str] = {}
    interrupted: list[float] = []
    writes = world.main
    try:
        with stop_requests(at_once=2) as interrupted:
            identities = {name: reward.identity for name, reward in rewards_of(cell.recipe)[0].rewards.items()}
            run = set_up(folder, cell, world=world)
            progress, identities = run.progress, run.identities
            status = Status.DONE if _train(run, interrupted) else Status.INTERRUPTED
            if status.final and cell.recipe.export_weights and world.main:
                with run.booked("checkpoint"):
                    export(folder, cell, run.policy)
        leave()
    except Diverged as divergence:
        status, message = Status.DIVERGED, str(divergence)
    except RewardUnavailable as error:
        status, message = Status.REWARD_UNAVAILABLE, str(error)
    except KeyboardInterrupt:
        status = Status.INTERRUPTED
    except Exception as error:  # of the export too: its checkpoint is kept, and the next start exports again
        if interrupted:  # and the others have ended
            status = Status.INTERRUPTED
        else:
            status, message = Status.FAILED, f"{type(error).__name__}: {error}"
            writes = _first_to_fail(folder)
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
        rewards=identities,
        provenance=provenance(world.size),
    )
    if writes:
        write_atomic(folder / "record.json", record.model_dump_json(indent=1) + "\n")
        if status.final:
            checkpoint.discard(folder)
    return record


def _first_to_fail(folder: Path) -> bool:
    """Write the traceback, unless another process has: where one fails, the others fail for want of it."""
    try:
        with (folder / "traceback.txt").open("x") as file:
            file.write(traceback.format_exc())
    except FileExistsError:
        return False
    return True


def _train(run: Run, interrupted: list[float]) -> bool:
    """Epochs until the budget is spent; False when a signal asked to stop."""
    recipe, progress = run.recipe, run.progress
    if progress.pending or not progress.metrics_bytes:
        _evaluate_and_log(run)
    while not run.spent:
        before = progress.cost
        try:
            metrics = train_epoch(run)
        except RewardUnavailable:  # before any step of this epoch
            progress.cost = progress.cost.undone(before)
            _save(run)
            raise
        progress.epoch += 1
        stop = run.agreed(bool(interrupted))
        due = progress.epoch % recipe.evaluation.every == 0 or run.spent
        if due:
            progress.pending = metrics
        else:
            run.log(metrics)
        if stop or due or progress.epoch % recipe.checkpoint_every == 0:
            _save(run)  # before an evaluation too, which may take longer than a stop may
        if stop:
            return False
        if due:
            _evaluate_and_log(run)
    return True


def _evaluate_and_log(run: Run) -> None:
    """Evaluate, and log that with the metrics of the epoch before, which the checkpoint holds."""
    evaluated = evaluate(run)
    run.log(run.progress.pending | evaluated)
    run.progress.pending = {}


def _save(run: Run) -> None:
    with run.booked("checkpoint"):
        if run.world.main:
            checkpoint.save(run.folder, run.progress, run.policy, run.optimizer, run.scaler)
        run.world.everyone(None)  # so that nobody ends before it is written


def train_epoch(run: Run) -> dict[str, float]:
    """Roll out from the old policy, score, and update on the images' likelihoods under the shared probe."""
    samples = collect(run)
    run.put_rewards_away()
    if not sum(run.world.everyone(len(samples.group))):  # nothing has a score
        return samples.metrics
    rewards, own = run.world.rows(samples.rewards)
    group, _ = run.world.rows(samples.group)
    advantage = advantages(rewards, group, run.recipe.advantage, samples.weights)[own]
    with run.booked("update"):
        trained = update(run, samples, advantage.float())
    return {**samples.metrics, **{f"train/{name}": value for name, value in trained.items()}}


if __name__ == "__main__":
    sys.exit(0 if train_cell(Path(sys.argv[1])).status.final else 1)
