"""One step of each kind, as coefficients: x' = x_coef x + velocity_coef velocity + std z."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ablate.flow import Velocity
from ablate.rollout import Rollout, Transitions
from ablate.seeding import Streams


@dataclass(frozen=True)
class Step:
    """Coefficients of one step from `sigma`; deterministic where `std` is 0."""

    sigma: float
    x_coef: float
    velocity_coef: float
    std: float


def euler_step(sigma: float, next_sigma: float) -> Step:
    """x' = x + (sigma' - sigma) v."""
    return Step(sigma=sigma, x_coef=1.0, velocity_coef=next_sigma - sigma, std=0.0)


def flow_sde_step(sigma: float, next_sigma: float, noise_level: float, guard: float) -> Step:
    """Euler-Maruyama on the reverse SDE with the flow's own marginals; Liu et al. 2025 (Flow-GRPO), eq. 9.

    g = noise_level sqrt(sigma / (1 - sigma)), dt = sigma' - sigma:
    mean = x (1 + g^2 dt / (2 sigma)) + v (1 + g^2 (1 - sigma) / (2 sigma)) dt, std = g sqrt(-dt).
    g is infinite at sigma = 1; there, and only in g, `guard` (the second level of the schedule) stands in.
    """
    dt = next_sigma - sigma
    g2 = noise_level**2 * sigma / (1 - min(sigma, guard))
    return Step(
        sigma=sigma,
        x_coef=1 + g2 * dt / (2 * sigma),
        velocity_coef=(1 + g2 * (1 - sigma) / (2 * sigma)) * dt,
        std=(g2 * -dt) ** 0.5,
    )


def run_steps(steps: list[Step], velocity: Velocity, noise: Tensor, sigmas: Tensor, streams: Streams) -> Rollout:
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
        x_coef=column("x_coef"),
        velocity_coef=column("velocity_coef"),
        std=column("std"),
    )
    return Rollout(x0=x, sigmas=sigmas, transitions=transitions)
