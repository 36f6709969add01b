"""What a reward is: images and their prompts in, scores out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from runners.prompts import Prompt


@dataclass(frozen=True, kw_only=True)
class RewardOutput:
    """`score` [b] is what is trained on; `parts` [b] each are recorded beside it; `reasons` say why an image failed.

    `terms` [b, r] are the rewards whose sum with `weights` [r] the score is, None for a single one.
    """

    score: NDArray[np.float64]
    terms: NDArray[np.float64] | None = None
    weights: tuple[float, ...] = (1.0,)
    parts: Mapping[str, NDArray[np.float64]] = field(default_factory=dict)
    reasons: tuple[str, ...] = ()


def joined(outputs: Sequence[RewardOutput]) -> RewardOutput:
    """The scores of several batches as those of one."""
    first = outputs[0]
    return replace(
        first,
        score=np.concatenate([o.score for o in outputs]),
        terms=None if first.terms is None else np.concatenate([o.terms for o in outputs if o.terms is not None]),
        parts={name: np.concatenate([o.parts[name] for o in outputs]) for name in first.parts},
        reasons=tuple(reason for o in outputs for reason in o.reasons),
    )


class Reward(Protocol):
    """`identity` names the implementation and its version; it is part of the cell id."""

    identity: str

    def __call__(self, images: NDArray[np.uint8], prompts: Sequence[Prompt]) -> RewardOutput:
        """Scores of images [b, h, w, 3] in 0..255 for their prompts."""
        ...
