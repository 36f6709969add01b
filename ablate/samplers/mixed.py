"""Mixed ODE-SDE: Euler everywhere but in a window of Flow-SDE steps (Li et al. 2025, MixGRPO, arXiv 2507.21802)."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ablate.flow import Velocity
from ablate.rollout import Rollout
from ablate.samplers.steps import euler_step, flow_sde_step, run_steps
from ablate.seeding import Streams


@dataclass(frozen=True, kw_only=True)
class Mixed:
    """Flow-SDE inside `window` contiguous steps, Euler outside; only the window's steps are scored.

    The window is the same for all samples of an epoch: with windows of their own, samples of one group would not be
    comparable. It never holds the last step, whose standard deviation is up to a hundred times smaller.
    policy `random`: a new place every epoch. `progressive`: from noise to data, `epochs_per_place` epochs at each
    place, then from the start again.
    """

    noise_level: float = 0.7
    window: int = 3  # Flow-GRPO-Fast takes 2 or 3 of 10 steps, MixGRPO 4 of 25
    policy: Literal["random", "progressive"] = "random"
    epochs_per_place: int = 25  # MixGRPO's tau

    def __post_init__(self) -> None:
        if self.noise_level <= 0 or self.window < 1 or self.epochs_per_place < 1:
            raise ValueError(
                f"noise_level must be positive, window and epochs_per_place at least 1; got "
                f"{self.noise_level}, {self.window}, {self.epochs_per_place}"
            )

    @property
    def stochastic(self) -> bool:
        return True

    def num_scored(self, num_steps: int) -> int:
        return self.window

    def problem(self, num_steps: int) -> str | None:
        if self.window < num_steps:
            return None
        return f"a window of {self.window} steps does not fit before the last of {num_steps} steps"

    def window_start(self, num_steps: int, epoch: int, shared: torch.Generator) -> int:
        """The first stochastic step of an epoch."""
        places = num_steps - self.window  # the last step is left out
        if self.policy == "progressive":
            return epoch // self.epochs_per_place % places
        return int(torch.randint(places, (), generator=shared))

    def sample(self, velocity: Velocity, noise: Tensor, *, sigmas: Tensor, epoch: int, streams: Streams) -> Rollout:
        levels = sigmas.tolist()
        start = self.window_start(len(levels) - 1, epoch, streams.shared)
        steps = [
            flow_sde_step(a, b, self.noise_level, guard=levels[1])
            if start <= i < start + self.window
            else euler_step(a, b)
            for i, (a, b) in enumerate(itertools.pairwise(levels))
        ]
        return run_steps(steps, velocity, noise, sigmas, streams)
