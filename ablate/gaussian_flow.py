"""A flow whose velocity, marginals and density are known exactly: data N(mean, scale^2)."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class GaussianFlow:
    """Data N(mean, scale^2) in every dimension."""

    mean: float = 0.7
    scale: float = 0.5

    def variance(self, sigma: Tensor) -> Tensor:
        """Of x at level sigma."""
        return (1 - sigma) ** 2 * self.scale**2 + sigma**2

    def velocity(self, x: Tensor, sigma: Tensor) -> Tensor:
        """E[noise - x0 | x] at level sigma [n], for x [n, ...]."""
        s = sigma.to(x).reshape(-1, *[1] * (x.ndim - 1))
        slope = (s - (1 - s) * self.scale**2) / self.variance(s)
        return -self.mean + slope * (x - (1 - s) * self.mean)

    def log_density(self, x: Tensor) -> Tensor:
        """Of the data, dimension by dimension, in nats."""
        z = (x - self.mean) / self.scale
        return -0.5 * z**2 - math.log(self.scale) - 0.5 * math.log(2 * math.pi)
