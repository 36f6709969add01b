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
from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from runners.geneval_prompts import COLORS
from runners.rewards.mask2former import Instance

TEMPLATES = ("a photo of a {color} {cls}", "a photo of a {color}-colored {cls}", "a photo of a {color} object")
BACKGROUND = (0x99, 0x99, 0x99)
CROPS_AT_ONCE = 64


class ColorClassifier:
    """CLIP with the weights of a folder, asked which of ten colours the crop of an object has."""

    def __init__(self, folder: Path) -> None:
        self._network = CLIPModel.from_pretrained(folder).eval()
        self._tokenizer = CLIPTokenizer.from_pretrained(folder)
        side = self._network.config.vision_config.image_size
        crop = {"height": side, "width": side}
        self._processor = CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size=crop)
        self._colors: dict[str, Tensor] = {}

    def to(self, device: str) -> None:
        """Move the weights."""
        self._network.to(device)
        self._colors = {cls: colors.to(device) for cls, colors in self._colors.items()}

    @torch.no_grad()
    def __call__(self, objects: Sequence[tuple[NDArray[np.uint8], Instance, str]]) -> list[str]:
        """The colour of each object: the image that it is in [h, w, 3], its mask, its class."""
        found: list[str] = []
        for start in range(0, len(objects), CROPS_AT_ONCE):
            some = objects[start : start + CROPS_AT_ONCE]
            crops = [crop(image, instance) for image, instance, _ in some]
            pixels = self._processor(crops, input_data_format="channels_last", return_tensors="pt")["pixel_values"]
            features = self._network.get_image_features(pixels.to(self._network.device)).pooler_output  # [n, d]
            colors = torch.stack([self._embedded(cls) for _, _, cls in some])  # [n, colours, d]
            found += [COLORS[i] for i in torch.einsum("nd,ncd->nc", features, colors).argmax(1).tolist()]
        return found

    def _embedded(self, cls: str) -> Tensor:
        """The ten colours [colours, d]: normalised means of the normalised embeddings of the templates."""
        if cls not in self._colors:
            texts = [template.format(color=color, cls=cls) for color in COLORS for template in TEMPLATES]
            tokens = self._tokenizer(texts, padding=True, return_tensors="pt").to(self._network.device)
            features = normalize(self._network.get_text_features(**tokens).pooler_output, dim=-1)
            self._colors[cls] = normalize(features.view(len(COLORS), len(TEMPLATES), -1).mean(1), dim=-1)
        return self._colors[cls]


def crop(image: NDArray[np.uint8], instance: Instance) -> Image.Image:
    """The object alone on grey, out of an image [h, w, 3], cut to its bounds."""
    alone = np.where(instance.mask[..., None], image, np.array(BACKGROUND, np.uint8))
    left, top, right, bottom = instance.box
    return Image.fromarray(alone[top:bottom, left:right])
