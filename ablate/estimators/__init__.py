"""The estimator axis."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ablate.estimators.elbo import ELBO
from ablate.estimators.protocol import Estimator
from ablate.estimators.trajectory import Trajectory

ESTIMATORS: Mapping[str, Callable[..., Estimator[Any]]] = {"trajectory": Trajectory, "elbo": ELBO}

__all__ = ["ESTIMATORS", "Estimator"]
