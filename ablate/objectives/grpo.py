"""GRPO and its descendants that clip or bend the ratio r = exp(f - f_old).

Log-probs are per latent dimension, so ratios are close to 1: clip ranges are far smaller here than for text.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ablate.objectives.protocol import Level
from ablate.objectives.ratio import check_positive, clipped_surrogate, log_ratio, ratio_metrics
from ablate.rollout import Evaluation


@dataclass(frozen=True, kw_only=True)
class GRPO:
    """L = mean max(-A r, -A clip(r, 1 - c, 1 + c)) on the ratio of every term.

    1e-3 is the released code's of arXiv 2602.04663; Flow-GRPO has 1e-4.

    Source: Shao et al. 2024 (arXiv 2402.03300), eq. 3; per step as in Flow-GRPO (arXiv 2505.05470), eq. 5.
    """

    clip_range: float = 1e-3
    needs: ClassVar[frozenset[str]] = frozenset({"old"})
    level: ClassVar[Level] = "term"

    def __post_init__(self) -> None:
        check_positive(clip_range=self.clip_range)

    def __call__(self, evaluation: Evaluation) -> tuple[Tensor, dict[str, Tensor]]:
        log_r, c = log_ratio(evaluation), self.clip_range
        terms, metrics = clipped_surrogate(log_r, evaluation.advantage[:, None], c, c)
        return terms.mean(), metrics


@dataclass(frozen=True, kw_only=True)
class DrGRPO(GRPO):
    """L = mean max(-A r, -A clip(r, 1 - c, 1 + c)) with A = R - mean, not divided by the group's deviation.

    The plan insists on `advantage.scale: none`. The source's constant length normalisation has no effect
    here, where all samples have equally many terms.

    Source: Liu et al. 2025 (arXiv 2503.20783), sec. 3.
    """

    demands: ClassVar[Mapping[str, str]] = {"advantage.scale": "none"}


@dataclass(frozen=True, kw_only=True)
class DAPO:
    """L = mean max(-A r, -A clip(r, 1 - low, 1 + high)) with high > low: clip-higher.

    Its dynamic sampling is `rollout.resample_rounds`. The source's 0.2 and 0.28 are for text; the default keeps their
    proportion at GRPO's scale.

    Source: Yu et al. 2025 (arXiv 2503.14476), eq. 8.
    """

    clip_low: float = 1e-3
    clip_high: float = 1.4e-3
    needs: ClassVar[frozenset[str]] = frozenset({"old"})
    level: ClassVar[Level] = "term"

    def __post_init__(self) -> None:
        check_positive(clip_low=self.clip_low, clip_high=self.clip_high)

    def __call__(self, evaluation: Evaluation) -> tuple[Tensor, dict[str, Tensor]]:
        log_r, low, high = log_ratio(evaluation), self.clip_low, self.clip_high
        terms, metrics = clipped_surrogate(log_r, evaluation.advantage[:, None], low, high)
        return terms.mean(), metrics


@dataclass(frozen=True, kw_only=True)
class GSPO:
    """L = mean max(-A s, -A clip(s, 1 - c, 1 + c)) on one ratio per sample, s = exp(mean_k(f - f_old)).

    The clip range is GRPO's, so that the two differ in the level alone; the source's 3e-4 is per token of a text.

    Source: Zheng et al. 2025 (arXiv 2507.18071), eqs. 5 to 7.
    """

    clip_range: float = 1e-3
    needs: ClassVar[frozenset[str]] = frozenset({"old"})
    level: ClassVar[Level] = "sample"

    def __post_init__(self) -> None:
        check_positive(clip_range=self.clip_range)

    def __call__(self, evaluation: Evaluation) -> tuple[Tensor, dict[str, Tensor]]:
        log_s, c = log_ratio(evaluation).mean(1), self.clip_range
        terms, metrics = clipped_surrogate(log_s, evaluation.advantage, c, c)
        return terms.mean(), metrics


@dataclass(frozen=True, kw_only=True)
class GMPO:
    """L = -mean_b(A exp(mean_k d)), d = f - f_old kept below c for A > 0 and above -c for A < 0.

    A geometric mean of the sample's ratios, clipped term by term in log-space, in A's direction alone.

    Source: Zhao et al. 2025 (arXiv 2507.20673), eq. 4 and alg. 1.
    """

    clip_range: float = 0.4
    needs: ClassVar[frozenset[str]] = frozenset({"old"})
    level: ClassVar[Level] = "sample"

    def __post_init__(self) -> None:
        check_positive(clip_range=self.clip_range)

    def __call__(self, evaluation: Evaluation) -> tuple[Tensor, dict[str, Tensor]]:
        log_r, advantage = log_ratio(evaluation), evaluation.advantage
        sign = torch.where(advantage < 0, -1.0, 1.0)[:, None].to(log_r)
        kept = sign * (sign * log_r).clamp(max=self.clip_range)
        clipped = (sign * log_r.detach() > self.clip_range).to(log_r).mean()
        return -(advantage * kept.mean(1).exp()).mean(), {**ratio_metrics(log_r), "clip_fraction": clipped}


@dataclass(frozen=True, kw_only=True)
class CISPO:
    """L = -mean(sg(min(r, c)) A f): the weight is truncated, no term loses its gradient. Without a truncation, EPG.

    The source's c, for text, hardly ever truncates ratios per latent dimension.

    Source: MiniMax 2025 (arXiv 2506.13585), eqs. 4 and 5; c as in ScaleRL (arXiv 2510.13786).
    """

    max_ratio: float = 5.0
    needs: ClassVar[frozenset[str]] = frozenset({"old"})
    level: ClassVar[Level] = "term"

    def __post_init__(self) -> None:
        check_positive(max_ratio=self.max_ratio)

    def __call__(self, evaluation: Evaluation) -> tuple[Tensor, dict[str, Tensor]]:
        log_r = log_ratio(evaluation)
        ratio = log_r.detach().exp()
        weight = ratio.clamp(max=self.max_ratio) * evaluation.advantage[:, None]
        truncated = (ratio > self.max_ratio).to(ratio).mean()
        return -(weight * evaluation.log_prob).mean(), {**ratio_metrics(log_r), "clip_fraction": truncated}


@dataclass(frozen=True, kw_only=True)
class SAPO:
    """L = -mean(4/t sigmoid(t (r - 1)) A), t = tau_positive for A > 0 and tau_negative otherwise: a soft clip.

    Its slope at r = 1 is A.

    Source: Gao et al. 2025 (arXiv 2511.20347), eqs. 5 and 6.
    """

    tau_positive: float = 1.0
    tau_negative: float = 1.05
    needs: ClassVar[frozenset[str]] = frozenset({"old"})
    level: ClassVar[Level] = "term"

    def __post_init__(self) -> None:
        check_positive(tau_positive=self.tau_positive, tau_negative=self.tau_negative)

    def __call__(self, evaluation: Evaluation) -> tuple[Tensor, dict[str, Tensor]]:
        log_r, advantage = log_ratio(evaluation), evaluation.advantage[:, None]
        tau = torch.where(advantage > 0, self.tau_positive, self.tau_negative).to(log_r)
        gate = 4 / tau * torch.sigmoid(tau * (log_r.exp() - 1))
        return -(gate * advantage).mean(), ratio_metrics(log_r)
