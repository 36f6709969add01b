"""One cell, top to bottom: roll out, score, estimate, update. The file to read first; then collect.py and update.py.

`train_cell(folder)` needs nothing but the folder's cell.json, resumes from its checkpoint, and ends by writing
record.json, whatever happens. Several processes may share a cell (distributed.py); the first of them writes its files.
"""

from __future__ import annotations

import time
import traceback
from pathlib import Path

import torch

from ablate.advantages import advantages
from ablate.attempts import begin, book_lost, complete_last, read_attempts
from ablate.geometry import check_devices
from ablate.record import Failure, Record, Status, read_cell, read_metrics, read_spent, write_record
from ablate.secrets import redacted
from ablate.source import FieldError, InputError
from ablate.stop_rule import StopRule
from runners import checkpoint
from runners.checkpoint import Progress
from runners.collect import collect
from runners.distributed import join, leave
from runners.evaluation import evaluate
from runners.export import export
from runners.provenance import provenance, this_attempt
from runners.rewards import RewardUnavailable
from runners.run import Diverged, Run, rewards_of, set_up
from runners.stop_files import cell_is_asked
from runners.stopping import stop_requests
from runners.update import update


def train_cell(folder: Path) -> Record:
    """Train the cell of a folder to its end and write its record. Bad states are records, not exceptions.

    Whoever calls it holds the lock of the folder. Raises InputError, with nothing done, where the processes that there
    are cannot share the cell's groups.
    """
    cell, world = read_cell(folder), join()
    check_devices(cell.recipe, world.size)
    if world.main:
        begin(folder, this_attempt(world.size))
        (folder / "traceback.txt").unlink(missing_ok=True)  # of an attempt before
    world.everyone(None)  # nobody goes on, and nobody fails, before
    attempts, lines = read_attempts(folder), read_metrics(folder)
    progress = Progress(epoch=lines[-1]["epoch"] if lines else 0, cost=read_spent(folder))  # until it is restored
    status, failure, message = Status.FAILED, None, ""
    identities: dict[str, str] = {}
    interrupted: list[float] = []
    writes = world.main
    try:
        with stop_requests(at_once=2) as interrupted:
            identities = {name: reward.identity for name, reward in rewards_of(cell.recipe)[0].rewards.items()}
            run = set_up(folder, cell, world=world, halvings=attempts[-1].halvings)
            progress, identities = run.progress, run.identities
            status = _train(run, interrupted)
            message = _early_end(run, status)
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
            status, failure, message = Status.FAILED, _kind(error), f"{type(error).__name__}: {error}"
            writes = _first_to_fail(folder)
    evaluated = [line for line in read_metrics(folder) if "eval/score" in line]
    last = evaluated[-1] if evaluated else {}
    record = Record(
        id=cell.id,
        status=status,
        failure=failure,
        message=message.splitlines()[-1] if message else "",
        seed=cell.seed,
        attempts=len(attempts),
        epochs=progress.epoch,
        cost=progress.cost,
        metrics={k: v for k, v in last.items() if k.startswith("eval/")},
        rewards=identities,
        provenance=provenance(world.size),
    )
    if writes:
        with stop_requests():  # which come too late
            book_lost(folder, progress.cost.lost)
            complete_last(folder, ended=time.time(), exit_code=int(not status.settled), status=status, failure=failure)
            write_record(folder, record)
            if status.final:
                checkpoint.discard(folder)
    return record


def _kind(error: Exception) -> Failure:
    if isinstance(error, torch.OutOfMemoryError):
        return Failure.OUT_OF_MEMORY
    return Failure.BAD_CONFIG if isinstance(error, InputError | FieldError) else Failure.ERROR


def _first_to_fail(folder: Path) -> bool:
    """Write the traceback, unless another process has: where one fails, the others fail for want of it."""
    try:
        with (folder / "traceback.txt").open("x") as file:
            file.write(redacted(traceback.format_exc()))
    except FileExistsError:
        return False
    return True


def _early_end(run: Run, status: Status) -> str:
    """What ended a cell before its budget did, or that its stop rule could not; empty where there is nothing to say."""
    if status is Status.PAUSED:
        return f"paused after {run.limits.share:.4g} of its budget"
    if run.stopped:
        return f"stopped by its rule {run.stopped}"
    rule = run.limits.stop_when
    if status is Status.DONE and rule and not any(StopRule.parse(rule).metric in x for x in read_metrics(run.folder)):
        return f"its stop rule {rule!r} asks for a metric that was never logged"
    return ""


def _train(run: Run, interrupted: list[float]) -> Status:
    """Epochs until the budget is spent or a limit reached; INTERRUPTED when a signal asked to stop."""
    recipe, progress = run.recipe, run.progress
    if progress.pending or not progress.metrics_bytes:
        _evaluate_and_log(run)
    while not run.spent and not run.paused:
        before = progress.cost
        try:
            metrics = train_epoch(run)
        except RewardUnavailable:  # before any step of this epoch
            progress.cost = progress.cost.undone(before)
            _save(run)
            raise
        progress.epoch += 1
        stop = run.agreed(bool(interrupted) or cell_is_asked(run.folder))
        run.check_stop_rule(metrics)
        due = progress.epoch % recipe.evaluation.every == 0 or run.spent or run.paused
        if due:
            progress.pending = metrics
        else:
            run.log(metrics)
        if stop or due or progress.epoch % recipe.checkpoint_every == 0:
            _save(run)  # before an evaluation too, which may take longer than a stop may
        if stop:
            return Status.INTERRUPTED
        if due:
            _evaluate_and_log(run)
            if run.paused:
                _save(run)  # with the evaluation, so that the next start does not repeat it
    return Status.DONE if run.spent else Status.PAUSED


def _evaluate_and_log(run: Run) -> None:
    """Evaluate, and log that with the metrics of the epoch before, which the checkpoint holds."""
    metrics = run.progress.pending | evaluate(run)
    run.log(metrics)
    run.check_stop_rule(metrics)
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
