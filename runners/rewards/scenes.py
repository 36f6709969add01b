"""Reward `scenes`: find the shapes of the embedded world in the pixels and judge them by GenEval's rules.

A pixel is modelled as ground + coverage * (colour - ground); its colour is the palette direction that fits best,
and it belongs to an object when its coverage is above one half. Objects are connected components of one colour;
their class is the shape whose template, of the same area and centroid, overlaps most (intersection over union).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from runners.prompts import Prompt
from runners.rewards.protocol import About, Images, Reward, RewardOutput
from runners.rewards.rules import Detection, verdict
from runners.tiny.scenes import COLORS, GROUND, SQUARE_SIDE, coverage

MIN_SIDE, MAX_SIDE = 4, 13  # pixels; the drawn shapes are 6 to 9 wide
MIN_OVERLAP = 0.8
WINDOW = MAX_SIDE + 2  # around a component
PIXELS = 2**18  # at once
_NAMES = tuple(COLORS)
_PALETTE = np.array(list(COLORS.values()), float) - np.array(GROUND, float)  # [colours, 3]
_SQUARED_NORM = (_PALETTE**2).sum(1)
_IN_PLANE = np.zeros((3, 3, 3), bool)  # neighbours above, below and beside, in the same image
_IN_PLANE[1] = ndimage.generate_binary_structure(2, 1)
# shape: (area, how far the centroid lies below the centre), for radius 1
_GEOMETRY = {"circle": (np.pi, 0.0), "square": (4 * SQUARE_SIDE**2, 0.0), "triangle": (2.0, 1 / 3)}


@dataclass
class ScenesReward(Reward):
    """`accuracy` (all requirements exactly met) and `score` (partial credit); the score is what is trained on.

    `released` scores as GenEval's released training reward does; see `verdict`.
    """

    about: ClassVar[About] = About(units="share", source="GenEval's rules (arXiv 2310.11513) on the embedded world")
    released: bool = False

    @property
    def identity(self) -> str:
        return "released-scenes-1" if self.released else "scenes-1"

    def __call__(self, images: Images, prompts: Sequence[Prompt]) -> RewardOutput:
        found = detect(images)
        verdicts = [
            verdict(detections, prompt, released=self.released)
            for detections, prompt in zip(found, prompts, strict=True)
        ]
        return RewardOutput(
            score=np.array([v.score for v in verdicts]),
            parts={"accuracy": np.array([float(v.accurate) for v in verdicts])},
            reasons=tuple("; ".join(v.reasons) for v in verdicts),
        )


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A component of about the size of a shape, as the shape that fits it best, and how well."""

    detection: Detection
    overlap: float  # intersection over union

    @property
    def fits(self) -> bool:
        """Whether it is taken for this shape."""
        return self.overlap >= MIN_OVERLAP


def detect(images: NDArray[np.uint8]) -> list[list[Detection]]:
    """The shapes of each image [b, h, w, 3]. Components that fit no shape are dropped."""
    return [[candidate.detection for candidate in found if candidate.fits] for found in candidates(images)]


def candidates(images: NDArray[np.uint8]) -> list[list[Candidate]]:
    """The components of each image [b, h, w, 3] that have about the size of a shape."""
    return [found for part in _parts(images) for found in _candidates(part)]


def solid_pixels(images: NDArray[np.uint8]) -> NDArray[np.bool_]:
    """Which pixels [b, h, w] belong to an object."""
    return np.concatenate([_explained(part)[2] for part in _parts(images)])


def _parts(images: NDArray[np.uint8]) -> Iterator[NDArray[np.uint8]]:
    """So many images at a time as fit into memory with room to spare."""
    at_once = max(1, PIXELS // (images.shape[1] * images.shape[2]))
    return (images[i : i + at_once] for i in range(0, len(images), at_once))


def _explained(images: NDArray[np.uint8]) -> tuple[NDArray[np.float64], NDArray[np.int_], NDArray[np.bool_]]:
    """Coverage by each colour of the palette [b, h, w, colours], the colour that fits best, and whether it is solid."""
    offset = images.astype(float) - np.array(GROUND, float)  # [b, h, w, 3]
    projection = offset @ _PALETTE.T / _SQUARED_NORM  # [b, h, w, colours], least-squares coverage
    color = np.argmax(projection**2 * _SQUARED_NORM, -1)  # what it explains of the offset, squared
    return projection, color, np.take_along_axis(projection, color[..., None], -1)[..., 0] > 0.5


def _candidates(images: NDArray[np.uint8]) -> list[list[Candidate]]:
    projection, color, solid = _explained(images)
    found: list[list[Candidate]] = [[] for _ in images]
    for index, name in enumerate(_NAMES):
        components, _ = ndimage.label(solid & (color == index), structure=_IN_PLANE)
        places = [
            (number, image.start, rows, columns)
            for number, (image, rows, columns) in enumerate(ndimage.find_objects(components), start=1)
            if all(MIN_SIDE <= side.stop - side.start <= MAX_SIDE for side in (rows, columns))
        ]
        covered = np.zeros((len(places), WINDOW, WINDOW))
        own = np.zeros(covered.shape, bool)
        sizes = np.empty(len(places), int)
        for i, (number, image, rows, columns) in enumerate(places):
            top, left = max(rows.start - 1, 0), max(columns.start - 1, 0)  # one pixel of margin for the soft edge
            window = (image, slice(top, top + WINDOW), slice(left, left + WINDOW))
            height, width = components[window].shape
            own[i, :height, :width] = components[window] == number
            covered[i, :height, :width] = projection[window][..., index]
            sizes[i] = max(height, width)
        nearby = ndimage.binary_dilation(own, structure=_IN_PLANE)
        shapes, overlaps = _best_shapes(covered.clip(0, 1) * nearby, sizes)
        for (_, image, rows, columns), shape, overlap in zip(places, shapes, overlaps, strict=True):
            box = (columns.start, rows.start, columns.stop, rows.stop)
            detection = Detection(cls=shape, color=name, box=box)
            found[image].append(Candidate(detection=detection, overlap=float(overlap)))
    return found


def _best_shapes(covered: NDArray[np.float64], sizes: NDArray[np.int_]) -> tuple[list[str], NDArray[np.float64]]:
    """The shapes whose templates of equal area and centroid overlap most with coverage [n, w, w], and the overlaps.

    A template ends where the window does: after `sizes` [n] pixels.
    """
    area = covered.sum((1, 2))
    pixels = np.arange(WINDOW) + 0.5
    y, x = ((covered.sum(axis) @ pixels) / area for axis in (2, 1))
    inside = pixels < sizes[:, None]  # [n, w]
    overlaps = []
    for shape, (area_per_square, centroid) in _GEOMETRY.items():
        radius = (area / area_per_square) ** 0.5
        template = coverage(shape, x, y - centroid * radius, radius, WINDOW) * inside[:, None] * inside[:, :, None]
        overlaps.append(np.minimum(covered, template).sum((1, 2)) / np.maximum(covered, template).sum((1, 2)))
    best = np.argmax(overlaps, 0)
    return [list(_GEOMETRY)[i] for i in best], np.max(overlaps, 0)
