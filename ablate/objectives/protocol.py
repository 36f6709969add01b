"""What an objective is."""

from __future__ import annotations

from typing import Literal, Protocol

from torch import Tensor

from ablate.rollout import Evaluation

Level = Literal["term", "sample", "group"]


class Objective(Protocol):
    """A frozen dataclass: fields are its hyperparameters with the source's defaults, the call is the maths.

    The loss is a mean over its units (terms, samples or groups), so that the loss of a batch is the size-weighted mean
    of the losses of its parts. An attribute `demands` = {"advantage.scale": "none"} names recipe values that it is
    defined by; combinations with other ones are excluded.
    """

    @property
    def needs(self) -> frozenset[str]:
        """What it reads beside log-prob and advantage; the rest of the evaluation is None.

        "old", "reference": that policy's log-prob, and beside "velocity" its velocity. "reward": the raw reward.
        "velocity": the current policy's, differentiable. "target": a probe of noised final samples, with the velocity
        to regress on. "transitions": a probe of recorded steps, with their coefficients.
        """
        ...

    @property
    def level(self) -> Level:
        """How far apart the entries may be that its loss couples: within a term, a sample or a group.

        With `velocity` among its needs it must be `term`: velocities of whole groups do not fit into memory.
        """
        ...

    def __call__(self, evaluation: Evaluation) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss to minimise, and scalar metrics."""
        ...
