"""Prompts with what an image must show, in GenEval's format, and where a run takes them from.

A prompt carries its requirements as data (Ghosh et al. 2023, arXiv 2310.11513: `tag`, `include`, `exclude`), so
that a reward can judge an image without parsing the sentence.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Protocol, TypeVar

import numpy as np
from pydantic import AfterValidator, BaseModel, Field, ValidationError, model_validator

from ablate.recipe import PromptsRecipe, Recipe
from ablate.source import InputError, counted, dotted, problems, read_text

HALVES = ("development", "evaluation")  # of held-out prompts
Relation = Literal["left of", "right of", "above", "below"]
Count = Annotated[int, Field(ge=1)]
Index = Annotated[int, Field(ge=0)]


class _Placed(Protocol):
    @property
    def position(self) -> tuple[str, int] | None: ...


Entry = TypeVar("Entry", bound=_Placed)


def _of_earlier_entries(entries: tuple[Entry, ...]) -> tuple[Entry, ...]:
    """Raises ValueError where a position is not relative to an earlier entry."""
    for i, entry in enumerate(entries):
        if entry.position and entry.position[1] >= i:
            expected = "expected the index of an earlier entry"
            raise ValueError(f"include.{i}.position.1: got {entry.position[1]}, {expected}")
    return entries


@dataclass(frozen=True, kw_only=True)
class Requirement:
    """`count` objects of class `cls`; optionally of one colour, or placed relative to the group `position[1]`.

    What the fields allow holds for those that come from outside; Python's own are taken as they are.
    """

    cls: str
    count: Count
    color: str | None = None
    position: tuple[Relation, Index] | None = None  # ("left of", index of the requirement it is left of)


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A sentence and what it asks for. Without metadata, `include` is empty and only text-based rewards apply."""

    text: str
    tag: str = "text"
    include: Annotated[tuple[Requirement, ...], AfterValidator(_of_earlier_entries)] = ()
    exclude: tuple[Requirement, ...] = ()
    group: int = 0  # which draw of the prompt an image belongs to: images of one are compared with each other


class PromptSource(Protocol):
    """Training prompts without end, and fixed lists that no training step sees: two halves, or `all` of them."""

    identity: ClassVar[str]  # part of a cell id; empty where the reward's or the files' says it

    def train(self, num_prompts: int, generator: np.random.Generator) -> list[Prompt]: ...

    def fixed(self, split: str, num_prompts: int) -> list[Prompt]:
        """The first `num_prompts` of the split `development`, `evaluation` or `all`: always the same ones."""
        ...


@dataclass(frozen=True, kw_only=True)
class ListedPrompts:
    """Prompts of a file, drawn without replacement; evaluation prompts come from a file of their own."""

    identity: ClassVar[str] = ""
    train_prompts: Sequence[Prompt]
    fixed_prompts: Sequence[Prompt]

    def train(self, num_prompts: int, generator: np.random.Generator) -> list[Prompt]:
        repeated = num_prompts > len(self.train_prompts)
        chosen = generator.choice(len(self.train_prompts), num_prompts, replace=repeated)
        return [self.train_prompts[i] for i in chosen]

    def fixed(self, split: str, num_prompts: int) -> list[Prompt]:
        return in_turn(self.fixed_prompts)[split][:num_prompts]


def halves(split: str) -> tuple[str, ...]:
    """What a split of held-out prompts consists of: of itself, or of both halves where it is `all`."""
    return HALVES if split == "all" else (split,)


def in_turn(prompts: Sequence[Prompt]) -> dict[str, list[Prompt]]:
    """Different sentences go in turn to the development and the evaluation split, repetitions with them.

    `all` is every one in its order.
    """
    turn = {text: i % 2 for i, text in enumerate(dict.fromkeys(p.text for p in prompts))}
    return {"all": list(prompts)} | {h: [p for p in prompts if turn[p.text] == own] for own, h in enumerate(HALVES)}


BUILT_IN: Mapping[str, str] = {
    "scenes": "runners.tiny.scenes:ScenePrompts",
    "geneval": "runners.geneval_prompts:GenEvalPrompts",
    "ocr": "runners.ocr_prompts:OCRPrompts",
}
HELD_OUT_BY_FILE = ("geneval",)  # of these, those whose held-out prompts a file can replace


def load_prompts(recipe: PromptsRecipe) -> PromptSource:
    """The prompt source of a recipe. Raises InputError for files that cannot be read or are missing."""
    if recipe.mix != "released" and recipe.train != "geneval":
        raise InputError(
            f"prompts.mix: got {recipe.mix!r}, expected 'released': {recipe.train!r} has no families to mix"
        )
    if recipe.evaluation is not None and recipe.train in BUILT_IN and recipe.train not in HELD_OUT_BY_FILE:
        own = f"{recipe.train!r} has held-out prompts of its own"
        raise InputError(f"prompts.evaluation: got {recipe.evaluation!r}, expected null: {own}")
    held_out = read_prompts(Path(recipe.evaluation)) if recipe.evaluation else None
    if recipe.train in BUILT_IN:
        module, _, name = BUILT_IN[recipe.train].partition(":")
        kind = getattr(importlib.import_module(module), name)
        given: dict[str, Any] = {} if held_out is None else {"held_out": held_out}
        if recipe.train == "geneval":
            given["mix"] = recipe.mix
        source: PromptSource = kind(**given)
        return source
    if held_out is None:
        raise InputError(f"prompts.evaluation: name a file of prompts that are not trained on, beside {recipe.train!r}")
    return ListedPrompts(train_prompts=read_prompts(Path(recipe.train)), fixed_prompts=held_out)


def check_held_out(source: PromptSource, recipe: Recipe, num_devices: int) -> None:
    """Raises InputError if a cell has fewer held-out prompts than devices, each of which evaluates a share of them."""
    split = recipe.evaluation.split
    found = len(source.fixed(split, recipe.evaluation.num_prompts))
    if found < num_devices:
        raise InputError(
            f"prompts.evaluation: {recipe.prompts.evaluation} leaves {counted(found, 'prompt')} for evaluation.split "
            f"{split!r}, fewer than {counted(num_devices, 'device')}: take more prompts or fewer devices"
        )


def read_prompts(path: Path) -> list[Prompt]:
    """Prompts of a file: GenEval's `*.jsonl` (one object per line with `prompt`, `tag`, `include`) or plain text lines.

    Raises InputError with file and line for a line that is neither.
    """
    prompts = []
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        if path.suffix != ".jsonl":
            prompts.append(Prompt(text=line.strip()))
            continue
        try:
            prompts.append(_Line.model_validate_json(line, strict=True).to_prompt())
        except ValidationError as error:
            location, problem = problems(error, _Line)[0]
            where = f"{path}:{number}: {dotted(location)}" if location else f"{path}:{number}"
            raise InputError(f"{where}: {problem}") from None
    if not prompts:
        raise InputError(f"{path}:1: holds no prompts")
    return prompts


class _Item(BaseModel):
    """An entry of `include` or `exclude` in GenEval's files."""

    cls: str = Field(alias="class")
    count: Count
    color: str | None = None
    position: tuple[Relation, Index] | None = None


class _Line(BaseModel):
    """A line of GenEval's files."""

    prompt: str
    tag: str = "text"
    include: tuple[_Item, ...] = ()
    exclude: tuple[_Item, ...] = ()

    @model_validator(mode="after")
    def _known_targets(self) -> _Line:
        _of_earlier_entries(self.include)
        return self

    def to_prompt(self) -> Prompt:
        include, exclude = (
            tuple(Requirement(cls=i.cls, count=i.count, color=i.color, position=i.position) for i in items)
            for items in (self.include, self.exclude)
        )
        return Prompt(text=self.prompt, tag=self.tag, include=include, exclude=exclude)
