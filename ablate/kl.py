"""Regularisers towards the reference policy."""

from __future__ import annotations

from torch import Tensor

from ablate.flow import mean_square


def velocity_kl(velocity: Tensor, reference_velocity: Tensor) -> Tensor:
    """Mean squared difference of the velocities [b, k, ...] -> [b, k]: the step KL without its weight in sigma.

    The default of arXiv 2602.04663 ("simple"); the path-space KL would weigh it by (1 - sigma) / sigma.
    """
    return mean_square(velocity - reference_velocity, 2)
