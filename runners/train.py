"""One cell, top to bottom: roll out, score, estimate, update. The file to read first.

`train_cell(folder)` needs nothing but the folder's cell.json, resumes from its checkpoint, and ends by writing
record.json, whatever happens.
"""

from __future__ import annotations

import math
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ablate.advantages import advantages
from ablate.plan import Cell
from ablate.record import Record, Status, read_json, read_metrics, write_atomic
from ablate.rollout import take
from ablate.seeding import generator, streams
from runners import checkpoint
from runners.checkpoint import Progress
from runners.collect import Samples, collect
from runners.embeddings import Conditioning
from runners.evaluation import evaluate
from runners.export import export
from runners.provenance import note_attempt, provenance
from runners.run import Diverged, Run, set_up
from runners.surrogate import Ask, Batch, accumulate_gradient

MAX_ON_POLICY_LOG_RATIO = 1e-3  # nats per latent dimension; float32 gives 1e-7, bfloat16 1e-5
EMA_WARMUP = 10  # decay min(ema_decay, (1 + t) / (10 + t)) after t updates


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


def update(run: Run, samples: Samples, advantage: Tensor) -> dict[str, float]:
    """The optimizer steps of an epoch, each on its own share of the groups; then the old policy follows."""
    recipe, policy, progress = run.recipe.update, run.policy, run.progress
    size, group = run.recipe.rollout.group_size, samples.group
    shared = recipe.group_probe == "shared" or run.objective.level == "group"
    probe = run.estimator.probe(
        samples.rollout,
        num_points=recipe.num_points,
        streams=streams(
            run.cell.seed,
            "probe",
            progress.epoch,
            samples=group.tolist() if shared else range(len(group)),
            group_size=size if recipe.group_probe == "stratified" and not shared else None,
        ),
    )
    order = torch.randperm(int(group.max()) + 1, generator=generator(run.cell.seed, "order", progress.epoch))
    shares = order.chunk(recipe.updates_per_epoch)
    old_decay = run.recipe.old_policy.decay(progress.update)
    reward = samples.score.to(advantage)
    metrics: list[dict[str, float]] = []
    for i, share in enumerate(shares):
        rows = (share.sort().values[:, None] * size + torch.arange(size)).flatten()
        given = samples.conditioning.rows(rows.to(policy.device))
        part = take(probe, rows.to(policy.device))

        def ask(weights: Any, samples: slice, points: slice, part: Any = part, given: Conditioning = given) -> Tensor:
            chosen = take(part, samples, points)
            n, m = chosen.sigma.shape
            repeated = given.rows(torch.arange(len(part.sigma), device=policy.device)[samples].repeat_interleave(m))
            with policy.using(weights):
                velocity = policy.velocity(
                    chosen.x.flatten(0, 1), chosen.sigma.flatten(), repeated, recipe.guidance_scale
                )
            calls = n * m * (1 + (recipe.guidance_scale > 1))
            run.spend(**{"backwards" if torch.is_grad_enabled() else "forwards": calls})
            return velocity.reshape(n, m, *velocity.shape[1:])

        batch = Batch(
            probe=part,
            advantage=advantage[rows].to(policy.device),
            group=group[rows].to(policy.device),
            group_size=size,
            reward=reward[rows].to(policy.device),
        )
        on_policy = i == 0 and old_decay == 0

        def gradient(
            micro_batch_size: int, batch: Batch = batch, ask: Ask = ask, on_policy: bool = on_policy
        ) -> dict[str, Tensor]:
            run.optimizer.zero_grad()
            return accumulate_gradient(
                run.objective,
                run.estimator,
                batch,
                ask,
                micro_batch_size=micro_batch_size,
                kl=run.recipe.kl,
                old_is_current=on_policy,
                scale=run.scaler.scale,
            )

        values = run.in_memory("update", recipe.micro_batch_size, gradient)
        if on_policy:
            _check_on_policy(run, values)
        run.scaler.unscale_(run.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(policy.trainable, recipe.max_grad_norm or math.inf)
        if not run.scaler.is_enabled():  # which leaves out updates that overflow, and lowers the scale
            _check("gradient", norm)
        run.scaler.step(run.optimizer)
        run.scaler.update()
        decay = run.recipe.evaluation.ema_decay
        policy.blend("average", min(decay, (1 + progress.update) / (EMA_WARMUP + progress.update)))
        progress.update += 1
        refresh = run.recipe.reference.refresh_every
        if refresh is not None and progress.update % refresh == 0:
            policy.blend("reference", 0)
        metrics.append({name: float(value) for name, value in values.items()} | {"grad_norm": float(norm)})
    policy.blend("old", run.recipe.old_policy.decay(progress.update))
    return {name: float(np.mean([m[name] for m in metrics])) for name in metrics[0]}


def _check_on_policy(run: Run, values: dict[str, Tensor]) -> None:
    """Where rollout and update ask the same policy about the same steps, its likelihood ratio must be 1."""
    ratio = values.get("log_ratio_abs")
    expected = "transitions" in run.estimator.needs and not run.recipe.rollout.truncate_timesteps
    if ratio is not None and expected and float(ratio) > MAX_ON_POLICY_LOG_RATIO:
        raise RuntimeError(
            f"on-policy, the log-ratio of the trajectory is {float(ratio):.1e} per dimension, above "
            f"{MAX_ON_POLICY_LOG_RATIO:.0e}: the update does not see what the rollout saw (dtype, guidance, dropout?)"
        )


def _check(what: str, value: Tensor) -> None:
    if not bool(value.isfinite().all()):
        raise Diverged(f"{what} is no longer finite")


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
