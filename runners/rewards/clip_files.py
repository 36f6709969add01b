"""Which files of the hub make a CLIP. Torch-free: a plan names them."""

from __future__ import annotations

from runners.rewards.weights import Weights

VIT_L = "openai/clip-vit-large-patch14"
VIT_H = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
MODEL = ("config.json", "model.safetensors")
PREPROCESSING = ("preprocessor_config.json", "tokenizer.json", "tokenizer_config.json")


def clip_weights(repository: str = VIT_L) -> Weights:
    """The files that `load_clip` reads."""
    return Weights(repository=repository, files=(*MODEL, *PREPROCESSING))
