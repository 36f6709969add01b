"""The embedded world: what is drawn is found, what is junk is not, and every clean render is right."""

from __future__ import annotations

import collections

import numpy as np
import pytest
from numpy.typing import NDArray

from runners.prompts import Prompt
from runners.rewards.rules import Detection
from runners.rewards.scenes import ScenesReward, detect
from runners.tiny.scenes import (
    COLORS,
    FAMILIES,
    GROUND,
    IMAGE_SIZE,
    SHAPES,
    SceneObject,
    ScenePrompts,
    all_prompts,
    coverage,
    draw_objects,
    render,
)

NUM_RENDERS = 600
BLANK = np.broadcast_to(np.array(GROUND, np.uint8), (IMAGE_SIZE, IMAGE_SIZE, 3))


@pytest.fixture(scope="module")
def scenes() -> list[tuple[Prompt, list[SceneObject], NDArray[np.uint8]]]:
    generator = np.random.default_rng(0)
    prompts = ScenePrompts().train(NUM_RENDERS // 2, generator) + ScenePrompts().fixed("evaluation", NUM_RENDERS // 2)
    drawn = [(prompt, draw_objects(prompt, generator)) for prompt in prompts]
    return [(prompt, objects, render(objects)) for prompt, objects in drawn]


def centre(found: Detection) -> tuple[float, float]:
    left, top, right, bottom = found.box
    return (left + right) / 2, (top + bottom) / 2


def test_clean_renders_are_accurate_in_every_family(scenes: list) -> None:
    prompts, _, images = zip(*scenes, strict=True)
    output = ScenesReward()(np.stack(images), prompts)
    for family in FAMILIES:
        own = [p.tag == family for p in prompts]
        assert sum(own) == NUM_RENDERS / len(FAMILIES)
        assert output.parts["accuracy"][own].mean() >= 0.99
        assert output.score[own].mean() >= 0.99
    wrong = [reason for reason, right in zip(output.reasons, output.parts["accuracy"], strict=True) if not right]
    assert all(wrong)  # each with its reason


def test_exactly_the_drawn_objects_are_found(scenes: list) -> None:
    for prompt, objects, image in scenes:
        (found,) = detect(image[None])
        kinds = collections.Counter((o.shape, o.color) for o in objects)
        assert collections.Counter((d.cls, d.color) for d in found) == kinds, prompt.text
        for o in objects:
            same = [d for d in found if (d.cls, d.color) == (o.shape, o.color)]
            assert min(max(abs(x - o.x), abs(y - o.y)) for x, y in map(centre, same)) <= 1


def test_a_render_is_wrong_for_another_prompt(scenes: list) -> None:
    """Guards against a reward that is always 1: images judged by a prompt of another family or content."""
    prompts, _, images = zip(*scenes, strict=True)
    shifted = prompts[1:] + prompts[:1]
    different = [a.include != b.include for a, b in zip(prompts, shifted, strict=True)]
    output = ScenesReward()(np.stack(images), shifted)
    assert output.parts["accuracy"][different].mean() < 0.2
    assert (output.score >= 0).all()


def test_images_are_judged_alike_one_by_one_and_together(scenes: list) -> None:
    noise = np.random.default_rng(0).normal(0, 30, (len(scenes), *BLANK.shape))
    images = (np.stack([image for *_, image in scenes]) + noise).clip(0, 255).astype(np.uint8)
    assert detect(images) == [detect(image[None])[0] for image in images]


def test_junk_is_no_object() -> None:
    generator = np.random.default_rng(0)
    for _ in range(20):
        assert detect(generator.integers(0, 256, BLANK.shape, dtype=np.uint8)[None]) == [[]]
    assert detect(BLANK[None]) == [[]]
    assert detect(np.full(BLANK.shape, 255, np.uint8)[None]) == [[]]
    assert detect(np.full(BLANK.shape, COLORS["red"], np.uint8)[None]) == [[]]


@pytest.mark.parametrize("box", [(2, 30, 10, 16), (12, 15, 4, 28), (4, 26, 4, 26), (10, 12, 10, 12), (5, 8, 5, 17)])
def test_bars_and_dots_are_no_object(box: tuple[int, int, int, int]) -> None:
    top, bottom, left, right = box
    image = BLANK.copy()
    image[top:bottom, left:right] = COLORS["green"]
    assert detect(image[None]) == [[]]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("color", COLORS)
def test_objects_are_found_faint_and_at_the_border(shape: str, color: str) -> None:
    for x, y in ((16, 16), (4.5, 27.4), (27.3, 5.2)):
        ((found,),) = detect(render([SceneObject(shape=shape, color=color, x=x, y=y, radius=4)])[None])
        assert (found.cls, found.color) == (shape, color)
    noisy = render([SceneObject(shape=shape, color=color, x=16, y=16, radius=4)]).astype(float)
    noisy += np.random.default_rng(0).normal(0, 8, noisy.shape)
    ((found,),) = detect(noisy.clip(0, 255).astype(np.uint8)[None])
    assert (found.cls, found.color) == (shape, color)


@pytest.mark.parametrize(("shape", "area"), [("circle", np.pi * 16), ("square", 4 * (0.85 * 4) ** 2), ("triangle", 32)])
def test_coverage_has_the_area_of_its_shape(shape: str, area: float) -> None:
    covered = coverage(shape, 16.3, 15.8, 4)
    assert covered.sum() == pytest.approx(area, rel=0.05)
    assert covered.min() >= 0
    assert covered.max() == 1


# prompts


def test_the_six_families_are_those_of_geneval() -> None:
    prompts = all_prompts()
    assert tuple(prompts) == FAMILIES
    texts = [prompt.text for family in prompts.values() for prompt in family]
    assert len(texts) == len(set(texts)) == 126
    assert all(prompt.tag == tag for tag, family in prompts.items() for prompt in family)


def test_training_draws_every_family_equally_often() -> None:
    generator = np.random.default_rng(0)
    for num_prompts in (6, 24, 48, 20):
        tags = collections.Counter(p.tag for p in ScenePrompts().train(num_prompts, generator))
        assert sum(tags.values()) == num_prompts
        assert max(tags.values()) - min(tags[family] for family in FAMILIES) <= (num_prompts % 6 > 0)


def test_a_remainder_favours_no_family() -> None:
    generator = np.random.default_rng(0)
    tags = collections.Counter(p.tag for _ in range(600) for p in ScenePrompts().train(2, generator))
    assert len(tags) == 6
    assert all(150 < count < 250 for count in tags.values())


def test_fixed_lists_are_balanced_and_always_the_same() -> None:
    for split in ("development", "evaluation"):
        prompts = ScenePrompts().fixed(split, 60)
        assert prompts == ScenePrompts().fixed(split, 60)
        assert prompts[:12] == ScenePrompts().fixed(split, 12)
        assert set(collections.Counter(p.tag for p in prompts).values()) == {10}


def test_no_prompt_of_a_large_family_is_both_trained_and_evaluated() -> None:
    source, generator = ScenePrompts(), np.random.default_rng(0)
    trained = {p.text for _ in range(20) for p in source.train(300, generator)}
    development, evaluation = ({p.text for p in source.fixed(split, 2000)} for split in ("development", "evaluation"))
    sizes = {tag: len(family) for tag, family in all_prompts().items()}
    for tag, family in all_prompts().items():
        own = {p.text for p in family}
        if sizes[tag] >= 12:
            parts = [own & trained, own & development, own & evaluation]
            assert sum(map(len, parts)) == len(set.union(*parts)) == len(own)
            assert len(parts[1]) == len(parts[2]) == len(own) // 6
        else:
            assert own <= trained & development & evaluation
    assert {tag for tag, size in sizes.items() if size >= 12} == {"colors", "position", "color_attr"}
