"""The evidence lower bound of the final sample: a weighted flow-matching error, for any sampler.

With residual D = v(x_sigma, sigma) - (noise - x0), log p(x0) is bounded below by -E[w(sigma) |D|^2] up to a constant,
with equality for the exact v, when w = (1 - sigma) / sigma and sigma is uniform: the path-space KL of the reverse SDE
(Song et al. 2021, arXiv 2101.09258, th. 1, in rectified-flow time). The other weights are surrogates.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ablate.flow import interpolate, like, mean_square
from ablate.rollout import Rollout
from ablate.seeding import Streams

MIN_SIGMA = 0.01  # where the uniform law starts: the bound diverges at 0 and cancels against the decoder's term


@dataclass(frozen=True, kw_only=True)
class ElboProbe:
    """Noised final samples. All policies see the same noise at the same levels."""

    x: Tensor  # [b, k, ...]
    target: Tensor  # [b, k, ...]  noise - x0
    sigma: Tensor  # [b, k]
    rollout_velocity: None = None


@dataclass(frozen=True, kw_only=True)
class ELBO:
    """-w |D|^2 / dims at k noise levels per sample; arXiv 2602.04663, eqs. 13 and 14, and the adaptive weight.

    weight `simple`: w = 1. `path_kl`: w = (1 - sigma) / sigma. `adaptive`: w = sigma / mean|D|, its denominator
    without gradient, of each policy's own residual (so a difference of two adaptive values is not a likelihood ratio).
    law of sigma: `sampler_grid` takes the rollout's own levels without replacement, as released; `uniform` is
    stratified on [0.01, 1], which alone makes path_kl the bound. On a grid path_kl gets the released guard,
    (1 - sigma) / (sigma + 1e-3), and its last level holds most of the weight (95% with ten shifted steps). None:
    `uniform` for path_kl, `sampler_grid` otherwise.
    """

    weight: Literal["adaptive", "simple", "path_kl"] = "adaptive"
    sigma_law: Literal["sampler_grid", "uniform"] | None = None
    needs_transitions = False
    shown = ("weight",)

    @property
    def law(self) -> str:
        """The law of sigma in force."""
        return self.sigma_law or ("uniform" if self.weight == "path_kl" else "sampler_grid")

    def probe(self, rollout: Rollout, *, num_points: int | None, streams: Streams) -> ElboProbe:
        levels = rollout.sigmas[:-1]
        if self.law == "sampler_grid":
            k = min(num_points or len(levels) - 1, len(levels))  # released: all levels but one drawn at random
            sigma = levels[streams.permutation(len(levels))[:, :k]]  # [b, k]
        else:
            k = num_points or len(levels) - 1
            strata = (torch.arange(k) + streams.uniform([k])) / k
            sigma = MIN_SIGMA + (1 - MIN_SIGMA) * strata
        x0 = rollout.x0[:, None]
        noise = streams.normal([k, *rollout.x0.shape[1:]], rollout.x0)
        sigma = sigma.to(x0.device)
        return ElboProbe(x=interpolate(x0, noise, sigma), target=noise - x0, sigma=sigma)

    def log_prob(self, velocity: Tensor, probe: ElboProbe) -> Tensor:
        residual = velocity - probe.target
        error = mean_square(residual, 2)
        sigma = probe.sigma.to(error)
        if self.weight == "simple":
            return -error
        if self.weight == "path_kl":
            return -error * (1 - sigma) / (sigma if self.law == "uniform" else sigma + 1e-3)
        scale = (like(probe.sigma, residual) * residual.detach()).abs().flatten(2).mean(-1)
        return -(sigma**2) * error / scale.to(error).clamp_min(1e-5)
