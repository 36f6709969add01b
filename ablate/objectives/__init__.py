"""The objective axis."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from ablate.objectives.dpo import D3PO, DGPO, DPO
from ablate.objectives.grpo import CISPO, DAPO, GMPO, GRPO, GSPO, SAPO, DrGRPO
from ablate.objectives.matching import CRD, TB, Kimi
from ablate.objectives.paper import EPG, PAR, PEPG
from ablate.objectives.protocol import Objective
from ablate.objectives.regression import AWM, NFT, RAM, RWR, SFT
from ablate.objectives.reinforce import RLOO, Reinforce
from ablate.objectives.steps import GRPOGuard, TempFlow

OBJECTIVES: Mapping[str, Callable[..., Objective]] = {
    "epg": EPG,
    "pepg": PEPG,
    "par": PAR,
    "reinforce": Reinforce,
    "rloo": RLOO,
    "grpo": GRPO,
    "dr_grpo": DrGRPO,
    "dapo": DAPO,
    "gspo": GSPO,
    "gmpo": GMPO,
    "cispo": CISPO,
    "sapo": SAPO,
    "kimi": Kimi,
    "tb": TB,
    "grpo_guard": GRPOGuard,
    "tempflow": TempFlow,
    "dpo": DPO,
    "d3po": D3PO,
    "dgpo": DGPO,
    "crd": CRD,
    "nft": NFT,
    "ram": RAM,
    "awm": AWM,
    "rwr": RWR,
    "sft": SFT,
}

__all__ = ["OBJECTIVES", "Objective"]
