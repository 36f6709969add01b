"""Reward `jpeg`: how well an image compresses, DDPO's reward that needs no model."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ablate.source import FieldError
from runners.prompts import Prompt
from runners.rewards.protocol import About, Images, Reward, RewardOutput

QUALITY = 95  # DDPO's


@dataclass
class JpegReward(Reward):
    """How small an image is as a JPEG; with `incompressible`, how large. Scores are divided by `scale`.

    The test of the released rewards trains on -kilobytes / 500, `scale: 500`.
    """

    about: ClassVar[About] = About(units="kilobytes, negated", source="Black et al. 2023 (arXiv 2305.13301), sec. 5.1")
    incompressible: bool = False
    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.scale <= 0:
            raise FieldError("scale", f"got {self.scale:g}, expected more than 0")

    @property
    def identity(self) -> str:
        scale = "" if self.scale == 1 else f" scale={self.scale:g}"
        return f"jpeg-{'incompressible-' if self.incompressible else ''}1{scale}"

    def __call__(self, images: Images, prompts: Sequence[Prompt]) -> RewardOutput:
        sign = 1 if self.incompressible else -1
        kilobytes = np.array([_jpeg_bytes(image) / 1000 for image in images])
        return RewardOutput(score=sign * kilobytes / self.scale)


def _jpeg_bytes(image: NDArray[np.uint8]) -> int:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="JPEG", quality=QUALITY)
    return buffer.tell()
