"""A frame of runs as a factorial design: its axes, what is missing, and the sums of squares that each term adds.

Terms are the axes and their pairs; type II: a term is adjusted for all terms that do not contain it. What is above
pairs is one term of its own. Where combinations are missing a term has fewer degrees of freedom, down to 0: then
another axis always changes with it, and the two cannot be told apart.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from analysis.bootstrap import Array

ALL, REST = "all axes together", "other interactions"


@dataclass(frozen=True, kw_only=True)
class Design:
    """What a frame of runs is as a factorial design."""

    axes: tuple[str, ...]  # with at least two values
    levels: pd.DataFrame  # a row per configuration that has runs: its value on each axis
    num_seeds: Array  # [configurations]
    num_missing: int  # combinations of these values without a run
    order: int  # terms couple at most so many axes; what lies above is noise where there is one seed each
    noise: str  # where s^2 comes from, in words

    @property
    def replicated(self) -> bool:
        return bool((self.num_seeds > 1).any())


def design(runs: pd.DataFrame, axes: Sequence[str]) -> Design:
    """The design of runs with a column per axis. With one seed each, the highest interactions are noise."""
    varied = tuple(axis for axis in axes if runs[axis].nunique() > 1)
    counts = runs.groupby(list(varied), sort=False).size() if varied else pd.Series([len(runs)])
    levels = counts.index.to_frame(index=False) if varied else pd.DataFrame(index=[0])
    full = int(np.prod([runs[axis].nunique() for axis in varied]))
    order, noise = 2, "spread over seeds within configurations"
    if (counts == 1).all():
        order = next((o for o in (2, 1) if _rank(_columns(levels, _terms(varied, o))) < len(levels)), 0)
        noise = {2: "interactions of three and more axes", 1: "all interactions", 0: "nothing: no run is left for it"}[
            order
        ]
    return Design(
        axes=varied, levels=levels, num_seeds=counts.to_numpy(float), num_missing=full - len(levels), order=order,
        noise=noise,
    )  # fmt: skip


def projections(shape: Design) -> dict[str, tuple[Array, int]]:
    """The quadratic form of each term on configuration means, [c, c], with its degrees of freedom."""
    terms = _terms(shape.axes, min(2, max(shape.order, 1)))
    forms: dict[str, tuple[Array, int]] = {}
    for term in terms:
        others = [other for other in terms if not set(term) <= set(other)]
        without, with_term = _projection(shape.levels, others), _projection(shape.levels, [*others, term])
        forms[" x ".join(term)] = (with_term - without, _trace(with_term - without))
    mean = np.full((len(shape.levels),) * 2, 1 / len(shape.levels))
    model = _projection(shape.levels, terms)
    whole = np.eye(len(shape.levels)) - mean
    forms[REST] = (whole + mean - model, _trace(whole + mean - model))
    forms[ALL] = (whole, len(shape.levels) - 1)
    return forms


def _terms(axes: Sequence[str], order: int) -> list[tuple[str, ...]]:
    return [term for size in range(1, order + 1) for term in itertools.combinations(axes, size)]


def _columns(levels: pd.DataFrame, terms: Sequence[tuple[str, ...]]) -> Array:
    """A constant, and an indicator of each combination of values of each term."""
    values = {axis: pd.factorize(levels[axis])[0] for axis in levels}
    blocks = [np.ones((len(levels), 1))]
    for term in terms:
        found, codes = np.unique(np.stack([values[axis] for axis in term]), axis=1, return_inverse=True)
        blocks.append(np.eye(found.shape[1])[codes])
    return np.concatenate(blocks, axis=1)


def _rank(columns: Array) -> int:
    return int(np.linalg.matrix_rank(columns))


def _projection(levels: pd.DataFrame, terms: Sequence[tuple[str, ...]]) -> Array:
    columns = _columns(levels, terms)
    left, singular, _ = np.linalg.svd(columns, full_matrices=False)
    basis = left[:, singular > 1e-9 * singular[0]]
    projection: Array = basis @ basis.T
    return projection


def _trace(form: Array) -> int:
    return round(float(np.trace(form)))
