"""The samples of an epoch: rolled out by the old policy, scored, and chosen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ablate.flow import NOISE_SCHEDULES, Velocity
from ablate.rollout import Rollout, concatenate, select
from ablate.seeding import derive_seed, streams
from runners.embeddings import Conditioning
from runners.evaluation import averages, batches, means
from runners.rewards.protocol import Images
from runners.run import Run
from runners.scoring import keep_unscored


@dataclass(frozen=True, kw_only=True)
class Samples:
    """What an epoch trains on: whole groups, in order, with their rewards."""

    rollout: Rollout
    conditioning: Conditioning
    rewards: Tensor  # [b, r]
    weights: tuple[float, ...]  # [r]  of the rewards in the score
    group: Tensor  # [b]
    metrics: dict[str, float]

    @property
    def score(self) -> Tensor:
        """What is trained on, [b]."""
        return self.rewards @ self.rewards.new_tensor(self.weights)

    def groups(self, wanted: Sequence[int], size: int) -> Samples:
        """Some groups, each with the best and the worst half of `size` samples."""
        if not wanted:
            return self.rows(torch.empty(0, dtype=torch.long))
        return self.rows(torch.cat([_best_and_worst(self, group, size) for group in wanted]))

    def rows(self, rows: Tensor) -> Samples:
        """Some samples, of whole groups."""
        if len(rows) == len(self.group):
            return self
        device = self.rollout.x0.device
        return replace(
            self,
            rollout=select(self.rollout, rows.to(device)),
            conditioning=self.conditioning.rows(rows.to(device)),
            rewards=self.rewards[rows],
            group=self.group[rows],
        )


def collect(run: Run) -> Samples:
    """Roll out and score prompts until enough groups have unequal rewards, and keep the best and worst of each.

    Without `rollout.resample_rounds` and `rollout.candidates`, the one round of prompts as it is. Groups with an image
    that has no score are left out.
    """
    recipe = run.recipe.rollout
    parts, metrics = [], []
    groups = torch.cat(run.shares()).sort().values.tolist()
    missing = len(groups)
    for number in range(1 + recipe.resample_rounds):
        drawn = _round(run, groups, number)
        metrics.append(drawn.metrics)
        unequal = _unequal(drawn)[:missing]
        missing -= len(unequal)
        if missing == 0 or number == recipe.resample_rounds:  # groups of equal rewards fill up what is missing
            unscored = set(drawn.group[~drawn.score.isfinite()].tolist())
            equal = sorted((group for group in groups if group not in unequal), key=unscored.__contains__)
            parts.append(drawn.groups(sorted(unequal + equal[:missing]), recipe.group_size))
            break
        if unequal:
            parts.append(drawn.groups(unequal, recipe.group_size))
    samples = _scored(parts[0] if len(parts) == 1 else _joined(parts))
    return replace(samples, metrics=averages(metrics))


def _round(run: Run, groups: Sequence[int], number: int) -> Samples:
    """These groups of one round of prompts, rolled out and scored."""
    recipe, epoch, seed = run.recipe.rollout, run.progress.epoch, run.cell.seed
    size = recipe.candidates or recipe.group_size
    drawn = run.prompts.train(recipe.num_groups, np.random.default_rng(derive_seed(seed, "prompts", epoch, number)))
    prompts = [replace(drawn[group], group=group) for group in groups for _ in range(size)]
    images: list[Images] = []

    def watch(rows: slice, part: Rollout) -> None:
        if rows.start == 0:  # of a first attempt, or another one
            images.clear()
            run.scorer.begin()
        images.append(run.policy.decode(part.x0))
        run.scorer.hand_over(images[-1], prompts[rows])

    run.fetch_rewards()
    with run.booked("rollout"):
        conditioning = run.policy.encode([p.text for p in prompts])
        indices = [group * size + i for group in groups for i in range(size)]
        rollout = roll_out(run, conditioning, indices, number, watch)
    with run.booked("reward"):
        scores = run.scorer.finish()
        keep_unscored(run.folder, images, prompts, scores, f"epoch-{epoch}-{number}-{run.world.rank}")
        unscored = np.array(scores.missing.reshape(len(groups), size).any(1))
        run.check_missing(scores, unscored)
        whole, own = run.everyones(scores)
        samples = Samples(
            rollout=rollout,
            conditioning=conditioning,
            rewards=torch.from_numpy(whole.score[own, None] if whole.terms is None else whole.terms[own]),
            weights=whole.weights,
            group=torch.tensor(groups).repeat_interleave(size),
            metrics={},
        )
        shares = {
            "rollout/informative_groups": len(_unequal(samples)) / len(groups),
            "rollout/missing_groups": float(unscored.mean()),
        }
        metrics = means("rollout", whole) | run.world.mean(shares)
    return replace(samples, metrics=metrics)


@torch.no_grad()
def roll_out(
    run: Run,
    conditioning: Conditioning,
    samples: Sequence[int],
    number: int = 0,
    watch: Callable[[slice, Rollout], None] | None = None,
) -> Rollout:
    """These samples of a round under the old policy, batch by batch, the same for every batch size.

    `watch` sees each batch when it is done; it sees the first again where memory did not suffice.
    """

    def in_batches(size: int) -> Rollout:
        parts = []
        for rows in batches(len(samples), size):
            parts.append(_batch(run, conditioning.rows(rows), number, samples[rows]))
            if watch:
                watch(rows, parts[-1])
        return concatenate(parts)

    with run.policy.using("old"):
        return run.in_memory("rollout", run.recipe.rollout.batch_size, in_batches)


def _batch(run: Run, conditioning: Conditioning, number: int, samples: Sequence[int]) -> Rollout:
    """These samples of a round; the noise of each depends on its index alone."""
    recipe, policy = run.recipe.rollout, run.policy
    labels = (run.cell.seed, "rollout", run.progress.epoch, number)
    own = start = streams(*labels, samples=samples)
    if recipe.noise == "group":
        size = recipe.candidates or recipe.group_size
        start = streams(*labels, "group", samples=[i // size for i in samples])
    noise = start.normal(policy.latent_shape, torch.empty((), device=policy.device))
    field = policy.field(conditioning, recipe.guidance_scale)
    if recipe.truncate_timesteps:
        field = _truncated(field)
    seen: list[Tensor] = []
    if "latents" in run.estimator.needs:
        field = _recorded(field, seen)
    sigmas = NOISE_SCHEDULES[recipe.noise_schedule](recipe.num_steps, policy.shift)
    rollout: Rollout = run.sampler.sample(field, noise, sigmas=sigmas, epoch=run.progress.epoch, streams=own)
    run.spend(forwards=len(samples) * recipe.num_steps * (1 + (recipe.guidance_scale > 1)))
    return replace(
        rollout,
        transitions=rollout.transitions if "transitions" in run.estimator.needs else None,
        latents=torch.stack(seen, 1) if seen else None,
    )


def _truncated(field: Velocity) -> Velocity:
    return lambda x, sigma: field(x, (1000 * sigma).int() / 1000)


def _recorded(field: Velocity, seen: list[Tensor]) -> Velocity:
    def recording(x: Tensor, sigma: Tensor) -> Tensor:
        seen.append(x)
        return field(x, sigma)

    return recording


def _scored(samples: Samples) -> Samples:
    """The groups in which every sample has a score."""
    unscored = samples.group[~samples.score.isfinite()]
    return samples.rows((~torch.isin(samples.group, unscored)).nonzero()[:, 0])


def _unequal(samples: Samples) -> list[int]:
    """The groups whose rewards differ; not those with a missing one."""
    groups, sizes = torch.unique_consecutive(samples.group, return_counts=True)
    score = samples.score.view(-1, int(sizes[0]))
    unequal: list[int] = groups[score.max(1).values > score.min(1).values].tolist()
    return unequal


def _best_and_worst(samples: Samples, group: int, size: int) -> Tensor:
    """The rows of a group's best and worst samples, half each, in order."""
    rows = (samples.group == group).nonzero()[:, 0]
    if len(rows) == size:
        return rows
    ranked = rows[samples.score[rows].argsort(descending=True, stable=True)]
    return torch.cat([ranked[: size // 2], ranked[len(rows) - size // 2 :]]).sort().values


def _joined(parts: list[Samples]) -> Samples:
    """The groups of several rounds, numbered anew."""
    size = int((parts[0].group == parts[0].group[0]).sum())
    rewards = torch.cat([p.rewards for p in parts])
    return replace(
        parts[0],
        rollout=concatenate([p.rollout for p in parts]),
        conditioning=Conditioning(
            torch.cat([p.conditioning.tokens for p in parts]), torch.cat([p.conditioning.pooled for p in parts])
        ),
        rewards=rewards,
        group=torch.arange(len(rewards) // size).repeat_interleave(size),
    )
