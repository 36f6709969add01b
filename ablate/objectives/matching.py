"""Losses that match the log-ratio to the reward: Kimi k1.5, trajectory balance, and centred reward distillation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from ablate.objectives.protocol import Level
from ablate.objectives.ratio import check_positive, log_ratio, ratio_metrics
from ablate.rollout import Evaluation


@dataclass(frozen=True, kw_only=True)
class Kimi:
    """L = mean((A - tau log r)^2). At tau = 1, twice `par` without its ratio.

    The source has one log r per sequence: `pool: sum` or `mean` of the estimator.

    Source: Kimi k1.5, Kimi Team 2025 (arXiv 2501.12599), sec. 2.3.2, with A = R - mean; its gradient is eq. 3.
    """

    tau: float = 1.0
    needs: ClassVar[frozenset[str]] = frozenset({"old"})
    level: ClassVar[Level] = "term"

    def __post_init__(self) -> None:
        check_positive(tau=self.tau)

    def __call__(self, evaluation: Evaluation) -> tuple[Tensor, dict[str, Tensor]]:
        log_r = log_ratio(evaluation)
        return (evaluation.advantage[:, None] - self.tau * log_r).square().mean(), ratio_metrics(log_r)


@dataclass(frozen=True, kw_only=True)
class TB:
    """L = mean((A/tau - log Z - log r)^2), log Z = the group's mean of A/tau - log r at each point, without gradient.

    Trajectory balance with the batch estimate of its partition function (VarGrad). The source has one log r per
    trajectory: `pool: sum` of the estimator.

    Source: Malkin et al. 2022 (arXiv 2201.13259); log Z as in VarGrad, Richter et al. 2020 (arXiv 2010.10436).
    """

    tau: float = 1.0
    needs: ClassVar[frozenset[str]] = frozenset({"old"})
    level: ClassVar[Level] = "group"

    def __post_init__(self) -> None:
        check_positive(tau=self.tau)

    def __call__(self, evaluation: Evaluation) -> tuple[Tensor, dict[str, Tensor]]:
        log_r = log_ratio(evaluation)
        gap = evaluation.advantage[:, None] / self.tau - log_r
        log_z = group_mean(gap.detach(), evaluation.group)
        return (gap - log_z).square().mean(), {**ratio_metrics(log_r), "log_z": log_z.mean()}


@dataclass(frozen=True, kw_only=True)
class CRD:
    """L = M/b mean((b [log r - mean_g log r] - [R - mean_g R])^2), R = (clip(A, -M, M) / M + 1) / 2.

    Centred reward distillation: the implicit reward log r matches the outer one, both centred in the group, the means
    without gradient. loss `bce`: cross-entropy of sigmoid(R - mean_g R). The source measures log r with the adaptive
    error without its factor s, and centres over the batch of a device. On a trajectory, log r is that of its steps.

    Source: centred reward distillation (arXiv 2603.14128), as in Flow-Factory's crd.py with uniform weighting.
    """

    beta: float = 1.0
    max_advantage: float = 5.0
    loss: Literal["mse", "bce"] = "mse"
    needs: ClassVar[frozenset[str]] = frozenset({"old"})
    level: ClassVar[Level] = "group"

    def __post_init__(self) -> None:
        check_positive(beta=self.beta, max_advantage=self.max_advantage)

    def __call__(self, evaluation: Evaluation) -> tuple[Tensor, dict[str, Tensor]]:
        log_r, m = log_ratio(evaluation), self.max_advantage
        implicit = self.beta * (log_r - group_mean(log_r.detach(), evaluation.group))
        reward = ((evaluation.advantage.clamp(-m, m) / m + 1) / 2)[:, None].expand_as(log_r)
        centred = reward - group_mean(reward, evaluation.group)
        if self.loss == "bce":
            loss = F.binary_cross_entropy_with_logits(implicit, torch.sigmoid(centred))
        else:
            loss = (implicit - centred).square().mean()
        return m / self.beta * loss, ratio_metrics(log_r)


def group_mean(values: Tensor, group: Tensor) -> Tensor:
    """Mean over the samples of a group, point by point, [b, k] -> [b, k]."""
    same = (group[:, None] == group[None]).to(values)
    return same @ values / same.sum(1, keepdim=True)
