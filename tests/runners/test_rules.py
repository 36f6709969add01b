"""GenEval's rules on detections written by hand."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runners.prompts import Prompt, Requirement
from runners.rewards.rules import POSITION_DEAD_BAND, Detection, relations, verdict

SIZE = 10.0


def at(cls: str, x: float = 50, y: float = 50, color: str = "red", size: float = SIZE) -> Detection:
    return Detection(cls=cls, color=color, box=(x - size / 2, y - size / 2, x + size / 2, y + size / 2))


def prompt(*include: Requirement) -> Prompt:
    return Prompt(text="", include=include)


def cats(count: int, **more: object) -> Requirement:
    return Requirement(cls="cat", count=count, **more)  # type: ignore[arg-type]


DOG_LEFT_OF_CAT = prompt(cats(1), Requirement(cls="dog", count=1, position=("left of", 0)))


@pytest.mark.parametrize(("found", "score"), [(0, 0), (1, 1 / 3), (2, 2 / 3), (3, 1), (4, 2 / 3), (5, 1 / 3), (9, 0)])
def test_a_wrong_count_earns_its_share(found: int, score: float) -> None:
    judged = verdict([at("cat")] * found, prompt(cats(3)))
    assert judged.score == pytest.approx(score)
    assert judged.accurate == (found == 3)
    assert judged.reasons == (() if found == 3 else (f"expected cat=3, found {found}",))


def test_five_of_two_is_no_negative_term() -> None:
    judged = verdict([at("cat")] * 5 + [at("dog")], prompt(cats(2), Requirement(cls="dog", count=1)))
    assert judged.score == 0.5  # the released reward: (1 - 1.5 + 1) / 2


@pytest.mark.parametrize(
    ("colors", "score", "reason"),
    [
        (["red"], 1, None),
        (["blue"], 1 / 2, "expected red cat=1, found blue"),
        (["red", "blue"], 3 / 4, "expected red cat=2, found red, blue"),
        (["blue", "green"], 1 / 2, "expected red cat=2, found blue, green"),
    ],
)
def test_a_wrong_color_earns_the_count(colors: list[str], score: float, reason: str | None) -> None:
    judged = verdict([at("cat", color=c) for c in colors], prompt(cats(len(colors), color="red")))
    assert judged.score == pytest.approx(score)
    assert judged.reasons == ((reason,) if reason else ())
    assert judged.accurate == (reason is None)


def test_the_released_form_is_negative_for_many_and_pays_a_violated_position() -> None:
    """Golden numbers: five of two -0.5; a violated position in an otherwise perfect image 0.75, a satisfied one 1."""
    assert verdict([at("cat")] * 5, prompt(cats(2)), released=True).score == -0.5
    assert verdict([at("cat", 50), at("dog", 80)], DOG_LEFT_OF_CAT, released=True).score == 0.75
    assert verdict([at("cat", 50), at("dog", 20)], DOG_LEFT_OF_CAT, released=True).score == 1


def test_a_wrong_count_earns_neither_color_nor_position() -> None:
    judged = verdict([at("cat"), at("cat")], prompt(cats(1, color="red")))
    assert (judged.score, judged.reasons) == (0, ("expected cat=1, found 2",))
    judged = verdict([at("dog")] * 2 + [at("cat")], DOG_LEFT_OF_CAT)
    assert judged.score == pytest.approx((1 + 0 + 0) / 3)


def test_a_position_is_a_third_term() -> None:
    satisfied = verdict([at("cat", 50), at("dog", 20)], DOG_LEFT_OF_CAT)
    assert (satisfied.accurate, satisfied.score, satisfied.reasons) == (True, 1, ())
    violated = verdict([at("cat", 50), at("dog", 80)], DOG_LEFT_OF_CAT)
    assert (violated.accurate, violated.reasons) == (False, ("expected dog left of cat",))
    assert violated.score == pytest.approx(2 / 3)  # the released reward adds the satisfied term too: 3 / 4


def test_a_position_relative_to_what_is_not_there() -> None:
    judged = verdict([at("dog")], DOG_LEFT_OF_CAT)
    assert judged.score == pytest.approx((0 + 1 + 0) / 3)
    assert judged.reasons == ("expected cat=1, found 0", "no cat to be left of")


def test_every_one_of_a_group_must_stand_right() -> None:
    wanted = prompt(cats(1), Requirement(cls="dog", count=2, position=("above", 0)))
    both = [at("cat", 50, 50), at("dog", 50, 20), at("dog", 55, 25)]
    assert verdict(both, wanted).accurate
    assert not verdict([*both[:2], at("dog", 50, 80)], wanted).accurate


def test_objects_that_nobody_asked_for_are_ignored() -> None:
    assert verdict([at("cat"), at("bird"), at("dog")], prompt(cats(1))) == verdict([at("cat")], prompt(cats(1)))


def test_a_prompt_without_requirements_scores_nothing() -> None:
    assert verdict([at("cat")], prompt()) == verdict([], prompt())
    assert verdict([], prompt()).score == 0
    assert not verdict([], prompt()).accurate


@pytest.mark.parametrize(
    ("x", "y", "held"),
    [
        (20, 50, {"left of"}),
        (80, 50, {"right of"}),
        (50, 20, {"above"}),  # y points down
        (50, 80, {"below"}),
        (20, 20, {"left of", "above"}),  # a diagonal is two relations
        (80, 79, {"right of", "below"}),
        (80, 60, {"right of"}),
        (50, 50, set()),
    ],
)
def test_where_a_stands_relative_to_b(x: float, y: float, held: set[str]) -> None:
    assert relations(at("a", x, y), at("b", 50, 50)) == held


def test_the_dead_band_is_a_tenth_of_the_summed_size() -> None:
    band = POSITION_DEAD_BAND * 2 * SIZE
    assert band == 2
    # beyond it, what is left must be over half of the distance
    assert relations(at("a", 50 + band), at("b")) == set()
    assert relations(at("a", 50 + 2 * band - 0.1), at("b")) == set()
    assert relations(at("a", 50 + 2 * band + 0.1), at("b")) == {"right of"}
    assert relations(at("a", 50 + 2 * band + 0.1, size=2 * SIZE), at("b")) == set()


OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
PLACES = st.floats(0, 100)
DETECTIONS = st.lists(
    st.builds(at, st.sampled_from(["cat", "dog", "bird"]), PLACES, PLACES, st.sampled_from(["red", "blue"])), max_size=9
)
PROMPTS = st.builds(
    lambda n, m, color, relation: prompt(
        Requirement(cls="cat", count=n, color=color),
        Requirement(cls="dog", count=m, position=(relation, 0) if relation else None),
    ),
    st.integers(1, 4),
    st.integers(1, 4),
    st.sampled_from([None, "red"]),
    st.sampled_from([None, *OPPOSITE]),
)


@given(st.tuples(PLACES, PLACES), st.tuples(PLACES, PLACES))
def test_relations_of_two_are_mirrored_and_never_contradict(a: tuple[float, float], b: tuple[float, float]) -> None:
    held = relations(at("a", *a), at("b", *b))
    assert relations(at("b", *b), at("a", *a)) == {OPPOSITE[relation] for relation in held}
    assert not {OPPOSITE[relation] for relation in held} & held


@given(DETECTIONS, PROMPTS)
def test_scores_are_shares_and_full_only_for_the_accurate(detections: list[Detection], wanted: Prompt) -> None:
    judged = verdict(detections, wanted)
    assert 0 <= judged.score <= 1
    assert judged.accurate == (judged.score == 1) == (not judged.reasons)


@given(DETECTIONS, PROMPTS, st.randoms())
def test_the_order_of_detections_does_not_matter(detections: list[Detection], wanted: Prompt, random: object) -> None:
    before = verdict(detections, wanted)
    random.shuffle(detections)  # type: ignore[attr-defined]
    after = verdict(detections, wanted)
    assert (after.accurate, after.score) == (before.accurate, before.score)


def test_what_a_prompt_excludes_makes_it_inaccurate_and_costs_no_score() -> None:
    one_cat = Prompt(text="", include=(cats(1),), exclude=(Requirement(cls="dog", count=2),))
    assert verdict([at("cat"), at("dog")], one_cat).accurate
    judged = verdict([at("cat"), at("dog"), at("dog")], one_cat)
    assert (judged.accurate, judged.score, judged.reasons) == (False, 1.0, ("expected dog<2, found 2",))
