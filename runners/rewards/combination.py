"""Several rewards at once: their weighted sum, with every one recorded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from runners.prompts import Prompt
from runners.rewards.protocol import Reward, RewardOutput


class WeightedSum:
    """The sum of rewards times their weights; `terms` has each reward, parts of the same name are the first one's."""

    def __init__(self, rewards: Mapping[str, Reward], weights: Mapping[str, float]) -> None:
        self.rewards, self.weights = rewards, weights
        self.identity = " + ".join(f"{weights[name]:g} {reward.identity}" for name, reward in rewards.items())

    def __call__(self, images: NDArray[np.uint8], prompts: Sequence[Prompt]) -> RewardOutput:
        outputs = {name: reward(images, prompts) for name, reward in self.rewards.items()}
        terms = np.stack([output.score for output in outputs.values()], 1)
        weights = tuple(self.weights[name] for name in outputs)
        parts = {name: output.score for name, output in outputs.items()}
        for output in outputs.values():
            parts = {**output.parts, **parts}
        reasons = next((output.reasons for output in outputs.values() if output.reasons), ())
        return RewardOutput(score=terms @ np.array(weights), terms=terms, weights=weights, parts=parts, reasons=reasons)
