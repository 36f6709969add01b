"""Velocity regression at noised final samples: DiffusionNFT, RAM, AWM, and reward-weighted regression.

v* = noise - x0 is the velocity that the sample was noised along, v_old and v_ref what the rollout and the reference
policy say at the same points. NFT and RAM take these points from the estimator and nothing else: crossing them with
several weights of `elbo` trains the same cell several times.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ablate.flow import like, mean_square
from ablate.objectives.protocol import Level
from ablate.objectives.ratio import check_positive, clipped_surrogate, log_ratio
from ablate.rollout import Evaluation, needed


@dataclass(frozen=True, kw_only=True)
class NFT:
    """L = M/beta mean(p l(v+) + (1 - p) l(v-)), p = clip(A, -M, M) / (2 M) + 1/2, l the adaptive error of x0.

    v+ = beta v + (1 - beta) v_old and v- = (1 + beta) v_old - beta v: the better a sample, the more v points to it, and
    the worse, the more v points away. l(u) = s^2 |u - v*|^2 / sg(s mean|u - v*|) / D. On-policy, its gradient is that
    of REINFORCE on the adaptive ELBO, for every beta. beta is 1 for GenEval, PickScore and HPSv2 upstream, 0.1 for OCR
    and in the port of arXiv 2602.04663. With `advantage: {scale: batch}`. Of the estimator, only the points are read.

    Source: DiffusionNFT, Zheng et al. 2025 (arXiv 2509.16117), eq. 5 and sec. 3.3; M / beta as released.
    """

    beta: float = 1.0
    max_advantage: float = 5.0
    needs: ClassVar[frozenset[str]] = frozenset({"old", "velocity", "target"})
    level: ClassVar[Level] = "term"

    def __post_init__(self) -> None:
        check_positive(beta=self.beta, max_advantage=self.max_advantage)

    def __call__(self, evaluation: Evaluation) -> tuple[Tensor, dict[str, Tensor]]:
        velocity, old, m = needed(evaluation.velocity), needed(evaluation.old_velocity), self.max_advantage
        preference = (evaluation.advantage.clamp(-m, m) / (2 * m) + 0.5)[:, None]
        step = self.beta * (velocity - old)
        positive, negative = self._error(old + step, evaluation), self._error(old - step, evaluation)
        loss = m / self.beta * (preference * positive + (1 - preference) * negative).mean()
        return loss, {"velocity_change": mean_square((velocity - old).detach(), 2).mean()}

    def _error(self, velocity: Tensor, evaluation: Evaluation) -> Tensor:
        probe = needed(evaluation.probe)
        residual: Tensor = like(probe.sigma, velocity) * (velocity - probe.target)
        scale: Tensor = residual.detach().abs().flatten(2).mean(-1).clamp_min(1e-5)
        return mean_square(residual, 2) / scale


@dataclass(frozen=True, kw_only=True)
class RAM:
    """L = mean|v - sg(v_ref + m A (v* - v_old))|^2 / D: the reference, corrected towards good samples.

    m = `scale`: 100 for GenEval and OCR, 1000 for PickScore in the source, 1 in the port of arXiv 2602.04663. residual
    `current` takes v without gradient for v_old, as the paper's equation does; `old` as its code does. There is no
    other pull to the reference: `kl.coef` is 0 in the source. With `advantage: {scale: group}`, unclipped. Of the
    estimator, only the points are read.

    Source: RAM (arXiv 2605.10759) and its release.
    """

    scale: float = 100.0
    residual: Literal["old", "current"] = "old"
    needs: ClassVar[frozenset[str]] = frozenset({"old", "reference", "velocity", "target"})
    level: ClassVar[Level] = "term"

    def __post_init__(self) -> None:
        check_positive(scale=self.scale)

    def __call__(self, evaluation: Evaluation) -> tuple[Tensor, dict[str, Tensor]]:
        velocity, reference = needed(evaluation.velocity), needed(evaluation.reference_velocity)
        anchor = needed(evaluation.old_velocity) if self.residual == "old" else velocity.detach()
        advantage = like(self.scale * evaluation.advantage, velocity)
        target = reference + advantage * (needed(evaluation.probe).target - anchor)
        error = mean_square(velocity - target.detach(), 2).mean()
        return error, {"velocity_change": mean_square((velocity - anchor).detach(), 2).mean()}


@dataclass(frozen=True, kw_only=True)
class AWM:
    """L = mean max(-A r, -A clip(r, 1 - c, 1 + c)) + ema_coef mean|v - v_old|^2 / D, r = exp(f - f_old).

    Advantage-weighted matching: on-policy, the flow-matching loss weighted by A. With the source's c = 1 the clip is
    never active at ratios near 1. The source divides advantages, clipped to 5, by 5: `advantage: {scale: batch, coef:
    0.2, clip: 1}`; its estimator is `released_awm`. v_old is the rollout policy's; the source has a third, short
    average there.

    Source: AWM, Xue et al. 2025 (arXiv 2509.25050), and its release.
    """

    clip_range: float = 1.0
    ema_coef: float = 1.0
    needs: ClassVar[frozenset[str]] = frozenset({"old", "velocity", "target"})
    level: ClassVar[Level] = "term"

    def __post_init__(self) -> None:
        check_positive(clip_range=self.clip_range)
        if self.ema_coef < 0:
            raise ValueError(f"ema_coef must not be negative, got {self.ema_coef}")

    def __call__(self, evaluation: Evaluation) -> tuple[Tensor, dict[str, Tensor]]:
        log_r, c = log_ratio(evaluation), self.clip_range
        terms, metrics = clipped_surrogate(log_r, evaluation.advantage[:, None], c, c)
        change = mean_square(needed(evaluation.velocity) - needed(evaluation.old_velocity), 2).mean()
        return terms.mean() + self.ema_coef * change, {**metrics, "velocity_change": change.detach()}


@dataclass(frozen=True, kw_only=True)
class RWR:
    """L = -mean(w f), w = R, or exp(R / temperature): likelihood of the own samples, weighted by reward.

    With the simple ELBO and `sigma_law: logit_normal`, Flow-GRPO's `rwr` on SD 3's training law. w is the raw reward,
    so that the fields of `advantage` do not apply, and rewards that are all equal still move the policy.

    Source: Lee et al. 2023 (arXiv 2302.12192); exponential form: ORW-CFM-W2 (arXiv 2502.06061).
    """

    temperature: float | None = None
    needs: ClassVar[frozenset[str]] = frozenset({"reward", "target"})
    level: ClassVar[Level] = "term"

    def __post_init__(self) -> None:
        if self.temperature is not None:
            check_positive(temperature=self.temperature)

    def __call__(self, evaluation: Evaluation) -> tuple[Tensor, dict[str, Tensor]]:
        reward = needed(evaluation.reward)
        weight = reward if self.temperature is None else (reward / self.temperature).exp()
        return -(weight.to(evaluation.log_prob)[:, None] * evaluation.log_prob).mean(), {"weight": weight.mean()}


@dataclass(frozen=True, kw_only=True)
class SFT:
    """L = -mean over groups and points of f of the group's best sample: fine-tuning on the best of n.

    A group whose rewards are all equal is left out.

    Source: Flow-GRPO's train_sd3_sft.py; RAFT, Dong et al. 2023 (arXiv 2304.06767).
    """

    needs: ClassVar[frozenset[str]] = frozenset({"target"})
    level: ClassVar[Level] = "group"

    def __call__(self, evaluation: Evaluation) -> tuple[Tensor, dict[str, Tensor]]:
        losses = []
        for group in torch.unique(evaluation.group):
            rows = (evaluation.group == group).nonzero()[:, 0]
            advantage = evaluation.advantage[rows]
            chosen = (advantage.max() > advantage.min()).to(evaluation.log_prob)
            losses.append(-chosen * evaluation.log_prob[rows[advantage.argmax()]].mean())
        return sum(losses, start=evaluation.log_prob.new_zeros(())) / len(losses), {}
