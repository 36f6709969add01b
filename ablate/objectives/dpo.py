"""Online DPO on the best and the worst sample of each group (Wallace et al. 2023, arXiv 2311.12908, eq. 14)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from ablate.objectives.protocol import Level
from ablate.objectives.ratio import check_positive
from ablate.rollout import Evaluation


@dataclass(frozen=True, kw_only=True)
class DPO:
    """L = mean over groups and points of -log sigmoid(beta [(f_w - q_w) - (f_l - q_l)]), q the reference's log-prob.

    w and l are the samples with the highest and lowest advantage; a group without a difference adds nothing. The
    samples of a group are probed at the same noise. On the simple ELBO this is Diffusion-DPO with its coefficient
    2 beta: Flow-GRPO's online DPO for SD 3.5 has 100, hence beta = 50.
    """

    beta: float = 50.0
    needs: ClassVar[frozenset[str]] = frozenset({"reference"})
    level: ClassVar[Level] = "group"

    def __post_init__(self) -> None:
        check_positive("beta", self.beta)

    def __call__(self, evaluation: Evaluation) -> tuple[Tensor, dict[str, Tensor]]:
        gain = evaluation.log_prob - evaluation.reference()  # [b, k]
        losses, margins = [], []
        for group in torch.unique(evaluation.group):
            rows = (evaluation.group == group).nonzero()[:, 0]
            advantage = evaluation.advantage[rows]
            best, worst = rows[advantage.argmax()], rows[advantage.argmin()]
            margin = gain[best] - gain[worst]  # [k]
            differs = (advantage.max() > advantage.min()).to(gain)
            losses.append(-differs * F.logsigmoid(self.beta * margin).mean())
            margins.append(margin.detach().mean())
        return torch.stack(losses).mean(), {"margin": torch.stack(margins).mean()}
