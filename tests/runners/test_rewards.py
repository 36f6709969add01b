"""Rewards that need no model, and their sums."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from ablate.recipe import RewardTerm
from ablate.source import FieldError
from runners.prompts import Prompt
from runners.rewards import load_reward
from runners.rewards.text import quoted, text_score

PROMPTS = [Prompt(text="a"), Prompt(text="b")]
FLAT = np.full((32, 32, 3), 128, np.uint8)
NOISE = np.random.default_rng(0).integers(0, 256, (32, 32, 3)).astype(np.uint8)


@pytest.mark.parametrize(
    ("target", "read", "score"),
    [
        ("Open", "we are OPEN now", 1),  # part of what was read
        ("open now", "o p e n n o w", 1),  # spaces do not count
        ("open", "opan", 0.75),
        ("open", "nothing like it at all", 0),  # the distance is capped
        ("open", "", 0),
    ],
)
def test_the_text_of_a_prompt_is_compared_with_what_was_read(target: str, read: str, score: float) -> None:
    assert text_score(target, read) == pytest.approx(score)


@pytest.mark.parametrize("target", ["", "  "])
def test_a_target_without_characters_asks_for_nothing(target: str) -> None:
    """The released rule divides by zero."""
    with pytest.raises(ValueError, match="expected at least one character"):
        text_score(target, "anything")


def test_the_text_is_what_stands_in_quotes() -> None:
    assert quoted('a sign that says "Mind the gap" and "another"') == "Mind the gap"
    assert quoted('a sign that says "nothing') == quoted("a sign") == ""


def test_flat_images_compress_better() -> None:
    flat, noise = load_reward("jpeg")(np.stack([FLAT, NOISE]), PROMPTS).score
    assert 0 > flat > noise


def test_compressibility_is_kilobytes_over_the_scale_of_training() -> None:
    images, buffer = np.stack([FLAT, NOISE]), io.BytesIO()
    Image.fromarray(NOISE).save(buffer, format="JPEG", quality=95)
    kilobytes = len(buffer.getvalue()) / 1000
    assert load_reward("jpeg")(images, PROMPTS).score[1] == -kilobytes
    trained = load_reward((RewardTerm(name="jpeg", scale=500, incompressible=True),))
    assert trained(images, PROMPTS).score[1] == kilobytes / 500
    assert trained.identity == "jpeg-incompressible-1 scale=500"
    with pytest.raises(FieldError, match="got 0, expected more than 0"):
        load_reward((RewardTerm(name="jpeg", scale=0),))


def test_a_sum_of_rewards_has_its_terms_and_records_each() -> None:
    images = np.stack([FLAT, NOISE])
    both = load_reward({"scenes": 2, "jpeg": 0.5})
    output = both(images, PROMPTS)
    scenes, jpeg = (load_reward(name)(images, PROMPTS).score for name in ("scenes", "jpeg"))
    np.testing.assert_allclose(output.terms, np.stack([scenes, jpeg], 1))
    assert output.weights == (2, 0.5)
    np.testing.assert_allclose(output.score, 2 * scenes + 0.5 * jpeg)
    assert output.parts.keys() == {"accuracy", "scenes", "jpeg"}
    assert both.identity == "2 scenes-1 + 0.5 jpeg-1"


@pytest.mark.parametrize(("spec", "message"), [("scnes", "did you mean 'scenes'"), ({"jpg": 1}, "did you mean 'jpeg'")])
def test_unknown_rewards_are_named(spec, message: str) -> None:
    with pytest.raises(FieldError, match=message):
        load_reward(spec)
