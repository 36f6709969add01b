"""Folders with the files of learned rewards, tiny and random, as the hub has them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from original_networks import ImageReward, OpenClip, head, shaken

SIDE, PATCH, VISION, TEXT, OUT = 28, 14, 48, 32, 24
CHARACTERS = [chr(code) for code in range(33, 127)]
CLIP_WORDS = [*CHARACTERS, *(c + "</w>" for c in CHARACTERS), "<|startoftext|>", "<|endoftext|>"]
BERT_WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *CHARACTERS, *("##" + c for c in CHARACTERS)]


def clip_config() -> transformers.CLIPConfig:
    """That of a tiny CLIP, with the vocabulary of `write_preprocessing`."""
    end = len(CLIP_WORDS) - 1
    text = {
        "vocab_size": end + 1, "hidden_size": TEXT, "intermediate_size": 4 * TEXT, "num_hidden_layers": 2,
        "num_attention_heads": 2, "max_position_embeddings": 77, "hidden_act": "gelu",
        "bos_token_id": end - 1, "eos_token_id": end, "pad_token_id": end,
    }  # fmt: skip
    vision = {
        "hidden_size": VISION, "intermediate_size": 4 * VISION, "num_hidden_layers": 2, "num_attention_heads": 3,
        "image_size": SIDE, "patch_size": PATCH, "hidden_act": "gelu",
    }  # fmt: skip
    return transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=OUT)


def write_preprocessing(folder: Path) -> None:
    """CLIP's tokenizer with a letter per token, and its image processor in the words of the oldest files on the hub."""
    tokens = {word: i for i, word in enumerate(CLIP_WORDS)}
    transformers.CLIPTokenizer(vocab=tokens, merges=[]).save_pretrained(folder)
    old = {"size": SIDE, "crop_size": SIDE, "resample": 3, "feature_extractor_type": "CLIPFeatureExtractor"}
    (folder / "preprocessor_config.json").write_text(json.dumps(old), encoding="utf-8")


def write_clip(folder: Path, seed: int = 0) -> Path:
    """The files of `clipscore` and of `pickscore`."""
    shaken(lambda: transformers.CLIPModel(clip_config()), seed).save_pretrained(folder)
    write_preprocessing(folder)
    return folder


def write_aesthetic(folder: Path, seed: int = 0) -> Path:
    """The files of `aesthetic`, those of its CLIP too."""
    state = {f"layers.{name}": tensor for name, tensor in shaken(lambda: head(OUT), seed + 1).state_dict().items()}
    torch.save(state, write_clip(folder, seed) / "aesthetic-model.pth")
    return folder


def original_hps(seed: int = 0) -> OpenClip:
    """HPSv2 in its own layout, tiny."""
    sizes = {"words": len(CLIP_WORDS), "tokens": 77, "side": SIDE, "patch": PATCH}
    return shaken(lambda: OpenClip(**sizes, vision=VISION, text=TEXT, out=OUT), seed)


def write_hps(folder: Path, seed: int = 0) -> Path:
    """The files of `hpsv2.1`."""
    clip_config().save_pretrained(folder)
    write_preprocessing(folder)
    torch.save({"state_dict": original_hps(seed).state_dict(), "epoch": 1}, folder / "HPS_v2.1_compressed.pt")
    return folder


def original_imagereward(seed: int = 0) -> ImageReward:
    """ImageReward in its own layout, tiny."""
    sizes = {"words": len(BERT_WORDS) + 2, "tokens": 40, "side": 32, "patch": 16}
    return shaken(lambda: ImageReward(**sizes, vision=128, text=TEXT), seed)


def write_imagereward(folder: Path, seed: int = 0) -> Path:
    """The files of `imagereward`."""
    tokens = {word: i for i, word in enumerate(BERT_WORDS)}
    transformers.BertTokenizer(vocab=tokens).save_pretrained(folder)
    torch.save(original_imagereward(seed).state_dict(), folder / "ImageReward.pt")
    settings = {
        "architectures": ["BertModel"], "hidden_size": TEXT, "intermediate_size": 2 * TEXT, "num_hidden_layers": 2,
        "num_attention_heads": 4, "hidden_act": "gelu", "layer_norm_eps": 1e-12, "max_position_embeddings": 40,
        "vocab_size": len(BERT_WORDS) + 2, "encoder_width": 768, "hidden_dropout_prob": 0.1,
    }  # fmt: skip
    (folder / "med_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder


WRITERS: dict[str, Callable[..., Path]] = {
    "aesthetic": write_aesthetic,
    "clipscore": write_clip,
    "hpsv2.1": write_hps,
    "imagereward": write_imagereward,
    "pickscore": write_clip,
}
