"""How much of an estimator's weight sits on few of its evaluation points.

The weight of a point is w = -(D / 2) d^2 f / d v^2, the mean over the D dimensions of the curvature of its log-prob f
in the velocity: a policy whose velocity differs by u there pays w |u|^2 / D. For an ELBO it is its weight over the
density of its law, for a trajectory velocity_coef^2 / (2 std^2), the KL of the step. Any estimator has it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ablate.estimators import Estimator


def point_weights(estimator: Estimator[Any], velocity: Tensor, probe: Any) -> Tensor:
    """[b, k], by one product of the Hessian with random signs; exact where no two dimensions interact."""
    v = velocity.detach().requires_grad_()
    signs = 2.0 * torch.randint(2, v.shape, generator=torch.Generator().manual_seed(0)).to(v) - 1
    with torch.enable_grad():
        (slope,) = torch.autograd.grad(estimator.log_prob(v, probe).sum(), v, create_graph=True)
        (curvature,) = torch.autograd.grad((slope * signs).sum(), v)
    return -0.5 * (curvature * signs).flatten(2).sum(2)


def effective_points(weights: Tensor) -> Tensor:
    """(sum w)^2 / sum w^2 of weights [b, k]: k if all are equal, 1 if one has all. [b]."""
    return weights.sum(1) ** 2 / weights.square().sum(1)


def largest_share(weights: Tensor) -> Tensor:
    """The share of the heaviest point, [b]."""
    return (weights.max(1).values / weights.sum(1)).clamp(max=1)
