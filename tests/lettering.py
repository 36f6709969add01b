"""Images with text in them: many fonts, sizes, angles, colours and noise."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from matplotlib import get_data_path
from matplotlib.font_manager import findSystemFonts
from matplotlib.ft2font import FT2Font
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter, ImageFont

SIDE = 512
NO_LETTERS = ("cmex10", "cmmi10", "cmsy10", "LastResort")  # other glyphs in the letters' places
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"


@dataclass(frozen=True, kw_only=True)
class Style:
    """How text is drawn: a range of sizes and of angles, random colours or black on white, blur and noise."""

    size: tuple[int, int]  # pixels
    angle: float = 0.0  # degrees, at most, either way
    coloured: bool = False
    blur: float = 0.0  # standard deviation, pixels
    noise: float = 0.0  # standard deviation of each channel, of 255


STYLES = {
    "clean": Style(size=(36, 72)),
    "medium": Style(size=(32, 64), angle=4, coloured=True, noise=12),
    "hard": Style(size=(14, 24), angle=10, coloured=True, blur=1, noise=20),
}


@cache
def fonts() -> list[Path]:
    """Those of matplotlib and of the system that have all Latin letters and digits."""
    own = findSystemFonts([f"{get_data_path()}/fonts/ttf"])
    found = {Path(file).name: Path(file) for file in [*findSystemFonts(), *own]}
    return [path for name, path in sorted(found.items()) if not name.startswith(NO_LETTERS) and _has_letters(path)]


def _has_letters(path: Path) -> bool:
    return {ord(letter) for letter in LETTERS} <= FT2Font(str(path)).get_charmap().keys()


def lettered(
    text: str, style: Style, font: Path, generator: np.random.Generator, side: int = SIDE
) -> NDArray[np.uint8]:
    """An image [side, side, 3] that shows `text`, in as many lines as it needs and in the middle."""
    ground, ink = _colours(generator) if style.coloured else ((255, 255, 255), (0, 0, 0))
    image = Image.new("RGB", (side, side), ground)
    draw = ImageDraw.Draw(image)
    size = int(generator.integers(style.size[0], style.size[1] + 1))
    lines, face = _fitted(text, font, size, 0.9 * side)
    draw.multiline_text((side / 2, side / 2), lines, font=face, fill=ink, anchor="mm", align="center")
    angle = generator.uniform(-style.angle, style.angle)
    image = image.rotate(angle, Image.Resampling.BICUBIC, fillcolor=ground)
    if style.blur:
        image = image.filter(ImageFilter.GaussianBlur(style.blur))
    noisy = np.asarray(image, float) + style.noise * generator.standard_normal((side, side, 3))
    return noisy.round().clip(0, 255).astype(np.uint8)


def _fitted(text: str, font: Path, size: int, width: float) -> tuple[str, ImageFont.FreeTypeFont]:
    """The text in lines of at most this width, smaller where a word does not fit."""
    face = ImageFont.truetype(font, size)
    while max(face.getlength(word) for word in [*text.split(), ""]) > width:
        size -= 1
        face = ImageFont.truetype(font, size)
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and face.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return "\n".join(lines), face


def _colours(generator: np.random.Generator) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """A ground and an ink whose brightness differs by at least 100 of 255."""
    while True:
        ground, ink = generator.integers(0, 256, (2, 3))
        if abs(float((ground - ink) @ (0.299, 0.587, 0.114))) >= 100:
            return tuple(ground.tolist()), tuple(ink.tolist())
