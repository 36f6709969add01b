"""Prompt source `geneval`: GenEval's six families over the 80 classes of COCO and ten colours.

Sentences are those of GenEval's `create_prompts.py` (Ghosh et al. 2023, arXiv 2310.11513), its plurals included
("four benchs"). Families are trained on in a mix, by default Flow-GRPO's (arXiv 2505.05470, sec. 5.1), and held out in
the proportions of GenEval's 553 prompts. What a held-out prompt asks for is never trained on, in any order of its
objects.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from itertools import chain
from typing import ClassVar, Literal

import numpy as np

from runners.prompts import HALVES, Prompt, Relation, Requirement, in_turn

# in COCO's order, as GenEval's prompts name them
CLASSES = (
    "person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light",
    "fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow",
    "elephant", "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee",
    "skis", "snowboard", "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard",
    "tennis racket", "bottle", "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple", "sandwich",
    "orange", "broccoli", "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch", "potted plant", "bed",
    "dining table", "toilet", "tv", "laptop", "computer mouse", "tv remote", "computer keyboard", "cell phone",
    "microwave", "oven", "toaster", "sink", "refrigerator", "book", "clock", "vase", "scissors", "teddy bear",
    "hair drier", "toothbrush",
)  # fmt: skip
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
RELATIONS: tuple[Relation, ...] = ("left of", "right of", "above", "below")
OPPOSITE = {"right of": "left of", "below": "above"}
NUMBERS = {2: "two", 3: "three", 4: "four"}

# how often a family is trained on; all 80 single objects are held out
MIXES = {
    "released": {"position": 7, "counting": 5, "color_attr": 3, "colors": 1, "two_object": 1, "single_object": 0},
    "equal": {"position": 1, "counting": 1, "color_attr": 1, "colors": 1, "two_object": 1, "single_object": 0},
}
# prompts of each of the two held-out splits: half of GenEval's, as there are no more than 80 single objects
HELD_OUT = {"single_object": 40, "two_object": 50, "counting": 40, "colors": 47, "position": 50, "color_attr": 50}
HELD_OUT_SEED = 0


class GenEvalPrompts:
    """Generated training prompts; held-out ones of its own, or those of `held_out` in turn.

    Past the end of a split its prompts come again, with other noise: two or four images per prompt.
    """

    identity: ClassVar[str] = "geneval-1"  # part of every cell id

    def __init__(
        self, held_out: Sequence[Prompt] | None = None, *, mix: Literal["released", "equal"] = "released"
    ) -> None:
        self._splits = own_splits() if held_out is None else in_turn(held_out)
        self._never = {meaning(prompt) for prompt in self._splits["all"]}
        self._families, weights = list(MIXES[mix]), np.array(list(MIXES[mix].values()), float)
        self._bounds = weights.cumsum() / weights.sum()

    def train(self, num_prompts: int, generator: np.random.Generator) -> list[Prompt]:
        """Each family as often as its weight says, to within one."""
        places = (np.arange(num_prompts) + generator.random()) / num_prompts
        families = np.searchsorted(self._bounds, generator.permuted(places), side="right")
        return [_draw_new(self._families[family], generator, self._never) for family in families]

    def fixed(self, split: str, num_prompts: int) -> list[Prompt]:
        own = self._splits[split]
        return [own[i % len(own)] for i in range(num_prompts if own else 0)]


def own_splits() -> dict[str, list[Prompt]]:
    """The two held-out splits, and `all` of both in turn. Any beginning of each has the families in proportion."""
    generator = np.random.default_rng(HELD_OUT_SEED)
    drawn: set[Hashable] = set()
    splits = {}
    for split in HALVES:
        placed = []
        for tag, number in HELD_OUT.items():
            for i in range(number):
                prompt = _draw_new(tag, generator, drawn)
                drawn.add(meaning(prompt))
                placed.append(((i + 0.5) / number, prompt))
        splits[split] = [prompt for _, prompt in sorted(placed, key=lambda pair: pair[0])]
    splits["all"] = list(chain.from_iterable(zip(*splits.values(), strict=True)))
    return splits


def meaning(prompt: Prompt) -> Hashable:
    """What a prompt asks for, whatever the order in which it names the objects."""
    things = frozenset((r.cls, r.count, r.color) for r in prompt.include)
    places = set()
    for r in prompt.include:
        if r.position is not None:
            relation, other = r.position[0], prompt.include[r.position[1]].cls
            turned = relation in OPPOSITE
            places.add((OPPOSITE[relation], other, r.cls) if turned else (relation, r.cls, other))
    return things, frozenset(places)


def draw(tag: str, generator: np.random.Generator) -> Prompt:
    """A random prompt of a family. People have no colour, and two colours are different, as in GenEval."""
    number = 2 if tag in ("two_object", "position", "color_attr") else 1
    colored = tag in ("colors", "color_attr")
    classes = generator.choice(CLASSES[1:] if colored else CLASSES, number, replace=False).tolist()
    colors = generator.choice(COLORS, number, replace=False).tolist() if colored else [None] * number
    count = int(generator.integers(2, 5)) if tag == "counting" else 1
    relation = RELATIONS[int(generator.integers(4))] if tag == "position" else None
    include = tuple(
        Requirement(cls=cls, count=count, color=color, position=(relation, 0) if relation and i else None)
        for i, (cls, color) in enumerate(zip(classes, colors, strict=True))
    )
    exclude = (Requirement(cls=classes[0], count=count + 1),) if tag == "counting" else ()
    return Prompt(text=sentence(include), tag=tag, include=include, exclude=exclude)


def sentence(include: Sequence[Requirement]) -> str:
    """The words in which GenEval asks for one or two objects."""
    first, *others = include
    if first.count > 1:
        return f"a photo of {NUMBERS[first.count]} {first.cls}{'es' if first.cls.endswith('s') else 's'}"
    if not others:
        return f"a photo of {_named(first)}"
    if (position := others[0].position) is not None:
        return f"a photo of {_named(others[0])} {position[0]} {_named(first)}"
    return f"a photo of {_named(first)} and {_named(others[0])}"


def _named(requirement: Requirement) -> str:
    words = " ".join(filter(None, (requirement.color, requirement.cls)))
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _draw_new(tag: str, generator: np.random.Generator, never: set[Hashable]) -> Prompt:
    while meaning(prompt := draw(tag, generator)) in never:
        pass
    return prompt
