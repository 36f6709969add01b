"""How an estimate of log-likelihood agrees with the truth: across samples, and in its policy gradient."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import pearsonr, spearmanr
from torch import Tensor

RESAMPLES = 1000


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """Of values [n] with the truth [n], both in nats in all."""

    gap_mean: float  # value - truth
    gap_sd: float  # across samples
    gap_error: float  # standard error of gap_mean
    pearson: float
    spearman: float


@dataclass(frozen=True, kw_only=True)
class Angle:
    """Between two gradients, in degrees, with a 95 % bootstrap interval over units."""

    degrees: float
    low: float
    high: float


def agreement(value: Tensor, truth: Tensor) -> Agreement:
    """Of n >= 3 samples."""
    a, b = (x.detach().double().cpu().numpy() for x in (value, truth))
    gap = a - b
    return Agreement(
        gap_mean=float(gap.mean()),
        gap_sd=float(gap.std(ddof=1)),
        gap_error=float(gap.std(ddof=1) / math.sqrt(len(gap))),
        pearson=float(pearsonr(a, b).statistic),
        spearman=float(spearmanr(a, b).statistic),
    )


def angle(estimate: Tensor, truth: Tensor) -> Angle | None:
    """Between gradients that are means over u units, each estimated twice by independent draws: [2, u, q].

    cos = <a, b> / sqrt(<a1, a2> <b1, b2>), where a and b are means of the two estimates: the noise of the draws, which
    would widen the angle between single estimates, cancels. Equal estimates have no noise. None where the draws leave
    no norm to divide by.
    """
    a, b = estimate.detach().double(), truth.detach().double()
    u = a.shape[1]
    grams = [x @ y.T for x, y in ((a[0], a[1]), (b[0], b[1]), (a.mean(0), b.mean(0)))]
    aa, bb, ab = (g.cpu().numpy() for g in grams)  # [u, u]
    centre = _degrees(np.full((1, u), 1 / u), aa, bb, ab)
    if not np.isfinite(centre[0]):
        return None
    picks = np.random.default_rng(0).integers(u, size=(RESAMPLES, u))
    shares = (picks[:, :, None] == np.arange(u)).mean(1)
    spread = _degrees(shares, aa, bb, ab)
    low, high = np.nanquantile(spread, [0.025, 0.975])
    return Angle(degrees=float(centre[0]), low=float(low), high=float(high))


def _degrees(
    shares: NDArray[np.float64], aa: NDArray[np.float64], bb: NDArray[np.float64], ab: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Of gradients sum_i share_i g_i, shares [r, u] and Gram matrices [u, u] -> [r]; NaN without a norm."""
    norms = [np.einsum("ri,ij,rj->r", shares, g, shares) for g in (aa, bb)]
    product = np.einsum("ri,ij,rj->r", shares, ab, shares)
    with np.errstate(invalid="ignore", divide="ignore"):
        cosine = product / np.sqrt(norms[0] * norms[1])
    cosine[(norms[0] <= 0) | (norms[1] <= 0)] = np.nan
    degrees: NDArray[np.float64] = np.degrees(np.arccos(np.clip(cosine, -1, 1)))
    return degrees
