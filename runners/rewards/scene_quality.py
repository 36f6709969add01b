"""What scenes of the embedded world look like, whatever was asked for: a held-out panel that `scenes` does not see.

All three are in [0, 1], higher is better.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from runners.prompts import Prompt
from runners.rewards.protocol import About, Images, Reward, RewardOutput
from runners.rewards.scenes import candidates, solid_pixels
from runners.tiny.scenes import GROUND

TOLERANCE = 24  # of 255, in every channel
MARGIN = 2  # pixels around a shape that its soft edge may colour
BLOCK = 4  # pixels of a side, for layouts
ABOUT = About(units="share", source="this project; docs/embedded-world.md")


@dataclass
class BackgroundPurity(Reward):
    """`background`: the share of pixels away from every shape that have the colour of the ground.

    What no shape's template fits is no shape: smears, halos and stray pixels count against it.
    """

    about: ClassVar[About] = ABOUT

    @property
    def identity(self) -> str:
        return "background-1"

    def __call__(self, images: Images, prompts: Sequence[Prompt]) -> RewardOutput:
        ground = (abs(images.astype(int) - GROUND) <= TOLERANCE).all(-1)  # [b, h, w]
        away = np.ones(ground.shape, bool)
        for image, found in zip(away, candidates(images), strict=True):
            for shape in found:
                if shape.fits:
                    left, top, right, bottom = (int(side) for side in shape.detection.box)
                    image[max(top - MARGIN, 0) : bottom + MARGIN, max(left - MARGIN, 0) : right + MARGIN] = False
        return RewardOutput(score=(ground & away).sum((1, 2)) / away.sum((1, 2)).clip(1))


@dataclass
class ShapeSharpness(Reward):
    """`sharpness`: how well the blobs of an image fit the shape each fits best, intersection over union; 0 without any.

    The reward asks for 0.8 and is blind above.
    """

    about: ClassVar[About] = ABOUT

    @property
    def identity(self) -> str:
        return "sharpness-1"

    def __call__(self, images: Images, prompts: Sequence[Prompt]) -> RewardOutput:
        overlaps = [[shape.overlap for shape in found] or [0.0] for found in candidates(images)]
        return RewardOutput(score=np.array([np.mean(of_image) for of_image in overlaps]))


@dataclass
class LayoutDiversity(Reward):
    """`diversity`: how much the layouts of images of one prompt differ, as the mean distance of each to the others.

    A layout is the share of solid pixels in blocks of 4 x 4; the distance of two is half the sum of differences over
    the mean number of solid pixels: 0 for equal ones, 1 for shapes in other places. 0 for a prompt with one image.
    """

    about: ClassVar[About] = ABOUT
    compares: ClassVar[bool] = True

    @property
    def identity(self) -> str:
        return "diversity-1"

    def __call__(self, images: Images, prompts: Sequence[Prompt]) -> RewardOutput:
        height, width = (side // BLOCK * BLOCK for side in images.shape[1:3])
        solid = solid_pixels(images)[:, :height, :width]
        blocks = solid.reshape(len(images), height // BLOCK, BLOCK, width // BLOCK, BLOCK).mean((2, 4))
        layouts = blocks.reshape(len(images), -1)  # [b, blocks]
        texts, score = np.array([p.text for p in prompts]), np.zeros(len(images))
        for text in dict.fromkeys(texts.tolist()):
            rows = np.flatnonzero(texts == text)
            layout = layouts[rows]
            different = abs(layout[:, None] - layout[None]).sum(-1) / 2
            there = (layout.sum(-1)[:, None] + layout.sum(-1)[None]) / 2
            score[rows] = (different / there.clip(1e-9)).sum(1) / max(len(rows) - 1, 1)
        return RewardOutput(score=score)
