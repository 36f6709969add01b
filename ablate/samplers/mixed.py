"""Mixed ODE-SDE: Euler everywhere but in a window of stochastic steps."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ablate.flow import Velocity
from ablate.rollout import Rollout
from ablate.samplers.sde import CPS, FlowSDE
from ablate.samplers.steps import euler_step, run_steps
from ablate.seeding import Streams


@dataclass(frozen=True, kw_only=True)
class Mixed:
    """x' = x + (s' - s) v, but inside `window` contiguous steps that of `sde` or `cps`; only these are scored.

    The window is the same for all samples of an epoch: with windows of their own, samples of one group would not be
    comparable. It lies within the first `until` of the steps and never holds the last one, whose standard deviation is
    up to a hundred times smaller.

    * policy: `random`, a new place every epoch. `progressive`, from noise to data, `epochs_per_place` epochs at each
      place, `stride` steps further, then from the start again (the release's `roll_back`; the paper stops).
      `exp_decay`, progressive with ceil(epochs_per_place exp(-decay max(place - decay_from, 0))) epochs at a place.
      `branch`, one random step, whatever `window` says: with `rollout.noise: group` all samples of a prompt share the
      path up to it, so that the reward is credited to that step alone (TempFlow-GRPO).
    * step: `flow` as in `sde`, `cps` as in `cps`, each with this `noise_level`.

    Source: MixGRPO, Li et al. 2025 (arXiv 2507.21802), secs. 3.1 and 3.2; TempFlow-GRPO (arXiv 2508.04324).
    """

    noise_level: float = 0.7
    window: int = 3  # Flow-GRPO-Fast takes 2 or 3 of 10 steps, MixGRPO 4 of 25
    policy: Literal["random", "progressive", "exp_decay", "branch"] = "random"
    step: Literal["flow", "cps"] = "flow"
    until: float = 1.0  # Flow-GRPO-Fast: 0.5
    epochs_per_place: int = 25  # MixGRPO's tau
    stride: int = 1
    decay: float = 0.1  # MixGRPO's k
    decay_from: int = 13

    def __post_init__(self) -> None:
        at_least_one = {"window": self.window, "epochs_per_place": self.epochs_per_place, "stride": self.stride}
        for name, value in at_least_one.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not 0 < self.until <= 1:
            raise ValueError(f"until must lie in (0, 1], got {self.until}")
        if self.decay < 0:
            raise ValueError(f"decay must not be negative, got {self.decay}")
        self._kind()

    @property
    def leaves(self) -> frozenset[str]:
        return self._kind().leaves

    def num_scored(self, num_steps: int) -> int:
        return 1 if self.policy == "branch" else self.window

    def problem(self, num_steps: int) -> str | None:
        if self.num_scored(num_steps) <= self._allowed(num_steps):
            return None
        where = "before the last" if self.until == 1 else f"into the first {self.until:g}"
        most = max(self._allowed(num_steps), 0)
        return (
            f"a window of {self.num_scored(num_steps)} steps does not fit {where} of {num_steps} steps: {most} at most"
        )

    def window_start(self, num_steps: int, epoch: int, shared: torch.Generator) -> int:
        """The first stochastic step of an epoch."""
        places = range(self._allowed(num_steps) - self.num_scored(num_steps) + 1)
        if self.policy in ("random", "branch"):
            return int(torch.randint(len(places), (), generator=shared))
        visited = places[:: self.stride]
        stays = [self._epochs_at(place) for place in visited]
        ends = list(itertools.accumulate(stays))
        return next(place for place, end in zip(visited, ends, strict=True) if epoch % ends[-1] < end)

    def sample(self, velocity: Velocity, noise: Tensor, *, sigmas: Tensor, epoch: int, streams: Streams) -> Rollout:
        levels = sigmas.tolist()
        start = self.window_start(len(levels) - 1, epoch, streams.shared)
        inside = range(start, start + self.num_scored(len(levels) - 1))
        rule = self._kind().rule(levels)
        steps = [(rule if i in inside else euler_step)(a, b) for i, (a, b) in enumerate(itertools.pairwise(levels))]
        return run_steps(steps, velocity, noise, sigmas, streams)

    def _allowed(self, num_steps: int) -> int:
        """How many of the first steps may be stochastic."""
        return min(num_steps - 1, math.floor(self.until * num_steps))

    def _kind(self) -> FlowSDE | CPS:
        return FlowSDE(noise_level=self.noise_level) if self.step == "flow" else CPS(noise_level=self.noise_level)

    def _epochs_at(self, place: int) -> int:
        decay = self.decay if self.policy == "exp_decay" else 0.0
        return math.ceil(self.epochs_per_place * math.exp(-decay * max(place - self.decay_from, 0)))
