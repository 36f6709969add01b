"""Several rewards at once: their weighted sum, with every one recorded and timed."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import numpy as np

from runners.prompts import Prompt
from runners.rewards.protocol import Images, Reward, RewardOutput, RewardUnavailable


class WeightedSum:
    """The sum of rewards times their weights; `terms` has each reward, parts of the same name are the first one's.

    A score is missing where that of any reward is.
    """

    def __init__(self, rewards: Mapping[str, Reward], weights: Mapping[str, float]) -> None:
        self.rewards, self.weights = rewards, weights
        self.remote = any(reward.remote for reward in rewards.values())

    @property
    def identity(self) -> str:
        """Those of all rewards, with their weights."""
        named = [(self.weights[name], reward.identity) for name, reward in self.rewards.items()]
        if len(named) == 1 and named[0][0] == 1:
            return named[0][1]
        return " + ".join(f"{weight:g} {identity}" for weight, identity in named)

    @property
    def identities(self) -> dict[str, str]:
        """What each reward is, with the weights that were loaded."""
        return {name: f"{r.identity} {r.fingerprint()}".strip() for name, r in self.rewards.items()}

    def load(self, device: str) -> None:
        """Bring the weights of all rewards to a device. Raises RewardUnavailable."""
        for reward in self.rewards.values():
            reward.load(device)

    def self_check(self) -> None:
        """Score small fixed inputs with each. Raises RewardUnavailable, whatever goes wrong."""
        for name, reward in self.rewards.items():
            try:
                reward.self_check()
            except RewardUnavailable:
                raise
            except Exception as error:  # of somebody else's model or function
                raise RewardUnavailable(f"reward {name}: self-check: {type(error).__name__}: {error}") from error

    def __call__(self, images: Images, prompts: Sequence[Prompt]) -> RewardOutput:
        outputs, seconds = {}, {}
        for name, reward in self.rewards.items():
            start = time.perf_counter()
            outputs[name] = reward(images, prompts)
            seconds[name] = time.perf_counter() - start
            if outputs[name].score.shape != (len(images),):
                got, expected = outputs[name].score.shape, len(images)
                raise ValueError(f"reward {name}: got scores of shape {got} for {expected} images")
        terms = np.stack([output.score for output in outputs.values()], 1)
        weights = tuple(self.weights[name] for name in outputs)
        parts = {name: output.score for name, output in outputs.items()} if len(outputs) > 1 else {}
        for output in outputs.values():
            parts = {**output.parts, **parts}
        reasons = next((output.reasons for output in outputs.values() if output.reasons), ())
        return RewardOutput(
            score=terms @ np.array(weights),
            terms=terms,
            weights=weights,
            parts=parts,
            reasons=reasons,
            seconds=seconds,
        )
