"""Prompts of GenEval's six families: its own sentences, the released mix, and splits that never overlap."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from ablate.recipe import PromptsRecipe, Recipe
from ablate.source import FieldError, InputError
from runners.geneval_prompts import CLASSES, COLORS, HELD_OUT, MIXES, GenEvalPrompts, draw, meaning, sentence
from runners.identity import identify
from runners.prompts import Prompt, Requirement, load_prompts, read_prompts

# lines of GenEval's evaluation_metadata.jsonl, and in other order of Flow-GRPO's and DiffusionNFT's test_metadata.jsonl
LINES = """\
{"tag": "single_object", "include": [{"class": "bench", "count": 1}], "prompt": "a photo of a bench"}
{"tag": "two_object", "include": [{"class": "bench", "count": 1}, {"class": "sports ball", "count": 1}], "prompt": "a photo of a bench and a sports ball"}
{"tag": "counting", "include": [{"class": "clock", "count": 2}], "exclude": [{"class": "clock", "count": 3}], "prompt": "a photo of two clocks"}
{"tag": "counting", "include": [{"class": "wine glass", "count": 2}], "exclude": [{"class": "wine glass", "count": 3}], "prompt": "a photo of two wine glasses"}
{"tag": "colors", "include": [{"class": "fire hydrant", "count": 1, "color": "blue"}], "prompt": "a photo of a blue fire hydrant"}
{"tag": "position", "include": [{"class": "teddy bear", "count": 1}, {"class": "dog", "count": 1, "position": ["right of", 0]}], "prompt": "a photo of a dog right of a teddy bear"}
{"tag": "color_attr", "include": [{"class": "wine glass", "count": 1, "color": "purple"}, {"class": "apple", "count": 1, "color": "black"}], "prompt": "a photo of a purple wine glass and a black apple"}
{"tag": "color_attr", "include": [{"class": "handbag", "count": 1, "color": "pink"}, {"class": "scissors", "count": 1, "color": "black"}], "prompt": "a photo of a pink handbag and a black scissors"}
"""  # noqa: E501
SPLITS = ("development", "evaluation")
NUM_HELD_OUT = sum(HELD_OUT.values())


@pytest.fixture(scope="module")
def source() -> GenEvalPrompts:
    return GenEvalPrompts()


def of_geneval(tmp_path: Path, repeats: int = 1) -> Path:
    path = tmp_path / "metadata.jsonl"
    path.write_text(LINES * repeats)
    return path


def test_released_lines_are_read_and_their_sentences_are_the_generator_s(tmp_path: Path) -> None:
    prompts = read_prompts(of_geneval(tmp_path))
    assert [p.text for p in prompts] == [json.loads(line)["prompt"] for line in LINES.splitlines()]
    assert [p.text for p in prompts] == [sentence(p.include) for p in prompts]
    assert {p.tag for p in prompts} == HELD_OUT.keys()
    assert {r.cls for p in prompts for r in p.include} <= set(CLASSES)


@pytest.mark.parametrize(
    ("include", "text"),
    [
        ([Requirement(cls="umbrella", count=1)], "a photo of an umbrella"),
        ([Requirement(cls="car", count=1, color="orange")], "a photo of an orange car"),
        ([Requirement(cls="bench", count=4)], "a photo of four benchs"),  # GenEval's own plural
        ([Requirement(cls="bus", count=3)], "a photo of three buses"),
    ],
)
def test_articles_and_plurals_are_those_of_geneval(include: list[Requirement], text: str) -> None:
    assert sentence(include) == text


def test_the_classes_are_those_of_coco_with_three_other_names() -> None:
    assert len(CLASSES) == len(set(CLASSES)) == 80
    assert [CLASSES.index(name) for name in ("person", "computer mouse", "tv remote", "computer keyboard")] == [
        0,
        64,
        65,
        66,
    ]
    assert CLASSES[-1] == "toothbrush"
    assert len(COLORS) == 10


@pytest.mark.parametrize("tag", HELD_OUT)
def test_each_family_asks_for_what_its_name_says(tag: str) -> None:
    generator = np.random.default_rng(0)
    for prompt in (draw(tag, generator) for _ in range(300)):
        first, *others = prompt.include
        assert prompt.tag == tag
        assert prompt.text == sentence(prompt.include)
        assert len(others) == (tag in ("two_object", "position", "color_attr"))
        assert len({r.cls for r in prompt.include}) == len(prompt.include)
        assert first.position is None
        assert all((r.position is not None) == (tag == "position") for r in others)
        assert (first.count in (2, 3, 4)) if tag == "counting" else all(r.count == 1 for r in prompt.include)
        excluded = ((first.cls, first.count + 1),) if tag == "counting" else ()
        assert tuple((r.cls, r.count) for r in prompt.exclude) == excluded
        colors = [r.color for r in prompt.include if r.color]
        assert len(set(colors)) == (len(prompt.include) if tag in ("colors", "color_attr") else 0)
        assert not (colors and "person" in {r.cls for r in prompt.include})


def test_every_class_color_and_relation_is_drawn() -> None:
    generator = np.random.default_rng(0)
    drawn = [r for tag in HELD_OUT for _ in range(700) for r in draw(tag, generator).include]
    assert {r.cls for r in drawn} == set(CLASSES)
    assert {r.color for r in drawn} == {None, *COLORS}
    assert {r.position[0] for r in drawn if r.position} == {"left of", "right of", "above", "below"}


def test_the_order_of_objects_is_not_part_of_what_is_asked_for() -> None:
    def pair(a: str, b: str, relation: str | None = None, **colors: str | None) -> Prompt:
        first = Requirement(cls=a, count=1, color=colors.get(a))
        second = Requirement(cls=b, count=1, color=colors.get(b), position=(relation, 0) if relation else None)
        return Prompt(text="", include=(first, second))

    assert meaning(pair("cat", "dog")) == meaning(pair("dog", "cat"))
    assert meaning(pair("cat", "dog", cat="red", dog="blue")) == meaning(pair("dog", "cat", cat="red", dog="blue"))
    assert meaning(pair("cat", "dog", cat="red", dog="blue")) != meaning(pair("cat", "dog", cat="blue", dog="red"))
    assert meaning(pair("cat", "dog", "left of")) == meaning(pair("dog", "cat", "right of"))
    assert meaning(pair("cat", "dog", "above")) == meaning(pair("dog", "cat", "below"))
    assert meaning(pair("cat", "dog", "left of")) != meaning(pair("dog", "cat", "left of"))
    assert meaning(pair("cat", "dog", "left of")) != meaning(pair("cat", "dog"))
    counts = [Prompt(text="", include=(Requirement(cls="cat", count=n),)) for n in (1, 2)]
    assert meaning(counts[0]) != meaning(counts[1])


def test_the_three_splits_never_overlap(source: GenEvalPrompts) -> None:
    development, evaluation = ({meaning(p) for p in source.fixed(split, NUM_HELD_OUT)} for split in SPLITS)
    assert len(development) == len(evaluation) == NUM_HELD_OUT == 277
    assert not development & evaluation
    trained = {meaning(p) for p in source.train(4000, np.random.default_rng(1))}
    assert len(trained) > 1500
    assert not trained & (development | evaluation)


def test_held_out_families_have_the_proportions_of_geneval(source: GenEvalPrompts) -> None:
    published = {
        "single_object": 80,
        "two_object": 99,
        "counting": 80,
        "colors": 94,
        "position": 100,
        "color_attr": 100,
    }
    for split in SPLITS:
        counts = Counter(p.tag for p in source.fixed(split, NUM_HELD_OUT))
        assert all(abs(2 * counts[tag] - number) <= 1 for tag, number in published.items())
        for wanted in (30, 100, 200):
            counts = Counter(p.tag for p in source.fixed(split, wanted))
            assert all(abs(counts[tag] - wanted * n / 553) <= 1.5 for tag, n in published.items())


def test_a_split_is_the_same_for_ever_and_begins_again_at_its_end(source: GenEvalPrompts) -> None:
    again = GenEvalPrompts()
    for split in SPLITS:
        prompts = source.fixed(split, 2 * NUM_HELD_OUT)
        assert prompts == again.fixed(split, NUM_HELD_OUT) * 2
        assert prompts[:10] == source.fixed(split, 10)
    texts = "\n".join(p.text for split in SPLITS for p in source.fixed(split, NUM_HELD_OUT))
    assert hashlib.sha256(texts.encode()).hexdigest()[:12] == "28d7a9f1f979"


@pytest.mark.parametrize("mix", MIXES)
def test_training_has_the_mix_that_a_recipe_names(mix: str) -> None:
    source = load_prompts(PromptsRecipe(train="geneval", mix=mix))
    generator, total = np.random.default_rng(0), sum(MIXES[mix].values())
    epochs = [Counter(p.tag for p in source.train(48, generator)) for _ in range(50)]
    for tag, weight in MIXES[mix].items():
        assert all(abs(counts[tag] - 48 * weight / total) < 1 for counts in epochs)
        assert sum(counts[tag] for counts in epochs) == pytest.approx(50 * 48 * weight / total, rel=0.1)


def test_the_mix_is_the_released_one_by_default_and_of_generated_prompts_alone() -> None:
    families = ("position", "counting", "color_attr", "colors", "two_object", "single_object")
    assert tuple(MIXES[PromptsRecipe(train="geneval").mix][family] for family in families) == (7, 5, 3, 1, 1, 0)
    with pytest.raises(InputError, match=r"prompts.mix: got 'equal', expected 'released': 'scenes' has no families"):
        load_prompts(PromptsRecipe(train="scenes", mix="equal"))


def test_families_of_an_epoch_are_in_no_order(source: GenEvalPrompts) -> None:
    tags = [p.tag for p in source.train(48, np.random.default_rng(0))]
    assert sum(a != b for a, b in itertools.pairwise(tags)) > 20


def test_the_generator_decides_what_is_trained_on(source: GenEvalPrompts) -> None:
    first, again, other = (source.train(20, np.random.default_rng(seed)) for seed in (0, 0, 1))
    assert first == again != other


def test_a_file_of_held_out_prompts_is_evaluated_and_never_trained_on(tmp_path: Path) -> None:
    held_out = [Prompt(text=f"two {cls}s", include=(Requirement(cls=cls, count=2),)) for cls in CLASSES[:79]]
    lines = [
        {"prompt": p.text, "tag": "counting", "include": [{"class": p.include[0].cls, "count": 2}]} for p in held_out
    ]
    path = tmp_path / "held_out.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    source = load_prompts(PromptsRecipe(train="geneval", evaluation=str(path)))
    assert [p.text for p in source.fixed("evaluation", 2)] == ["two bicycles", "two motorcycles"]
    assert len(source.fixed("development", 100)) == 100  # forty, and again
    trained = [p for p in source.train(2000, np.random.default_rng(0)) if p.tag == "counting"]
    assert {p.include[0].cls for p in trained if p.include[0].count == 2} == {"toothbrush"}


def test_all_held_out_prompts_are_both_halves_in_turn(source: GenEvalPrompts) -> None:
    development, evaluation = (source.fixed(split, NUM_HELD_OUT) for split in SPLITS)
    everything = source.fixed("all", 2 * NUM_HELD_OUT)
    assert (everything[::2], everything[1::2]) == (development, evaluation)
    assert source.fixed("all", 2 * NUM_HELD_OUT + 1)[-1] == development[0]


def test_all_of_a_file_are_its_lines_in_their_order(tmp_path: Path) -> None:
    path = of_geneval(tmp_path, repeats=2)
    for train in ("geneval", str(path)):
        source = load_prompts(PromptsRecipe(train=train, evaluation=str(path)))
        assert source.fixed("all", 16) == read_prompts(path)


def test_repeated_lines_of_a_file_stay_in_one_split(tmp_path: Path) -> None:
    """Flow-GRPO's and DiffusionNFT's test_metadata.jsonl has each prompt four times."""
    path = of_geneval(tmp_path, repeats=4)
    source = load_prompts(PromptsRecipe(train=str(path), evaluation=str(path)))
    development, evaluation = (source.fixed(split, 100) for split in SPLITS)
    assert len(development) == len(evaluation) == 16
    assert not {p.text for p in development} & {p.text for p in evaluation}


def test_the_generator_and_a_held_out_file_are_part_of_a_cell_s_id(tmp_path: Path) -> None:
    def identity(**prompts: str) -> dict[str, str]:
        recipe = Recipe(prompts=PromptsRecipe(**prompts), budget={"epochs": 1})  # type: ignore[arg-type]
        return {key: value for key, value in identify(recipe).items() if key.startswith("prompts")}

    assert identity() == {}
    assert identity(train="geneval") == {"prompts.train": "geneval-1"}
    path = of_geneval(tmp_path)
    assert identity(train="geneval", evaluation=str(path)).keys() == {"prompts.train", "prompts.evaluation"}
    with pytest.raises(FieldError, match=r"nothing.jsonl: no such file"):
        identity(train="geneval", evaluation=str(tmp_path / "nothing.jsonl"))
