"""GenEval's own measure and its released training reward, against their definition written down once more."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runners.prompts import Prompt, Requirement
from runners.rewards.rules import Detection, correct, relations, verdict

CAT, DOG = "cat", "dog"


def at(cls: str, x: float = 50, y: float = 50, color: str = "red") -> Detection:
    return Detection(cls=cls, color=color, box=(x - 5, y - 5, x + 5, y + 5))


def asked(*include: Requirement, exclude: tuple[Requirement, ...] = ()) -> Prompt:
    return Prompt(text="", include=include, exclude=exclude)


def one(cls: str, **more: object) -> Requirement:
    return Requirement(cls=cls, count=1, **more)  # type: ignore[arg-type]


SINGLE = asked(one(CAT))
TWO = asked(one(CAT), one(DOG))
COUNTING = asked(Requirement(cls=CAT, count=2), exclude=(Requirement(cls=CAT, count=3),))
COLORS = asked(one(CAT, color="red"))
POSITION = asked(one(CAT), one(DOG, position=("left of", 0)))
COLOR_ATTR = asked(one(CAT, color="red"), one(DOG, color="blue"))


@pytest.mark.parametrize(
    ("prompt", "found", "official", "strict", "released", "repaired"),
    [
        (SINGLE, [], False, False, 0, 0),
        (SINGLE, [at(CAT)], True, True, 1, 1),
        (SINGLE, [at(CAT), at(CAT)], True, False, 0, 0),  # one more is correct, and not strict
        (SINGLE, [at(CAT)] * 3, True, False, -1, 0),
        (TWO, [at(CAT), at(DOG), at(DOG)], True, False, 1 / 2, 1 / 2),
        (TWO, [at(DOG)], False, False, 1 / 2, 1 / 2),
        (COUNTING, [at(CAT)], False, False, 1 / 2, 1 / 2),
        (COUNTING, [at(CAT)] * 2, True, True, 1, 1),
        (COUNTING, [at(CAT)] * 3, False, False, 1 / 2, 1 / 2),  # excluded
        (COUNTING, [at(CAT)] * 5, False, False, -1 / 2, 0),
        (COLORS, [at(CAT)], True, True, 1, 1),
        (COLORS, [at(CAT, color="blue")], False, False, 1 / 2, 1 / 2),
        (COLORS, [at(CAT), at(CAT, color="blue")], True, False, 0, 0),  # the most confident one is red
        (COLORS, [at(CAT, color="blue"), at(CAT)], False, False, 0, 0),
        (POSITION, [at(CAT, 50), at(DOG, 20)], True, True, 1, 1),
        (POSITION, [at(CAT, 50), at(DOG, 80)], False, False, 3 / 4, 2 / 3),  # the quirk and its repair
        (POSITION, [at(DOG, 20)], False, False, (0 + 1 + 0) / 3, 1 / 3),
        (POSITION, [at(CAT, 50)], False, False, (1 + 0 + 0) / 3, 1 / 3),
        (POSITION, [at(CAT, 50), at(DOG, 20), at(DOG, 80)], True, False, 1 / 3, 1 / 3),
        (COLOR_ATTR, [at(CAT), at(DOG, color="blue")], True, True, 1, 1),
        (COLOR_ATTR, [at(CAT), at(DOG)], False, False, 3 / 4, 3 / 4),
        (COLOR_ATTR, [at(CAT, color="blue"), at(DOG)], False, False, 1 / 2, 1 / 2),
    ],
)
def test_golden_cases(
    prompt: Prompt, found: list[Detection], official: bool, strict: bool, released: float, repaired: float
) -> None:
    assert correct(found, prompt) == official
    assert verdict(found, prompt).accurate == verdict(found, prompt, released=True).accurate == strict
    assert verdict(found, prompt, released=True).score == pytest.approx(released)
    assert verdict(found, prompt).score == pytest.approx(repaired)


@pytest.mark.parametrize(("number", "holds"), [(1, True), (2, False)])
def test_of_what_is_excluded_only_the_class_and_the_count_are_looked_at(number: int, holds: bool) -> None:
    prompt = asked(one(CAT), exclude=(Requirement(cls=DOG, count=2, color="blue", position=("left of", 0)),))
    found = [at(CAT), *[at(DOG, x=90, color="red")] * number]
    assert correct(found, prompt) == verdict(found, prompt).accurate == holds


def test_nothing_required_and_nothing_excluded_is_correct() -> None:
    nothing = asked(exclude=(one(DOG),))
    assert correct([at(CAT)], nothing)
    assert not correct([at(DOG)], nothing)


def released_reward(found: dict[str, list[Detection]], prompt: Prompt) -> tuple[bool, float]:
    """`evaluate_reward` of DiffusionNFT's gen_eval.py: strict_correct, which knows no `exclude`, and the score."""
    strict, rewards, groups = True, [], []
    for r in prompt.include:
        own, holds = found.get(r.cls, []), True
        rewards.append(1 - abs(r.count - len(own)) / r.count)
        if len(own) != r.count:
            holds = False
            if r.color is not None or r.position is not None:
                rewards.append(0.0)
        else:
            if r.color is not None:
                right = [d.color for d in own].count(r.color)
                rewards.append(1 - abs(r.count - right) / r.count)
                holds = right == r.count
            if r.position is not None and holds:
                target = groups[r.position[1]]
                if target is None:
                    holds = False
                    rewards.append(0.0)
                else:
                    if not all(r.position[0] in relations(a, b) for a in own for b in target):
                        holds = False
                        rewards.append(0.0)
                    rewards.append(1.0)
        groups.append(own if holds else None)
        strict = strict and holds
    return strict, sum(rewards) / len(rewards) if rewards else 0


def official_measure(found: dict[str, list[Detection]], prompt: Prompt) -> bool:
    """`evaluate` of GenEval's evaluate_images.py."""
    right, groups = True, []
    for r in prompt.include:
        own, holds = found.get(r.cls, [])[: r.count], True
        if len(own) < r.count:
            holds = False
        else:
            if r.color is not None and [d.color for d in own].count(r.color) < r.count:
                holds = False
            if r.position is not None and holds:
                target = groups[r.position[1]]
                holds = target is not None and all(r.position[0] in relations(a, b) for a in own for b in target)
        groups.append(own if holds else None)
        right = right and holds
    return right and not any(len(found.get(r.cls, [])) >= r.count for r in prompt.exclude)


PLACES = st.sampled_from([10, 40, 45, 80])
DETECTIONS = st.lists(
    st.builds(at, st.sampled_from([CAT, DOG, "bird"]), PLACES, PLACES, st.sampled_from(["red", "blue"])), max_size=6
)
POSITIONS = st.sampled_from([None, "left of", "right of", "above", "below"])
SHADES = st.sampled_from([None, "red"])


@st.composite
def prompts(draw: st.DrawFn) -> Prompt:
    """Of up to three objects, every one of which may have colour and place at once, as GenEval's own never do."""
    include = []
    for i, cls in enumerate(draw(st.permutations([CAT, DOG, "bird"]))[: draw(st.integers(1, 3))]):
        relation = draw(POSITIONS) if i else None
        position = (relation, draw(st.integers(0, i - 1))) if relation else None
        include.append(Requirement(cls=cls, count=draw(st.integers(1, 3)), color=draw(SHADES), position=position))
    excluded = st.builds(Requirement, cls=st.sampled_from([CAT, DOG]), count=st.integers(1, 4))
    return asked(*include, exclude=tuple(draw(st.lists(excluded, max_size=1))))


@given(DETECTIONS, prompts())
@settings(max_examples=500, deadline=None)
def test_both_forms_are_those_that_were_released(detections: list[Detection], prompt: Prompt) -> None:
    found = {cls: [d for d in detections if d.cls == cls] for cls in (CAT, DOG, "bird")}
    judged = verdict(detections, prompt, released=True)
    strict, score = released_reward(found, prompt)
    assert judged.score == pytest.approx(score)
    excluded = any(len(found.get(r.cls, [])) >= r.count for r in prompt.exclude)
    assert judged.accurate == (strict and not excluded)
    assert correct(detections, prompt) == official_measure(found, prompt)
    assert correct(detections, prompt) or not judged.accurate  # strict is stricter
