"""Grids with known effects, as frames: what the statistics must find again."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from analysis.design import ALL, Design, design, projections

AXES = ("objective", "estimator", "sampler")
OBJECTIVES, ESTIMATORS, SAMPLERS = ("grpo", "epg", "dpo"), ("trajectory", "simple", "adaptive"), ("sde", "ode")


@dataclass(frozen=True, kw_only=True)
class Planted:
    """A grid of 3 x 3 x 2 combinations without trajectory x ode: an estimator effect, a smaller one of the sampler, an
    interaction of both, and none of the objective."""

    seeds: int = 3
    noise: float = 0.03  # deviation over seeds
    block: float = 0.0  # deviation of what a seed does to all cells
    spread: float = 1.0  # the noisiest configuration has this factor more noise than the quietest

    @property
    def runs(self) -> pd.DataFrame:
        """A row per cell: the axes, configuration, seed, and the expected value."""
        rows = [
            (o, e, s, seed)
            for o in OBJECTIVES
            for e in ESTIMATORS
            for s in SAMPLERS
            for seed in range(self.seeds)
            if (e, s) != ("trajectory", "ode")
        ]
        frame = pd.DataFrame(rows, columns=[*AXES, "seed"])
        effect = frame["estimator"].map({"trajectory": 0.0, "simple": 0.03, "adaptive": 0.08})
        effect += frame["sampler"].map({"sde": 0.0, "ode": 0.02})
        effect += 0.03 * ((frame["estimator"] == "adaptive") & (frame["sampler"] == "ode"))
        configuration = frame[list(AXES)].agg(" · ".join, axis=1)
        return frame.assign(axes="", configuration=configuration, expected=0.5 + effect, status="done")

    @property
    def design(self) -> Design:
        return design(self.runs, AXES)

    def deviations(self) -> NDArray[np.float64]:
        """Of the noise of each run."""
        num = len(self.runs) // self.seeds
        return np.repeat(self.noise * self.spread ** np.linspace(-0.5, 0.5, num), self.seeds)

    def shares(self) -> dict[str, float]:
        """The true share of each term in the variance of a run, for an average seed."""
        means = self.runs.groupby(list(AXES), sort=False)["expected"].first().to_numpy(float)
        parts = {term: means @ form @ means / len(means) for term, (form, _) in projections(self.design).items()}
        total = parts[ALL] + float((self.deviations() ** 2).mean())
        return {**{term: part / total for term, part in parts.items()}, "seeds": 1 - parts[ALL] / total}

    def grids(self, num: int, seed: int = 0) -> Iterator[pd.DataFrame]:
        """`num` grids, with the column `final`."""
        rng, runs, deviations = np.random.default_rng(seed), self.runs, self.deviations()
        for _ in range(num):
            noise = deviations * rng.standard_normal(len(runs))
            noise += self.block * rng.standard_normal(self.seeds)[runs["seed"]]
            yield runs.assign(final=runs["expected"] + noise)


def curves(runs: pd.DataFrame, value: NDArray[np.float64], x: NDArray[np.float64]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Cells and metrics of runs whose held-out accuracy is `value` [runs, points] at `x` device-hours [points]."""
    cells = runs.assign(id=[f"c{i}" for i in range(len(runs))])
    num, points = value.shape
    metrics = pd.DataFrame(
        {
            "id": np.repeat(cells["id"].to_numpy(), points),
            "epoch": np.tile(np.arange(points), num),
            "device_hours": np.tile(x, num),
            "nfe": np.tile(1e6 * x, num),
            "metric": "eval/accuracy",
            "value": value.ravel(),
        }
    )
    return cells, metrics
