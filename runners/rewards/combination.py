"""Several rewards at once: their weighted sum, with every one recorded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from runners.prompts import Prompt
from runners.rewards.protocol import Reward, RewardOutput


class WeightedSum:
    """The sum of rewards times their weights; `terms` has the summands, parts of the same name are the first one's."""

    def __init__(self, rewards: Mapping[str, Reward], weights: Mapping[str, float]) -> None:
        self.rewards, self.weights = rewards, weights
        self.identity = " + ".join(f"{weights[name]:g} {reward.identity}" for name, reward in rewards.items())

    def __call__(self, images: NDArray[np.uint8], prompts: Sequence[Prompt]) -> RewardOutput:
        outputs = {name: reward(images, prompts) for name, reward in self.rewards.items()}
        terms = np.stack([self.weights[name] * output.score for name, output in outputs.items()], 1)
        parts = {name: output.score for name, output in outputs.items()}
        for output in outputs.values():
            parts = {**output.parts, **parts}
        reasons = next((output.reasons for output in outputs.values() if output.reasons), ())
        return RewardOutput(score=terms.sum(1), terms=terms, parts=parts, reasons=reasons)
