"""The held-out panel of the embedded world: what it is for, and that it does not see what the reward sees."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from runners.prompts import Prompt
from runners.rewards.scene_quality import BackgroundPurity, LayoutDiversity, ShapeSharpness
from runners.tiny.scenes import GROUND, IMAGE_SIZE, SHAPES, SceneObject, render

PROMPT = Prompt(text="a circle", tag="single_object")


def one(shape: str = "circle", x: float = 16, y: float = 16, color: str = "red") -> NDArray[np.uint8]:
    return render([SceneObject(shape=shape, color=color, x=x, y=y, radius=4)])


def score(measure: object, *images: NDArray[np.uint8], prompts: list[Prompt] | None = None) -> list[float]:
    found = measure(np.stack(images), prompts or [PROMPT] * len(images))  # type: ignore[operator]
    return found.score.tolist()


@pytest.mark.parametrize("shape", SHAPES)
def test_clean_scenes_are_pure_and_sharp_whatever_was_asked_for(shape: str) -> None:
    assert score(BackgroundPurity(), one(shape), one(shape, 5, 27, "blue")) == [1.0, 1.0]
    assert min(score(ShapeSharpness(), one(shape), one(shape, 20, 10, "green"))) > 0.95


def test_dirt_away_from_shapes_is_seen_and_the_shape_itself_is_not() -> None:
    dirty = one()
    dirty[:2, :] = 120
    clean, found = score(BackgroundPurity(), one(), dirty)
    away = IMAGE_SIZE**2 - 12**2  # a circle of radius 4 is 8 pixels wide, 2 more to each side
    assert clean == 1.0
    assert found == pytest.approx(1 - 2 * IMAGE_SIZE / away)


def test_a_smear_is_no_shape_and_counts_as_dirt() -> None:
    smear = np.broadcast_to(np.array(GROUND, np.uint8), (IMAGE_SIZE, IMAGE_SIZE, 3)).copy()
    smear[10:14, 2:30] = (225, 50, 50)
    assert score(BackgroundPurity(), smear)[0] == pytest.approx(1 - 4 * 28 / IMAGE_SIZE**2)


def test_blurred_shapes_are_less_sharp_and_nothing_is_not_sharp_at_all() -> None:
    box = np.zeros((IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8) + np.array(GROUND, np.uint8)
    box[10:18, 10:15] = (225, 50, 50)  # a box of 8 x 5 is neither square nor circle
    empty = np.zeros_like(box) + np.array(GROUND, np.uint8)
    sharp, odd, none = score(ShapeSharpness(), one("square"), box, empty)
    assert sharp > 0.9 > odd > 0
    assert none == 0


def test_layouts_are_compared_within_a_prompt_alone() -> None:
    left, right = one(x=6), one(x=26)
    assert score(LayoutDiversity(), left, left) == [0.0, 0.0]
    assert score(LayoutDiversity(), left, one(x=6, color="blue")) == pytest.approx([0.0, 0.0], abs=0.05)
    assert score(LayoutDiversity(), left, right) == pytest.approx([1.0, 1.0])
    assert score(LayoutDiversity(), left, right, left) == pytest.approx([0.5, 1.0, 0.5])
    other = Prompt(text="a square", tag="single_object")
    assert score(LayoutDiversity(), left, right, prompts=[PROMPT, other]) == [0.0, 0.0]
