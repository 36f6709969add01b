"""The colour of an object by CLIP, zero-shot, as GenEval asks for it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from runners.geneval_prompts import COLORS
from runners.rewards.clip import load_clip
from runners.rewards.mask2former import Instance

TEMPLATES = ("a photo of a {color} {cls}", "a photo of a {color}-colored {cls}", "a photo of a {color} object")
BACKGROUND = (0x99, 0x99, 0x99)
CROPS_AT_ONCE = 64


class ColorClassifier:
    """The CLIP of a folder, which other rewards share, asked which of ten colours the crop of an object has."""

    def __init__(self, folder: Path) -> None:
        self._clip = load_clip(folder)

    def to(self, device: str) -> None:
        """Move the weights."""
        self._clip.to(device)

    def __call__(self, objects: Sequence[tuple[NDArray[np.uint8], Instance, str]]) -> list[str]:
        """The colour of each object: the image that it is in [h, w, 3], its mask, its class."""
        found: list[str] = []
        for start in range(0, len(objects), CROPS_AT_ONCE):
            some = objects[start : start + CROPS_AT_ONCE]
            embedded = {cls: self._embedded(cls) for cls in dict.fromkeys(cls for _, _, cls in some)}
            features = self._clip.embed_images([crop(image, instance) for image, instance, _ in some])  # [n, d]
            colors = torch.stack([embedded[cls] for _, _, cls in some])  # [n, colours, d]
            found += [COLORS[i] for i in torch.einsum("nd,ncd->nc", features, colors).argmax(1).tolist()]
        return found

    def _embedded(self, cls: str) -> Tensor:
        """The ten colours [colours, d]: normalised means of the normalised embeddings of the templates."""
        texts = [template.format(color=color, cls=cls) for color in COLORS for template in TEMPLATES]
        features = self._clip.embed_texts(texts)
        return normalize(features.view(len(COLORS), len(TEMPLATES), -1).mean(1), dim=-1)


def crop(image: NDArray[np.uint8], instance: Instance) -> Image.Image:
    """The object alone on grey, out of an image [h, w, 3], cut to its bounds."""
    alone = np.where(instance.mask[..., None], image, np.array(BACKGROUND, np.uint8))
    left, top, right, bottom = instance.box
    return Image.fromarray(alone[top:bottom, left:right])
