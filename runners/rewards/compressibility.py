"""Reward `jpeg`: how well an image compresses, DDPO's reward that needs no model."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from runners.prompts import Prompt
from runners.rewards.protocol import RewardOutput

QUALITY = 95  # DDPO's


class JpegReward:
    """Minus the size of the JPEG in kilobytes; Black et al. 2023 (arXiv 2305.13301), sec. 5.1."""

    identity = "jpeg-1"

    def __call__(self, images: NDArray[np.uint8], prompts: Sequence[Prompt]) -> RewardOutput:
        return RewardOutput(score=np.array([-_jpeg_bytes(image) / 1000 for image in images]))


def _jpeg_bytes(image: NDArray[np.uint8]) -> int:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="JPEG", quality=QUALITY)
    return buffer.tell()
