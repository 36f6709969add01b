"""The likelihood ratio of current and rollout policy, and its clipped surrogate."""

from __future__ import annotations

import torch
from torch import Tensor

from ablate.rollout import Evaluation


def log_ratio(evaluation: Evaluation) -> Tensor:
    """f - f_old at the shared probe, [b, k]."""
    return evaluation.log_prob - evaluation.old()


def clipped_surrogate(log_r: Tensor, advantage: Tensor, low: float, high: float) -> tuple[Tensor, dict[str, Tensor]]:
    """max(-A r, -A clip(r, 1 - low, 1 + high)) term by term, and the metrics of the ratio.

    No gradient once the ratio has moved far enough in A's direction; Schulman et al. 2017 (arXiv 1707.06347), eq. 7.
    """
    ratio = log_r.exp()
    terms = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - low, 1 + high))
    outside = ((ratio < 1 - low) | (ratio > 1 + high)).to(log_r).mean()
    return terms, {**ratio_metrics(log_r), "clip_fraction": outside}


def check_positive(**values: float) -> None:
    """Refuse a hyperparameter that must be positive."""
    for name, value in values.items():
        if value <= 0:
            raise ValueError(f"{name} must be positive, got {value}")


def ratio_metrics(log_r: Tensor) -> dict[str, Tensor]:
    """How far the policies are apart."""
    return {"log_ratio_abs": log_r.detach().abs().mean()}
