"""The optimizer steps of an epoch, each on its own share of the groups."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ablate.rollout import Probe, take
from ablate.seeding import streams
from runners.collect import Samples
from runners.embeddings import Conditioning
from runners.evaluation import averages
from runners.run import Diverged, Run
from runners.surrogate import Ask, Asked, Batch, accumulate_gradient

EMA_WARMUP = 10  # decay min(ema_decay, (1 + t) / (10 + t)) after t updates
MAX_ON_POLICY_LOG_RATIO = 1e-3  # nats per latent dimension; float32 gives 1e-7, bfloat16 1e-5


def update(run: Run, samples: Samples, advantage: Tensor) -> dict[str, float]:
    """Draw the shared probe, take the steps, and let the old policy follow; the means of the steps' metrics."""
    recipe, progress = run.recipe, run.progress
    group = samples.group
    kind = "shared" if run.objective.level == "group" else recipe.update.group_probe
    probe = draw_probe(run, samples, kind, recipe.update.num_points, progress.epoch)
    on_policy = recipe.old_policy.decay(progress.update) == 0  # before the first step
    metrics: list[dict[str, float]] = []
    for groups in run.shares():
        rows = torch.isin(group, groups).nonzero()[:, 0]
        num_rows = sum(run.world.everyone(len(rows)))
        if num_rows == 0:  # no group of this update has a score
            continue
        share = len(rows) / num_rows
        metrics.append(_step(run, samples, probe, advantage, rows, share, on_policy=on_policy))
        on_policy = False
    run.policy.blend("old", recipe.old_policy.decay(progress.update))
    return averages(metrics)


def draw_probe(run: Run, samples: Samples, kind: str, num_points: int | None, *labels: int) -> Probe:
    """Where the policy is asked about these samples; `kind` says what a group has in common, see `group_probe`."""
    size, group = run.recipe.rollout.group_size, samples.group
    index = group * size + torch.arange(len(group)) % size  # among the samples of all processes
    own = streams(
        run.cell.seed,
        "probe",
        *labels,
        samples=(group if kind == "shared" else index).tolist(),
        group_size=size if kind == "stratified" else None,
    )
    probe: Probe = run.estimator.probe(samples.rollout, num_points=num_points, streams=own)
    return probe


def asking(run: Run, probe: Probe, conditioning: Conditioning) -> Ask:
    """How any policy answers at this probe [b, k], under the conditioning [b, ...] of its samples."""
    scale = run.recipe.update.guidance_scale
    index = torch.arange(len(conditioning.tokens), device=run.policy.device)

    def ask(weights: Asked, chosen: slice, points: slice) -> Tensor:
        asked = take(probe, chosen, points)
        n, m = asked.sigma.shape
        given = conditioning.rows(index[chosen].repeat_interleave(m))
        with run.policy.using(weights):
            velocity = run.policy.velocity(asked.x.flatten(0, 1), asked.sigma.flatten(), given, scale)
        run.spend(**{"backwards" if torch.is_grad_enabled() else "forwards": n * m * (1 + (scale > 1))})
        return velocity.reshape(n, m, *velocity.shape[1:])

    return ask


def _step(
    run: Run, samples: Samples, probe: Probe, advantage: Tensor, rows: Tensor, share: float, *, on_policy: bool
) -> dict[str, float]:
    """One optimizer step on these samples, which are this share of those of all processes."""
    recipe, policy, progress = run.recipe, run.policy, run.progress
    there = rows.to(policy.device)
    part = take(probe, there)
    ask = asking(run, part, samples.conditioning.rows(there))
    batch = Batch(
        probe=part,
        advantage=advantage[rows].to(policy.device),
        group=samples.group[rows].to(policy.device),
        group_size=recipe.rollout.group_size,
        reward=samples.score[rows].to(advantage).to(policy.device),
    )

    def gradient(micro_batch_size: int) -> dict[str, Tensor]:
        run.optimizer.zero_grad()
        if share == 0:
            run.scaler.scale(torch.zeros((), device=policy.device))  # as in the other processes
            return {}
        return accumulate_gradient(
            run.objective,
            run.estimator,
            batch,
            ask,
            micro_batch_size=micro_batch_size,
            kl=recipe.kl,
            old_is_current=on_policy,
            scale=run.scaler.scale,
        )

    measured = run.in_memory("update", recipe.update.micro_batch_size, gradient)
    run.world.average_gradients(policy.trainable, share)
    metrics = run.world.mean({name: float(value) for name, value in measured.items()}, share)
    if on_policy:
        _check_on_policy(run, metrics)
    metrics |= _descend(run)
    policy.blend("average", min(recipe.evaluation.ema_decay, (1 + progress.update) / (EMA_WARMUP + progress.update)))
    progress.update += 1
    refresh = recipe.reference.refresh_every
    if refresh is not None and progress.update % refresh == 0:
        policy.blend("reference", 0)
    return metrics


def _descend(run: Run) -> dict[str, float]:
    """Clip the gradient and step. Raises Diverged for one that is not finite; in float16 such a step is left out."""
    run.scaler.unscale_(run.optimizer)
    limit = run.recipe.update.max_grad_norm or math.inf
    norm = float(torch.nn.utils.clip_grad_norm_(run.policy.trainable, limit))
    scaled = run.scaler.is_enabled()
    if not math.isfinite(norm) and not scaled:
        raise Diverged("gradient is no longer finite")
    run.scaler.step(run.optimizer)
    run.scaler.update()
    if not scaled:
        return {"grad_norm": norm}
    return {"grad_norm": norm if math.isfinite(norm) else 0.0, "overflow": float(not math.isfinite(norm))}


def _check_on_policy(run: Run, metrics: dict[str, float]) -> None:
    """Where rollout and update ask the same policy about the same steps, its likelihood ratio must be 1."""
    ratio = metrics.get("on_policy_log_ratio", 0.0)
    if getattr(run.estimator, "unit", "dimension") == "nats":
        ratio /= math.prod(run.policy.latent_shape)
    if ratio > MAX_ON_POLICY_LOG_RATIO and not run.recipe.rollout.truncate_timesteps:
        raise RuntimeError(
            f"on-policy, the log-ratio of the trajectory is {ratio:.1e} per dimension, above "
            f"{MAX_ON_POLICY_LOG_RATIO:.0e}: the update does not see what the rollout saw (dtype, guidance, dropout?)"
        )
