"""Reward `jpeg`: how well an image compresses, DDPO's reward that needs no model."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from runners.prompts import Prompt
from runners.rewards.protocol import About, Images, Reward, RewardOutput

QUALITY = 95  # DDPO's


@dataclass
class JpegReward(Reward):
    """How small an image is as a JPEG; with `incompressible`, how large."""

    about: ClassVar[About] = About(units="kilobytes, negated", source="Black et al. 2023 (arXiv 2305.13301), sec. 5.1")
    incompressible: bool = False

    @property
    def identity(self) -> str:
        return "jpeg-incompressible-1" if self.incompressible else "jpeg-1"

    def __call__(self, images: Images, prompts: Sequence[Prompt]) -> RewardOutput:
        sign = 1 if self.incompressible else -1
        return RewardOutput(score=np.array([sign * _jpeg_bytes(image) / 1000 for image in images]))


def _jpeg_bytes(image: NDArray[np.uint8]) -> int:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="JPEG", quality=QUALITY)
    return buffer.tell()
