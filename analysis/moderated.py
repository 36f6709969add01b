"""Student's t for means over few seeds, with variances that borrow strength from the other configurations.

Two or three seeds say little about their own spread. If the variances s^2 (d = n - 1 degrees of freedom) of C
configurations are drawn from a scaled inverse chi-squared law with d0 and s0^2, then with

    s~^2 = (d0 s0^2 + d s^2) / (d0 + d),    (mean - mu) / (s~ / sqrt(n)) ~ t(d0 + d):

95 % intervals hold 95 % of configurations. Equal variances give d0 = infinity and the pooled variance; very unequal
ones d0 = 0 and the ordinary t. d0 and s0 come from the moments of log s^2. Smyth 2004, equations in section 6.2.

Here, beside that: fewer than 8 configurations with two seeds cannot tell d0, so each keeps its own variance; and one
whose variance is improbable beside the others' (p < 0.02) keeps its own too, for pooling would flatter it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import stats
from scipy.special import digamma, polygamma

from analysis.bootstrap import Array

FEWEST = 8  # variances from which their common law can be told
_OUTLIER = 0.02


def intervals(samples: Sequence[Array], level: float = 0.95) -> tuple[Array, Array, Array]:
    """Mean, lower and upper end of each configuration's seeds; NaN ends for one seed, NaN for none."""
    n = np.array([len(s) for s in samples])
    mean = np.array([s.mean() if len(s) else np.nan for s in samples])
    half = half_widths(np.array([s.var(ddof=1) if len(s) > 1 else np.nan for s in samples]), n, level)
    return mean, mean - half, mean + half


def half_widths(variance: Array, n: Array, level: float = 0.95) -> Array:
    """Half the interval of a mean over n seeds with these variances; NaN where there is none.

    Seeds that all agree, as shares of a few prompts may, say nothing of their spread: without variances to borrow from
    they have no interval, rather than one of no width.
    """
    moderated, df = moderate(variance, np.asarray(n, float) - 1)
    known = (df > 0) & (moderated > 0)
    half: Array = stats.t.ppf((1 + level) / 2, np.where(known, df, np.nan)) * np.sqrt(moderated / np.maximum(n, 1))
    return half


def welch_df(error: Array, df: Array) -> Array:
    """Degrees of freedom of a sum of squared standard errors over the last dimension (Welch 1947)."""
    found: Array = error.sum(-1) ** 2 / (error**2 / (df + 2)).sum(-1) - 2
    return found


def moderate(variance: Array, df: Array) -> tuple[Array, Array]:
    """Moderated variances and their degrees of freedom; entries without two seeds (df < 1) keep what they have."""
    moderated, moderated_df = np.array(variance, float), np.array(df, float)
    usable = (df > 0) & (np.nan_to_num(variance) > 0)
    for _ in range(2):  # the second time without the outliers of the first
        if usable.sum() < FEWEST:
            return np.array(variance, float), np.array(df, float)
        prior, prior_df = _prior(variance[usable], df[usable])
        ratio = np.where(usable, variance / prior, 0)
        beyond = stats.f.sf(ratio, np.maximum(df, 1), min(prior_df, 1e9)) < _OUTLIER
        usable &= ~beyond
    if usable.sum() < FEWEST:
        return np.array(variance, float), np.array(df, float)
    prior, prior_df = _prior(variance[usable], df[usable])
    lent = usable | ((df > 0) & (variance == 0))
    weight = 1.0 if np.isinf(prior_df) else prior_df / (prior_df + df[lent])
    moderated[lent] = weight * prior + (1 - weight) * variance[lent]
    moderated_df[lent] = np.minimum(prior_df + df[lent], df[usable].sum())
    return moderated, moderated_df


def _prior(variance: Array, df: Array) -> tuple[float, float]:
    """s0^2 and d0, from mean and variance of log s^2."""
    logs = np.log(variance) - digamma(df / 2) + np.log(df / 2)
    excess = float(logs.var(ddof=1) - polygamma(1, df / 2).mean())
    if excess <= 0:
        return float((df * variance).sum() / df.sum()), np.inf
    half = _trigamma_inverse(excess)
    return float(np.exp(logs.mean() + digamma(half) - np.log(half))), 2 * half


def _trigamma_inverse(x: float) -> float:
    """y with trigamma(y) = x, by Newton's method on 1 / trigamma, which is nearly linear (Smyth 2004, appendix)."""
    y = 0.5 + 1 / x
    for _ in range(50):
        trigamma = float(polygamma(1, y))
        step = trigamma * (1 - trigamma / x) / float(polygamma(2, y))
        y += step
        if abs(step) < 1e-8 * y:
            break
    return y
