"""Rewards by name, and weighted sums of them."""

from __future__ import annotations

import importlib
import json
from collections import Counter
from collections.abc import Mapping
from functools import cache
from typing import Any

from ablate.components import instantiate
from ablate.recipe import RewardSpec, RewardTerm, reward_terms
from ablate.source import FieldError, choices
from runners.rewards.combination import WeightedSum
from runners.rewards.function import FunctionReward
from runners.rewards.protocol import About, Reward, RewardOutput, RewardUnavailable

REWARDS: Mapping[str, str] = {
    "scenes": "runners.rewards.scenes:ScenesReward",
    "background": "runners.rewards.scene_quality:BackgroundPurity",
    "sharpness": "runners.rewards.scene_quality:ShapeSharpness",
    "diversity": "runners.rewards.scene_quality:LayoutDiversity",
    "jpeg": "runners.rewards.jpeg:JpegReward",
    "ocr:ppocrv6-small": "runners.rewards.ocr:OCRReward",
    "geneval-hf": "runners.rewards.geneval:GenEvalReward",
    "aesthetic": "runners.rewards.aesthetic:AestheticReward",
    "clipscore": "runners.rewards.similarity:ClipScoreReward",
    "hpsv2.1": "runners.rewards.hps:HPSReward",
    "imagereward": "runners.rewards.imagereward:ImageReward",
    "pickscore": "runners.rewards.similarity:PickScoreReward",
    "judge": "runners.rewards.judge:JudgeReward",
    "unified-reward": "runners.rewards.judge:UnifiedReward",
    "pairwise": "runners.rewards.pairwise:PairwiseReward",
    "pairwise-judge": "runners.rewards.pairwise:PairwiseJudge",
    "remote": "runners.rewards.remote:RemoteReward",
}
RESERVED = {"score", "accuracy"}


def reward_class(name: str) -> Any:
    """The class of a built-in reward. Modules are imported when they are asked for: some need torch."""
    module, _, attribute = REWARDS[name].partition(":")
    return getattr(importlib.import_module(module), attribute)


def load_reward(spec: RewardSpec, field: str = "reward") -> WeightedSum:
    """The reward of a recipe, as the sum of its terms. Raises FieldError for unknown names and impossible parameters.

    Equal terms of a process are one instance, so that weights are in memory once.
    """
    terms = reward_terms(spec)
    called = Counter(term.called for term in terms)
    if reserved := RESERVED & called.keys():
        raise FieldError(field, f"label {min(reserved)!r} is taken by the sum and its parts; give another label")
    if repeated := [name for name, number in called.items() if number > 1]:
        raise FieldError(field, f"{repeated[0]!r} stands for two rewards; give each a label of its own")
    return WeightedSum(
        {term.called: load_term(term, field) for term in terms}, {term.called: term.weight for term in terms}
    )


def load_term(term: RewardTerm, field: str = "reward") -> Reward:
    """A single reward, without its weight."""
    try:
        return _instance(term.name, json.dumps(term.parameters, sort_keys=True, default=str))
    except ValueError as error:  # FieldError names a parameter, which lies within the field
        raise FieldError(field, str(error)) from None


@cache
def _instance(name: str, parameters: str) -> Reward:
    given: dict[str, Any] = json.loads(parameters)
    if name in REWARDS:
        reward: Reward = instantiate(reward_class(name), name, given)
        return reward
    if ":" in name:
        return FunctionReward(name, given)
    raise ValueError(f"unknown reward {name!r}{choices(name, REWARDS)}, or 'module:function' of your own")


__all__ = ["REWARDS", "About", "Reward", "RewardOutput", "RewardUnavailable", "WeightedSum", "load_reward", "load_term"]
