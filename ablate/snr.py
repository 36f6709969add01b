"""Signal and noise of an update's gradient, from independent draws, both unbiased.

An update is the mean of u groups' gradients g_i. Each group is a prompt with its images, so groups are independent;
each was probed m times on the same images, so its draws are independent given them. With W the mean over groups of the
trace of the covariance between draws, T that between the groups' mean gradients, and g the mean of all:

    given the rollouts   noise = W / u                       signal = |g|^2 - W / (u m)
    over rollouts        noise = (T + W (1 - 1 / m)) / u     signal = |g|^2 - T / u

Noise is the trace of the covariance of the gradient that one update of u groups takes; signal is the squared norm of
its expectation. SNR = signal / noise. 1 / SNR is the simple noise scale of McCandlish et al. 2018 (arXiv 1812.06162,
eq. 2.9), counted in updates: so many have to be averaged until half of the squared norm is signal.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class SignalAndNoise:
    """Squared norms; an unbiased signal may come out negative where there is none."""

    signal: float  # given the rollouts
    noise: float
    total_signal: float  # over rollouts and probes
    total_noise: float


def signal_and_noise(gradients: Tensor) -> SignalAndNoise:
    """gradients [u, m, q] of u >= 2 groups and m >= 2 draws; q is anything that keeps inner products."""
    u, m = gradients.shape[:2]
    means = gradients.mean(1)  # [u, q]
    within = float((gradients - means[:, None]).square().sum()) / (u * (m - 1))
    between = float((means - means.mean(0)).square().sum()) / (u - 1)
    squared = float(means.mean(0).square().sum())
    return SignalAndNoise(
        signal=squared - within / (u * m),
        noise=within / u,
        total_signal=squared - between / u,
        total_noise=(between + within * (1 - 1 / m)) / u,
    )
