"""Laws of the noise level: where on (0, 1] a sample is probed, and how densely.

Each law is a quantile function with its distribution function and density, so that stratified numbers, truncation at
`low` and importance weights are all exact.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Law:
    """A distribution on (0, 1)."""

    quantile: Callable[[Tensor], Tensor]
    distribution: Callable[[Tensor], Tensor]
    density: Callable[[Tensor], Tensor]

    def levels(self, u: Tensor, low: float) -> Tensor:
        """Uniform numbers u in [0, 1) -> levels in [low, 1), of this law given that sigma >= low."""
        below = self.distribution(torch.tensor(low, dtype=u.dtype))
        return self.quantile(below + (1 - below) * u)

    def density_above(self, sigma: Tensor, low: float) -> Tensor:
        """The density of `levels` at sigma."""
        return self.density(sigma) / (1 - self.distribution(torch.tensor(low, dtype=sigma.dtype, device=sigma.device)))


UNIFORM = Law(quantile=lambda u: u, distribution=lambda s: s, density=torch.ones_like)
LINEAR = Law(quantile=torch.sqrt, distribution=torch.square, density=lambda s: 2 * s)


def logit_normal(mean: float = 0.0, std: float = 1.0) -> Law:
    """sigma = sigmoid(mean + std n), n normal: SD 3's training law; Esser et al. 2024 (arXiv 2403.03206), eq. 19."""

    def density(s: Tensor) -> Tensor:
        z = (torch.logit(s) - mean) / std
        return (-0.5 * z**2).exp() / (std * math.sqrt(2 * math.pi) * s * (1 - s))

    return Law(
        quantile=lambda u: torch.sigmoid(mean + std * torch.special.ndtri(u)),
        distribution=lambda s: torch.special.ndtr((torch.logit(s) - mean) / std),
        density=density,
    )


def scheduler_density(shift: float) -> Law:
    """The levels of a sampler with this time shift, in the limit of many steps; Esser et al. 2024, eq. 23.

    sigma = S u / (1 + (S - 1) u), p(sigma) = S / (S - (S - 1) sigma)^2.
    """
    return Law(
        quantile=lambda u: shift * u / (1 + (shift - 1) * u),
        distribution=lambda s: s / (shift - (shift - 1) * s),
        density=lambda s: shift / (shift - (shift - 1) * s) ** 2,
    )
