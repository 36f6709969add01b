"""Reward `imagereward`: ImageReward v1.0, BLIP's text encoder looking at the image, and a head."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import transformers
from PIL import Image
from torch import Tensor, nn

from runners.rewards.aesthetic import score_head
from runners.rewards.learned import LearnedReward
from runners.rewards.pretrained import State, complete, part, read, renamed
from runners.rewards.protocol import About
from runners.rewards.weights import Weights

CHECKPOINT, TEXT_CONFIG = "ImageReward.pt", "med_config.json"
MEAN, STD = 0.16717362830052426, 1.0333394966054072  # of the head's output on the authors' training data
MAX_TOKENS = 35
HEAD_WIDTH = 64  # of every ViT's attention heads
VISION_NAMES = {  # BLIP's -> BlipVisionModel's
    r"^patch_embed\.proj\.": "embeddings.patch_embedding.",
    r"^cls_token$": "embeddings.class_embedding",
    r"^pos_embed$": "embeddings.position_embedding",
    r"^blocks\.": "encoder.layers.",
    r"^norm\.": "post_layernorm.",
    r"\.norm([12])\.": r".layer_norm\1.",
    r"\.attn\.qkv\.": ".self_attn.qkv.",
    r"\.attn\.proj\.": ".self_attn.projection.",
}
TEXT_SETTINGS = (  # of med_config.json
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "hidden_act",
    "layer_norm_eps", "max_position_embeddings",
)  # fmt: skip


class BlipScorer(nn.Module):
    """The first token of a prompt after it has looked at the image, through the head."""

    def __init__(self, vision: Any, text: Any, head: nn.Module, tokenizer: Any) -> None:
        super().__init__()
        self.vision, self.text, self.head, self.tokenizer = vision, text, head, tokenizer
        side = vision.config.image_size
        self.preprocess = transformers.CLIPImageProcessorPil(
            size={"shortest_edge": side}, crop_size={"height": side, "width": side}
        )  # the authors': CLIP's, not BLIP's

    def forward(self, images: Sequence[Image.Image], texts: Sequence[str]) -> Tensor:
        """Standardised scores [b]."""
        device = self.vision.device
        pixels = self.preprocess(images=list(images), return_tensors="pt")["pixel_values"].to(device)
        tokens = self.tokenizer(
            list(texts), padding="max_length", truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
        ).to(device)
        seen = self.vision(pixel_values=pixels).last_hidden_state
        read = self.text(tokens.input_ids, attention_mask=tokens.attention_mask, encoder_hidden_states=seen)
        scores: Tensor = self.head(read.last_hidden_state[:, 0]).squeeze(-1)
        return (scores - MEAN) / STD


@dataclass
class ImageReward(LearnedReward[BlipScorer]):
    """A score of image and prompt trained on experts' rankings, standardised on the authors' data."""

    about: ClassVar[About] = About(
        units="standard deviations, about -2 to 2",
        source="Xu et al. 2023 (arXiv 2304.05977)",
        weights=f"THUDM/ImageReward ({CHECKPOINT}, {TEXT_CONFIG}); google-bert/bert-base-uncased (tokenizer)",
        licence="Apache-2.0 (card)",
        gibibytes=1.7,
    )
    version: ClassVar[str] = "imagereward-1"

    @property
    def needs(self) -> tuple[Weights, ...]:
        own = Weights(repository="THUDM/ImageReward", files=(CHECKPOINT, TEXT_CONFIG))
        tokenizer = ("tokenizer.json", "tokenizer_config.json")
        return own, Weights(repository="google-bert/bert-base-uncased", files=tokenizer)

    def build(self, *folders: Path) -> BlipScorer:
        return _load(*(folder.resolve() for folder in folders))

    def raw(self, network: BlipScorer, images: Sequence[Image.Image], texts: Sequence[str]) -> Tensor:
        scores: Tensor = network(images, texts)
        return scores


def vision_encoder(state: State) -> Any:
    """BLIP's ViT as a BlipVisionModel of the sizes that its weights have."""
    state = renamed(state, VISION_NAMES)
    width, _, _, patch = state["embeddings.patch_embedding.weight"].shape
    config = transformers.BlipVisionConfig(
        hidden_size=width,
        intermediate_size=state["encoder.layers.0.mlp.fc1.weight"].shape[0],
        num_hidden_layers=sum(name.endswith(".mlp.fc1.weight") for name in state),
        num_attention_heads=width // HEAD_WIDTH,
        image_size=patch * round((state["embeddings.position_embedding"].shape[1] - 1) ** 0.5),
        patch_size=patch,
        layer_norm_eps=1e-6,
    )
    return complete(transformers.BlipVisionModel, state=state, config=config)


def text_encoder(state: State, settings: dict[str, Any], vision_width: int) -> Any:
    """BLIP's BERT, which attends to the image in every layer, as a BlipTextModel; `settings` as in med_config.json."""
    config = transformers.BlipTextConfig(
        **{name: settings[name] for name in TEXT_SETTINGS}, encoder_hidden_size=vision_width
    )
    return complete(transformers.BlipTextModel, state=state, config=config, add_pooling_layer=False)


@cache
def _load(checkpoint: Path, tokenizer: Path) -> BlipScorer:
    state: State = read(checkpoint / CHECKPOINT)
    vision = vision_encoder(part(state, "blip.visual_encoder."))
    settings = json.loads((checkpoint / TEXT_CONFIG).read_text(encoding="utf-8"))
    text = text_encoder(part(state, "blip.text_encoder."), settings, vision.config.hidden_size)
    words = transformers.BertTokenizer.from_pretrained(tokenizer)
    return BlipScorer(vision, text, score_head(part(state, "mlp.layers.")), words)
