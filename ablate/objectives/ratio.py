"""The likelihood ratio of current and rollout policy, and its clipped surrogate."""

from __future__ import annotations

import torch
from torch import Tensor

from ablate.rollout import Evaluation


def log_ratio(evaluation: Evaluation) -> Tensor:
    """f - f_old at the shared probe, [b, k]."""
    return evaluation.log_prob - evaluation.old()


def clipped_surrogate(ratio: Tensor, advantage: Tensor, clip_range: float) -> Tensor:
    """max(-A r, -A clip(r, 1 - c, 1 + c)): no gradient once the ratio has moved far enough in A's direction.

    Schulman et al. 2017 (arXiv 1707.06347), eq. 7, as a loss.
    """
    return torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - clip_range, 1 + clip_range))


def check_positive(name: str, value: float) -> None:
    """Refuse a hyperparameter that must be positive."""
    if value <= 0:
        raise ValueError(f"{name} must be positive, got {value}")


def ratio_metrics(log_r: Tensor, clip_range: float | None = None) -> dict[str, Tensor]:
    """How far the policies are apart, and how many ratios a clip range catches."""
    log_r = log_r.detach()
    metrics = {"log_ratio_abs": log_r.abs().mean()}
    if clip_range is not None:
        metrics["clip_fraction"] = ((log_r.exp() - 1).abs() > clip_range).to(log_r).mean()
    return metrics
