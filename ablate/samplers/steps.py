"""One step of each kind, as coefficients: x' = x_coef x + velocity_coef v + std z, z standard normal.

Every step here is linear-Gaussian, because x, the predicted x0 = x - sigma v and the predicted noise
x + (1 - sigma) v are linear in (x, v). What is singular is guarded here and nowhere else:

* sigma = 1: the diffusion sqrt(sigma / (1 - sigma)) of Flow-SDE is infinite; in it, the second level stands in.
* sigma' = 0: the noise of DDIM, CPS and DMD vanishes with sigma', so that their last step has no density; a step
  with std = 0 is deterministic and never recorded.
"""

from __future__ import annotations

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ablate.flow import Velocity
from ablate.rollout import Rollout, Transitions
from ablate.seeding import Streams


@dataclass(frozen=True)
class Step:
    """Coefficients of one step from `sigma` to `next_sigma`; deterministic where `std` is 0."""

    sigma: float
    next_sigma: float
    x_coef: float
    velocity_coef: float
    std: float = 0.0


StepRule = Callable[[float, float], Step]
"""(sigma, next_sigma) -> step."""


def euler_step(sigma: float, next_sigma: float) -> Step:
    """x' = x + (sigma' - sigma) v."""
    return Step(sigma, next_sigma, x_coef=1.0, velocity_coef=next_sigma - sigma)


def sde_step(sigma: float, next_sigma: float, diffusion: float) -> Step:
    """Euler-Maruyama on the reverse SDE with the flow's own marginals, for any diffusion g >= 0.

    dx = [v + g^2 (x + (1 - sigma) v) / (2 sigma)] dt + g dw, since the score is -(x + (1 - sigma) v) / sigma;
    Liu et al. 2025 (Flow-GRPO), eq. 8.
    """
    dt, half = next_sigma - sigma, diffusion**2 / (2 * sigma)
    return Step(
        sigma,
        next_sigma,
        x_coef=1 + half * dt,
        velocity_coef=(1 + half * (1 - sigma)) * dt,
        std=diffusion * math.sqrt(-dt),
    )


def flow_sde_step(sigma: float, next_sigma: float, noise_level: float, guard: float) -> Step:
    """`sde_step` with g = noise_level sqrt(sigma / (1 - sigma)); Liu et al. 2025 (Flow-GRPO), eq. 9.

    g is infinite at sigma = 1; there, and only in g, `guard` (the second level of the schedule) stands in.
    """
    return sde_step(sigma, next_sigma, noise_level * math.sqrt(sigma / (1 - min(sigma, guard))))


def renoise_step(sigma: float, next_sigma: float, std: float) -> Step:
    """Predicted x0 and noise, recombined at sigma' with a part of the noise drawn anew:

    x' = (1 - sigma') x0 + sqrt(sigma'^2 - std^2) noise + std z. With std = 0 it equals Euler. Song et al. 2021 (DDIM,
    arXiv 2010.02502), eq. 12, for alpha = 1 - sigma.
    """
    kept = math.sqrt(max(next_sigma**2 - std**2, 0.0))
    return Step(
        sigma,
        next_sigma,
        x_coef=1 - next_sigma + kept,
        velocity_coef=kept * (1 - sigma) - (1 - next_sigma) * sigma,
        std=std,
    )


def ddim_std(sigma: float, next_sigma: float, eta: float) -> float:
    """eta sigma' sqrt(1 - q^2), q = sigma' (1 - sigma) / (sigma (1 - sigma')) the correlation a diffusion keeps."""
    q = next_sigma * (1 - sigma) / (sigma * (1 - next_sigma))
    return eta * next_sigma * math.sqrt(1 - q**2)


@dataclass(frozen=True, kw_only=True)
class StepSampler(ABC):
    """A sampler whose every step leaves a Gaussian density behind; a subclass says with `rule` which step.

    Every step but the last is scored: near sigma = 0 the deviation is up to a hundred times smaller than elsewhere
    (0 for some samplers), and that step's likelihood would outweigh all others.
    """

    @property
    def leaves(self) -> frozenset[str]:
        return frozenset({"transitions", "density"})

    @abstractmethod
    def rule(self, sigmas: Sequence[float]) -> StepRule:
        """The step of this sampler on a schedule."""

    def num_scored(self, num_steps: int) -> int:
        return num_steps - 1

    def problem(self, num_steps: int) -> str | None:
        return None if num_steps >= 2 else f"a stochastic sampler needs at least 2 steps, got {num_steps}"

    def sample(self, velocity: Velocity, noise: Tensor, *, sigmas: Tensor, epoch: int, streams: Streams) -> Rollout:
        levels = sigmas.tolist()
        rule = self.rule(levels)
        steps = [rule(a, b) for a, b in itertools.pairwise(levels)]
        rollout = run_steps(steps, velocity, noise, sigmas, streams)
        assert rollout.transitions is not None, "no step of the rule has noise"
        return replace(rollout, transitions=rollout.transitions.first(self.num_scored(len(steps))))


def run_steps(steps: Sequence[Step], velocity: Velocity, noise: Tensor, sigmas: Tensor, streams: Streams) -> Rollout:
    """Apply the steps to `noise` [b, ...]; every stochastic one is recorded with its coefficients."""
    x = noise
    visited, following, velocities = [], [], []
    for step in steps:
        v = velocity(x, torch.full((len(x),), step.sigma, device=x.device, dtype=torch.float32))
        next_x = step.x_coef * x + step.velocity_coef * v
        if step.std > 0:
            next_x = next_x + step.std * streams.normal(x.shape[1:], x)
            visited.append(x)
            following.append(next_x)
            velocities.append(v)
        x = next_x
    if not visited:
        return Rollout(x0=x, sigmas=sigmas)
    scored = [step for step in steps if step.std > 0]

    def column(name: str) -> Tensor:
        return torch.tensor([getattr(step, name) for step in scored], dtype=torch.float64)

    transitions = Transitions(
        x=torch.stack(visited, 1),
        next_x=torch.stack(following, 1),
        velocity=torch.stack(velocities, 1),
        sigma=column("sigma"),
        next_sigma=column("next_sigma"),
        x_coef=column("x_coef"),
        velocity_coef=column("velocity_coef"),
        std=column("std"),
    )
    return Rollout(x0=x, sigmas=sigmas, transitions=transitions)
