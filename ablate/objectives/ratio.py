"""The likelihood ratio of current and rollout policy, and its clipped surrogate."""

from __future__ import annotations

import torch
from torch import Tensor

from ablate.rollout import Evaluation


def log_ratio(evaluation: Evaluation) -> Tensor:
    """f - f_old at the shared probe, [b, k]."""
    return evaluation.log_prob - evaluation.old()


def clipped_surrogate(ratio: Tensor, advantage: Tensor, low: float, high: float) -> Tensor:
    """max(-A r, -A clip(r, 1 - low, 1 + high)): no gradient once the ratio has moved far enough in A's direction.

    Schulman et al. 2017 (arXiv 1707.06347), eq. 7, as a loss.
    """
    return torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - low, 1 + high))


def check_positive(**values: float) -> None:
    """Refuse a hyperparameter that must be positive."""
    for name, value in values.items():
        if value <= 0:
            raise ValueError(f"{name} must be positive, got {value}")


def ratio_metrics(log_r: Tensor, low: float | None = None, high: float | None = None) -> dict[str, Tensor]:
    """How far the policies are apart, and how many ratios a clip range catches."""
    log_r = log_r.detach()
    metrics = {"log_ratio_abs": log_r.abs().mean()}
    if low is not None and high is not None:
        ratio = log_r.exp()
        metrics["clip_fraction"] = ((ratio < 1 - low) | (ratio > 1 + high)).to(log_r).mean()
    return metrics
