"""One cell, top to bottom: roll out, score, estimate, update. The file to read first.

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
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ablate.advantages import advantages
from ablate.flow import NOISE_SCHEDULES
from ablate.plan import Cell
from ablate.record import Record, Status, read_json, read_metrics, write_atomic
from ablate.rollout import Rollout, concatenate, take
from ablate.seeding import derive_seed, generator, streams
from runners import checkpoint
from runners.checkpoint import Progress
from runners.evaluation import batches, evaluate, means
from runners.policy import Conditioning
from runners.provenance import note_attempt, provenance
from runners.run import Run, set_up
from runners.surrogate import Batch, accumulate_gradient

EMA_WARMUP = 10  # decay min(ema_decay, (1 + t) / (10 + t)) after t updates


class Diverged(Exception):
    """Training has left the numbers: a result, not an error."""


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
                checkpoint.save(run.folder, progress, run.policy, run.optimizer)
        if interrupted and not run.spent:
            return False
    return True


def train_epoch(run: Run) -> dict[str, float]:
    """Roll out from the old policy, score, and update on the images' likelihoods under the shared probe."""
    recipe, cell, epoch = run.recipe, run.cell, run.progress.epoch
    groups, size = recipe.rollout.num_groups, recipe.rollout.group_size
    prompts = [
        prompt
        for prompt in run.prompts.train(groups, np.random.default_rng(derive_seed(cell.seed, "prompts", epoch)))
        for _ in range(size)
    ]
    conditioning = run.policy.encode([p.text for p in prompts])
    with run.booked("rollout"):
        rollout = roll_out(run, conditioning)
        images = run.policy.decode(rollout.x0)
    with run.booked("reward"):
        scores = run.reward(images, prompts)
    _check("reward", torch.from_numpy(scores.score))
    group = torch.arange(groups).repeat_interleave(size)
    advantage = advantages(torch.from_numpy(scores.score), group, recipe.advantage)
    with run.booked("update"):
        trained = update(run, rollout, conditioning, advantage.float(), group)
    deviation = torch.from_numpy(scores.score).view(groups, size).std(1, correction=0)
    return {
        **means("rollout", scores),
        "rollout/informative_groups": float((deviation > 0).double().mean()),
        **{f"train/{name}": value for name, value in trained.items()},
    }


@torch.no_grad()
def roll_out(run: Run, conditioning: Conditioning) -> Rollout:
    """Images of an epoch under the old policy, batch by batch; a sample's noise depends on its index alone."""
    recipe, policy = run.recipe.rollout, run.policy
    sigmas = NOISE_SCHEDULES[recipe.noise_schedule](recipe.num_steps, policy.shift)
    rollouts = []
    with policy.using("old"):
        for rows in batches(len(conditioning.tokens), recipe.batch_size):
            samples = range(rows.start, rows.stop)
            own = streams(run.cell.seed, "rollout", run.progress.epoch, samples=samples)
            noise = own.normal(policy.latent_shape, torch.empty((), device=policy.device))
            field = policy.field(conditioning.rows(rows), recipe.guidance_scale)
            rollouts.append(run.sampler.sample(field, noise, sigmas=sigmas, epoch=run.progress.epoch, streams=own))
            run.spend(forwards=len(samples) * recipe.num_steps * (1 + (recipe.guidance_scale > 1)))
    return concatenate(rollouts)


def update(
    run: Run, rollout: Rollout, conditioning: Conditioning, advantage: Tensor, group: Tensor
) -> dict[str, float]:
    """The optimizer steps of an epoch, each on its own share of the groups; then the old policy follows."""
    recipe, policy, progress = run.recipe.update, run.policy, run.progress
    size = run.recipe.rollout.group_size
    shared = recipe.share_probe == "group" or run.objective.level == "group"
    samples = group.tolist() if shared else range(len(group))
    probe = run.estimator.probe(
        rollout,
        num_points=recipe.num_points,
        streams=streams(run.cell.seed, "probe", progress.epoch, samples=samples),
    )
    order = torch.randperm(int(group.max()) + 1, generator=generator(run.cell.seed, "order", progress.epoch))
    shares = order.chunk(recipe.updates_per_epoch)
    old_decay = _old_decay(run.recipe.old_policy.decay, progress.update)
    metrics: list[dict[str, float]] = []
    for i, share in enumerate(shares):
        rows = (share.sort().values[:, None] * size + torch.arange(size)).flatten()
        given = conditioning.rows(rows.to(policy.device))
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

        run.optimizer.zero_grad()
        values = accumulate_gradient(
            run.objective,
            run.estimator,
            Batch(probe=part, advantage=advantage[rows].to(policy.device), group=group[rows], group_size=size),
            ask,
            micro_batch_size=recipe.micro_batch_size,
            kl_coef=run.recipe.kl.coef,
            old_is_current=i == 0 and old_decay == 0,
        )
        norm = torch.nn.utils.clip_grad_norm_(policy.trainable, recipe.max_grad_norm)
        _check("gradient", norm)
        run.optimizer.step()
        decay = run.recipe.evaluation.ema_decay
        policy.blend("average", min(decay, (1 + progress.update) / (EMA_WARMUP + progress.update)))
        progress.update += 1
        metrics.append({name: float(value) for name, value in values.items()} | {"grad_norm": float(norm)})
    policy.blend("old", _old_decay(run.recipe.old_policy.decay, progress.update))
    return {name: float(np.mean([m[name] for m in metrics])) for name in metrics[0]}


def _old_decay(kind: str, num_updates: int) -> float:
    """How slowly the rollout policy follows; see OldPolicyRecipe. DiffusionNFT (arXiv 2509.16117), `return_decay`."""
    if kind == "slow":
        return min(0.001 * num_updates, 0.5)
    if kind == "late":
        return 0.0 if num_updates < 75 else min(0.0075 * (num_updates - 75), 0.999)
    return 0.0


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
