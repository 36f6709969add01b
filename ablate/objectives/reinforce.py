"""Policy gradients without a ratio: REINFORCE and RLOO."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ablate.objectives.protocol import Level
from ablate.rollout import Evaluation


@dataclass(frozen=True, kw_only=True)
class Reinforce:
    """L = -mean(A f), f the log-prob of the current policy, A the advantage.

    On a trajectory, the mean over its steps; `pool: sum` of the estimator sums them.

    Source: Williams 1992, "Simple statistical gradient-following algorithms".
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    level: ClassVar[Level] = "term"

    def __call__(self, evaluation: Evaluation) -> tuple[Tensor, dict[str, Tensor]]:
        return -(evaluation.advantage[:, None] * evaluation.log_prob).mean(), {}


@dataclass(frozen=True, kw_only=True)
class RLOO:
    """L = -mean(A f), A = R - mean of the other rewards of the group, with the KL inside the reward.

    The baseline is `advantage: {centre: leave_one_out, scale: none}`, unclipped, on which the plan insists. With
    `kl_coef` b, the reward is R - b sg(f - q), averaged over points, and so is centred with it (TRL takes the rollout
    policy's log-prob for f).

    Source: Ahmadian et al. 2024 (arXiv 2402.14740), sec. 2.3, and eq. 3 for the KL in the reward.
    """

    kl_coef: float = 0.0
    demands: ClassVar[Mapping[str, object]] = {
        "advantage.centre": "leave_one_out",
        "advantage.scale": "none",
        "advantage.coef": 1.0,
        "advantage.clip": None,
    }

    def __post_init__(self) -> None:
        if self.kl_coef < 0:
            raise ValueError(f"kl_coef must not be negative, got {self.kl_coef}")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"reference"}) if self.kl_coef else frozenset()

    @property
    def level(self) -> Level:
        return "group" if self.kl_coef else "term"

    def __call__(self, evaluation: Evaluation) -> tuple[Tensor, dict[str, Tensor]]:
        advantage, metrics = evaluation.advantage, {}
        if self.kl_coef:
            kl = (evaluation.log_prob - evaluation.reference()).detach().mean(1)
            advantage = advantage - self.kl_coef * _less_the_others(kl, evaluation.group)
            metrics["kl_in_reward"] = kl.mean()
        return -(advantage[:, None] * evaluation.log_prob).mean(), metrics


def _less_the_others(values: Tensor, group: Tensor) -> Tensor:
    """Each value minus the mean of the others of its group, [b] -> [b]."""
    same = (group[:, None] == group[None]).to(values)
    others = same - torch.eye(len(values), dtype=same.dtype, device=same.device)
    return values - others @ values / others.sum(1).clamp_min(1)
