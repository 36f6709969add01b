"""A flow whose velocity and density are known exactly, and which has parameters: a mixture of round Gaussians."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class MixtureFlow:
    """Data sum_c p_c N(mean_c, scale_c^2 I) in d dimensions, p = softmax(logits).

    At level s each component is N((1 - s) mean_c, (1 - s)^2 scale_c^2 + s^2), so that the velocity E[noise - x0 | x] is
    the mean over components, by their probability given x, of each component's own: that of `GaussianFlow`.
    """

    logits: Tensor  # [c]
    means: Tensor  # [c, d]
    log_scales: Tensor  # [c]

    @property
    def parameters(self) -> tuple[Tensor, Tensor, Tensor]:
        """What a policy gradient is taken with respect to."""
        return self.logits, self.means, self.log_scales

    def velocity(self, x: Tensor, sigma: Tensor) -> Tensor:
        """E[noise - x0 | x] at level sigma [n], for x [n, d]."""
        s = sigma.to(x)[:, None]
        offset, variance = self._offset_and_variance(x, s)
        slope = (s - (1 - s) * (2 * self.log_scales).exp()) / variance  # [n, c]
        each = slope[..., None] * offset - self.means  # [n, c, d]
        posterior = self._log_joint(offset, variance).softmax(1)
        return (posterior[..., None] * each).sum(1)

    def log_density(self, x: Tensor) -> Tensor:
        """Of the data at x [n, d], nats in all: [n]."""
        return self._log_joint(*self._offset_and_variance(x, x.new_zeros(len(x), 1))).logsumexp(1)

    def sample(self, num_samples: int, generator: torch.Generator) -> Tensor:
        """Data, [n, d]."""
        which = torch.multinomial(self.logits.softmax(0), num_samples, replacement=True, generator=generator)
        noise = torch.randn(num_samples, self.means.shape[1], generator=generator, dtype=self.means.dtype)
        return self.means[which] + self.log_scales[which].exp()[:, None] * noise

    def _offset_and_variance(self, x: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        offset = x[:, None] - (1 - s)[..., None] * self.means  # [n, c, d]
        return offset, (1 - s) ** 2 * (2 * self.log_scales).exp() + s**2  # [n, c]

    def _log_joint(self, offset: Tensor, variance: Tensor) -> Tensor:
        """log p(component, x), [n, c]."""
        d = self.means.shape[1]
        squared = offset.square().sum(-1) / variance
        return self.logits.log_softmax(0) - 0.5 * (squared + d * (2 * math.pi * variance).log())


def ring(num_components: int = 8, radius: float = 2.0, scale: float = 0.3) -> MixtureFlow:
    """Components on a circle in the plane, ever less probable: the last has a third of the first."""
    angle = torch.arange(num_components, dtype=torch.float64) * 2 * math.pi / num_components
    return MixtureFlow(
        logits=-torch.linspace(0, math.log(3), num_components, dtype=torch.float64),
        means=radius * torch.stack([angle.cos(), angle.sin()], 1),
        log_scales=torch.full((num_components,), math.log(scale), dtype=torch.float64),
    )


def single(mean: float = 0.7, scale: float = 0.5, num_dims: int = 2) -> MixtureFlow:
    """One component: the Gaussian."""
    return MixtureFlow(
        logits=torch.zeros(1, dtype=torch.float64),
        means=torch.full((1, num_dims), mean, dtype=torch.float64),
        log_scales=torch.full((1,), math.log(scale), dtype=torch.float64),
    )
