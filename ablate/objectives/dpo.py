"""Preference losses on pairs within a group, and their group form.

The reference is the base model, or with `reference.refresh_every` a copy of the policy from some updates ago.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from ablate.objectives.matching import group_mean
from ablate.objectives.protocol import Level
from ablate.objectives.ratio import check_positive
from ablate.rollout import Evaluation


@dataclass(frozen=True, kw_only=True)
class DPO:
    """L = mean over groups, their pairs and points of -log sigmoid(beta [(f_w - q_w) - (f_l - q_l)]).

    f is the policy's log-prob, q the reference's. pairs `best_worst`: the samples of highest and lowest advantage;
    `margin`: every pair whose advantages differ by more than `margin`. A group without a pair adds nothing. The samples
    of a group are probed at the same noise. On the simple ELBO this is Diffusion-DPO with its coefficient 2 beta:
    Flow-GRPO's online DPO for SD 3.5 has 100, hence beta = 50.

    Source: Diffusion-DPO, Wallace et al. 2023 (arXiv 2311.12908), eq. 14.
    """

    beta: float = 50.0
    pairs: Literal["best_worst", "margin"] = "best_worst"
    margin: float = 0.0
    needs: ClassVar[frozenset[str]] = frozenset({"reference"})
    level: ClassVar[Level] = "group"

    def __post_init__(self) -> None:
        check_positive(beta=self.beta)
        if self.margin < 0:
            raise ValueError(f"margin must not be negative, got {self.margin}")

    def __call__(self, evaluation: Evaluation) -> tuple[Tensor, dict[str, Tensor]]:
        gain = self._gain(evaluation.log_prob - evaluation.reference())  # [b, k]
        losses, margins = [], []
        for group in torch.unique(evaluation.group):
            rows = (evaluation.group == group).nonzero()[:, 0]
            better, worse = self._pairs(evaluation.advantage[rows])
            if not len(better):  # no pair, no gradient
                losses.append(0 * gain[rows].sum())
                continue
            difference = gain[rows[better]] - gain[rows[worse]]  # [pairs, k]
            losses.append(-F.logsigmoid(self.beta * difference).mean())
            margins.append(difference.detach().mean())
        mean_margin = torch.stack(margins).mean() if margins else gain.new_zeros(())
        return torch.stack(losses).mean(), {"margin": mean_margin}

    def _gain(self, log_ratio: Tensor) -> Tensor:
        return log_ratio

    def _pairs(self, advantage: Tensor) -> tuple[Tensor, Tensor]:
        """Indices of the better and of the worse sample of each pair."""
        if self.pairs == "margin":
            better, worse = (advantage[:, None] - advantage[None] > self.margin).nonzero(as_tuple=True)
            return better, worse
        differs = (advantage.max() > advantage.min()).to(torch.int64).reshape(1)
        index = differs.nonzero()[:, 0]
        return advantage.argmax().reshape(1)[index], advantage.argmin().reshape(1)[index]


@dataclass(frozen=True, kw_only=True)
class D3PO(DPO):
    """L = mean of -log sigmoid(beta [log c(p_w) - log c(p_l)]), p = exp(f - q), c its clip to [1 - eps, 1 + eps].

    DPO on every step of a trajectory.

    Source: D3PO, Yang et al. 2023 (arXiv 2311.13231), eq. 14; the clip and both defaults are its release's.
    """

    beta: float = 0.1
    eps: float = 0.1
    needs: ClassVar[frozenset[str]] = frozenset({"reference", "transitions"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.eps < 1:
            raise ValueError(f"eps must lie in (0, 1), got {self.eps}")

    def _gain(self, log_ratio: Tensor) -> Tensor:
        return log_ratio.exp().clamp(1 - self.eps, 1 + self.eps).log()


@dataclass(frozen=True, kw_only=True)
class DGPO:
    """L = -mean(sg(w_g) A f), w_g = sigmoid(-beta mean_g(A [f - q])): DPO's weight, for a whole group at once.

    On the simple ELBO, which the source has, f is minus the denoising error; the weight falls as the group's better
    samples become likelier than under the reference. The source's PPO-like clip of the error is left out. beta = 100 is
    Flow-Factory's default, its SD 3.5 configuration without guidance has 10.

    Source: Direct Group Preference Optimization (arXiv 2510.08425), as in Flow-Factory's dgpo.py.
    """

    beta: float = 100.0
    needs: ClassVar[frozenset[str]] = frozenset({"reference"})
    level: ClassVar[Level] = "group"

    def __post_init__(self) -> None:
        check_positive(beta=self.beta)

    def __call__(self, evaluation: Evaluation) -> tuple[Tensor, dict[str, Tensor]]:
        f, advantage = evaluation.log_prob, evaluation.advantage[:, None]
        preference = group_mean(advantage * (f.detach() - evaluation.reference()), evaluation.group)
        weight = torch.sigmoid(-self.beta * preference)
        return -(weight * advantage * f).mean(), {"group_weight": weight.mean()}
