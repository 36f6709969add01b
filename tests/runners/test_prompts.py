"""Prompts of files: GenEval's format, plain text, and what is wrong with a line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ablate.recipe import PromptsRecipe
from ablate.source import InputError
from runners.prompts import Prompt, Requirement, load_prompts, read_prompts
from runners.tiny.scenes import ScenePrompts, all_prompts

LINE = {"prompt": "two cats", "tag": "counting", "include": [{"class": "cat", "count": 2}]}


def to_geneval(prompt: Prompt) -> dict[str, Any]:
    """A prompt as GenEval's evaluation_metadata.jsonl has it: keys that say nothing are left out."""

    def item(r: Requirement) -> dict[str, Any]:
        entry = {"class": r.cls, "count": r.count, "color": r.color, "position": r.position}
        return {key: value for key, value in entry.items() if value is not None}

    line: dict[str, Any] = {"tag": prompt.tag, "include": [item(r) for r in prompt.include], "prompt": prompt.text}
    return {**line, "exclude": [item(r) for r in prompt.exclude]} if prompt.exclude else line


def test_prompts_survive_a_geneval_file(tmp_path: Path) -> None:
    prompts = [prompt for family in all_prompts().values() for prompt in family]
    assert any(p.exclude for p in prompts)
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps(to_geneval(p)) + "\n\n" for p in prompts))
    assert read_prompts(path) == prompts


def test_a_line_of_geneval_itself(tmp_path: Path) -> None:
    line = (
        '{"tag": "position", "include": [{"class": "teddy bear", "count": 1}, {"class": "dog", "count": 1, '
        '"position": ["right of", 0]}], "prompt": "a photo of a dog right of a teddy bear"}'
    )
    (tmp_path / "p.jsonl").write_text(line)
    (prompt,) = read_prompts(tmp_path / "p.jsonl")
    dog = Requirement(cls="dog", count=1, position=("right of", 0))
    assert prompt.include == (Requirement(cls="teddy bear", count=1), dog)
    assert (prompt.tag, prompt.text) == ("position", "a photo of a dog right of a teddy bear")


def test_other_files_are_one_prompt_per_line(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("a cat\n\n  a dög \n{}")
    assert read_prompts(tmp_path / "p.txt") == [Prompt(text="a cat"), Prompt(text="a dög"), Prompt(text="{}")]


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("{", ["EOF"]),
        ("a cat", ["got 'a cat'"]),
        ("[]", ["got []", "a mapping"]),
        (LINE | {"prompt": 5}, ["prompt: got 5", "expected text"]),
        ({k: v for k, v in LINE.items() if k != "prompt"}, ["prompt: is required"]),
        (LINE | {"include": "cat"}, ["include: got 'cat'", "expected a list"]),
        (LINE | {"include": [{"count": 1}]}, ["include.0.class: is required"]),
        (LINE | {"include": [{"class": "cat"}]}, ["include.0.count: is required"]),
        (LINE | {"include": [{"class": "cat", "count": 0}]}, ["include.0.count: got 0", "at least 1"]),
        (LINE | {"include": [{"class": "cat", "count": "2"}]}, ["include.0.count: got '2'", "a whole number"]),
        (
            LINE | {"include": [{"class": "cat", "count": 1, "position": ["left off", 0]}]},
            ["got 'left off'", "did you mean 'left of'?", "above, below"],
        ),
        (
            LINE | {"include": [{"class": "cat", "count": 1, "position": ["above", 0]}]},
            ["include.0.position.1: got 0", "an earlier entry"],
        ),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, line: str | dict[str, Any], parts: list[str]) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(f"{json.dumps(LINE)}\n{line if isinstance(line, str) else json.dumps(line)}\n")
    with pytest.raises(InputError) as caught:
        read_prompts(path)
    message = str(caught.value)
    assert message.startswith(f"{path}:2: ")
    assert "\n" not in message
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", ":1: holds no prompts"), (b"\n\n", ":1: holds no prompts"), (b"a\n\xff\n", ":2: got the byte 0xff")],
)
def test_a_file_without_prompts(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "p.txt").write_bytes(content)
    with pytest.raises(InputError, match=f"p.txt{message}"):
        read_prompts(tmp_path / "p.txt")


def test_a_missing_file_names_the_nearest_one(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a cat")
    with pytest.raises(InputError, match=r"promts.txt: no such file, did you mean 'prompts.txt'\?"):
        read_prompts(tmp_path / "promts.txt")


def test_files_are_trained_on_without_repetition_and_evaluated_in_disjoint_halves(tmp_path: Path) -> None:
    train, held_out = tmp_path / "train.txt", tmp_path / "held_out.txt"
    train.write_text("".join(f"t{i}\n" for i in range(10)))
    held_out.write_text("".join(f"e{i}\n" for i in range(7)))
    source = load_prompts(PromptsRecipe(train=str(train), evaluation=str(held_out)))
    assert len({p.text for p in source.train(10, np.random.default_rng(0))}) == 10
    assert len(source.train(25, np.random.default_rng(0))) == 25
    assert [p.text for p in source.fixed("development", 9)] == ["e0", "e2", "e4", "e6"]
    assert [p.text for p in source.fixed("evaluation", 2)] == ["e1", "e3"]


@pytest.mark.parametrize("name", ["scenes", "ocr"])
def test_all_of_a_built_in_source_is_both_halves_in_turn(name: str) -> None:
    source = load_prompts(PromptsRecipe(train=name))
    assert source.fixed("all", 5)[::2] == source.fixed("development", 3)
    assert source.fixed("all", 5)[1::2] == source.fixed("evaluation", 2)


def test_the_built_in_source_and_a_missing_evaluation_file(tmp_path: Path) -> None:
    assert isinstance(load_prompts(PromptsRecipe()), ScenePrompts)
    with pytest.raises(InputError, match=r"prompts.evaluation: name a file of prompts that are not trained on"):
        load_prompts(PromptsRecipe(train=str(tmp_path / "p.txt")))
