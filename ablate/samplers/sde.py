"""Flow-SDE: stochastic steps that keep the flow's marginals (Liu et al. 2025, arXiv 2505.05470, eq. 9)."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

from torch import Tensor

from ablate.flow import Velocity
from ablate.rollout import Rollout
from ablate.samplers.steps import flow_sde_step, run_steps
from ablate.seeding import Streams


@dataclass(frozen=True, kw_only=True)
class FlowSDE:
    """x' ~ N(mean(x, v), g^2 |dt|) at every step, g = noise_level sqrt(sigma / (1 - sigma)).

    Every step but the last is scored, as in Flow-GRPO (its timestep_fraction of 0.99 leaves the last out): near
    sigma = 0 the deviation is up to a hundred times smaller than elsewhere, and that step's likelihood would outweigh
    all others. `score_last` scores it too, as arXiv 2602.04663's release can.
    """

    noise_level: float = 0.7  # Flow-GRPO's value for SD 3.5
    score_last: bool = False

    def __post_init__(self) -> None:
        if self.noise_level <= 0:
            raise ValueError(f"noise_level must be positive, got {self.noise_level}; sampler ode has no noise")

    @property
    def stochastic(self) -> bool:
        return True

    def num_scored(self, num_steps: int) -> int:
        return num_steps if self.score_last else num_steps - 1

    def problem(self, num_steps: int) -> str | None:
        return None if num_steps >= 2 else f"sde needs at least 2 steps, got {num_steps}"

    def sample(self, velocity: Velocity, noise: Tensor, *, sigmas: Tensor, epoch: int, streams: Streams) -> Rollout:
        levels = sigmas.tolist()
        steps = [flow_sde_step(a, b, self.noise_level, guard=levels[1]) for a, b in itertools.pairwise(levels)]
        rollout = run_steps(steps, velocity, noise, sigmas, streams)
        assert rollout.transitions is not None
        return replace(rollout, transitions=rollout.transitions.first(self.num_scored(len(steps))))
