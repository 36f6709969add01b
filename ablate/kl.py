"""Regularisers towards the reference policy: [b, k] at the points of a probe, to be averaged and weighted."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ablate.flow import mean_square


@dataclass(frozen=True, kw_only=True)
class Difference:
    """What the current and the reference policy say at the points of a probe."""

    velocity: Tensor  # [b, k, ...]  differentiable
    reference_velocity: Tensor  # [b, k, ...]
    log_prob: Tensor  # [b, k]  differentiable
    reference_log_prob: Tensor  # [b, k]
    probe: Any  # a TrajectoryProbe for the kinds in NEED_TRANSITIONS

    @property
    def square(self) -> Tensor:
        """Mean squared difference of the velocities, [b, k]."""
        return mean_square(self.velocity - self.reference_velocity, 2)

    @property
    def log_ratio(self) -> Tensor:
        """f - q, [b, k]."""
        return self.log_prob - self.reference_log_prob


def velocity_kl(d: Difference) -> Tensor:
    """|v - v_ref|^2 / D: the step KL without its weight in sigma; the default of arXiv 2602.04663 ("girsanov")."""
    return d.square


def path_kl(d: Difference) -> Tensor:
    """(1 - s) / s |v - v_ref|^2 / D, whose integral over s is the KL of the memoryless reverse SDEs' paths.

    Girsanov: g^2 / 2 of the squared difference of the scores, with g^2 = 2 s / (1 - s).
    """
    sigma: Tensor = d.probe.sigma.to(d.square)
    return d.square * (1 - sigma) / sigma


def gaussian_step_kl(d: Difference) -> Tensor:
    """KL of the step's two Gaussians per dimension, |mean - mean_ref|^2 / (2 D std^2), std^2 = g^2 |dt|."""
    coefficient: Tensor = d.probe.velocity_coef / d.probe.std
    return d.square * (coefficient**2 / 2).to(d.square)


def released_gaussian_step_kl(d: Difference) -> Tensor:
    """|dt| times `gaussian_step`: Flow-GRPO's release for SD 3.5 divides by g^2 and forgets |dt|.

    Its coefficient of 0.04 belongs to this form: with ten steps, it is about 0.004 of `gaussian_step`.
    """
    step: Tensor = d.probe.sigma - d.probe.next_sigma
    return gaussian_step_kl(d) * step.to(d.square)


def k1(d: Difference) -> Tensor:
    """f - q: unbiased for KL(current, reference) on current samples, but negative at times, and its gradient is 0 in
    expectation (Schulman 2020)."""
    return d.log_ratio


def k2(d: Difference) -> Tensor:
    """(f - q)^2 / 2: biased, never negative; its gradient is that of the KL (Schulman 2020)."""
    return d.log_ratio**2 / 2


def k3(d: Difference) -> Tensor:
    """exp(q - f) - (q - f) - 1: unbiased, never negative (Schulman 2020); GRPO (arXiv 2402.03300), eq. 4."""
    return (-d.log_ratio).exp() + d.log_ratio - 1


def released_k3(d: Difference) -> Tensor:
    """exp(f - q) - (f - q) - 1: the reverse ratio, as arXiv 2602.04663's release has it."""
    return d.log_ratio.exp() - d.log_ratio - 1


KINDS: Mapping[str, Callable[[Difference], Tensor]] = {
    "velocity": velocity_kl,
    "path": path_kl,
    "gaussian_step": gaussian_step_kl,
    "released_gaussian_step": released_gaussian_step_kl,
    "k1": k1,
    "k2": k2,
    "k3": k3,
    "released_k3": released_k3,
}
