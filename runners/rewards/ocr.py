"""Reward `ocr:ppocrv6-small`: does an image show the text that its prompt quotes? Read by PP-OCRv6 on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from rapidocr import RapidOCR

from runners.digest import file_digest
from runners.prompts import Prompt
from runners.rewards.protocol import About, Images, Reward, RewardOutput, RewardUnavailable
from runners.rewards.text import quoted, text_score

DETECTOR, RECOGNISER = "PP-OCRv6_det_small.onnx", "PP-OCRv6_rec_small.onnx"
NOTHING_ASKED = 'the prompt asks for no text: there is none in "double quotes"'
WORD = "ABLATE"  # of the self-check


@dataclass
class OCRReward(Reward):
    """The share of the asked characters that was read, 1 - min(d, n) / n, by Flow-GRPO's rule; see `text_score`.

    The part `exact` is 1 where the whole text was read. The reported measure of published OCR runs is the mean score.

    An image in which nothing is read scores 0. A prompt that quotes no text, or an empty one, has no score at all
    (NaN), where the released code divides by zero: 0 would tell the policy that all its images are bad, while nothing
    was asked of them. Such a prompt is left out of the update and counted as missing.

    `threads` images are read at once, each on one core: several cores for one image are slower than one.
    Images are enlarged until their shorter side has `min_side` pixels; 512 takes half the time and reads small text
    worse. The scores depend on neither threads nor batch.
    """

    about: ClassVar[About] = About(
        units="share of characters",
        source="Liu et al. 2025 (arXiv 2505.05470), released ocr.py",
        weights=f"{DETECTOR} and {RECOGNISER}, in the wheel of rapidocr",
        licence="Apache-2.0",
        gibibytes=0.3,
    )
    threads: int = 1
    min_side: int = 736

    def __post_init__(self) -> None:
        if self.threads < 1:
            raise ValueError(f"threads: got {self.threads}, expected at least 1")
        if not 32 <= self.min_side <= 2000:
            raise ValueError(f"min_side: got {self.min_side}, expected 32 to 2000 pixels")

    @property
    def identity(self) -> str:
        side = "" if self.min_side == 736 else f" min_side={self.min_side}"
        detector, recogniser = self._digests
        return f"ocr:ppocrv6-small-1{side} det={detector} rec={recogniser}"

    def fingerprint(self) -> str:
        """What reads and runs the weights, which the identity names."""
        return f"rapidocr-{version('rapidocr')} onnxruntime-{version('onnxruntime')}"

    def load(self, device: str) -> None:
        """Find the weights; they work on the CPU, whatever the device. Raises RewardUnavailable without them."""
        _ = self._engine

    def __call__(self, images: Images, prompts: Sequence[Prompt]) -> RewardOutput:
        targets = [quoted(prompt.text).strip() for prompt in prompts]
        asked = [i for i, target in enumerate(targets) if target]
        texts = dict(zip(asked, self.read(images[asked]), strict=True))
        score = np.full(len(images), np.nan)
        score[asked] = [text_score(targets[i], texts[i]) for i in asked]
        reasons = [NOTHING_ASKED] * len(images)
        for i in asked:
            reasons[i] = "" if score[i] == 1 else f"expected {targets[i]!r}, read {texts[i]!r}"
        exact = np.where(np.isnan(score), np.nan, score == 1)
        return RewardOutput(score=score, parts={"exact": exact}, reasons=tuple(reasons))

    def read(self, images: Images) -> list[str]:
        """The text in each image [b, h, w, 3], line by line from above; empty where there is none."""
        if self.threads == 1:
            return [self._read(image) for image in images]
        with ThreadPoolExecutor(self.threads) as pool:
            return list(pool.map(self._read, images))

    def check_inputs(self) -> tuple[Images, list[Prompt]]:
        return np.stack([_rendered(WORD), _rendered("")]), [Prompt(text=f'a sign that says "{WORD}"')] * 2

    def self_check(self) -> None:
        """Read a word, and nothing in a blank image, twice. Raises RewardUnavailable where that fails."""
        images, prompts = self.check_inputs()
        for _ in range(2):
            if (found := self(images, prompts)).score.tolist() != [1.0, 0.0]:
                got = f"{found.score.tolist()} ({'; '.join(filter(None, found.reasons))})"
                raise RewardUnavailable(f"{self.identity}: expected 1 for a word and 0 for a blank image, got {got}")

    def _read(self, image: NDArray[np.uint8]) -> str:
        found = self._engine(np.ascontiguousarray(image[..., ::-1]))  # BGR
        return " ".join(found.txts or ())

    @cached_property
    def _engine(self) -> Any:
        detector, recogniser = _weights()
        return RapidOCR(
            params={
                "Global.log_level": "error",  # a blank image is no warning
                "Global.use_cls": False,  # no text is upside down
                "Det.model_path": str(detector),  # so that nothing is downloaded
                "Det.limit_side_len": self.min_side,
                "Rec.model_path": str(recogniser),
                "EngineConfig.onnxruntime.intra_op_num_threads": 1,
                "EngineConfig.onnxruntime.inter_op_num_threads": 1,
            }
        )

    @cached_property
    def _digests(self) -> list[str]:
        return [file_digest(path) for path in _weights()]


def _weights() -> tuple[Path, Path]:
    """The files of the detector and the recogniser."""
    folder = Path(str(files("rapidocr"))) / "models"
    detector, recogniser = folder / DETECTOR, folder / RECOGNISER
    if missing := [path.name for path in (detector, recogniser) if not path.exists()]:
        raise RewardUnavailable(
            f"rapidocr {version('rapidocr')} has no {' and no '.join(missing)} in {folder}: "
            "run `pip install --force-reinstall 'rapidocr>=3.9,<4'`, whose wheel holds both"
        )
    return detector, recogniser


def _rendered(text: str) -> NDArray[np.uint8]:
    image = Image.new("RGB", (256, 256), "white")
    ImageDraw.Draw(image).text((128, 128), text, font=ImageFont.load_default(36), fill="black", anchor="mm")
    return np.asarray(image)
