"""Stochastic samplers: every step draws noise and leaves a Gaussian transition density behind."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ablate.flow import Velocity, predict_x0
from ablate.rollout import Rollout
from ablate.samplers.ode import dpm2_weight
from ablate.samplers.steps import StepRule, StepSampler, ddim_std, flow_sde_step, renoise_step, sde_step
from ablate.seeding import Streams


@dataclass(frozen=True, kw_only=True)
class FlowSDE(StepSampler):
    """x' ~ N(x + [v + g^2 (x + (1 - s) v) / (2 s)] dt, g^2 |dt|), g = noise_level sqrt(s / (1 - s)).

    Keeps the flow's marginals. `score_last` scores the last step too, as arXiv 2602.04663's release can; Flow-GRPO's
    timestep_fraction of 0.99 leaves it out. noise_level sqrt(2) is the memoryless SDE.

    Source: Flow-GRPO, Liu et al. 2025 (arXiv 2505.05470), eq. 9.
    """

    noise_level: float = 0.7  # Flow-GRPO's value for SD 3.5
    score_last: bool = False

    def __post_init__(self) -> None:
        if self.noise_level <= 0:
            raise ValueError(f"noise_level must be positive, got {self.noise_level}; sampler ode has no noise")

    def num_scored(self, num_steps: int) -> int:
        return num_steps if self.score_last else num_steps - 1

    def rule(self, sigmas: Sequence[float]) -> StepRule:
        return lambda a, b: flow_sde_step(a, b, self.noise_level, guard=sigmas[1])


@dataclass(frozen=True, kw_only=True)
class DanceSDE(StepSampler):
    """x' ~ N(x + [v + g^2 (x + (1 - s) v) / (2 s)] dt, g^2 |dt|) with constant diffusion g = noise_level.

    Not singular at s = 1. The source pairs it with the `linear` noise schedule.

    Source: DanceGRPO, Xue et al. 2025 (arXiv 2505.07818), eq. 8.
    """

    noise_level: float = 0.3  # the source's eta

    def __post_init__(self) -> None:
        if self.noise_level <= 0:
            raise ValueError(f"noise_level must be positive, got {self.noise_level}; sampler ode has no noise")

    def rule(self, sigmas: Sequence[float]) -> StepRule:
        return lambda a, b: sde_step(a, b, self.noise_level)


@dataclass(frozen=True, kw_only=True)
class DDIM(StepSampler):
    """x' ~ N((1 - s') x0 + sqrt(s'^2 - std^2) noise, std^2), std = eta s' sqrt(1 - [s' (1 - s) / (s (1 - s'))]^2).

    x0 and noise are the predicted ones. eta = 0 would be Euler; eta = 1 is the first-order `dpm_sde`. The last step
    has no noise. The sampler of DDPO and D3PO, in rectified-flow terms.

    Source: Song et al. 2021 (arXiv 2010.02502), eqs. 12 and 16.
    """

    eta: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.eta <= 1:
            raise ValueError(f"eta must lie in (0, 1], got {self.eta}; sampler ode has no noise")

    def rule(self, sigmas: Sequence[float]) -> StepRule:
        return lambda a, b: renoise_step(a, b, ddim_std(a, b, self.eta))


@dataclass(frozen=True, kw_only=True)
class CPS(StepSampler):
    """x' = (1 - s') x0 + sqrt(s'^2 - std^2) noise + std z, std = s' sin(noise_level pi / 2).

    Preserves the coefficients of x0 and noise. Not a consistent discretisation: the noise of a step does not shrink
    with the step, so the final variance stays below the data's however many steps are taken. It was published with a
    squared distance instead of its density: estimator `cps_distance`. `use_density` lets `trajectory` score the steps'
    own Gaussian all the same.

    Source: Flow-CPS, Wang and Yu 2025 (arXiv 2509.05952).
    """

    noise_level: float = 0.8  # Flow-GRPO-Fast without guidance
    use_density: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.noise_level <= 1:
            raise ValueError(f"noise_level must lie in (0, 1], got {self.noise_level}; sampler ode has no noise")

    @property
    def leaves(self) -> frozenset[str]:
        return frozenset({"transitions", "density"} if self.use_density else {"transitions"})

    def rule(self, sigmas: Sequence[float]) -> StepRule:
        return lambda a, b: renoise_step(a, b, b * math.sin(self.noise_level * math.pi / 2))


@dataclass(frozen=True, kw_only=True)
class DMD(StepSampler):
    """x' ~ N((1 - s') x0, s'^2): the predicted x0 is noised again from scratch.

    Made for few-step students; with many steps each one throws away what the noise knew.

    Source: DMD2, Yin et al. 2024 (arXiv 2405.14867), sec. 4.4; scored as in arXiv 2602.04663's release.
    """

    def rule(self, sigmas: Sequence[float]) -> StepRule:
        return lambda a, b: renoise_step(a, b, b)


@dataclass(frozen=True, kw_only=True)
class DPMSolverSDE(StepSampler):
    """x' ~ N((s'/s) e^-h x + (1 - s') (1 - e^-2h) m, s'^2 (1 - e^-2h)), h the step in log((1 - s) / s).

    order 1: m is the predicted x0; the same step as `ddim` with eta 1. order 2: m = x0 + (h / 2 h0)(x0 - x0 before),
    which depends on two network answers, so that no single evaluation gives its density: order 2 leaves none.

    Source: DPM-Solver++, Lu et al. 2022 (arXiv 2211.01095), its SDE form; MixGRPO-Flash (arXiv 2507.21802).
    """

    order: Literal[1, 2] = 1

    @property
    def leaves(self) -> frozenset[str]:
        return frozenset({"transitions", "density"} if self.order == 1 else ())

    def num_scored(self, num_steps: int) -> int:
        return num_steps - 1 if self.leaves else 0

    def rule(self, sigmas: Sequence[float]) -> StepRule:
        return lambda a, b: renoise_step(a, b, ddim_std(a, b, 1.0))

    def sample(self, velocity: Velocity, noise: Tensor, *, sigmas: Tensor, epoch: int, streams: Streams) -> Rollout:
        if self.order == 1:
            return super().sample(velocity, noise, sigmas=sigmas, epoch=epoch, streams=streams)
        levels = sigmas.tolist()
        x, previous, rule = noise, None, self.rule(levels)
        for i, (a, b) in enumerate(itertools.pairwise(levels)):
            v = velocity(x, torch.full((len(x),), a, device=x.device))
            x0, step = predict_x0(x, v, torch.tensor(a)), rule(a, b)
            correction = 0 if previous is None or b == 0 else dpm2_weight(levels[i - 1], a, b) * (x0 - previous)
            x0_coef = 1 - b - (b**2 - step.std**2) ** 0.5 * (1 - a) / a  # of x0 in the mean, beside x
            x = step.x_coef * x + step.velocity_coef * v + x0_coef * correction
            x = x + step.std * streams.normal(x.shape[1:], x)
            previous = x0
        return Rollout(x0=x, sigmas=sigmas)
