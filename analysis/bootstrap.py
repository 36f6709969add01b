"""The bootstrap over seeds: of one configuration, and stratified, of many that are pooled.

One configuration: percentile interval of the mean. Up to 5 seeds all n^n resamples are enumerated, so the interval has
no randomness of its own. For 2 and 3 seeds it is their range, and holds the true mean in 50 and 74 % of cases only: it
is drawn as a band around curves and called a range. Tables have Student's t instead, see moderated.py.

Many configurations: seeds are resampled within each. A resample of n seeds has (n - 1) / n of their variance, so
residuals are first stretched by sqrt(n / (n - 1)); and the ends by t / z, Student's quantile for sum (n - 1) degrees of
freedom over the normal one. Davison & Hinkley 1997, section 3.2; the stratified form is that of Agarwal et al. 2021
(rliable), which does neither. Configurations are taken as independent: what a seed does to all of them is not covered.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Array = NDArray[np.float64]
Statistic = Callable[[Array], Array]  # [..., runs] -> [...]


def bootstrap(samples: Array, level: float = 0.95) -> tuple[Array, Array]:
    """Lower and upper end for the mean of samples [n, ...] over the first dimension; NaN for n = 1."""
    n = len(samples)
    if n == 1:
        return np.full(samples.shape[1:], np.nan), np.full(samples.shape[1:], np.nan)
    means = np.tensordot(shares(n), samples, axes=1)  # [resamples, ...]
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2], axis=0, method="inverted_cdf")
    return low, high


def band_name(most_seeds: int) -> str:
    """What the band of `bootstrap` over so many seeds is to be called."""
    return "range over seeds" if most_seeds <= 3 else "95 % bootstrap interval over seeds"


def iqm(values: Array) -> Array:
    """Interquartile mean of [..., n]: the mean without the lowest and the highest quarter, rounded down."""
    cut = values.shape[-1] // 4
    middle = np.sort(values, axis=-1)[..., cut : values.shape[-1] - cut]
    mean: Array = middle.mean(-1)
    return mean


def resamples(strata: Sequence[Array], num: int = 1000, seed: int = 0) -> Array:
    """Seeds resampled within each stratum [n_c, ...], all side by side: [num, sum of n_c, ...].

    A stratum of one seed borrows the residuals of the others; without any, there is nothing to resample.
    """
    rng = np.random.default_rng(seed)
    residuals = [(s - s.mean(0)) * np.sqrt(len(s) / (len(s) - 1)) if len(s) > 1 else None for s in strata]
    known = [r for r in residuals if r is not None]
    if not known:
        raise ValueError("no stratum has two seeds: an interval over seeds does not exist")
    pool = np.concatenate(known)
    drawn = []
    for stratum, own in zip(strata, residuals, strict=True):
        source = pool if own is None else own
        drawn.append(stratum.mean(0) + source[rng.integers(len(source), size=(num, len(stratum)))])
    return np.concatenate(drawn, axis=1)


def stratified(strata: Sequence[Array], statistic: Statistic = iqm, level: float = 0.95) -> tuple[Array, Array, Array]:
    """Estimate, lower and upper end of a statistic over the runs of strata [n_c, ...]; NaN ends with one seed each."""
    runs = np.concatenate(list(strata))
    estimate = statistic(np.moveaxis(runs, 0, -1))
    if all(len(stratum) == 1 for stratum in strata):
        return estimate, np.full_like(estimate, np.nan), np.full_like(estimate, np.nan)
    drawn = statistic(np.moveaxis(resamples(strata), 1, -1))  # [resamples, ...]
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2], axis=0)
    df = sum(len(stratum) - 1 for stratum in strata)
    stretch = stats.t.ppf((1 + level) / 2, df) / stats.norm.ppf((1 + level) / 2)
    return estimate, estimate - stretch * (estimate - low), estimate + stretch * (high - estimate)


def shares(n: int) -> Array:
    """The share of each sample in each resample, [resamples, n]."""
    if n <= 5:
        picks = np.array(list(itertools.product(range(n), repeat=n)))
    else:
        picks = np.random.default_rng(0).integers(n, size=(4000, n))
    shares: Array = (picks[:, :, None] == np.arange(n)).mean(1)
    return shares
