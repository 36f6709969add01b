"""The likelihood of a stochastic rollout's own steps: exact, but only for samplers with transition densities."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ablate.estimators.protocol import Pool, Unit, full_precision, in_unit
from ablate.flow import like, mean_square
from ablate.rollout import Rollout
from ablate.seeding import Streams


@dataclass(frozen=True, kw_only=True)
class TrajectoryProbe:
    """Recorded transitions, one per point; see `Transitions`."""

    x: Tensor  # [b, k, ...]
    next_x: Tensor  # [b, k, ...]
    rollout_velocity: Tensor  # [b, k, ...]
    sigma: Tensor  # [b, k]
    next_sigma: Tensor  # [b, k]
    x_coef: Tensor  # [b, k]
    velocity_coef: Tensor  # [b, k]
    std: Tensor  # [b, k]

    def deviation(self, velocity: Tensor) -> Tensor:
        """x' - mean(x, v) [b, k, ...], in float32 at least."""
        v = full_precision(velocity)
        return self.next_x.to(v) - like(self.x_coef, v) * self.x.to(v) - like(self.velocity_coef, v) * v


@dataclass(frozen=True, kw_only=True)
class _Steps:
    """Estimators whose points are recorded steps."""

    pool: Pool = "each"
    unit: Unit = "dimension"

    def num_points(self, asked: int | None, num_steps: int, num_scored: int) -> int:
        return min(asked or num_scored, num_scored)

    def probe(self, rollout: Rollout, *, num_points: int | None, streams: Streams) -> TrajectoryProbe:
        steps = rollout.transitions
        assert steps is not None
        batch, num_steps = steps.x.shape[:2]
        k = self.num_points(num_points, num_steps, num_steps)
        index = streams.permutation(num_steps)[:, :k].sort(-1).values  # [b, k]
        rows, device = torch.arange(batch)[:, None], steps.x.device
        return TrajectoryProbe(
            x=steps.x[rows, index],
            next_x=steps.next_x[rows, index],
            rollout_velocity=steps.velocity[rows, index],
            sigma=steps.sigma[index].to(device),
            next_sigma=steps.next_sigma[index].to(device),
            x_coef=steps.x_coef[index].to(device),
            velocity_coef=steps.velocity_coef[index].to(device),
            std=steps.std[index].to(device),
        )


@dataclass(frozen=True, kw_only=True)
class Trajectory(_Steps):
    """f = log N(x'; mean(x, v), std^2) / D = -|x' - mean|^2 / (2 D std^2) - log(std sqrt(2 pi)) for every step.

    The steps are the sampler's own, with its mean and std, evaluated on the latents as they were recorded. Every
    scored step is a point; with fewer points, steps are drawn for each sample without replacement.

    * pool: what objectives see of the steps; `sum` is the log-density of the path.
    * unit: `nats` is D times as much.
    * normaliser: false drops log(std sqrt(2 pi)), which no ratio notices; see `released_trajectory`.

    Source: Flow-GRPO, Liu et al. 2025 (arXiv 2505.05470), eq. 9; DDPO, Black et al. 2023 (arXiv 2305.13301), sec. 4.3.
    """

    normaliser: bool = True
    needs = frozenset({"transitions", "density"})

    def log_prob(self, velocity: Tensor, probe: TrajectoryProbe) -> Tensor:
        error = mean_square(probe.deviation(velocity), 2)
        std = probe.std.to(error)
        density = -error / (2 * std**2)
        if self.normaliser:
            density = density - std.log() - 0.5 * math.log(2 * math.pi)
        return in_unit(density, velocity, self.unit)


@dataclass(frozen=True, kw_only=True)
class ReleasedTrajectory(Trajectory):
    """f = -|x' - mean|^2 / (2 D std^2): `trajectory` without its normaliser.

    In the copies that DiffusionNFT and MixGRPO carry, the lines that subtract log(std sqrt(2 pi)) stand behind a closed
    parenthesis and have no effect. No ratio notices; absolute values and sums over steps do.

    Source: DiffusionNFT (solver.py) and MixGRPO (sampling_utils.py), as released.
    """

    normaliser: bool = False


@dataclass(frozen=True, kw_only=True)
class CPSDistance(_Steps):
    """f = -|x' - mean|^2 / D for every step: not a log-density, but what Flow-CPS was published with.

    Differs from `trajectory` by the factor 2 std^2 and the normaliser; the clip range has to absorb the scale (1e-5 in
    the source).

    Source: Flow-CPS, Wang and Yu 2025 (arXiv 2509.05952), as in Flow-GRPO's and Flow-Factory's release.
    """

    needs = frozenset({"transitions"})

    def log_prob(self, velocity: Tensor, probe: TrajectoryProbe) -> Tensor:
        return in_unit(-mean_square(probe.deviation(velocity), 2), velocity, self.unit)
