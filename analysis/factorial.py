"""How much of a result each axis explains: omega squared of a factorial design, with intervals.

Runs y = mu_c + b_seed + e, e ~ N(0, s^2), of C configurations c with n seeds each; b is what a seed does to all of
them (prompts, first noise), a block that is fitted and left out. For a term t (an axis, or the interaction of two)
let P_t project the vector of configuration means on what t adds to all terms that do not contain it: type-II sums of
squares, SS_t = n |P_t y|^2 with d_t degrees of freedom. With SS and N = nC of all runs, and s^2 from seeds within
configurations, (C - 1)(n - 1) degrees of freedom,

    omega_t^2 = (SS_t - d_t s^2) / (SS + s^2)      estimates      V_t / V,   V_t = |P_t mu|^2 / C,

the share of term t in the variance of a run (Hays 1963). eta_t^2 = SS_t / SS is the same without taking out noise.
Every configuration counts once: where seeds are missing, n is their harmonic mean (unweighted means). Where
configurations are missing, P_t is what is left of the term, shares of terms overlap, and need not add up to 1.

Interval: SS_t / s^2 and SS_rest / s^2 are independent noncentral chi-squared with noncentralities l_t = N V_t / s^2
and l_rest, whatever is missing, and the share is l_t / (l_t + l_rest + N). The ends are those shares at which an
omega^2 as high, or as low, as the one found has probability 2.5 % (a parametric bootstrap over seeds, inverted;
l_rest at its estimate). Resampling 2 or 3 seeds instead would be biased: every resample adds their noise to SS_t
again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from analysis.bootstrap import Array
from analysis.design import ALL, REST, Design, design, projections

SEEDS = "seeds"
_DRAWS = 4000
_STEPS = 30  # of a bisection


def shares(runs: pd.DataFrame, axes: Sequence[str], value: str) -> pd.DataFrame:
    """A row per term: term, df, eta2, omega2, low, high. NaN where a term cannot be told apart, or there is no noise.

    Rows: each axis, each pair of axes, `other interactions`, `all axes together`, and `seeds`, what these leave.
    """
    shape = design(runs, axes)
    if not shape.axes:
        return pd.DataFrame(columns=["term", "df", "eta2", "omega2", "low", "high"])
    means, within, noise_df = _means_and_noise(runs, shape, value)
    n = len(means) / (1 / shape.num_seeds).sum()  # harmonic mean
    forms = {term: part for term, part in projections(shape).items() if term != REST or part[1]}
    squares = {term: max(0.0, n * float(means @ form @ means)) for term, (form, _) in forms.items()}
    dfs = {term: df for term, (_, df) in forms.items()}
    if not shape.replicated:
        within, noise_df = squares.pop(REST, 0.0), dfs.pop(REST, 0)
        squares[ALL], dfs[ALL] = squares[ALL] - within, dfs[ALL] - noise_df
    rows = []
    for term, df in dfs.items():
        rest, rest_df = squares[ALL] - squares[term], dfs[ALL] - df
        row: dict[str, Any] = {"term": term, "df": df, "eta2": np.nan, "omega2": np.nan, "low": np.nan, "high": np.nan}
        if df and noise_df and within > 0:
            omega2, low, high = omega_squared((squares[term], rest, within), (df, rest_df, noise_df))
            total = squares[ALL] + within
            row |= {"eta2": squares[term] / total, "omega2": omega2, "low": low, "high": high}
        rows.append(row)
    last = rows[-1]  # all axes together
    left = {"omega2": last["omega2"], "low": last["high"], "high": last["low"], "eta2": last["eta2"]}
    return pd.DataFrame([*rows, {"term": SEEDS, "df": noise_df, **{name: 1 - part for name, part in left.items()}}])


def _means_and_noise(runs: pd.DataFrame, shape: Design, value: str) -> tuple[Array, float, int]:
    """Configuration means for the average seed, the sum of squares of what is left, and its degrees of freedom."""
    cells = runs.groupby(list(shape.axes), sort=False).ngroup().to_numpy()
    blocks = pd.factorize(runs["seed"])[0]
    effects = np.eye(blocks.max() + 1)[blocks]
    effects = effects[:, :-1] - effects[:, -1:] if shape.replicated else effects[:, :0]  # they add up to 0
    columns = np.concatenate([np.eye(cells.max() + 1)[cells], effects], axis=1)
    values = runs[value].to_numpy(float)
    fitted, _, rank, _ = np.linalg.lstsq(columns, values)
    residuals = values - columns @ fitted
    return fitted[: cells.max() + 1], float(residuals @ residuals), len(values) - int(rank)


def omega_squared(
    squares: tuple[float, float, float], dfs: tuple[int, int, int], level: float = 0.95
) -> tuple[float, float, float]:
    """Share of a term and its interval, from the sums of squares and degrees of freedom of term, rest and noise."""
    (term, rest, noise), (df, rest_df, noise_df) = squares, dfs
    variance, runs = noise / noise_df, df + rest_df + noise_df + 1
    found = _omega2(term, rest, variance, df, noise_df)
    rest_shift = max(0.0, rest / variance * max(noise_df - 2, 1) / noise_df - rest_df)
    rng = np.random.default_rng(0)
    normal, other = rng.standard_normal((2, _DRAWS))
    tails = rng.chisquare(df - 1, _DRAWS) if df > 1 else np.zeros(_DRAWS)
    rests = np.zeros(_DRAWS)
    if rest_df:
        rests = (other + np.sqrt(rest_shift)) ** 2 + (rng.chisquare(rest_df - 1, _DRAWS) if rest_df > 1 else 0)
    variances = rng.chisquare(noise_df, _DRAWS) / noise_df

    def as_high(shift: float) -> float:
        """Probability of an omega^2 at least as high as the one found, where the noncentrality is shift^2."""
        drawn = _omega2((normal + shift) ** 2 + tails, rests, variances, df, noise_df)
        return float(np.mean(drawn >= found))

    def solve(probability: float) -> float:
        low, high = 0.0, 4 * (np.sqrt(term / variance) + 5)
        for _ in range(_STEPS):
            middle = (low + high) / 2
            low, high = (middle, high) if as_high(middle) < probability else (low, middle)
        shift = high**2 if low else 0.0
        return shift / (shift + rest_shift + runs)

    return float(np.clip(found, 0, 1)), solve((1 - level) / 2), solve((1 + level) / 2)


def _omega2(term: Array | float, rest: Array | float, variance: Array | float, df: int, noise_df: int) -> Array | float:
    return (term - df * variance) / (term + rest + (noise_df + 1) * variance)
