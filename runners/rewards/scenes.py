"""Reward `scenes`: find the shapes of the embedded world in the pixels and judge them by GenEval's rules.

A pixel is modelled as ground + coverage * (colour - ground); its colour is the palette direction that fits best,
and it belongs to an object when its coverage is above one half. Objects are connected components of one colour;
their class is the shape whose template, of the same area and centroid, overlaps most (intersection over union).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from runners.prompts import Prompt
from runners.rewards.protocol import RewardOutput
from runners.rewards.rules import Detection, judge
from runners.tiny.scenes import COLORS, GROUND, SQUARE_SIDE, coverage

MIN_SIDE, MAX_SIDE = 4, 13  # pixels; the drawn shapes are 6 to 9 wide
MIN_OVERLAP = 0.8
_NAMES = tuple(COLORS)
_PALETTE = np.array(list(COLORS.values()), float) - np.array(GROUND, float)  # [colours, 3]
_SQUARED_NORM = (_PALETTE**2).sum(1)
# shape: (area, how far the centroid lies below the centre), for radius 1
_GEOMETRY = {"circle": (np.pi, 0.0), "square": (4 * SQUARE_SIDE**2, 0.0), "triangle": (2.0, 1 / 3)}


class ScenesReward:
    """`accuracy` (all requirements exactly met) and `score` (partial credit); the score is what is trained on.

    `released` scores as GenEval's released training reward does; see `judge`.
    """

    def __init__(self, *, released: bool = False) -> None:
        self.released = released
        self.identity = "released-scenes-1" if released else "scenes-1"

    def __call__(self, images: NDArray[np.uint8], prompts: Sequence[Prompt]) -> RewardOutput:
        verdicts = [
            judge(detect(image), prompt, released=self.released) for image, prompt in zip(images, prompts, strict=True)
        ]
        return RewardOutput(
            score=np.array([v.score for v in verdicts]),
            parts={"accuracy": np.array([float(v.accurate) for v in verdicts])},
            reasons=tuple("; ".join(v.reasons) for v in verdicts),
        )


def detect(image: NDArray[np.uint8]) -> list[Detection]:
    """The shapes of an image [h, w, 3]. Components that fit no shape are dropped."""
    offset = image.astype(float) - np.array(GROUND, float)  # [h, w, 3]
    projection = offset @ _PALETTE.T / _SQUARED_NORM  # [h, w, colours], least-squares coverage
    residual = (offset**2).sum(-1, keepdims=True) - projection**2 * _SQUARED_NORM
    color = np.argmin(residual, -1)
    solid = np.take_along_axis(projection, color[..., None], -1)[..., 0] > 0.5
    detections = []
    for index in np.unique(color[solid]):
        components, _ = ndimage.label(solid & (color == index))
        for number, (rows, columns) in enumerate(ndimage.find_objects(components), start=1):
            if not all(MIN_SIDE <= side.stop - side.start <= MAX_SIDE for side in (rows, columns)):
                continue
            top, left = max(rows.start - 1, 0), max(columns.start - 1, 0)  # one pixel of margin for the soft edge
            window = (slice(top, top + MAX_SIDE + 2), slice(left, left + MAX_SIDE + 2))
            nearby = ndimage.binary_dilation(components[window] == number)
            shape, overlap = _best_shape(projection[window][..., index].clip(0, 1) * nearby)
            if overlap >= MIN_OVERLAP:
                box = (columns.start, rows.start, columns.stop, rows.stop)
                detections.append(Detection(cls=shape, color=_NAMES[index], box=box))
    return detections


def _best_shape(covered: NDArray[np.float64]) -> tuple[str, float]:
    """The shape whose template of equal area and centroid overlaps most with coverage [h, w], and that overlap."""
    area = covered.sum()
    y, x = ((np.arange(n) + 0.5) @ covered.sum(1 - axis) / area for axis, n in enumerate(covered.shape))
    size = max(covered.shape)
    padded = np.zeros((size, size))
    padded[: covered.shape[0], : covered.shape[1]] = covered
    overlaps = {}
    for shape, (area_per_square, centroid) in _GEOMETRY.items():
        radius = (area / area_per_square) ** 0.5
        template = coverage(shape, x, y - centroid * radius, radius, size)
        overlaps[shape] = float(np.minimum(padded, template).sum() / np.maximum(padded, template).sum())
    best = max(overlaps, key=overlaps.__getitem__)
    return best, overlaps[best]
