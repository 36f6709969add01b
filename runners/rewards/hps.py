"""Reward `hpsv2.1`: Human Preference Score v2.1, a CLIP ViT-H/14 in open_clip's layout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import ClassVar

import transformers
from PIL import Image
from torch import Tensor

from runners.rewards.clip import Clip, clip_of
from runners.rewards.clip_files import PREPROCESSING, VIT_H
from runners.rewards.learned import LearnedReward
from runners.rewards.pretrained import State, complete, read, renamed
from runners.rewards.protocol import About
from runners.rewards.weights import Weights

CHECKPOINT = "HPS_v2.1_compressed.pt"
NAMES = {  # open_clip's -> CLIPModel's
    r"^visual\.class_embedding$": "vision_model.embeddings.class_embedding",
    r"^visual\.positional_embedding$": "vision_model.embeddings.position_embedding.weight",
    r"^visual\.conv1\.": "vision_model.embeddings.patch_embedding.",
    r"^visual\.ln_pre\.": "vision_model.pre_layrnorm.",
    r"^visual\.transformer\.resblocks\.": "vision_model.encoder.layers.",
    r"^visual\.ln_post\.": "vision_model.post_layernorm.",
    r"^visual\.proj$": "visual_projection.weight",
    r"^positional_embedding$": "text_model.embeddings.position_embedding.weight",
    r"^token_embedding\.": "text_model.embeddings.token_embedding.",
    r"^transformer\.resblocks\.": "text_model.encoder.layers.",
    r"^ln_final\.": "text_model.final_layer_norm.",
    r"^text_projection$": "text_projection.weight",
    r"\.ln_([12])\.": r".layer_norm\1.",
    r"\.mlp\.c_fc\.": ".mlp.fc1.",
    r"\.mlp\.c_proj\.": ".mlp.fc2.",
    r"\.attn\.": ".self_attn.",
}


@dataclass
class HPSReward(LearnedReward[Clip]):
    """The cosine of image and prompt under a CLIP ViT-H/14 that was trained on rankings of images."""

    about: ClassVar[About] = About(
        units="cosine, about 0.2 to 0.35",
        source="Wu et al. 2023 (arXiv 2306.09341), version 2.1 of its weights",
        weights=f"xswu/HPSv2 ({CHECKPOINT}); {VIT_H} (configuration, image processor and tokenizer)",
        licence="Apache-2.0 (authors' repository)",
        gibibytes=3.7,
    )
    version: ClassVar[str] = "hpsv2.1-1"

    @property
    def needs(self) -> tuple[Weights, ...]:
        own = Weights(repository="xswu/HPSv2", files=(CHECKPOINT,))
        return own, Weights(repository=VIT_H, files=("config.json", *PREPROCESSING))

    def build(self, *folders: Path) -> Clip:
        return _load(*(folder.resolve() for folder in folders))

    def raw(self, network: Clip, images: Sequence[Image.Image], texts: Sequence[str]) -> Tensor:
        side = network.model.config.vision_config.image_size
        return network.cosines([letterboxed(image, side) for image in images], texts)


def clip_state(state: State) -> State:
    """The weights of open_clip's CLIP under the names, and in the shapes, of transformers' CLIPModel."""
    found: State = {}
    for name, tensor in renamed(state, NAMES).items():
        if ".in_proj_" in name:  # query, key and value are one matrix in open_clip
            for letter, rows in zip("qkv", tensor.chunk(3), strict=True):
                found[name.replace(".in_proj_", f".{letter}_proj.")] = rows
        else:
            found[name] = tensor.T if name in {"visual_projection.weight", "text_projection.weight"} else tensor
    return found


def letterboxed(image: Image.Image, side: int) -> Image.Image:
    """The whole image in a black square of `side` pixels, as HPSv2 prepares it; other CLIP rewards cut to a square."""
    scale = side / max(image.size)
    width, height = (round(length * scale) for length in image.size)
    square = Image.new("RGB", (side, side))
    square.paste(image.resize((width, height), Image.Resampling.BICUBIC), ((side - width) // 2, (side - height) // 2))
    return square


@cache
def _load(checkpoint: Path, base: Path) -> Clip:
    state = read(checkpoint / CHECKPOINT)["state_dict"]
    config = transformers.CLIPConfig.from_pretrained(base)
    return clip_of(complete(transformers.CLIPModel, state=clip_state(state), config=config), base)
