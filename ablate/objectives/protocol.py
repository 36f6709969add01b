"""What an objective is."""

from __future__ import annotations

from typing import Literal, Protocol

from torch import Tensor

from ablate.rollout import Evaluation

Level = Literal["term", "sample", "group"]


class Objective(Protocol):
    """A frozen dataclass: fields are its hyperparameters with the source's defaults, the call is the maths.

    The loss is a mean over its units (terms, samples or groups), so that the loss of a batch is the size-weighted mean
    of the losses of its parts.
    """

    @property
    def needs(self) -> frozenset[str]:
        """Which other policies it reads: a subset of {"old", "reference"}."""
        ...

    @property
    def level(self) -> Level:
        """How far apart the entries may be that its loss couples: within a term, a sample or a group."""
        ...

    def __call__(self, evaluation: Evaluation) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss to minimise, and scalar metrics."""
        ...
