"""Rectified flow in one convention, and the noise schedules.

x = (1 - sigma) x0 + sigma noise, velocity = noise - x0, sigma in [0, 1] with 1 = noise. The network's time input is
1000 sigma; that factor exists at the diffusers boundary only. Source: Esser et al. 2024 (arXiv 2403.03206), sec. 2.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Velocity = Callable[[Tensor, Tensor], Tensor]
"""A velocity field: (x [n, ...], sigma [n]) -> velocity [n, ...]."""


def like(values: Tensor, x: Tensor) -> Tensor:
    """`values` with trailing axes of length one, to broadcast against `x`, in the dtype of `x`."""
    return values.reshape(values.shape + (1,) * (x.ndim - values.ndim)).to(x)


def interpolate(x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """x = (1 - sigma) x0 + sigma noise; sigma has the leading axes of x0."""
    s = like(sigma, x0)
    return (1 - s) * x0 + s * noise


def predict_x0(x: Tensor, velocity: Tensor, sigma: Tensor) -> Tensor:
    """The clean sample that a velocity points to: x - sigma v."""
    return x - like(sigma, x) * velocity


def mean_square(x: Tensor, batch_axes: int) -> Tensor:
    """Mean of x^2 over all but the first `batch_axes` axes, in float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32)).square().flatten(batch_axes).mean(-1)


def shift_sigmas(sigmas: Tensor, shift: float) -> Tensor:
    """Time shift of SD 3: sigma -> S sigma / (1 + (S - 1) sigma); Esser et al. 2024, eq. 23."""
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def diffusers_sigmas(num_steps: int, shift: float = 3.0) -> Tensor:
    """The [num_steps + 1] levels of diffusers' FlowMatchEulerDiscreteScheduler, in float64.

    Its smallest level, 1/1000, is shifted when the scheduler is built and again when its steps are set, so that the
    last step starts near zero (0.0089 at shift 3) and is far smaller than the one before.
    """
    smallest = shift_sigmas(torch.tensor(1 / 1000, dtype=torch.float64), shift)
    levels = torch.linspace(1, float(smallest), num_steps, dtype=torch.float64)
    return torch.cat([shift_sigmas(levels, shift), levels.new_zeros(1)])


def linear_sigmas(num_steps: int, shift: float = 3.0) -> Tensor:
    """Evenly spaced levels, then shifted: [num_steps + 1], in float64; the schedule of DanceGRPO and MixGRPO."""
    return shift_sigmas(torch.linspace(1, 0, num_steps + 1, dtype=torch.float64), shift)


NOISE_SCHEDULES: dict[str, Callable[[int, float], Tensor]] = {"diffusers": diffusers_sigmas, "linear": linear_sigmas}
