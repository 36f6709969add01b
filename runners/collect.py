"""The samples of an epoch: rolled out by the old policy, scored, and chosen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ablate.flow import NOISE_SCHEDULES, Velocity
from ablate.rollout import Rollout, concatenate, select
from ablate.seeding import derive_seed, streams
from runners.evaluation import batches, means
from runners.policy import Conditioning
from runners.rewards import RewardOutput
from runners.run import Diverged, Run


@dataclass(frozen=True, kw_only=True)
class Samples:
    """What an epoch trains on: whole groups, in order, with their rewards."""

    rollout: Rollout
    conditioning: Conditioning
    rewards: Tensor  # [b, r]  weighted; their sum is the score
    group: Tensor  # [b]
    metrics: dict[str, float]

    @property
    def score(self) -> Tensor:
        """[b]"""
        return self.rewards.sum(1)


def collect(run: Run) -> Samples:
    """Roll out and score prompts until enough groups have unequal rewards, and keep the best and worst of each.

    Without `rollout.resample_rounds` and `rollout.candidates`, the one round of prompts as it is.
    """
    recipe = run.recipe.rollout
    parts: list[Samples] = []
    informative = 0
    for number in range(1 + recipe.resample_rounds):
        part = _round(run, number)
        informative += len(_informative(part))
        parts.append(part)
        if informative >= recipe.num_groups:
            break
    drawn = _joined(parts)
    groups = _informative(drawn)
    equal = sorted(set(range(int(drawn.group[-1]) + 1)) - set(groups))
    kept = sorted((groups + equal)[: recipe.num_groups])
    rows = torch.cat([_best_and_worst(drawn, group, recipe.group_size) for group in kept])
    score = drawn.score.numpy()
    metrics = {
        **{name: float(np.mean([part.metrics[name] for part in parts])) for name in parts[0].metrics},
        "rollout/score": float(score.mean()),
        "rollout/informative_groups": len(groups) / (len(groups) + len(equal)),
    }
    return Samples(
        rollout=select(drawn.rollout, rows.to(drawn.rollout.x0.device)),
        conditioning=drawn.conditioning.rows(rows.to(drawn.rollout.x0.device)),
        rewards=drawn.rewards[rows],
        group=torch.arange(len(kept)).repeat_interleave(recipe.group_size),
        metrics=metrics,
    )


def _round(run: Run, number: int) -> Samples:
    """One round of prompts, rolled out and scored."""
    recipe, epoch, seed = run.recipe.rollout, run.progress.epoch, run.cell.seed
    size = recipe.candidates or recipe.group_size
    drawn = run.prompts.train(recipe.num_groups, np.random.default_rng(derive_seed(seed, "prompts", epoch, number)))
    prompts = [prompt for prompt in drawn for _ in range(size)]
    conditioning = run.policy.encode([p.text for p in prompts])
    with run.booked("rollout"):
        rollout = roll_out(run, conditioning, number)
        images = run.policy.decode(rollout.x0)
    with run.booked("reward"):
        scores = run.reward(images, prompts)
    if not np.isfinite(scores.score).all():
        raise Diverged("reward is no longer finite")
    return Samples(
        rollout=rollout,
        conditioning=conditioning,
        rewards=_terms(scores),
        group=torch.arange(recipe.num_groups).repeat_interleave(size),
        metrics=means("rollout", scores),
    )


@torch.no_grad()
def roll_out(run: Run, conditioning: Conditioning, number: int = 0) -> Rollout:
    """Images under the old policy, batch by batch; a sample's noise depends on its index alone."""
    recipe, policy = run.recipe.rollout, run.policy
    sigmas = NOISE_SCHEDULES[recipe.noise_schedule](recipe.num_steps, policy.shift)
    size = recipe.candidates or recipe.group_size
    labels = (run.cell.seed, "rollout", run.progress.epoch, number)
    rollouts = []
    with policy.using("old"):
        for rows in batches(len(conditioning.tokens), recipe.batch_size):
            samples = range(rows.start, rows.stop)
            own = streams(*labels, samples=samples)
            start = (
                own
                if recipe.noise == "independent"
                else streams(*labels, "group", samples=[i // size for i in samples])
            )
            noise = start.normal(policy.latent_shape, torch.empty((), device=policy.device))
            field = policy.field(conditioning.rows(rows), recipe.guidance_scale)
            if recipe.truncate_timesteps:
                field = _truncated(field)
            seen: list[Tensor] = []
            if "latents" in run.estimator.needs:
                field = _recorded(field, seen)
            rollout = run.sampler.sample(field, noise, sigmas=sigmas, epoch=run.progress.epoch, streams=own)
            rollouts.append(replace(rollout, latents=torch.stack(seen, 1)) if seen else rollout)
            run.spend(forwards=len(samples) * recipe.num_steps * (1 + (recipe.guidance_scale > 1)))
    return concatenate(rollouts)


def _truncated(field: Velocity) -> Velocity:
    return lambda x, sigma: field(x, (1000 * sigma).int() / 1000)


def _recorded(field: Velocity, seen: list[Tensor]) -> Velocity:
    def recording(x: Tensor, sigma: Tensor) -> Tensor:
        seen.append(x)
        return field(x, sigma)

    return recording


def _terms(scores: RewardOutput) -> Tensor:
    return torch.from_numpy(scores.score[:, None] if scores.terms is None else scores.terms)


def _informative(samples: Samples) -> list[int]:
    """The groups whose rewards differ."""
    by_group = [samples.score[samples.group == g] for g in range(int(samples.group[-1]) + 1)]
    return [g for g, score in enumerate(by_group) if score.max() > score.min()]


def _best_and_worst(samples: Samples, group: int, size: int) -> Tensor:
    """The rows of a group's best and worst samples, half each, in order."""
    rows = (samples.group == group).nonzero()[:, 0]
    if len(rows) == size:
        return rows
    ranked = rows[samples.score[rows].argsort(descending=True, stable=True)]
    return torch.cat([ranked[: size // 2], ranked[len(rows) - size // 2 :]]).sort().values


def _joined(parts: list[Samples]) -> Samples:
    """Several rounds, their groups numbered on."""
    offsets = np.cumsum([0, *(int(p.group[-1]) + 1 for p in parts)])

    def joined(of: Callable[[Samples], Tensor]) -> Tensor:
        return torch.cat([of(p) for p in parts])

    return Samples(
        rollout=concatenate([p.rollout for p in parts]),
        conditioning=Conditioning(
            tokens=joined(lambda p: p.conditioning.tokens), pooled=joined(lambda p: p.conditioning.pooled)
        ),
        rewards=joined(lambda p: p.rewards),
        group=torch.cat([p.group + offset for p, offset in zip(parts, offsets, strict=False)]),
        metrics={},
    )
