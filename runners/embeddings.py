"""Prompt embeddings: kept in memory, and on disk where asked for; then the encoders can leave."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from runners.memory import with_room

CLIP_TOKENS = 77  # of an embedding, before those of T5
MOST = 4096  # embeddings in memory; the least recently used leaves first


@dataclass(frozen=True)
class Conditioning:
    """Prompt embeddings."""

    tokens: Tensor  # [b, t, d]
    pooled: Tensor  # [b, e]

    def rows(self, index: Tensor | slice) -> Conditioning:
        """The embeddings of some samples."""
        return Conditioning(self.tokens[index], self.pooled[index])


class Embeddings:
    """Embeddings by text. `encode` is asked for the unknown ones, and must encode each by itself.

    In a batch, the last bits of an embedding would depend on the others, and a resumed cell would not be the same cell.
    Where memory does not suffice to encode, the embeddings that are kept for later make room.
    """

    def __init__(self, encode: Callable[[list[str]], Conditioning], device: torch.device, folder: Path | None) -> None:
        self._encode, self._device, self._folder = encode, device, folder
        self._known: OrderedDict[str, tuple[Tensor, Tensor]] = OrderedDict()

    def __call__(self, texts: Sequence[str]) -> Conditioning:
        """The embeddings of these texts, [b, ...]."""
        wanted = list(dict.fromkeys(texts))
        found = {text: embedding for text in wanted if (embedding := self._find(text)) is not None}
        if unknown := [text for text in wanted if text not in found]:
            encoded = with_room(lambda: self._encode(unknown), self._known.clear)
            for text, tokens, pooled in zip(unknown, encoded.tokens, encoded.pooled, strict=True):
                found[text] = (tokens.clone(), pooled.clone())
                self._store(text, *found[text])
        for text, embedding in found.items():
            self._known[text] = embedding
            self._known.move_to_end(text)
        while len(self._known) > MOST:
            self._known.popitem(last=False)
        return Conditioning(*(torch.stack([found[text][i] for text in texts]) for i in (0, 1)))

    def _find(self, text: str) -> tuple[Tensor, Tensor] | None:
        if text in self._known:
            return self._known[text]
        path = self._path(text)
        if path is None or not path.exists():
            return None
        try:
            tensors = load_file(path, device=str(self._device))
            return tensors["tokens"], tensors["pooled"]
        except (SafetensorError, KeyError, OSError) as error:
            print(f"{path} is damaged ({type(error).__name__}); its prompt is encoded again", file=sys.stderr)
            return None

    def _store(self, text: str, tokens: Tensor, pooled: Tensor) -> None:
        if (path := self._path(text)) is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".writing-") as own:  # of this process on this host
            partial = Path(own) / path.name
            save_file({"tokens": tokens.cpu().contiguous(), "pooled": pooled.cpu().contiguous()}, partial)
            partial.replace(path)

    def _path(self, text: str) -> Path | None:
        name = hashlib.sha256(text.encode()).hexdigest()[:32]
        return None if self._folder is None else self._folder / f"{name}.safetensors"


def cache_folder(**identity: object) -> Path:
    """Where embeddings of this identity (model, encoders, prompt length, dtype) are kept, under ABLATE_CACHE."""
    root = Path(os.environ.get("ABLATE_CACHE", Path.home() / ".cache" / "ablate"))
    return root / "embeddings" / hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
