"""The embedded world: 32x32 images of a few solid shapes, described in GenEval's six families.

Objects stand on a jittered 3x3 raster, so they never overlap. Scenes are drawn from what a prompt requires, hence
every clean render satisfies its own caption. The prompt list is finite (126 sentences); where a family has at
least twelve, two sixths of it are kept from training: one for development, one for evaluation.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from runners.prompts import Prompt, Relation, Requirement, halves

IMAGE_SIZE = 32
SHAPES = ("circle", "square", "triangle")
COLORS = {"red": (225, 50, 50), "green": (45, 185, 75), "blue": (60, 95, 235), "yellow": (240, 210, 60)}
GROUND = (20, 20, 26)
RELATIONS: tuple[Relation, ...] = ("left of", "right of", "above", "below")
FAMILIES = ("single_object", "two_object", "counting", "colors", "position", "color_attr")

_NUMBERS = {2: "two", 3: "three", 4: "four"}
_RASTER = 3
_SPACING = IMAGE_SIZE / _RASTER
_RADIUS = (3.4, 4.4)  # pixels
_JITTER = 0.8  # pixels
_GAP = 1.5  # pixels of ground between two objects, so that equal colours stay apart
_SUPERSAMPLE = 3
Position = float | NDArray[np.float64]
SQUARE_SIDE = 0.85  # half a side in radii: with 1, squares would look far larger than circles


@dataclass(frozen=True, kw_only=True)
class SceneObject:
    """One solid shape; `x`, `y` and `radius` in pixels, y downwards."""

    shape: str
    color: str
    x: float
    y: float
    radius: float


def all_prompts() -> dict[str, list[Prompt]]:
    """Every sentence of the world by family, in a fixed order."""
    pairs = list(itertools.permutations(SHAPES, 2))
    return {
        "single_object": [_prompt("single_object", f"a {s}", Requirement(cls=s, count=1)) for s in SHAPES],
        "two_object": [
            _prompt("two_object", f"a {a} and a {b}", Requirement(cls=a, count=1), Requirement(cls=b, count=1))
            for a, b in pairs
        ],
        "counting": [
            Prompt(
                text=f"{word} {s}s",
                tag="counting",
                include=(Requirement(cls=s, count=n),),
                exclude=(Requirement(cls=s, count=n + 1),),
            )
            for s in SHAPES
            for n, word in _NUMBERS.items()
        ],
        "colors": [
            _prompt("colors", f"a {c} {s}", Requirement(cls=s, count=1, color=c)) for s in SHAPES for c in COLORS
        ],
        "position": [
            _prompt(
                "position",
                f"a {b} {relation} a {a}",
                Requirement(cls=a, count=1),
                Requirement(cls=b, count=1, position=(relation, 0)),
            )
            for a, b in pairs
            for relation in RELATIONS
        ],
        "color_attr": [
            _prompt(
                "color_attr",
                f"a {c} {a} and a {d} {b}",
                Requirement(cls=a, count=1, color=c),
                Requirement(cls=b, count=1, color=d),
            )
            for a, b in pairs
            for c, d in itertools.permutations(COLORS, 2)
        ],
    }


def _prompt(tag: str, text: str, *include: Requirement) -> Prompt:
    return Prompt(text=text, tag=tag, include=include)


class ScenePrompts:
    """The prompt source `scenes`: families equally likely; see the module's first lines for the three splits."""

    identity: ClassVar[str] = ""  # the reward's says it

    def __init__(self) -> None:
        order = np.random.default_rng(0)
        self._splits: dict[str, dict[str, list[Prompt]]] = {"train": {}, "development": {}, "evaluation": {}}
        for tag, prompts in all_prompts().items():
            shuffled = [prompts[i] for i in order.permutation(len(prompts))]
            sixth = len(prompts) // 6 if len(prompts) >= 12 else 0
            self._splits["development"][tag] = shuffled[:sixth] or shuffled
            self._splits["evaluation"][tag] = shuffled[sixth : 2 * sixth] or shuffled
            self._splits["train"][tag] = shuffled[2 * sixth :]

    def train(self, num_prompts: int, generator: np.random.Generator) -> list[Prompt]:
        """`num_prompts` prompts: every family as often as the others (to within one), then uniform inside it."""
        tags = generator.permuted(np.arange(num_prompts) % len(FAMILIES))
        offset = generator.integers(len(FAMILIES))  # a remainder does not always favour the same families
        families = [self._splits["train"][FAMILIES[(tag + offset) % len(FAMILIES)]] for tag in tags]
        return [family[generator.integers(len(family))] for family in families]

    def fixed(self, split: str, num_prompts: int) -> list[Prompt]:
        """The families in turn; where a family has no more prompts, they come again."""
        families = [self._splits[half][tag] for half in halves(split) for tag in FAMILIES]
        turns = [divmod(i, len(families)) for i in range(num_prompts)]
        return [families[family][turn % len(families[family])] for turn, family in turns]


def draw_objects(prompt: Prompt, generator: np.random.Generator) -> list[SceneObject]:
    """A random scene that fulfils `prompt`: exactly the required objects, colours left open drawn at random."""
    wanted = [
        (r.cls, r.color or list(COLORS)[generator.integers(len(COLORS))])
        for r in prompt.include
        for _ in range(r.count)
    ]
    while True:
        cells = generator.choice(_RASTER**2, len(wanted), replace=False)
        centres = (np.stack([cells % _RASTER, cells // _RASTER], 1) + 0.5) * _SPACING
        centres += generator.uniform(-_JITTER, _JITTER, centres.shape)
        radii = generator.uniform(*_RADIUS, len(wanted))
        objects = [
            SceneObject(shape=shape, color=color, x=float(x), y=float(y), radius=float(r))
            for (shape, color), (x, y), r in zip(wanted, centres, radii, strict=True)
        ]
        if _apart(objects) and _placed(prompt, objects):
            return objects


def _apart(objects: list[SceneObject]) -> bool:
    return all(
        max(abs(a.x - b.x), abs(a.y - b.y)) >= a.radius + b.radius + _GAP for a, b in itertools.combinations(objects, 2)
    )


def _placed(prompt: Prompt, objects: list[SceneObject]) -> bool:
    """Relations hold with room to spare: the distance along the axis is at least one raster step minus jitter."""
    by_class = {o.shape: o for o in objects}
    for requirement in prompt.include:
        if requirement.position is None:
            continue
        relation, target = requirement.position
        here, there = by_class[requirement.cls], by_class[prompt.include[target].cls]
        dx, dy = here.x - there.x, here.y - there.y
        along = {"left of": -dx, "right of": dx, "above": -dy, "below": dy}[relation]
        across = abs(dy) if relation in ("left of", "right of") else abs(dx)
        if along < _SPACING - 2 * _JITTER or along < across:
            return False
    return True


def coverage(shape: str, x: Position, y: Position, radius: Position, size: int = IMAGE_SIZE) -> NDArray[np.float64]:
    """How much of each pixel of a `size` x `size` raster a shape covers, in [0, 1]: for drawing and for detecting.

    Of several shapes of one kind at positions [n], [n, size, size].
    """
    points = (np.arange(size * _SUPERSAMPLE) + 0.5) / _SUPERSAMPLE
    across, down = ((points - np.asarray(c)[..., None]) / np.asarray(radius)[..., None] for c in (x, y))
    u, v = across[..., None, :], down[..., :, None]  # v downwards
    if shape == "circle":
        inside = u**2 + v**2 <= 1
    elif shape == "square":
        inside = np.maximum(abs(u), abs(v)) <= SQUARE_SIDE
    else:  # triangle, apex up
        inside = (abs(u) <= (v + 1) / 2) & (v <= 1)
    fine = inside.reshape(*inside.shape[:-2], size, _SUPERSAMPLE, size, _SUPERSAMPLE)
    covered: NDArray[np.float64] = np.einsum("...aibj->...ab", fine.view(np.uint8)) / _SUPERSAMPLE**2
    return covered


def render(objects: list[SceneObject]) -> NDArray[np.uint8]:
    """The image of a scene, [32, 32, 3], antialiased."""
    image = np.broadcast_to(np.array(GROUND, float), (IMAGE_SIZE, IMAGE_SIZE, 3))
    for o in objects:
        covered = coverage(o.shape, o.x, o.y, o.radius)[..., None]
        image = image * (1 - covered) + covered * np.array(COLORS[o.color], float)
    return image.round().astype(np.uint8)
