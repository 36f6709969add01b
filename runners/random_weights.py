"""Stable Diffusion 3.5 Medium at its real size with random weights: what it costs, without downloading it.

The configuration is that of `stabilityai/stable-diffusion-3.5-medium`; prompt embeddings are random too.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

from ablate.recipe import ModelRecipe
from runners.embeddings import CLIP_TOKENS, Conditioning
from runners.policy import SD3Policy


def random_policy(recipe: ModelRecipe, device: torch.device) -> SD3Policy:
    """A policy of the real architecture for a recipe; `model.path` is not looked at."""
    dtype = getattr(torch, recipe.dtype)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # 2.2 billion parameters are never in float32
    try:
        pipe = StableDiffusion3Pipeline(
            transformer=medium_transformer(),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=medium_autoencoder(),
            text_encoder=None, tokenizer=None, text_encoder_2=None, tokenizer_2=None,
            text_encoder_3=None, tokenizer_3=None,
        )  # fmt: skip
    finally:
        torch.set_default_dtype(before)
    pipe.transformer.to(dtype)  # its buffers, as when loaded
    policy = SD3Policy(recipe, device, pipe)
    config = policy.network.config

    def embeddings(texts: Sequence[str]) -> Conditioning:
        tokens = CLIP_TOKENS + recipe.max_sequence_length
        return Conditioning(
            torch.randn(len(texts), tokens, config.joint_attention_dim, dtype=dtype, device=device),
            torch.randn(len(texts), config.pooled_projection_dim, dtype=dtype, device=device),
        )

    policy.encode = embeddings
    return policy


def medium_transformer() -> SD3Transformer2DModel:
    """24 blocks of width 1536, dual attention in the first 13, RMS-normalised queries and keys."""
    return SD3Transformer2DModel(
        sample_size=128, patch_size=2, in_channels=16, out_channels=16, num_layers=24, attention_head_dim=64,
        num_attention_heads=24, joint_attention_dim=4096, caption_projection_dim=1536, pooled_projection_dim=2048,
        pos_embed_max_size=384, dual_attention_layers=tuple(range(13)), qk_norm="rms_norm",
    )  # fmt: skip


def medium_autoencoder() -> AutoencoderKL:
    """Images to 16 channels at an eighth of the side."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=16, norm_num_groups=32,
        sample_size=1024, use_quant_conv=False, use_post_quant_conv=False, scaling_factor=1.5305, shift_factor=0.0609,
    )  # fmt: skip
