"""EPG, the paper's policy gradient with an importance ratio that carries no gradient (arXiv 2602.04663)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ablate.objectives.protocol import Level
from ablate.objectives.ratio import log_ratio, ratio_metrics
from ablate.rollout import Evaluation


@dataclass(frozen=True, kw_only=True)
class EPG:
    """L = -mean(sg(r) A f), r = exp(f - f_old): the gradient of the unclipped surrogate -mean(A r)."""

    needs: ClassVar[frozenset[str]] = frozenset({"old"})
    level: ClassVar[Level] = "term"

    def __call__(self, evaluation: Evaluation) -> tuple[Tensor, dict[str, Tensor]]:
        log_r = log_ratio(evaluation).detach()
        loss = -(log_r.exp() * evaluation.advantage[:, None] * evaluation.log_prob).mean()
        return loss, ratio_metrics(log_r)
