"""GRPO (Shao et al. 2024, arXiv 2402.03300) and GSPO (Zheng et al. 2025, arXiv 2507.18071)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ablate.objectives.protocol import Level
from ablate.objectives.ratio import check_positive, clipped_surrogate, log_ratio, ratio_metrics
from ablate.rollout import Evaluation


@dataclass(frozen=True, kw_only=True)
class GRPO:
    """L = mean max(-A r, -A clip(r, 1 - c, 1 + c)) on the ratio of every term; Shao et al. 2024, eq. 3, per step.

    Ratios are per latent dimension, hence so small a clip range; 1e-3 is the released code's of arXiv 2602.04663.
    """

    clip_range: float = 1e-3
    needs: ClassVar[frozenset[str]] = frozenset({"old"})
    level: ClassVar[Level] = "term"

    def __post_init__(self) -> None:
        check_positive("clip_range", self.clip_range)

    def __call__(self, evaluation: Evaluation) -> tuple[Tensor, dict[str, Tensor]]:
        log_r = log_ratio(evaluation)
        loss = clipped_surrogate(log_r.exp(), evaluation.advantage[:, None], self.clip_range).mean()
        return loss, ratio_metrics(log_r, self.clip_range)


@dataclass(frozen=True, kw_only=True)
class GSPO:
    """The same surrogate on one ratio per sample, s = exp(mean_k(f - f_old)); Zheng et al. 2025, eqs. 5 to 7.

    The clip range is GRPO's, so that the two differ in the level alone; the source's 3e-4 is per token of a text.
    """

    clip_range: float = 1e-3
    needs: ClassVar[frozenset[str]] = frozenset({"old"})
    level: ClassVar[Level] = "sample"

    def __post_init__(self) -> None:
        check_positive("clip_range", self.clip_range)

    def __call__(self, evaluation: Evaluation) -> tuple[Tensor, dict[str, Tensor]]:
        log_s = log_ratio(evaluation).mean(1)
        loss = clipped_surrogate(log_s.exp(), evaluation.advantage, self.clip_range).mean()
        return loss, ratio_metrics(log_s, self.clip_range)
