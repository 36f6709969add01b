"""EPG, PEPG and PAR of arXiv 2602.04663, each with and without its importance ratio.

r = exp(f - f_old); sg stops the gradient. On-policy, all three have the gradient of REINFORCE. PAR and PEPG have the
same gradient everywhere. Their fixed point is pi proportional to pi_ref exp(R / beta) only with the advantage
(eta / beta) (R - mean), eta the coefficient of the KL: `advantage: {scale: none, coef: eta / beta}`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ablate.objectives.protocol import Level
from ablate.objectives.ratio import log_ratio, ratio_metrics
from ablate.rollout import Evaluation


@dataclass(frozen=True, kw_only=True)
class _Paper:
    ratio: bool = True
    level: ClassVar[Level] = "term"

    def _weight(self, log_r: Tensor) -> Tensor:
        return log_r.detach().exp() if self.ratio else torch.ones_like(log_r)


@dataclass(frozen=True, kw_only=True)
class EPG(_Paper):
    """L = -mean(sg(r) A f): the gradient of the unclipped surrogate -mean(A r); without ratio, of REINFORCE.

    Source: arXiv 2602.04663, EPG.
    """

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"old"} if self.ratio else ())

    def __call__(self, evaluation: Evaluation) -> tuple[Tensor, dict[str, Tensor]]:
        weighted = evaluation.advantage[:, None] * evaluation.log_prob
        if not self.ratio:
            return -weighted.mean(), {}
        log_r = log_ratio(evaluation)
        return -(self._weight(log_r) * weighted).mean(), ratio_metrics(log_r)


@dataclass(frozen=True, kw_only=True)
class PEPG(_Paper):
    """L = -mean(sg(r) (A - sg(log r)) f): EPG, pulled back towards the rollout policy.

    Source: arXiv 2602.04663, PEPG and theorem 3.1.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"old"})

    def __call__(self, evaluation: Evaluation) -> tuple[Tensor, dict[str, Tensor]]:
        log_r = log_ratio(evaluation)
        advantage = evaluation.advantage[:, None] - log_r.detach()
        return -(self._weight(log_r) * (advantage * evaluation.log_prob)).mean(), ratio_metrics(log_r)


@dataclass(frozen=True, kw_only=True)
class PAR(_Paper):
    """L = mean(sg(r) (A - log r)^2) / 2: the log-ratio regresses on the advantage. Its gradient is PEPG's.

    Source: arXiv 2602.04663, PAR.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"old"})

    def __call__(self, evaluation: Evaluation) -> tuple[Tensor, dict[str, Tensor]]:
        log_r = log_ratio(evaluation)
        gap = evaluation.advantage[:, None] - log_r
        return 0.5 * (self._weight(log_r) * gap**2).mean(), ratio_metrics(log_r)
