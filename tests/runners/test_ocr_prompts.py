"""Prompts that ask for text: the built-in source `ocr`, and files as Flow-GRPO ships them."""

from __future__ import annotations

import hashlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from ablate.recipe import BudgetRecipe, PromptsRecipe, Recipe
from ablate.source import FieldError
from runners.identity import identify
from runners.ocr_prompts import FAMILIES, OCRPrompts, all_texts
from runners.prompts import Prompt, load_prompts, read_prompts
from runners.rewards.text import quoted

SOURCE = OCRPrompts()
SPLITS = ("train", "development", "evaluation")


def as_compared(text: str) -> str:
    """A text as the reward sees it: without case and spaces."""
    return "".join(text.split()).lower()


def asked(prompts: list[Prompt]) -> set[str]:
    return {as_compared(quoted(prompt.text)) for prompt in prompts}


def test_no_text_is_in_two_splits() -> None:
    splits = [{as_compared(t) for texts in SOURCE.texts(s).values() for t in texts} for s in SPLITS]
    everything = [text for texts in all_texts().values() for text in texts]
    assert sum(len(split) for split in splits) == len(set.union(*splits)) == len(everything)


def test_what_is_drawn_comes_from_its_own_split() -> None:
    drawn = asked(SOURCE.train(4000, np.random.default_rng(0)))
    development, evaluation = (asked(SOURCE.fixed(split, 4000)) for split in SPLITS[1:])
    assert len(drawn) > 2900  # of three families with thousands of texts, hardly any comes twice
    assert len(development) == len(evaluation) == 3 * 512 + 21
    assert not (drawn & development) | (drawn & evaluation) | (development & evaluation)


def test_every_prompt_quotes_a_text_of_as_many_words_as_its_family_says() -> None:
    prompts = [*SOURCE.train(1000, np.random.default_rng(0)), *SOURCE.fixed("evaluation", 1000)]
    words = dict(zip(FAMILIES, (1, 2, 3, 4), strict=True))
    assert all(len(quoted(prompt.text).split()) == words[prompt.tag] for prompt in prompts)
    assert all(prompt.text.count('"') == 2 for prompt in prompts)


def test_lengths_are_equally_likely_and_prompts_depend_on_the_generator_alone() -> None:
    first, again, other = (SOURCE.train(402, np.random.default_rng(seed)) for seed in (0, 0, 1))
    assert first == again == OCRPrompts().train(402, np.random.default_rng(0))
    assert first != other
    assert sorted(Counter(prompt.tag for prompt in first).values()) == [100, 100, 101, 101]


def test_fixed_prompts_are_the_first_of_one_list_with_the_lengths_in_turn() -> None:
    assert SOURCE.fixed("evaluation", 10) == SOURCE.fixed("evaluation", 600)[:10]
    assert [prompt.tag for prompt in SOURCE.fixed("development", 8)] == [*FAMILIES, *FAMILIES]


def test_prompts_change_only_with_their_identity() -> None:
    fixed = [prompt.text for split in SPLITS[1:] for prompt in SOURCE.fixed(split, 600)]
    drawn = [prompt.text for prompt in SOURCE.train(600, np.random.default_rng(0))]
    digest = hashlib.sha256("\n".join(fixed + drawn).encode()).hexdigest()[:12]
    assert (OCRPrompts.identity, digest) == ("ocr-1", "a762c7ae77bb")  # count up the identity when this changes


def recipe(**prompts: str) -> Recipe:
    return Recipe(prompts=PromptsRecipe(**prompts), budget=BudgetRecipe(epochs=1))


def test_a_recipe_names_the_source_and_a_cell_id_holds_it() -> None:
    assert isinstance(load_prompts(PromptsRecipe(train="ocr")), OCRPrompts)
    assert identify(recipe(train="ocr"))["prompts.train"] == "ocr-1"
    assert "prompts.train" not in identify(recipe())


@pytest.mark.parametrize("train", ["ocr", "scenes"])
def test_a_file_beside_a_built_in_source_is_refused(train: str) -> None:
    with pytest.raises(FieldError, match=f"got 'test.txt', expected null: '{train}' has held-out prompts of its own"):
        identify(recipe(train=train, evaluation="test.txt"))


def test_files_of_flow_grpo_are_lines_with_a_quoted_text(tmp_path: Path) -> None:
    lines = [
        'A lighthouse at dawn with a brass plate that reads "Mind The Gulls 24", in soft light, next to a "door".',
        "A baker's window, the painted letters \"Don't Wait\" half covered by steam, a warm and crowded street.",
        'A worn ticket with the number "13½" in red ink.',
    ]
    (tmp_path / "train.txt").write_text("\n".join(lines), encoding="utf-8")  # no line end after the last
    (tmp_path / "test.txt").write_bytes("\r\n".join(lines).encode())
    for name in ("train.txt", "test.txt"):
        prompts = read_prompts(tmp_path / name)
        assert [prompt.text for prompt in prompts] == lines
        assert [quoted(prompt.text) for prompt in prompts] == ["Mind The Gulls 24", "Don't Wait", "13½"]
