"""Rewards `clipscore` and `pickscore`: how near an image is to its prompt, by CLIP and by a CLIP trained on choices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from PIL import Image
from torch import Tensor

from runners.rewards.clip import Clip, load_clip
from runners.rewards.clip_files import MODEL, PREPROCESSING, VIT_H, VIT_L, clip_weights
from runners.rewards.learned import LearnedReward
from runners.rewards.protocol import About
from runners.rewards.weights import Weights


@dataclass
class ClipScoreReward(LearnedReward[Clip]):
    """CLIP's logits over 100, which is the cosine of image and prompt: the papers' CLIPScore.

    `model` is the repository of the CLIP, any that transformers loads as a `CLIPModel`.
    """

    about: ClassVar[About] = About(
        units="cosine, about 0.2 to 0.35",
        source="Hessel et al. 2021 (arXiv 2104.08718), without its factor 2.5 and its clip at 0",
        weights=f"{VIT_L} (model.safetensors)",
        licence="MIT (authors' repository)",
        gibibytes=1.6,
    )
    version: ClassVar[str] = "clipscore-1"
    model: str = VIT_L

    @property
    def needs(self) -> tuple[Weights, ...]:
        return (clip_weights(self.model),)

    def build(self, *folders: Path) -> Clip:
        return load_clip(*folders)

    def raw(self, network: Clip, images: Sequence[Image.Image], texts: Sequence[str]) -> Tensor:
        return network.logits(images, texts) / 100


@dataclass
class PickScoreReward(LearnedReward[Clip]):
    """The logits of a CLIP ViT-H/14 that was trained on which of two images people chose.

    The papers train on PickScore / 26, `scale: 26`.
    """

    about: ClassVar[About] = About(
        units="logits, about 18 to 24",
        source="Kirstain et al. 2023 (arXiv 2305.01569)",
        weights=f"yuvalkirstain/PickScore_v1 (model.safetensors); {VIT_H} (image processor and tokenizer)",
        licence="MIT (authors' repository)",
        gibibytes=3.7,
    )
    version: ClassVar[str] = "pickscore-1"

    @property
    def needs(self) -> tuple[Weights, ...]:
        own = Weights(repository="yuvalkirstain/PickScore_v1", files=MODEL)
        return own, Weights(repository=VIT_H, files=PREPROCESSING)

    def build(self, *folders: Path) -> Clip:
        return load_clip(*folders)

    def raw(self, network: Clip, images: Sequence[Image.Image], texts: Sequence[str]) -> Tensor:
        return network.logits(images, texts)
