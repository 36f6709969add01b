"""Rewards by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from runners.rewards.protocol import Reward, RewardOutput
from runners.rewards.scenes import ScenesReward

REWARDS: Mapping[str, Callable[[], Reward]] = {"scenes": ScenesReward}

__all__ = ["REWARDS", "Reward", "RewardOutput"]
