"""Signal and noise of the policy gradient on fixed rollouts: by number of points, and by noise level.

On-policy, every ratio objective has the gradient of REINFORCE, -mean(A f) (a contract of this repository), so that one
objective stands for all.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ablate.advantages import advantages
from ablate.concentration import effective_points, largest_share, point_weights
from ablate.objectives.reinforce import Reinforce
from ablate.rollout import take
from ablate.snr import SignalAndNoise, signal_and_noise
from runners.collect import Samples, collect
from runners.run import Run
from runners.surrogate import Asked, Batch, accumulate_gradient
from runners.update import asking, draw_probe

Project = Callable[[Sequence[Tensor]], Tensor]


@dataclass(frozen=True, kw_only=True)
class Rollouts:
    """The fixed samples of a cell: groups, each a prompt with its images."""

    samples: Samples
    advantage: Tensor  # [b]
    num_groups: int
    calls: float
    seconds: float

    @property
    def group_size(self) -> int:
        return len(self.advantage) // self.num_groups


@dataclass(frozen=True, kw_only=True)
class Draw:
    """The gradient of one probe, group by group."""

    gradient: Tensor  # [u, q], or by level [u, k, q], whose mean over k it is
    log_prob: Tensor  # [b, k]
    weight: Tensor  # [b, k]
    sigma: Tensor  # [b, k]
    seconds: float


@dataclass(frozen=True, kw_only=True)
class AtPoints:
    """What is found at one number of points."""

    points: int
    total: SignalAndNoise
    cosine: float
    effective_points: float
    largest_share: float
    calls: float
    seconds: float


@dataclass(frozen=True, kw_only=True)
class AtLevel:
    """What is found at one noise level, when every level is a point."""

    sigma: float
    weight_share: float
    part: SignalAndNoise


def roll_out(run: Run) -> Rollouts:
    """Roll out and score the groups of a run's recipe."""
    before, start = run.progress.cost.nfe, time.perf_counter()
    samples = collect(run)
    advantage = advantages(samples.rewards, samples.group, run.recipe.advantage, samples.weights).float()
    return Rollouts(
        samples=samples,
        advantage=advantage.to(run.policy.device),
        num_groups=int(samples.group.max()) + 1,
        calls=run.progress.cost.nfe - before,
        seconds=time.perf_counter() - start,
    )


def numbers_of_points(run: Run, asked: Sequence[int]) -> list[int]:
    """How many points the estimator really draws for each number, and for all levels: each once, in order."""
    return sorted({_num_points(run, k) for k in (*asked, run.recipe.rollout.num_steps)})


def measure(
    run: Run,
    rollouts: Rollouts,
    points: Sequence[int],
    num_draws: int,
    project: Project,
    advance: Callable[[int], object],
) -> tuple[list[AtPoints], list[AtLevel]]:
    """`num_draws` independent probes at each number of points; by level at the number that has them all."""
    all_levels = _num_points(run, run.recipe.rollout.num_steps)
    drawn: dict[int, list[Draw]] = {}
    for k in points:
        drawn[k] = []
        for number in range(num_draws):
            drawn[k].append(draw(run, rollouts, k, number, project, by_level=k == all_levels))
            advance(len(rollouts.advantage) * k)
    updates = {k: [_whole(d.gradient).mean(0) for d in draws] for k, draws in drawn.items()}  # [q] each
    everything = sum(k * g for k, gradients in updates.items() for g in gradients)
    found = []
    for k, draws in drawn.items():
        weight = torch.cat([d.weight for d in draws])
        others = [torch.cosine_similarity(g, everything - k * g, dim=0) for g in updates[k]]
        found.append(
            AtPoints(
                points=k,
                total=signal_and_noise(torch.stack([_whole(d.gradient) for d in draws], 1)),
                cosine=float(torch.stack(others).mean()),
                effective_points=float(effective_points(weight).mean()),
                largest_share=float(largest_share(weight).mean()),
                calls=3.0 * len(rollouts.advantage) * k * (1 + (run.recipe.update.guidance_scale > 1)),
                seconds=sorted(d.seconds for d in draws)[len(draws) // 2],
            )
        )
    return found, _levels(drawn[all_levels]) if all_levels in drawn else []


def draw(run: Run, rollouts: Rollouts, points: int, number: int, project: Project, *, by_level: bool = False) -> Draw:
    """The gradient of -mean(A f) for probe `number`, for every group by itself, and by level where asked for."""
    samples, size = rollouts.samples, rollouts.group_size
    probe = _sorted(probe_of(run, rollouts, points, number))
    velocities: list[Tensor] = []
    columns = [slice(j, j + 1) for j in range(points)] if by_level else [slice(None)]
    seconds, gradients = 0.0, []
    for group in range(rollouts.num_groups):
        rows = slice(group * size, (group + 1) * size)
        for chosen in columns:
            start = time.perf_counter()
            velocities.append(_accumulate(run, samples, rollouts.advantage, take(probe, rows, chosen), rows))
            run.wait()
            seconds += time.perf_counter() - start
            gradients.append(project(gradient_of(run)))
    run.optimizer.zero_grad()
    k = len(columns)
    joined = [torch.cat(velocities[i : i + k], 1) for i in range(0, len(velocities), k)]
    velocity = torch.cat(joined)  # [b, k, ...]
    factor = k if run.estimator.pool == "sum" else 1
    stacked = factor * torch.stack(gradients)
    return Draw(
        gradient=stacked.reshape(rollouts.num_groups, k, -1) if by_level else stacked,
        log_prob=run.estimator.log_prob(velocity, probe),
        weight=point_weights(run.estimator, velocity, probe),
        sigma=probe.sigma,
        seconds=seconds,
    )


def _accumulate(run: Run, samples: Samples, advantage: Tensor, probe: Any, rows: slice) -> Tensor:
    """Leave the gradient of some samples at a part of the probe in `.grad`; their velocities [n, k, ...]."""
    answer, answers = asking(run, probe, samples.conditioning.rows(rows)), []

    def ask(weights: Asked, chosen: slice, points: slice) -> Tensor:
        velocity = answer(weights, chosen, points)
        answers.append(velocity.detach())
        return velocity

    group = samples.group[rows].to(run.policy.device)
    batch = Batch(probe=probe, advantage=advantage[rows], group=group, group_size=len(group))
    run.optimizer.zero_grad()
    micro = max(run.recipe.update.micro_batch_size, probe.sigma.shape[1])  # whole samples, so that answers line up
    accumulate_gradient(Reinforce(), run.estimator, batch, ask, micro_batch_size=micro)
    return torch.cat(answers)


def probe_of(run: Run, rollouts: Rollouts, points: int, number: int) -> Any:
    """Probe `number` with so many points, its numbers shared within groups as the recipe has it."""
    return draw_probe(run, rollouts.samples, run.recipe.update.group_probe, points, points, number)


def _num_points(run: Run, asked: int) -> int:
    steps = run.recipe.rollout.num_steps
    return int(run.estimator.num_points(asked, steps, run.sampler.num_scored(steps)))


def _sorted(probe: Any) -> Any:
    """The probe with every sample's points from noise to data."""
    order = probe.sigma.argsort(dim=1, descending=True, stable=True)
    rows = torch.arange(len(order), device=order.device)[:, None]
    parts = {f.name: getattr(probe, f.name) for f in dataclasses.fields(probe)}
    return dataclasses.replace(probe, **{k: v if v is None else v[rows, order.to(v.device)] for k, v in parts.items()})


def gradient_of(run: Run) -> list[Tensor]:
    """What `.grad` holds, tensor by tensor; zeros where nothing was added."""
    return [torch.zeros_like(p) if p.grad is None else p.grad for p in run.policy.trainable]


def _whole(gradient: Tensor) -> Tensor:
    """[u, q] of a gradient that may be by level."""
    return gradient.mean(1) if gradient.ndim == 3 else gradient


def _levels(draws: list[Draw]) -> list[AtLevel]:
    """The part of every level in the gradient, from noise to data."""
    gradients = torch.stack([d.gradient for d in draws], 1)  # [u, m, k, q]
    k = gradients.shape[2]
    weight, sigma = (torch.cat([getattr(d, name) for d in draws]) for name in ("weight", "sigma"))
    share = (weight / weight.sum(1, keepdim=True)).mean(0)
    return [
        AtLevel(
            sigma=float(sigma[:, j].mean()),
            weight_share=float(share[j]),
            part=signal_and_noise(gradients[:, :, j] / k),
        )
        for j in range(k)
    ]
