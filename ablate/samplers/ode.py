"""Deterministic samplers: Euler, and DPM-Solver++ 2M (Lu et al. 2022, arXiv 2211.01095, alg. 2, data prediction)."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ablate.flow import Velocity, predict_x0
from ablate.rollout import Rollout
from ablate.samplers.steps import euler_step, run_steps
from ablate.seeding import Streams


@dataclass(frozen=True, kw_only=True)
class ODE:
    """dx = v dt, deterministic: x' = x + (s' - s) v with solver `euler`, second-order multistep with `dpm2`.

    Leaves no transition densities, so only estimators that need the final sample alone can follow it. `dpm1`, the
    first order of `dpm2`, is the same step as `euler`.

    Source: DPM-Solver++, Lu et al. 2022 (arXiv 2211.01095), alg. 2.
    """

    solver: Literal["euler", "dpm1", "dpm2"] = "euler"
    leaves = frozenset[str]()
    deterministic = True

    def num_scored(self, num_steps: int) -> int:
        return 0

    def problem(self, num_steps: int) -> str | None:
        return None

    def sample(self, velocity: Velocity, noise: Tensor, *, sigmas: Tensor, epoch: int, streams: Streams) -> Rollout:
        levels = sigmas.tolist()
        if self.solver != "dpm2":
            steps = [euler_step(a, b) for a, b in itertools.pairwise(levels)]
            return run_steps(steps, velocity, noise, sigmas, streams)
        return Rollout(x0=_dpm2(velocity, noise, levels), sigmas=sigmas)


def _dpm2(velocity: Velocity, x: Tensor, levels: list[float]) -> Tensor:
    """Each step is x' = (sigma'/sigma) x + (1 - sigma'/sigma) m with m = m0 + w (m0 - m1), m0 and m1 the predicted x0
    now and one step before; with w = 0 it is first order and equals Euler exactly.

    w = h / (2 h0) with h the steps in log-SNR lambda = log((1 - sigma) / sigma). First and last step are first order;
    so is the second, because lambda is -inf at sigma = 1 and the step before it infinitely long (w = 0).
    """
    previous = None
    for i, (a, b) in enumerate(itertools.pairwise(levels)):
        x0 = predict_x0(x, velocity(x, torch.full((len(x),), a, device=x.device)), torch.tensor(a))
        target = x0
        if previous is not None and b > 0:
            weight = dpm2_weight(levels[i - 1], a, b)
            target = x0 + weight * (x0 - previous)
        x = b / a * x + (1 - b / a) * target
        previous = x0
    return x


def dpm2_weight(before: float, now: float, after: float) -> float:
    """h / (2 h0): how far the predicted x0 is extrapolated, given three successive noise levels."""
    if before >= 1:
        return 0.0
    h = _log_snr(after) - _log_snr(now)
    h0 = _log_snr(now) - _log_snr(before)
    return 0.5 * h / h0


def _log_snr(sigma: float) -> float:
    s = torch.tensor(sigma, dtype=torch.float64)
    return float(torch.log1p(-s) - s.log())
