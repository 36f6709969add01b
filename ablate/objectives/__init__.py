"""The objective axis."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from ablate.objectives.dpo import DPO
from ablate.objectives.epg import EPG
from ablate.objectives.grpo import GRPO, GSPO
from ablate.objectives.protocol import Objective
from ablate.objectives.reinforce import Reinforce

OBJECTIVES: Mapping[str, Callable[..., Objective]] = {
    "reinforce": Reinforce,
    "epg": EPG,
    "grpo": GRPO,
    "gspo": GSPO,
    "dpo": DPO,
}

__all__ = ["OBJECTIVES", "Objective"]
