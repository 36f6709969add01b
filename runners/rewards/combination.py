"""Several rewards at once: their weighted sum, with every one recorded and timed."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from runners.prompts import Prompt
from runners.rewards.protocol import Images, Reward, RewardOutput, RewardUnavailable


class WeightedSum:
    """The sum of rewards times their weights; `terms` has each reward.

    A score is missing where that of any reward is. Where two rewards have a part of the same name, or a name is taken,
    the later one is called `<label>.<part>`.
    """

    def __init__(self, rewards: Mapping[str, Reward], weights: Mapping[str, float]) -> None:
        self.rewards, self.weights = rewards, weights
        self.remote = any(reward.remote for reward in rewards.values())
        self.compares = any(reward.compares for reward in rewards.values())
        self.seconds = dict.fromkeys(rewards, 0.0)  # that each has worked, failures included

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
        """Bring the weights of all rewards to a device. Raises RewardUnavailable, whatever goes wrong."""
        for name, reward in self.rewards.items():
            self._of(name, lambda reward=reward: reward.load(device))  # type: ignore[misc]

    def self_check(self) -> None:
        """Score small fixed inputs with each. Raises RewardUnavailable, whatever goes wrong."""
        for name, reward in self.rewards.items():
            self._of(name, reward.self_check)

    def _of(self, name: str, work: Callable[[], None]) -> None:
        try:
            work()
        except RewardUnavailable as error:
            raise RewardUnavailable(f"reward {name}: {error}") from None
        except Exception as error:  # of somebody else's model or function
            raise RewardUnavailable(f"reward {name}: {type(error).__name__}: {error}") from error

    def __call__(self, images: Images, prompts: Sequence[Prompt]) -> RewardOutput:
        """The sum. Raises RewardUnavailable or RuntimeError, with the name of the reward, where one raises."""
        outputs = {name: self._output(name, images, prompts) for name in self.rewards}
        terms = np.stack([output.score for output in outputs.values()], 1)
        weights = tuple(self.weights[name] for name in outputs)
        score = terms @ np.array(weights)
        return RewardOutput(
            score=score, terms=terms, weights=weights, parts=_parts(outputs), reasons=_reasons(outputs, score)
        )

    def _output(self, name: str, images: Images, prompts: Sequence[Prompt]) -> RewardOutput:
        start = time.perf_counter()
        try:
            output = self.rewards[name](images, prompts)
            _check(output, len(images))
        except RewardUnavailable as error:
            raise RewardUnavailable(f"{name}: {error}") from None
        except Exception as error:  # of somebody else's model or function
            raise RuntimeError(f"{name}: {type(error).__name__}: {error}") from error
        finally:
            self.seconds[name] += time.perf_counter() - start
        return output


def _check(output: RewardOutput, number: int) -> None:
    """Raises ValueError for an output that is not that of so many images."""
    for name, values in {"scores": output.score, **output.parts}.items():
        if np.shape(values) != (number,):
            raise ValueError(f"got {name} of shape {np.shape(values)} for {number} images")
    if len(output.reasons) not in (0, number):
        raise ValueError(f"got {len(output.reasons)} reasons for {number} images")


def _parts(outputs: Mapping[str, RewardOutput]) -> dict[str, np.ndarray]:
    parts = {name: output.score for name, output in outputs.items()} if len(outputs) > 1 else {}
    for name, output in outputs.items():
        for part, values in output.parts.items():
            parts[f"{name}.{part}" if part in parts or part == "score" else part] = values
    return parts


def _reasons(outputs: Mapping[str, RewardOutput], score: np.ndarray) -> tuple[str, ...]:
    """Of a missing score, the reasons of all rewards that have none; else those of the first reward that gives any."""
    first = next((output.reasons for output in outputs.values() if output.reasons), ("",) * len(score))
    reasons = list(first)
    for row in np.flatnonzero(~np.isfinite(score)).tolist():
        reasons[row] = "; ".join(f"{name}: {o.reason(row)}" for name, o in outputs.items() if o.missing[row])
    return tuple(reasons) if any(reasons) else ()
