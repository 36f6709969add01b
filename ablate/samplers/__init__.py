"""The sampler axis."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from ablate.samplers.mixed import Mixed
from ablate.samplers.ode import ODE
from ablate.samplers.protocol import Sampler
from ablate.samplers.sde import FlowSDE

SAMPLERS: Mapping[str, Callable[..., Sampler]] = {"ode": ODE, "sde": FlowSDE, "mixed": Mixed}

__all__ = ["SAMPLERS", "Sampler"]
