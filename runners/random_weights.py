"""Stable Diffusion 3.5 at its real sizes with random weights: what it costs, without downloading it.

Numbers are those of `transformer/config.json` and `vae/config.json` of `stabilityai/stable-diffusion-3.5-medium` and
`stabilityai/stable-diffusion-3.5-large`; both have one autoencoder and one scheduler. Prompt embeddings are random too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

from ablate.recipe import ModelRecipe
from ablate.seeding import Streams, generator
from ablate.source import InputError, choices
from runners.embeddings import CLIP_TOKENS, Conditioning, Embeddings
from runners.policy import SD3Policy

HUB_IDS: Mapping[str, str] = {
    "sd3.5-medium": "stabilityai/stable-diffusion-3.5-medium",
    "sd3.5-large": "stabilityai/stable-diffusion-3.5-large",
}  # what `ablate bench --random-weights` calls the sizes, and where they are published


def random_policy(recipe: ModelRecipe, device: torch.device) -> SD3Policy:
    """A policy of the size that `model.path` names, in the recipe's dtype. Raises InputError for any other model."""
    build = transformer_of(recipe.path)
    dtype = getattr(torch, recipe.dtype)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # billions of parameters are never in float32
    try:
        pipe = StableDiffusion3Pipeline(
            transformer=build(),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=autoencoder(),
            text_encoder=None, tokenizer=None, text_encoder_2=None, tokenizer_2=None,
            text_encoder_3=None, tokenizer_3=None,
        )  # fmt: skip
    finally:
        torch.set_default_dtype(before)
    pipe.transformer.to(dtype)  # its buffers, as when loaded
    policy = SD3Policy(recipe, device, pipe)
    config = policy.network.config

    def encode(texts: list[str]) -> Conditioning:
        own = Streams(tuple(generator(0, "embedding", text) for text in texts), shared=generator(0))
        tokens, like = CLIP_TOKENS + recipe.max_sequence_length, torch.empty((), dtype=dtype, device=device)
        return Conditioning(
            own.normal((tokens, config.joint_attention_dim), like), own.normal((config.pooled_projection_dim,), like)
        )

    policy.encode = Embeddings(encode, device, None)  # by text: all policies see a prompt under one embedding
    return policy


def transformer_of(name: str) -> Callable[[], SD3Transformer2DModel]:
    """What builds the transformer of `sd3.5-medium`, `sd3.5-large` or their hub ids. Raises InputError for others."""
    if name not in HUB_IDS and name not in HUB_IDS.values():
        allowed = [*HUB_IDS, *HUB_IDS.values()]
        raise InputError(f"--random-weights: got model {name!r}, of no known size{choices(name, allowed)}")
    return large_transformer if name.endswith("large") else medium_transformer


_transformer = partial(
    SD3Transformer2DModel, sample_size=128, patch_size=2, in_channels=16, out_channels=16, attention_head_dim=64,
    joint_attention_dim=4096, pooled_projection_dim=2048, qk_norm="rms_norm",
)  # fmt: skip


def medium_transformer() -> SD3Transformer2DModel:
    """24 blocks of width 1536, dual attention in the first 13: 2.24 billion parameters."""
    return _transformer(
        num_layers=24, num_attention_heads=24, caption_projection_dim=1536, pos_embed_max_size=384,
        dual_attention_layers=tuple(range(13)),
    )  # fmt: skip


def large_transformer() -> SD3Transformer2DModel:
    """38 blocks of width 2432 without dual attention: 8.06 billion parameters, and 90 million numbers of positions."""
    return _transformer(num_layers=38, num_attention_heads=38, caption_projection_dim=2432, pos_embed_max_size=192)


def autoencoder() -> AutoencoderKL:
    """Images to 16 channels at an eighth of the side."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=16, norm_num_groups=32,
        sample_size=1024, use_quant_conv=False, use_post_quant_conv=False, scaling_factor=1.5305, shift_factor=0.0609,
    )  # fmt: skip
