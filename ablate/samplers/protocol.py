"""What a sampler is."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from ablate.flow import Velocity
from ablate.rollout import Rollout
from ablate.seeding import Streams


class Sampler(Protocol):
    """A frozen dataclass: fields are its parameters, `sample` integrates a velocity field from noise to data."""

    @property
    def leaves(self) -> frozenset[str]:
        """What it leaves behind beside the samples: a subset of {"transitions", "density"}.

        "transitions": Gaussian steps with their coefficients. "density": they are meant to be scored by their density;
        those of `cps` are not.
        """
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
