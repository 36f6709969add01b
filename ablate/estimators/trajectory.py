"""The likelihood of a stochastic rollout's own steps: exact, but only for samplers with transition densities."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ablate.flow import like, mean_square
from ablate.rollout import Rollout
from ablate.seeding import Streams


@dataclass(frozen=True, kw_only=True)
class TrajectoryProbe:
    """Recorded transitions, one per point; see `Transitions`."""

    x: Tensor  # [b, k, ...]
    next_x: Tensor  # [b, k, ...]
    rollout_velocity: Tensor  # [b, k, ...]
    sigma: Tensor  # [b, k]
    x_coef: Tensor  # [b, k]
    velocity_coef: Tensor  # [b, k]
    std: Tensor  # [b, k]


@dataclass(frozen=True, kw_only=True)
class Trajectory:
    """log N(x'; mean(x, v), std^2) per step: -(|x' - mean|^2 / D) / (2 std^2) - log(std sqrt(2 pi)), per dimension.

    Flow-GRPO (Liu et al. 2025, arXiv 2505.05470), eq. 11 on. Every scored step is a point; with fewer points, steps
    are drawn for each sample without replacement.
    """

    needs_transitions = True

    def probe(self, rollout: Rollout, *, num_points: int | None, streams: Streams) -> TrajectoryProbe:
        steps = rollout.transitions
        assert steps is not None
        batch, num_steps = steps.x.shape[:2]
        k = min(num_points or num_steps, num_steps)
        index = streams.permutation(num_steps)[:, :k].sort(-1).values  # [b, k]
        rows = torch.arange(batch)[:, None]
        return TrajectoryProbe(
            x=steps.x[rows, index],
            next_x=steps.next_x[rows, index],
            rollout_velocity=steps.velocity[rows, index],
            sigma=steps.sigma[index].to(steps.x.device),
            x_coef=steps.x_coef[index].to(steps.x.device),
            velocity_coef=steps.velocity_coef[index].to(steps.x.device),
            std=steps.std[index].to(steps.x.device),
        )

    def log_prob(self, velocity: Tensor, probe: TrajectoryProbe) -> Tensor:
        mean = like(probe.x_coef, velocity) * probe.x + like(probe.velocity_coef, velocity) * velocity
        error = mean_square(probe.next_x - mean, 2)
        std = probe.std.to(error)
        return -error / (2 * std**2) - std.log() - 0.5 * math.log(2 * math.pi)
