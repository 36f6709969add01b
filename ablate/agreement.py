"""How an estimate of log-likelihood agrees with the truth: across samples, and in its policy gradient."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import pearsonr, spearmanr
from scipy.stats import t as student
from torch import Tensor

LEAST_COSINE, MOST_COSINE = 0.2, 1.05


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
    """Between two gradients, in degrees, with a 95 % interval over units."""

    degrees: float
    low: float
    high: float


def claimed(estimator: Any, log_prob: Tensor, num_dims: int) -> Tensor:
    """What an estimator's points [b, k] say of log p, nats in all: [b].

    The mean over points for an ELBO, with the decoder's term where it is a bound; the sum over a trajectory's steps,
    which is the density of a path, not of its end, and lacks that of its start.
    """
    scale = num_dims if getattr(estimator, "unit", "dimension") == "dimension" else 1
    if "transitions" in estimator.needs:
        return scale * log_prob.sum(1)
    return scale * log_prob.mean(1) + (estimator.decoder(num_dims) if is_bound(estimator) else 0.0)


def is_bound(estimator: Any) -> bool:
    """Whether an estimator says of itself that it bounds log p from below."""
    return bool(getattr(estimator, "bounds", False))


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
    """Between gradients that are means over u >= 3 units, each estimated twice by independent draws: [2, u, q].

    cos = <a, b> / sqrt(<a1, a2> <b1, b2>), where a and b are means of the two estimates: the noise of the draws, which
    would widen the angle between single estimates, cancels. Equal estimates have no noise. None where the draws are too
    noisy to tell: the two estimates of one gradient have a cosine below 0.2, or cos comes out above 1.05. The interval
    is Student's, with the jackknife's error of the cosine.
    """
    a, b = estimate.detach().double(), truth.detach().double()
    u = a.shape[1]
    grams = [(x @ y.T).cpu().numpy() for x, y in ((a[0], a[1]), (b[0], b[1]), (a.mean(0), b.mean(0)))]  # [u, u]
    without_one = (1 - np.eye(u)) / (u - 1)
    centre, *others = _cosines(np.vstack([np.full(u, 1 / u), without_one]), *grams)
    reliable = all(_cosine(x[0].mean(0), x[1].mean(0)) >= LEAST_COSINE for x in (a, b))
    if not reliable or not np.isfinite(centre) or centre > MOST_COSINE:
        return None
    error = math.sqrt((u - 1) * np.nanvar(others))
    reach = float(student.ppf(0.975, u - 1)) * error
    degrees, low, high = np.degrees(np.arccos(np.clip([centre, centre + reach, centre - reach], -1, 1)))
    return Angle(degrees=float(degrees), low=float(low), high=float(high))


def _cosine(x: Tensor, y: Tensor) -> float:
    return float(x @ y / (x.norm() * y.norm()))


def _cosines(
    shares: NDArray[np.float64], aa: NDArray[np.float64], bb: NDArray[np.float64], ab: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Of gradients sum_i share_i g_i, shares [r, u] and Gram matrices [u, u] -> [r]; NaN without a norm."""
    products = [np.einsum("ri,ij,rj->r", shares, gram, shares) for gram in (aa, bb, ab)]
    with np.errstate(invalid="ignore", divide="ignore"):
        cosines: NDArray[np.float64] = products[2] / np.sqrt(products[0] * products[1])
    cosines[(products[0] <= 0) | (products[1] <= 0)] = np.nan
    return cosines
