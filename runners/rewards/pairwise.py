"""Rewards `pairwise` and `pairwise-judge`: the share of an image's comparisons with others of its prompt that it wins.

Source: Pref-GRPO (Wang et al. 2025, arXiv 2508.20751), which fits group-relative advantages to preferences.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from ablate.recipe import RewardTerm
from runners.prompts import Prompt
from runners.rewards import load_term
from runners.rewards.groups import Pair, groups, pairs, shares_won
from runners.rewards.http import Failure
from runners.rewards.judge import ChatReward
from runners.rewards.protocol import About, Images, Reward, RewardOutput

PREF_GRPO = "Wang et al. 2025 (arXiv 2508.20751)"
ALONE = 0.5  # the score of the only image of its prompt: what an average one has in a group
COMPARE = """\
You are given a text caption and two generated images based on that caption. \
Your task is to evaluate and compare these images based on two key criteria:
1. Alignment with the Caption: Assess how well each image aligns with the provided caption. \
Consider the accuracy of depicted objects, their relationships, and attributes as described in the caption.
2. Overall Image Quality: Examine the visual quality of each image, \
including clarity, detail preservation, color accuracy, and overall aesthetic appeal.
Compare both images using the above criteria and select the one that better aligns with the caption \
while exhibiting superior visual quality.
Provide a clear conclusion such as "Image 1 is better.", "Image 2 is better." and "Both images are equally good."
Your task is provided as follows:
Text Caption: [{prompt}]"""


@dataclass(kw_only=True)
class PairwiseReward(Reward):
    """The share of the others of its prompt whose score an image's score beats, ties counting half.

    `reward` is any reward: a name, or {name: ..., and its parameters}. Its scores are recorded as `compared`.
    """

    compares: ClassVar[bool] = True
    about: ClassVar[About] = About(units="share of comparisons won", source=PREF_GRPO)
    reward: str | dict[str, Any]

    def __post_init__(self) -> None:
        given = {"name": self.reward} if isinstance(self.reward, str) else self.reward
        if not isinstance(given.get("name"), str) or {"weight", "label"} & given.keys():
            raise ValueError(f"reward: got {given}, expected {{name: ...}} with parameters, without weight and label")
        self._inner = load_term(RewardTerm(**given))

    @property  # that of the reward within
    def remote(self) -> bool:  # type: ignore[override]
        return self._inner.remote

    @property
    def patience(self) -> float | None:  # type: ignore[override]
        return self._inner.patience

    @property
    def identity(self) -> str:
        return f"pairwise-1 of {self._inner.identity}"

    def load(self, device: str) -> None:
        self._inner.load(device)

    def fingerprint(self) -> str:
        return self._inner.fingerprint()

    def self_check(self) -> None:
        """That of the reward within."""
        self._inner.self_check()

    def check_inputs(self) -> tuple[Images, list[Prompt]]:
        return self._inner.check_inputs()

    def __call__(self, images: Images, prompts: Sequence[Prompt]) -> RewardOutput:
        inner = self._inner(images, prompts)
        compared = [pair for group in groups(prompts) for pair in pairs(group)]
        scores = np.where(inner.missing, np.nan, inner.score)  # an infinite one wins nothing
        outcomes = [(1 + np.sign(scores[i] - scores[j])) / 2 for i, j in compared]
        score, _ = shares_won(len(images), compared, outcomes)
        score = np.where(_wanted(len(images), compared) + inner.missing, score, ALONE)
        reasons = list(inner.reasons or [""] * len(images))
        for i in np.flatnonzero(np.isnan(score) & ~inner.missing):
            reasons[i] = "no other image of its prompt has a score"
        return RewardOutput(
            score=score, parts={**inner.parts, "compared": inner.score}, reasons=tuple(reasons) if any(reasons) else ()
        )


@dataclass(kw_only=True)
class PairwiseJudge(ChatReward):
    """The share of comparisons that a model decides for an image, each pair of a prompt asked in both orders.

    `pattern` finds 1 or 2 for the better image; what it finds without a number is a tie, and an answer in which it
    finds nothing is left out. `opponents`, an even number, bounds with how many of its group each
    image is compared; null: with all.
    """

    compares: ClassVar[bool] = True
    about: ClassVar[About] = About(
        units="share of comparisons won", source=f"{PREF_GRPO}; question of UnifiedReward", weights="on the server"
    )
    template: str = COMPARE
    pattern: str = r"(?i)Image ([12]) is better|equally good"
    opponents: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.opponents is not None and (self.opponents < 2 or self.opponents % 2):
            raise ValueError(f"opponents: got {self.opponents}, expected an even number, or null for all")

    @property
    def identity(self) -> str:
        bounded = "" if self.opponents is None else f" opponents={self.opponents}"
        return f"pairwise-judge-1 {self.model} {self.question}{bounded}"

    def __call__(self, images: Images, prompts: Sequence[Prompt]) -> RewardOutput:
        chosen = [pair for group in groups(prompts) for pair in pairs(group, self.opponents)]
        asked = [order for i, j in chosen for order in ((i, j), (j, i))]
        replies = self.replies(images, [(order, prompts[order[0]].text) for order in asked]) if asked else []
        score, told = shares_won(len(images), asked, [_outcome(reply) for reply in replies])
        wanted = _wanted(len(images), asked)
        reasons = [""] * len(images)
        for order, reply in zip(asked, replies, strict=True):
            for i in order:
                if isinstance(reply, Failure) and np.isnan(score[i]):
                    reasons[i] = reply.reason
        return RewardOutput(
            score=np.where(wanted, score, ALONE),
            parts={"answered": np.where(wanted, told / np.maximum(wanted, 1), 1.0)},
            reasons=tuple(reasons) if any(reasons) else (),
        )


def _wanted(number: int, compared: Sequence[Pair]) -> NDArray[np.int_]:
    """How many comparisons each of `number` images takes part in."""
    return np.bincount(np.ravel(compared).astype(int), minlength=number)


def _outcome(reply: re.Match[str] | Failure) -> float:
    """1 where the first image is better, 0 the second, 1/2 neither."""
    return np.nan if isinstance(reply, Failure) else {"1": 1.0, "2": 0.0}.get(reply[1], 0.5)
