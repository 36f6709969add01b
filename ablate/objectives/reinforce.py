"""REINFORCE (Williams 1992): the plain policy gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ablate.objectives.protocol import Level
from ablate.rollout import Evaluation


@dataclass(frozen=True, kw_only=True)
class Reinforce:
    """L = -mean(A f), f the log-prob of the current policy, A the advantage; Williams 1992, eq. 4."""

    needs: ClassVar[frozenset[str]] = frozenset()
    level: ClassVar[Level] = "term"

    def __call__(self, evaluation: Evaluation) -> tuple[Tensor, dict[str, Tensor]]:
        return -(evaluation.advantage[:, None] * evaluation.log_prob).mean(), {}
