"""Instances in an image by Mask2Former, with the input sizes and the post-processing of mmdet, which GenEval uses.

The processor of transformers smooths images that it shrinks and stretches sides to multiples of 32, where mmdet does
neither; its post-processing finds masks at 384 x 384 whatever the image. So both are written here.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from transformers import Mask2FormerForUniversalSegmentation

from runners.rewards.pretrained import complete
from runners.rewards.protocol import Images, RewardUnavailable

SHORT_SIDE, LONG_SIDE, DIVISOR = 800, 1333, 32  # pixels
MEAN, STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)  # of the channels, in 0..255
NUM_CLASSES = 80
MAX_INSTANCES = 100  # of an image
Box = tuple[int, int, int, int]


@dataclass(frozen=True, kw_only=True)
class Instance:
    """One object: class index in COCO's order, score in [0, 1], `mask` [h, w] and its `bounds`."""

    label: int
    score: float
    box: Box
    mask: NDArray[np.bool_]


class InstanceDetector:
    """Mask2Former with the weights of a folder, in float32.

    Raises RewardUnavailable for one that does not know COCO's classes, OSError or ValueError for files that do not make
    a whole model.
    """

    def __init__(self, folder: Path) -> None:
        self._network = complete(Mask2FormerForUniversalSegmentation, folder)
        names = self._network.config.id2label
        if len(names) != NUM_CLASSES or names[0] != "person":
            got = f"{len(names)} classes, the first {names.get(0)!r}"
            raise RewardUnavailable(f"{folder}: expected the 80 classes of COCO, the first 'person', got {got}")

    def to(self, device: str) -> None:
        """Move the weights."""
        self._network.to(device)

    @torch.no_grad()
    def __call__(self, images: Images, thresholds: NDArray[np.float64]) -> list[list[Instance]]:
        """Per image [b, h, w, 3] the instances whose score exceeds its threshold [b], most confident first."""
        device = self._network.device
        resized = input_size(*images.shape[1:3])
        padded = tuple(-(-side // DIVISOR) * DIVISOR for side in resized)
        pixels = torch.from_numpy(np.ascontiguousarray(images)).to(device).movedim(-1, 1).float()  # [b, 3, h, w]
        pixels = F.interpolate(pixels, size=resized, mode="bilinear", align_corners=False).round()  # as OpenCV does
        mean, std = (torch.tensor(values, device=device).view(3, 1, 1) for values in (MEAN, STD))
        found: Any = self._network(F.pad((pixels - mean) / std, (0, padded[1] - resized[1], 0, padded[0] - resized[0])))
        answers = zip(found.class_queries_logits, found.masks_queries_logits, thresholds, strict=True)
        sizes = (padded, resized, images.shape[1:3])
        return [instances(classes, masks, sizes, float(threshold)) for classes, masks, threshold in answers]


def input_size(height: int, width: int) -> tuple[int, int]:
    """Height and width to which mmdet resizes an image, before padding; transformers rounds down where this rounds."""
    scale = min(SHORT_SIDE / min(height, width), LONG_SIDE / max(height, width))
    return int(height * scale + 0.5), int(width * scale + 0.5)


def instances(
    class_logits: Tensor, mask_logits: Tensor, sizes: tuple[tuple[int, ...], ...], threshold: float
) -> list[Instance]:
    """What mmdet's `MaskFormerFusionHead` makes of an image's queries, class logits [q, 81] and mask logits [q, h, w].

    Masks are enlarged to the network's input, cut to what is no padding, and resized to the image: the three `sizes`.
    A score is the probability of the class times the mean probability inside the mask. So a class probability that
    does not exceed the threshold cannot count, and its mask is not enlarged.
    """
    padded, resized, image = sizes
    probabilities = class_logits.softmax(-1)[:, :-1]
    highest, index = probabilities.flatten().topk(min(MAX_INSTANCES, probabilities.numel()), sorted=False)
    index = index[highest > threshold]
    if not len(index):
        return []
    query, label = index // probabilities.shape[1], index % probabilities.shape[1]
    logits = F.interpolate(mask_logits[query][None], size=padded, mode="bilinear", align_corners=False)
    logits = logits[..., : resized[0], : resized[1]]
    logits = F.interpolate(logits, size=image, mode="bilinear", align_corners=False)[0]  # [n, h, w]
    inside = logits > 0
    within = (logits.sigmoid() * inside).flatten(1).sum(1) / (inside.flatten(1).sum(1) + 1e-6)
    scores = probabilities[query, label] * within
    order = [i for i in scores.argsort(descending=True, stable=True).tolist() if scores[i] > threshold]
    return [
        Instance(label=int(label[i]), score=float(scores[i]), box=bounds(mask), mask=mask)
        for i, mask in ((i, inside[i].cpu().numpy()) for i in order)
    ]


def bounds(mask: NDArray[np.bool_]) -> Box:
    """(left, top, right, bottom) of a mask [h, w] with at least one pixel, right and bottom past its last one."""
    columns, rows = (np.flatnonzero(mask.any(axis)).tolist() for axis in (0, 1))
    return columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
