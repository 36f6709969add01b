"""CLIP as open_clip lays it out and ImageReward as BLIP does, in plain torch: what their checkpoints are made of.

Only what names and shapes of the weights and the computation depend on: no dropout, no options.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import TypeVar

import torch
from torch import Tensor, nn

Network = TypeVar("Network", bound=nn.Module)


def shaken(make: Callable[[], Network], seed: int = 0) -> Network:
    """A network with random weights that are large enough to matter, all of them."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = make()
        with torch.no_grad():
            for tensor in network.parameters():
                if tensor.ndim < 2:
                    tensor.add_(torch.randn(tensor.shape), alpha=0.1)
                else:
                    tensor.copy_(torch.randn(tensor.shape) / math.sqrt(tensor[0].numel()))
    return network.eval().requires_grad_(False)


class ResidualBlock(nn.Module):
    """open_clip's ResidualAttentionBlock."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.Sequential()
        self.mlp.add_module("c_fc", nn.Linear(width, 4 * width))
        self.mlp.add_module("gelu", nn.GELU())
        self.mlp.add_module("c_proj", nn.Linear(4 * width, width))

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        normed = self.ln_1(x)
        x = x + self.attn(normed, normed, normed, need_weights=False, attn_mask=mask)[0]
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    def __init__(self, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(ResidualBlock(width, heads) for _ in range(layers))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        for block in self.resblocks:
            x = block(x, mask)
        return x


class Visual(nn.Module):
    """open_clip's VisionTransformer."""

    def __init__(self, side: int, patch: int, width: int, layers: int, heads: int, out: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, patch, patch, bias=False)
        self.class_embedding = nn.Parameter(torch.zeros(width))
        self.positional_embedding = nn.Parameter(torch.zeros((side // patch) ** 2 + 1, width))
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer = Transformer(width, layers, heads)
        self.proj = nn.Parameter(torch.zeros(width, out))

    def forward(self, pixels: Tensor) -> Tensor:
        patches = self.conv1(pixels).flatten(2).transpose(1, 2)
        first = self.class_embedding.expand(len(pixels), 1, -1)
        x = self.ln_pre(torch.cat([first, patches], 1) + self.positional_embedding)
        return self.ln_post(self.transformer(x)[:, 0]) @ self.proj


class OpenClip(nn.Module):
    """open_clip's CLIP."""

    def __init__(self, *, words: int, tokens: int, side: int, patch: int, vision: int, text: int, out: int) -> None:
        super().__init__()
        self.visual = Visual(side, patch, vision, 2, 3, out)
        self.transformer = Transformer(text, 2, 2)
        self.token_embedding = nn.Embedding(words, text)
        self.positional_embedding = nn.Parameter(torch.zeros(tokens, text))
        self.ln_final = nn.LayerNorm(text)
        self.text_projection = nn.Parameter(torch.zeros(text, out))
        self.logit_scale = nn.Parameter(torch.tensor(4.6))

    def forward(self, pixels: Tensor, tokens: Tensor) -> Tensor:
        """Cosines of images and texts, [images, texts]; the last word of the vocabulary ends a text."""
        length = tokens.shape[1]
        causal = torch.full((length, length), float("-inf")).triu(1)
        x = self.ln_final(self.transformer(self.token_embedding(tokens) + self.positional_embedding, causal))
        texts = x[torch.arange(len(x)), tokens.argmax(-1)] @ self.text_projection
        images = self.visual(pixels)
        return nn.functional.normalize(images, dim=-1) @ nn.functional.normalize(texts, dim=-1).T


class VisionAttention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        return self.proj((_weights(q, k) @ v).transpose(1, 2).flatten(2))


class VisionBlock(nn.Module):
    """BLIP's (timm's) Block."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=1e-6), nn.LayerNorm(width, eps=1e-6)
        self.attn = VisionAttention(width, heads)
        self.mlp = nn.Module()
        self.mlp.fc1, self.mlp.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp.fc2(nn.functional.gelu(self.mlp.fc1(self.norm2(x))))


class BlipVision(nn.Module):
    """BLIP's VisionTransformer."""

    def __init__(self, side: int, patch: int, width: int, layers: int, heads: int) -> None:
        super().__init__()
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(3, width, patch, patch)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, (side // patch) ** 2 + 1, width))
        self.blocks = nn.ModuleList(VisionBlock(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, pixels: Tensor) -> Tensor:
        patches = self.patch_embed.proj(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(pixels), -1, -1), patches], 1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class BertAttention(nn.Module):
    """Attention of BLIP's med.py, to `source` with a residual connection and a norm after it."""

    def __init__(self, width: int, source: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.self, self.output = nn.Module(), nn.Module()
        self.self.query, self.self.key, self.self.value = (nn.Linear(n, width) for n in (width, source, source))
        self.output.dense, self.output.LayerNorm = nn.Linear(width, width), nn.LayerNorm(width, eps=1e-12)

    def forward(self, x: Tensor, source: Tensor, shown: Tensor | None = None) -> Tensor:
        given = (self.self.query(x), self.self.key(source), self.self.value(source))
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in given)
        mixed = (_weights(q, k, shown) @ v).transpose(1, 2).flatten(2)
        return self.output.LayerNorm(self.output.dense(mixed) + x)


class BertLayer(nn.Module):
    def __init__(self, width: int, source: int, heads: int) -> None:
        super().__init__()
        self.attention = BertAttention(width, width, heads)
        self.crossattention = BertAttention(width, source, heads)
        self.intermediate, self.output = nn.Module(), nn.Module()
        self.intermediate.dense = nn.Linear(width, 2 * width)
        self.output.dense, self.output.LayerNorm = nn.Linear(2 * width, width), nn.LayerNorm(width, eps=1e-12)

    def forward(self, x: Tensor, shown: Tensor, image: Tensor) -> Tensor:
        x = self.crossattention(self.attention(x, x, shown), image)
        return self.output.LayerNorm(self.output.dense(nn.functional.gelu(self.intermediate.dense(x))) + x)


class BlipText(nn.Module):
    """BLIP's BertModel, without a pooler."""

    def __init__(self, words: int, tokens: int, width: int, source: int, layers: int, heads: int) -> None:
        super().__init__()
        self.embeddings, self.encoder = nn.Module(), nn.Module()
        self.embeddings.word_embeddings = nn.Embedding(words, width)
        self.embeddings.position_embeddings = nn.Embedding(tokens, width)
        self.embeddings.LayerNorm = nn.LayerNorm(width, eps=1e-12)
        self.embeddings.register_buffer("position_ids", torch.arange(tokens)[None])
        self.encoder.layer = nn.ModuleList(BertLayer(width, source, heads) for _ in range(layers))

    def forward(self, tokens: Tensor, shown: Tensor, image: Tensor) -> Tensor:
        positions = self.embeddings.position_embeddings(self.embeddings.position_ids[:, : tokens.shape[1]])
        x = self.embeddings.LayerNorm(self.embeddings.word_embeddings(tokens) + positions)
        for layer in self.encoder.layer:
            x = layer(x, shown, image)
        return x


class ImageReward(nn.Module):
    """The authors' ImageReward: `blip`, with two projections that scoring does not use, and `mlp`."""

    def __init__(self, *, words: int, tokens: int, side: int, patch: int, vision: int, text: int) -> None:
        super().__init__()
        self.blip, self.mlp = nn.Module(), nn.Module()
        self.blip.visual_encoder = BlipVision(side, patch, vision, 2, vision // 64)
        self.blip.text_encoder = BlipText(words, tokens, text, vision, 2, 4)
        self.blip.vision_proj, self.blip.text_proj = nn.Linear(vision, 8), nn.Linear(text, 8)
        self.mlp.layers = head(text)

    def forward(self, pixels: Tensor, tokens: Tensor, shown: Tensor) -> Tensor:
        read = self.blip.text_encoder(tokens, shown, self.blip.visual_encoder(pixels))
        return (self.mlp.layers(read[:, 0])[:, 0] - 0.16717362830052426) / 1.0333394966054072


def head(width: int) -> nn.Sequential:
    """LAION's head: five linear maps with nothing but dropout between them."""
    sizes = (width, 1024, 128, 64, 16, 1)
    layers = [nn.Linear(a, b) for a, b in pairwise(sizes)]
    dropouts = [nn.Dropout(0.2), nn.Dropout(0.2), nn.Dropout(0.1)]
    return nn.Sequential(layers[0], dropouts[0], layers[1], dropouts[1], layers[2], dropouts[2], layers[3], layers[4])


def _weights(q: Tensor, k: Tensor, shown: Tensor | None = None) -> Tensor:
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    if shown is not None:
        scores = scores.masked_fill(shown[:, None, None] == 0, float("-inf"))
    return scores.softmax(-1)
