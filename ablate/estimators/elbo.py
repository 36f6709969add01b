"""The evidence lower bound of the final sample: a weighted flow-matching error, for any sampler.

With residual D = v(x_sigma, sigma) - (noise - x0), log p(x0) is bounded below by -E[w(sigma) |D|^2] up to a constant,
with equality for the exact v, when w = (1 - sigma) / sigma and sigma is uniform: the path-space KL of the reverse SDE
(Song et al. 2021, arXiv 2101.09258, in rectified-flow time). The other weights are surrogates.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ablate.estimators.laws import LINEAR, UNIFORM, Law, logit_normal, scheduler_density
from ablate.estimators.protocol import Pool, Unit, in_unit
from ablate.flow import interpolate, like, mean_square
from ablate.rollout import Rollout
from ablate.seeding import Streams

Weight = Literal["adaptive", "simple", "path_kl", "x0", "ghuber"]
SigmaLaw = Literal["sampler_grid", "uniform", "linear", "logit_normal", "scheduler_density"]


@dataclass(frozen=True, kw_only=True)
class ElboProbe:
    """Noised final samples. All policies see the same noise at the same levels."""

    x: Tensor  # [b, k, ...]
    target: Tensor  # [b, k, ...]  noise - x0
    sigma: Tensor  # [b, k]
    rollout_velocity: None = None


@dataclass(frozen=True, kw_only=True)
class ELBO:
    """f = -w(s) |v - (noise - x0)|^2 / D at noised final samples x = (1 - s) x0 + s noise.

    * weight: `simple` w = 1. `path_kl` w = (1 - s) / s, the bound. `x0` w = s^2. `adaptive` w = s / mean|v - (noise -
      x0)|, its denominator without gradient, of each policy's own residual (so that a difference of two values is not a
      likelihood ratio). `ghuber` f = -s ((E + 1e-10)^p - 1e-10^p) / p, E the mean squared residual, p = `power`.
    * sigma_law: `sampler_grid` the rollout's own levels without replacement; `uniform`, `linear` (in
      proportion to s, as RAM), `logit_normal` (SD 3's training law) and `scheduler_density` (the sampler's levels in
      the limit of many steps, for this `shift`) are stratified over a sample's points, on [min_sigma, 1): the bound
      diverges at 0, where it cancels against the decoder's term. null: `uniform` for path_kl, else `sampler_grid`.
    * importance: divide by the density of the law, so that the mean over points estimates the integral over s. null:
      for path_kl alone, which is the bound only then. The grid has no density.
    * antithetic: successive points share their level and have opposite noise, so that k is even.
    * xt_from_rollout: x is the latent that the rollout passed through at that level, noise = (x - (1 - s) x0) / s.
    * pool: what objectives see of the points. `mean` averages them before a ratio is exponentiated, `each` after.
    * unit: `nats` is D times as much. Under a law with density, log p(x0) >= E log p(x0 | x at min_sigma) + E f for
      path_kl.
    * guard: added to s in the denominator of path_kl; see `released_path_kl`.

    Source: arXiv 2602.04663, eqs. 13 and 14; adaptive as released; ghuber: AWM (arXiv 2509.25050), as released.
    """

    weight: Weight = "adaptive"
    sigma_law: SigmaLaw | None = None
    importance: bool | None = None
    min_sigma: float = 0.01
    shift: float = 3.0  # SD 3's
    antithetic: bool = False
    xt_from_rollout: bool = False
    pool: Pool = "each"
    unit: Unit = "dimension"
    power: float = 0.25
    guard: float = 0.0
    shown: ClassVar[tuple[str, ...]] = ("weight",)

    def __post_init__(self) -> None:
        if not 0 < self.min_sigma < 1:
            raise ValueError(f"min_sigma must lie in (0, 1), got {self.min_sigma}")
        if self.shift <= 0 or self.power <= 0 or self.guard < 0:
            given = f"got {self.shift}, {self.power}, {self.guard}"
            raise ValueError(f"shift and power must be positive, guard not negative; {given}")
        if self.law == "sampler_grid" and self.importance:
            raise ValueError("importance divides by the density of sigma_law, and sampler_grid has none")
        if self.law != "sampler_grid" and self.xt_from_rollout:
            raise ValueError(f"xt_from_rollout knows the rollout's own levels alone, not sigma_law {self.law}")
        if self.antithetic and self.xt_from_rollout:
            raise ValueError("antithetic noise has no place in xt_from_rollout, where the rollout gives the noise")

    @property
    def law(self) -> str:
        """The law of sigma in force."""
        return self.sigma_law or ("uniform" if self.weight == "path_kl" else "sampler_grid")

    @property
    def importance_weighted(self) -> bool:
        """Whether values are divided by the density of the law."""
        chosen = self.weight == "path_kl" if self.importance is None else self.importance
        return chosen and self.law != "sampler_grid"

    @property
    def bounds(self) -> bool:
        """Whether the mean over points and `decoder` bound log p(x0) from below, up to the decoder's approximation."""
        return self.weight == "path_kl" and self.importance_weighted and not self.guard

    def decoder(self, num_dims: int) -> float:
        """E log p(x0 | x at min_sigma), nats in all: that of N(x / (1 - s), s^2 / (1 - s)^2), for data smooth at s."""
        s = self.min_sigma
        return -0.5 * num_dims * (math.log(2 * math.pi * s**2 / (1 - s) ** 2) + 1)

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"latents"} if self.xt_from_rollout else ())

    def num_points(self, asked: int | None, num_steps: int, num_scored: int) -> int:
        k = asked or max(num_steps - 1, 1)  # released: all levels but one drawn at random
        if self.antithetic:
            k += k % 2
        highest = num_steps * (2 if self.antithetic else 1)
        return min(k, highest) if self.law == "sampler_grid" else k

    def probe(self, rollout: Rollout, *, num_points: int | None, streams: Streams) -> ElboProbe:
        grid = rollout.sigmas[:-1]
        k = self.num_points(num_points, len(grid), 0)
        drawn = k // 2 if self.antithetic else k
        index = None
        if self.law == "sampler_grid":
            index = streams.permutation(len(grid))[:, :drawn]
            sigma = grid[index]  # [b, drawn]
        else:
            strata = (torch.arange(drawn) + streams.uniform([drawn])) / drawn
            sigma = self._law().levels(strata, self.min_sigma)
        x0 = rollout.x0[:, None]
        sigma = sigma.to(x0.device)
        if self.xt_from_rollout:
            assert index is not None
            assert rollout.latents is not None
            x = rollout.latents[torch.arange(len(x0))[:, None], index]
            noise = (x - (1 - like(sigma, x)) * x0) / like(sigma, x)
            return ElboProbe(x=x, target=noise - x0, sigma=sigma)
        noise = streams.normal([drawn, *rollout.x0.shape[1:]], rollout.x0)
        if self.antithetic:
            noise = torch.stack([noise, -noise], 2).flatten(1, 2)
            sigma = sigma.repeat_interleave(2, 1)
        return ElboProbe(x=interpolate(x0, noise, sigma), target=noise - x0, sigma=sigma)

    def log_prob(self, velocity: Tensor, probe: ElboProbe) -> Tensor:
        residual = velocity - probe.target
        sigma = probe.sigma.to(torch.promote_types(residual.dtype, torch.float32))
        value = in_unit(-self.error(residual, sigma), velocity, self.unit)
        return value / self._law().density_above(sigma, self.min_sigma) if self.importance_weighted else value

    def error(self, residual: Tensor, sigma: Tensor) -> Tensor:
        """w |residual|^2 / D, residual [b, k, ...] and sigma [b, k] -> [b, k]."""
        error = mean_square(residual, 2)
        if self.weight == "simple":
            return error
        if self.weight == "path_kl":
            return error * (1 - sigma) / (sigma + self.guard)
        if self.weight == "x0":
            return error * sigma**2
        if self.weight == "ghuber":
            offset = float(1e-10**self.power)
            return sigma * ((error + 1e-10) ** self.power - offset) / self.power
        scale = (like(sigma, residual) * residual.detach()).abs().flatten(2).mean(-1)
        return sigma**2 * error / scale.to(error).clamp_min(1e-5)

    def _law(self) -> Law:
        if self.law == "scheduler_density":
            return scheduler_density(self.shift)
        return {"uniform": UNIFORM, "linear": LINEAR, "logit_normal": logit_normal()}[self.law]


@dataclass(frozen=True, kw_only=True)
class ReleasedPathKL(ELBO):
    """f = -(1 - s) / (s + 1e-3) |v - (noise - x0)|^2 / D on the sampler's own levels: `exact` of the paper's release.

    It is not the bound: the shifted grid is denser near 1 and nothing divides by its density, and the guard 1e-3 is
    added to s. With ten shifted steps, the last level alone holds 95% of the weight, which is reason enough to be
    unstable.

    Source: arXiv 2602.04663's release (compute_elbo, `exact`).
    """

    weight: Weight = "path_kl"
    sigma_law: SigmaLaw | None = "sampler_grid"
    guard: float = 1e-3
    shown: ClassVar[tuple[str, ...]] = ()


@dataclass(frozen=True, kw_only=True)
class ReleasedAWM(ELBO):
    """f = -s ((E + 1e-10)^(1/4) - 1e-10^(1/4)) 4, E = |v - (noise - x0)|^2 / D, on the sampler's own levels.

    The paper says "simple"; every released configuration for SD 3.5 has `ghuber` with power 1/4.

    Source: AWM (arXiv 2509.25050), as released (compute_log_prob_awm).
    """

    weight: Weight = "ghuber"
    shown: ClassVar[tuple[str, ...]] = ()
