"""Corrections of the ratio that need the steps of a trajectory: GRPO-Guard and TempFlow-GRPO."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ablate.flow import like
from ablate.objectives.protocol import Level
from ablate.objectives.ratio import check_positive, clipped_surrogate, log_ratio
from ablate.rollout import Evaluation, needed


@dataclass(frozen=True, kw_only=True)
class GRPOGuard:
    """L = mean max(-A r, -A clip(r, 1 - c, 1 + c)), log r = mean_D(z u), u = mean - mean_old, z the step's noise.

    The plain log-ratio of a step is mean_D(z u) / std - |u|^2 / (2 D std^2): negative on average, and of another scale
    at every step. The normalised one, which does not read the estimator's value, has mean 0 and one scale, so that the
    clip is reached on both sides at all steps. `per_dt` divides each term by |dt|, as the source does and its copy in
    Flow-Factory does not.

    Source: GRPO-Guard, Wang et al. 2025 (arXiv 2510.22319), eqs. 8 and 12.
    """

    clip_range: float = 2e-6
    per_dt: bool = False
    needs: ClassVar[frozenset[str]] = frozenset({"old", "velocity", "transitions"})
    level: ClassVar[Level] = "term"

    def __post_init__(self) -> None:
        check_positive(clip_range=self.clip_range)

    def __call__(self, evaluation: Evaluation) -> tuple[Tensor, dict[str, Tensor]]:
        velocity, old, probe = needed(evaluation.velocity), needed(evaluation.old_velocity), needed(evaluation.probe)
        noise = probe.deviation(old) / like(probe.std, old)
        shift = like(probe.velocity_coef, old) * (velocity - old)
        log_r, c = (noise * shift).flatten(2).mean(-1), self.clip_range
        terms, metrics = clipped_surrogate(log_r, evaluation.advantage[:, None], c, c)
        if self.per_dt:
            terms = terms / (probe.sigma - probe.next_sigma).to(terms)
        return terms.mean(), metrics


@dataclass(frozen=True, kw_only=True)
class TempFlow:
    """L = mean(std max(-A r, -A clip(r, 1 - c, 1 + c))): noisier steps, which explore more, weigh more.

    std is the deviation of the step, g sqrt(|dt|); the paper scales it to mean 1 over the schedule, which the learning
    rate absorbs. Made for sampler `mixed` with policy `branch`.

    Source: TempFlow-GRPO, He et al. 2025 (arXiv 2508.04324), noise-aware weighting.
    """

    clip_range: float = 1e-4
    needs: ClassVar[frozenset[str]] = frozenset({"old", "transitions"})
    level: ClassVar[Level] = "term"

    def __post_init__(self) -> None:
        check_positive(clip_range=self.clip_range)

    def __call__(self, evaluation: Evaluation) -> tuple[Tensor, dict[str, Tensor]]:
        log_r, c = log_ratio(evaluation), self.clip_range
        terms, metrics = clipped_surrogate(log_r, evaluation.advantage[:, None], c, c)
        return (needed(evaluation.probe).std.to(terms) * terms).mean(), metrics
