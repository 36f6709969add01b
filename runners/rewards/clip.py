"""CLIP with its preprocessing: images and texts as unit vectors in one space (Radford et al. 2021, arXiv 2103.00020).

Loaded once per folder and process, however many rewards use it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image
from torch import Tensor, nn

from runners.rewards.pretrained import complete

MAX_TOKENS = 77
KEPT_TEXTS = 4096  # embeddings, 16 MB of ViT-H's


class Clip(nn.Module):
    """A `CLIPModel` that takes PIL images and strings. Texts are embedded once and kept, the latest 4096 of them."""

    def __init__(self, model: Any, preprocess: Any, tokenizer: Any) -> None:
        super().__init__()
        self.model, self.preprocess, self.tokenizer = model, preprocess, tokenizer
        # one at a time: an embedding is then the same to the last bit whatever was asked for beside it
        self._embedding = lru_cache(KEPT_TEXTS)(self._embed_text)

    @torch.inference_mode()
    def embed_images(self, images: Sequence[Image.Image]) -> Tensor:
        """Unit vectors [b, d] of images, together in one batch."""
        # an image three pixels high looks like one of three channels, unless it is said where they are
        pixels = self.preprocess(images=list(images), input_data_format="channels_last", return_tensors="pt")
        return _unit(self.model.get_image_features(**pixels.to(self.model.device)))

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Unit vectors [b, d] of texts, cut after 77 tokens."""
        return torch.stack([self._embedding(text) for text in texts]).to(self.model.device)

    def cosines(self, images: Sequence[Image.Image], texts: Sequence[str]) -> Tensor:
        """How near each image is to its own text, [b] in [-1, 1]."""
        return (self.embed_images(images) * self.embed_texts(texts)).sum(-1)

    def logits(self, images: Sequence[Image.Image], texts: Sequence[str]) -> Tensor:
        """`cosines` [b] times the model's scale, about 100: the diagonal of `logits_per_image`."""
        scale: Tensor = self.model.logit_scale.exp()
        return self.cosines(images, texts) * scale

    @torch.inference_mode()
    def _embed_text(self, text: str) -> Tensor:
        tokens = self.tokenizer(
            [text], truncation=True, max_length=MAX_TOKENS, padding="max_length", return_tensors="pt"
        )
        return _unit(self.model.get_text_features(**tokens.to(self.model.device)))[0].cpu()


def load_clip(model: Path, preprocessing: Path | None = None) -> Clip:
    """The CLIP of a folder, on the CPU the first time; the same instance for every caller.

    `preprocessing` is where the image processor and the tokenizer are, if elsewhere. Who moves the instance moves it
    for all. Raises OSError or ValueError for files that do not make a whole model.
    """
    return _load(model.resolve(), (preprocessing or model).resolve())


def clip_of(model: nn.Module, preprocessing: Path) -> Clip:
    """A `CLIPModel` with the image processor and the tokenizer of a folder."""
    preprocess = transformers.CLIPImageProcessorPil.from_pretrained(
        preprocessing
    )  # open_clip's numbers; no torchvision
    return Clip(model, preprocess, transformers.CLIPTokenizer.from_pretrained(preprocessing))


@cache
def _load(model: Path, preprocessing: Path) -> Clip:
    return clip_of(complete(transformers.CLIPModel, model), preprocessing)


def _unit(features: Any) -> Tensor:
    """Vectors of length 1; transformers 5 answers with an object, 4 with a tensor."""
    vectors: Tensor = getattr(features, "pooler_output", features)
    unit: Tensor = vectors / vectors.norm(dim=-1, keepdim=True)
    return unit
