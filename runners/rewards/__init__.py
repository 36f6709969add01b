"""Rewards by name, and weighted sums of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

from ablate.source import FieldError, choices
from runners.rewards.combination import WeightedSum
from runners.rewards.compressibility import JpegReward
from runners.rewards.protocol import Reward, RewardOutput
from runners.rewards.scene_quality import BackgroundPurity, LayoutDiversity, ShapeSharpness
from runners.rewards.scenes import ScenesReward

REWARDS: Mapping[str, Callable[[], Reward]] = {
    "scenes": ScenesReward,
    "released_scenes": partial(ScenesReward, released=True),
    "background": BackgroundPurity,
    "sharpness": ShapeSharpness,
    "diversity": LayoutDiversity,
    "jpeg": JpegReward,
}


def load_reward(spec: str | Mapping[str, float], field: str = "reward") -> Reward:
    """The reward of a recipe: a name, or names with the weights of their sum. Raises FieldError for unknown ones."""
    names = [spec] if isinstance(spec, str) else list(spec)
    for name in names:
        if name not in REWARDS:
            raise FieldError(field, f"unknown reward {name!r}{choices(name, REWARDS)}")
    if isinstance(spec, str):
        return REWARDS[spec]()
    return WeightedSum({name: REWARDS[name]() for name in names}, spec)


__all__ = ["REWARDS", "Reward", "RewardOutput", "load_reward"]
