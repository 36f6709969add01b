"""Reward `aesthetic`: LAION's aesthetic predictor v2, a small head on CLIP's image embedding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import ClassVar

from PIL import Image
from torch import Tensor, nn

from runners.rewards.clip import Clip, load_clip
from runners.rewards.clip_files import VIT_L, clip_weights
from runners.rewards.learned import LearnedReward
from runners.rewards.pretrained import State, frozen, part, read
from runners.rewards.protocol import About
from runners.rewards.weights import Weights

REPOSITORY = "trl-lib/ddpo-aesthetic-predictor"
CHECKPOINT = "aesthetic-model.pth"


class AestheticPredictor(nn.Module):
    """A rating of images, from their unit vectors under CLIP."""

    def __init__(self, clip: Clip, head: nn.Module) -> None:
        super().__init__()
        self.clip, self.head = clip, head

    def forward(self, images: Sequence[Image.Image]) -> Tensor:
        """Ratings [b]."""
        embeddings = self.clip.embed_images(images)
        scores: Tensor = self.head(embeddings.to(next(self.head.parameters()).device))
        return scores.squeeze(-1)


@dataclass
class AestheticReward(LearnedReward[AestheticPredictor]):
    """How much people would like an image from 1 to 10, whatever was asked for."""

    about: ClassVar[About] = About(
        units="rating, about 1 to 10",
        source="Schuhmann 2022 (github.com/christophschuhmann/improved-aesthetic-predictor)",
        weights=f"{REPOSITORY} ({CHECKPOINT}); {VIT_L} (model.safetensors)",
        licence="Apache-2.0 (head), MIT (CLIP), authors' repositories",
        gibibytes=1.6,
    )
    version: ClassVar[str] = "aesthetic-1"

    @property
    def needs(self) -> tuple[Weights, ...]:
        return Weights(repository=REPOSITORY, files=(CHECKPOINT,)), clip_weights()

    def build(self, *folders: Path) -> AestheticPredictor:
        return _load(*(folder.resolve() for folder in folders))

    def raw(self, network: AestheticPredictor, images: Sequence[Image.Image], texts: Sequence[str]) -> Tensor:
        scores: Tensor = network(images)
        return scores


def score_head(state: State) -> nn.Sequential:
    """LAION's head, of its weights: linear maps without activations; the dropouts are there for the numbers of layers.

    Raises RuntimeError for other weights.
    """
    head = nn.Sequential(
        nn.Linear(state["0.weight"].shape[1], 1024), nn.Dropout(), nn.Linear(1024, 128), nn.Dropout(),
        nn.Linear(128, 64), nn.Dropout(), nn.Linear(64, 16), nn.Linear(16, 1),
    )  # fmt: skip
    head.load_state_dict(state)
    return frozen(head)


@cache
def _load(head: Path, clip: Path) -> AestheticPredictor:
    return AestheticPredictor(load_clip(clip), score_head(part(read(head / CHECKPOINT), "layers.")))
