"""The estimator axis."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ablate.estimators.elbo import ELBO, ReleasedAWM, ReleasedPathKL
from ablate.estimators.protocol import Estimator
from ablate.estimators.trajectory import CPSDistance, ReleasedTrajectory, Trajectory

ESTIMATORS: Mapping[str, Callable[..., Estimator[Any]]] = {
    "trajectory": Trajectory,
    "elbo": ELBO,
    "cps_distance": CPSDistance,
    "released_trajectory": ReleasedTrajectory,
    "released_path_kl": ReleasedPathKL,
    "released_awm": ReleasedAWM,
}

__all__ = ["ESTIMATORS", "Estimator"]
