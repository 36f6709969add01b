"""What a reward is: images and their prompts in, scores out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from runners.prompts import Prompt, Requirement

Images = NDArray[np.uint8]  # [b, h, w, 3] in 0..255


class RewardUnavailable(Exception):
    """A reward that cannot score anything now: no weights, no server. The message says what to do about it."""


@dataclass(frozen=True, kw_only=True)
class RewardOutput:
    """`score` [b] is what is trained on, NaN where it is missing; `parts` [b] each are recorded beside it; `reasons`
    say why an image failed.

    `terms` [b, r] are the rewards whose sum with `weights` [r] the score is, None for a single one.
    """

    score: NDArray[np.float64]
    terms: NDArray[np.float64] | None = None
    weights: tuple[float, ...] = (1.0,)
    parts: Mapping[str, NDArray[np.float64]] = field(default_factory=dict)
    reasons: tuple[str, ...] = ()

    @property
    def missing(self) -> NDArray[np.bool_]:
        """Which images have no score, [b]."""
        return ~np.isfinite(self.score)

    def reason(self, row: int) -> str:
        """Why an image failed, or has no score."""
        given = self.reasons[row] if self.reasons else ""
        return given or ("not a finite number" if self.missing[row] else "")


def joined(outputs: Sequence[RewardOutput]) -> RewardOutput:
    """The scores of several batches as those of one; what a batch does not have is missing in it."""
    first = next((o for o in outputs if not o.missing.all()), outputs[0])
    names = dict.fromkeys(name for o in outputs for name in o.parts)

    def rows(output: RewardOutput, values: NDArray[np.float64] | None) -> NDArray[np.float64]:
        return np.full(output.score.shape, np.nan) if values is None else values

    return replace(
        first,
        score=np.concatenate([o.score for o in outputs]),
        terms=None if first.terms is None else np.concatenate([_terms(o, first.terms.shape[1]) for o in outputs]),
        parts={name: np.concatenate([rows(o, o.parts.get(name)) for o in outputs]) for name in names},
        reasons=tuple(reason for o in outputs for reason in o.reasons or ("",) * len(o.score))
        if any(o.reasons for o in outputs)
        else (),
    )


def _terms(output: RewardOutput, number: int) -> NDArray[np.float64]:
    return np.full((len(output.score), number), np.nan) if output.terms is None else output.terms


def missing(number: int, reason: str) -> RewardOutput:
    """No scores for so many images, and why."""
    return RewardOutput(score=np.full(number, np.nan), reasons=(reason,) * number)


@dataclass(frozen=True, kw_only=True)
class About:
    """What `ablate rewards` shows of a reward."""

    units: str
    source: str
    weights: str = "none"  # hub ids or packages, with the files that are used
    licence: str = ""  # of the weights
    gibibytes: float = 0.0  # of memory, with its weights


class Reward(ABC):
    """A dataclass: its fields are its parameters in a YAML file; its docstring and `about` are its documentation.

    Making one is cheap and needs no weights, as every plan does it. Weights are loaded by `load`.
    """

    about: ClassVar[About]
    remote: ClassVar[bool] = False  # waits for another machine, so that this one can do something else meanwhile
    patience: ClassVar[float | None] = None  # seconds after which a call ends by itself, where it has such a limit
    compares: ClassVar[bool] = False  # a score depends on the other images of its prompt

    @property
    @abstractmethod
    def identity(self) -> str:
        """The implementation with its version, and the weights that it names; part of every cell id."""

    def load(self, device: str) -> None:  # noqa: B027  (most small ones have nothing to load)
        """Bring the weights to a device ("cpu", "cuda:0"), from the disk the first time.

        Raises RewardUnavailable where they are not to be had, saying what to put where.
        """

    def fingerprint(self) -> str:
        """Of the weights that were loaded; empty where the identity says it all. Goes into a cell's record."""
        return ""

    @abstractmethod
    def __call__(self, images: Images, prompts: Sequence[Prompt]) -> RewardOutput:
        """Scores of images [b, h, w, 3] in 0..255 for their prompts; NaN for an image that it could not score."""

    def self_check(self) -> None:
        """Score small fixed inputs, before a cell starts. Raises RewardUnavailable where that fails.

        Here: a score for each image, finite, and the same twice.
        """
        images, prompts = self.check_inputs()
        first, again = self(images, prompts).score, self(images, prompts).score
        if first.shape != (len(images),) or not np.isfinite(first).all():
            raise RewardUnavailable(f"{self.identity}: expected {len(images)} finite scores, got {first}")
        if not np.array_equal(first, again):
            raise RewardUnavailable(f"{self.identity}: scored the same images {first} and then {again}")

    def check_inputs(self) -> tuple[Images, list[Prompt]]:
        """Images and prompts of the self-check."""
        return fixed_inputs()


def fixed_inputs() -> tuple[Images, list[Prompt]]:
    """Three images, 64 pixels wide: grey, a red square on white, and noise; the same prompt for all."""
    square = np.full((64, 64, 3), 255, np.uint8)
    square[16:48, 16:48] = (220, 30, 30)
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    prompt = Prompt(
        text='a red square that says "OK"',
        tag="colors",
        include=(Requirement(cls="square", count=1, color="red"),),
    )
    return np.stack([np.full_like(square, 128), square, noise]), [prompt] * 3
