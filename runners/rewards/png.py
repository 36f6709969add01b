"""Images as PNG in text, without loss; and back, of files that strangers have sent."""

from __future__ import annotations

import base64
import binascii
import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image


def to_base64(image: NDArray[np.uint8]) -> str:
    """An image [h, w, 3] as a PNG file in base64."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG", compress_level=1)  # fast: the network is nearer than the disk
    return base64.b64encode(buffer.getvalue()).decode()


def to_data_url(image: NDArray[np.uint8]) -> str:
    """An image [h, w, 3] as browsers and chat endpoints take it."""
    return f"data:image/png;base64,{to_base64(image)}"


def from_base64(text: str, max_pixels: int) -> NDArray[np.uint8]:
    """The image [h, w, 3]. Raises ValueError for what is no 8-bit RGB PNG, or larger; nothing large is decoded."""
    try:
        file = io.BytesIO(base64.b64decode(text, validate=True))
    except binascii.Error:
        raise ValueError("is not base64") from None
    try:
        with Image.open(file, formats=("PNG",)) as image:
            width, height, mode = image.width, image.height, image.mode
            if width * height <= max_pixels and mode == "RGB":
                return np.array(image)
    except Exception as error:  # of the decoder: damaged files raise half a dozen kinds
        raise ValueError(f"cannot be read as a PNG: {type(error).__name__}") from None
    if mode != "RGB":
        raise ValueError(f"has mode {mode}, expected 8-bit RGB")
    raise ValueError(f"has {width} x {height} pixels, expected {max_pixels} at most")
