"""The parts of the embedded pipeline, untrained: SD 3.5's classes with small sizes."""

from __future__ import annotations

import json

import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.trainers import BpeTrainer
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

TEXT_TOKENS = 9  # begin, at most seven words, end


def autoencoder() -> AutoencoderKL:
    """Images [n, 3, 32, 32] to latents [n, 4, 8, 8] and back."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 48),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=32,
        use_quant_conv=False,
        use_post_quant_conv=False,
        mid_block_add_attention=False,
    )


def tokenizer(sentences: list[str]) -> CLIPTokenizer:
    """CLIP's byte-pair tokenizer, trained on the world's own sentences until every word is one token."""
    special = ["<|startoftext|>", "<|endoftext|>"]
    pairs = Tokenizer(BPE())
    pairs.pre_tokenizer = Whitespace()
    pairs.train_from_iterator(
        sentences,
        BpeTrainer(vocab_size=1000, special_tokens=special, end_of_word_suffix="</w>", show_progress=False),
    )
    model = json.loads(pairs.to_str())["model"]
    return CLIPTokenizer(
        vocab=model["vocab"], merges=[tuple(pair) for pair in model["merges"]], model_max_length=TEXT_TOKENS
    )


class TextToLatent(nn.Module):
    """Two CLIP text encoders and the SD 3.5 transformer, conditioned as `StableDiffusion3Pipeline` does it."""

    def __init__(self, tokenizer: CLIPTokenizer, sentences: list[str], *, width: int, num_blocks: int) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.tokens: Tensor
        self.register_buffer(
            "tokens",
            tokenizer(sentences, padding="max_length", max_length=TEXT_TOKENS, return_tensors="pt").input_ids,
        )
        text = CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=TEXT_TOKENS,
            projection_dim=64,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        self.text_encoder = CLIPTextModelWithProjection(text)
        self.text_encoder_2 = CLIPTextModelWithProjection(text)
        self.transformer = SD3Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=num_blocks,
            attention_head_dim=32,
            num_attention_heads=width // 32,
            joint_attention_dim=2 * text.hidden_size,
            caption_projection_dim=width,
            pooled_projection_dim=2 * text.projection_dim,
            pos_embed_max_size=4,
            qk_norm="rms_norm",
        )

    def embed(self, captions: Tensor) -> tuple[Tensor, Tensor]:
        """Token and pooled embeddings of captions [n], indices of sentences: [n, tokens, 128] and [n, 128]."""
        tokens = self.tokens[captions]
        outputs = [e(tokens, output_hidden_states=True) for e in (self.text_encoder, self.text_encoder_2)]
        return (
            torch.cat([o.hidden_states[-2] for o in outputs], -1),
            torch.cat([o.text_embeds for o in outputs], -1),
        )
