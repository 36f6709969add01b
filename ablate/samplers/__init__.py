"""The sampler axis."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from ablate.samplers.mixed import Mixed
from ablate.samplers.ode import ODE
from ablate.samplers.protocol import Sampler
from ablate.samplers.sde import CPS, DDIM, DMD, DanceSDE, DPMSolverSDE, FlowSDE

SAMPLERS: Mapping[str, Callable[..., Sampler]] = {
    "ode": ODE,
    "sde": FlowSDE,
    "mixed": Mixed,
    "dance": DanceSDE,
    "ddim": DDIM,
    "dpm_sde": DPMSolverSDE,
    "cps": CPS,
    "dmd": DMD,
}

__all__ = ["SAMPLERS", "Sampler"]
