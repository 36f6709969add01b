"""Rewards of a user's own, some of which fail."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from runners.prompts import Prompt
from runners.rewards import RewardUnavailable


def brightness(images: np.ndarray, prompts: Sequence[Prompt], scale: float = 1.0) -> np.ndarray:
    return scale * images.mean((1, 2, 3)) / 255


def not_of_circles(images: np.ndarray, prompts: Sequence[Prompt]) -> np.ndarray:
    """No number for images of prompts with circles."""
    circles = np.array(["circle" in prompt.text for prompt in prompts])
    return np.where(circles, np.nan, brightness(images, prompts))


def not_of_grey(images: np.ndarray, prompts: Sequence[Prompt]) -> np.ndarray:
    """No number for images of one colour."""
    return np.where(np.ptp(images, (1, 2, 3)) == 0, np.nan, brightness(images, prompts))


def raises_at_circles(images: np.ndarray, prompts: Sequence[Prompt]) -> np.ndarray:
    if any("circle" in prompt.text for prompt in prompts):
        raise ValueError("no circles, please")
    return brightness(images, prompts)


def until_told(images: np.ndarray, prompts: Sequence[Prompt], file: str) -> np.ndarray:
    """Available as long as a file is there that counts the calls left."""
    left = int(Path(file).read_text())
    if left == 0:
        raise RewardUnavailable("the server is down")
    Path(file).write_text(str(left - 1))
    return brightness(images, prompts)


def raises(images: np.ndarray, prompts: Sequence[Prompt]) -> np.ndarray:
    raise ConnectionError("no server at port 18085")


def undefined(images: np.ndarray, prompts: Sequence[Prompt]) -> np.ndarray:
    return np.full(len(images), np.nan)


def of_the_self_check(images: np.ndarray, prompts: Sequence[Prompt]) -> np.ndarray:
    """A number for the prompt of the self-check alone."""
    return np.where(["OK" in prompt.text for prompt in prompts], brightness(images, prompts), np.nan)


def of_five(images: np.ndarray, prompts: Sequence[Prompt]) -> np.ndarray:
    """Five scores, whatever the number of images."""
    return np.zeros(5)
