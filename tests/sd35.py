"""A pipeline with all of SD 3.5 Medium's structure and random weights of a few hundred kilobytes, and cells on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel, T5TokenizerFast

from ablate.grid import load_grid
from ablate.plan import Cell, make_plan
from ablate.recipe import ModelRecipe
from runners.tiny.architecture import tokenizer

GRIDS = Path(__file__).parents[1] / "grids"
ODE = "{objective: [epg], estimator: [elbo], sampler: [ode]}"
SDE = "{objective: [grpo], estimator: [trajectory], sampler: [sde]}"
SENTENCES = ["a red circle", "two blue squares", "a green triangle left of a red square"]


def write_pipeline(folder: Path) -> Path:
    """Three text encoders, T5 among them, dual attention in the first block, RMS qk-norm, a 16-channel VAE."""
    torch.manual_seed(0)
    clip = tokenizer(SENTENCES)
    letters = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((c, -1.0) for c in "▁abcdefghijklmnopqrstuvwxyz ")]
    text = CLIPTextConfig(
        vocab_size=len(clip), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=9, projection_dim=16, bos_token_id=clip.bos_token_id, eos_token_id=clip.eos_token_id,
        pad_token_id=clip.pad_token_id,
    )  # fmt: skip
    t5 = T5Config(vocab_size=32, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 8, 8), layers_per_block=1, latent_channels=16, norm_num_groups=4, sample_size=64,
        use_quant_conv=False, use_post_quant_conv=False, scaling_factor=1.5305, shift_factor=0.0609,
    )  # fmt: skip
    transformer = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=16, out_channels=16, num_layers=2, attention_head_dim=8,
        num_attention_heads=4, joint_attention_dim=32, caption_projection_dim=32, pooled_projection_dim=32,
        pos_embed_max_size=8, qk_norm="rms_norm", dual_attention_layers=(0,),
    )  # fmt: skip
    pipe = StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        text_encoder=CLIPTextModelWithProjection(text),
        tokenizer=clip,
        text_encoder_2=CLIPTextModelWithProjection(text),
        tokenizer_2=clip,
        text_encoder_3=T5EncoderModel(t5),
        tokenizer_3=T5TokenizerFast(vocab=letters, extra_ids=0),
    )
    pipe.save_pretrained(folder)
    return folder


def recipe(folder: Path, **fields: Any) -> ModelRecipe:
    """A LoRA on the pipeline in this folder."""
    given = {"path": str(folder), "lora_rank": 4, "max_sequence_length": 16, "resolution": 64}
    return ModelRecipe.model_validate(given | fields)


def cell(folder: Path, what: str, tmp_path: Path, **fields: Any) -> Cell:
    """The first cell of these axes: two epochs of twelve images."""
    (tmp_path / "g.yaml").write_text(
        f"name: g\nrecipe: {GRIDS / 'recipes' / 'tiny-scenes.yaml'}\naxes: {what}\nseeds: [0]\n"
        f"override: {{reward: jpeg, model: {recipe(folder, **fields).model_dump_json()}}}\n"
    )
    settings = {
        "rollout.num_groups": 3,
        "rollout.group_size": 4,
        "rollout.num_steps": 4,
        "update.updates_per_epoch": 1,
        "update.micro_batch_size": 16,
        "evaluation.num_prompts": 6,
        "evaluation.num_steps": 2,
        "budget.epochs": 2,
    }
    return make_plan(load_grid(tmp_path / "g.yaml", settings)).cells[0]
