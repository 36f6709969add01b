"""What a sampler is."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import Tensor

from ablate.flow import Velocity
from ablate.rollout import Rollout
from ablate.seeding import Streams


@runtime_checkable
class Sampler(Protocol):
    """A frozen dataclass: fields are its parameters, `sample` integrates a velocity field from noise to data."""

    @property
    def stochastic(self) -> bool:
        """Whether it leaves transition densities behind."""
        ...

    def sample(self, velocity: Velocity, noise: Tensor, *, sigmas: Tensor, epoch: int, streams: Streams) -> Rollout:
        """Roll out from `noise` [b, ...] along `sigmas` [t + 1], decreasing from 1 to 0; one network call a step."""
        ...

    def num_scored(self, num_steps: int) -> int:
        """How many of so many steps leave a transition density behind."""
        ...

    def problem(self, num_steps: int) -> str | None:
        """Why this sampler cannot run with so many steps, or None."""
        ...
