"""The policy: a `StableDiffusion3Pipeline` whose transformer is trained, with its old, reference and average weights.

All of SD 3.5 and the embedded model go through this file. Other weights are copies of the trained tensors alone (the
LoRA's, or all of the transformer's), exchanged in place, so that one network serves every policy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from diffusers.utils import logging
from numpy.typing import NDArray
from peft import LoraConfig
from torch import Tensor
from transformers.utils import logging as transformers_logging

from ablate.flow import Velocity
from ablate.recipe import ModelRecipe
from ablate.source import InputError
from runners.attention import check_kernel, use_kernel
from runners.compiling import compile_blocks
from runners.embeddings import Conditioning, Embeddings, cache_folder
from runners.hub import ENCODERS, cached_commit
from runners.identity import model_path
from runners.memory import in_memory

Weights = Literal["current", "old", "reference", "average"]

# Every attention projection of a joint block but those of the second attention; DiffusionNFT and the paper's release.
LORA_TARGETS = [
    *(f"attn.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")),
    *(f"attn.{name}" for name in ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")),
]


SECOND_ATTENTION = [f"attn2.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")]  # of the dual-attention blocks
DECODED_IMAGES, DECODED_PIXELS = 32, 2**21  # at once: fastest for small images, two gigabytes for large ones


def add_lora(network: SD3Transformer2DModel, recipe: ModelRecipe) -> None:
    """Adapters on the attention projections, which alone are trained then."""
    network.requires_grad_(False)
    config = LoraConfig(
        r=recipe.lora_rank,
        lora_alpha=recipe.lora_alpha,
        init_lora_weights="gaussian",
        target_modules=[*LORA_TARGETS, *(SECOND_ATTENTION if recipe.lora_second_attention else [])],
    )
    network.add_adapter(config)


def images_at_once(recipe: ModelRecipe) -> int:
    """How many images are decoded together."""
    return max(1, min(DECODED_IMAGES, DECODED_PIXELS // recipe.resolution**2))


class SD3Policy:
    """Stable Diffusion 3 and 3.5, LoRA or all weights of the transformer."""

    encode: Callable[[Sequence[str]], Conditioning]
    """Embeddings of the texts, each computed once."""

    def __init__(self, recipe: ModelRecipe, device: torch.device, pipe: StableDiffusion3Pipeline | None = None) -> None:
        check_kernel(recipe.attention, device)
        self.device = device
        self.recipe = recipe
        torch.set_float32_matmul_precision("high" if recipe.tf32 else "highest")
        self.pipe = pipe or _load(recipe)
        self.pipe.set_progress_bar_config(disable=True)
        self._encoders = [p for p in (getattr(self.pipe, name) for name in ENCODERS) if p is not None]
        for part in (self.pipe.vae, *self._encoders):
            part.requires_grad_(False).eval()
        for part in (self.pipe.vae, self.pipe.transformer, *([] if recipe.offload_encoders else self._encoders)):
            part.to(device)
        self.pipe.vae.to(memory_format=torch.channels_last)  # its convolutions are a third of a small model's rollout
        if recipe.vae_tiling:
            self.pipe.vae.enable_tiling()
        network = self.network = self.pipe.transformer
        network.requires_grad_(recipe.lora_rank is None)
        if recipe.lora_rank is not None:
            add_lora(network, recipe)
        use_kernel(network, recipe.attention)
        if recipe.gradient_checkpointing:
            network.enable_gradient_checkpointing()
        if recipe.compile:
            compile_blocks(network)
        self.trainable = [p for p in network.parameters() if p.requires_grad]
        for p in self.trainable:
            p.data = p.data.float()
        side = recipe.resolution // self.pipe.vae_scale_factor
        self.latent_shape: tuple[int, ...] = (network.config.in_channels, side, side)
        self._decoded_at_once = images_at_once(recipe)  # as they fitted into memory
        self.shift = float(self.pipe.scheduler.config.shift)
        self._copies: dict[str, list[Tensor]] = {
            name: [p.detach().clone() for p in self.trainable] for name in ("old", "reference", "average")
        }
        self._refreshed = False
        self.encode = Embeddings(self._encode, device, _cache(recipe) if recipe.cache_embeddings else None)

    @property
    def trained_bytes(self) -> int:
        """Of one copy of the trained weights."""
        return sum(p.nbytes for p in self.trainable)

    @torch.no_grad()
    def _encode(self, texts: list[str]) -> Conditioning:
        """Embeddings, each text by itself; offloaded encoders visit the device for as long as it takes."""
        visiting = self._encoders if self.recipe.offload_encoders else []
        try:
            for encoder in visiting:
                encoder.to(self.device)
            encoded = [
                self.pipe.encode_prompt(
                    text,
                    None,
                    None,
                    do_classifier_free_guidance=False,
                    max_sequence_length=self.recipe.max_sequence_length,
                    device=self.device,
                )
                for text in texts
            ]
        finally:
            for encoder in visiting:
                encoder.to("cpu")
        return Conditioning(torch.cat([e[0] for e in encoded]), torch.cat([e[2] for e in encoded]))

    def velocity(self, x: Tensor, sigma: Tensor, conditioning: Conditioning, guidance_scale: float = 1.0) -> Tensor:
        """The network's velocity at x [n, c, h, w], sigma [n]; float32. With guidance, u + s (v - u)."""
        if guidance_scale == 1:
            return self._call(x, sigma, conditioning)
        empty = self.encode([""])
        both = Conditioning(
            torch.cat([empty.tokens.expand(len(x), -1, -1), conditioning.tokens]),
            torch.cat([empty.pooled.expand(len(x), -1), conditioning.pooled]),
        )
        without, with_prompt = self._call(torch.cat([x, x]), torch.cat([sigma, sigma]), both).chunk(2)
        return without + guidance_scale * (with_prompt - without)

    def field(self, conditioning: Conditioning, guidance_scale: float) -> Velocity:
        """The velocity as a function of (x, sigma) alone, for samplers."""
        return lambda x, sigma: self.velocity(x, sigma, conditioning, guidance_scale)

    def _call(self, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        dtype = getattr(torch, self.recipe.dtype)
        with torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32):
            output: Tensor = self.network(
                hidden_states=x.to(dtype),
                timestep=1000 * sigma.to(x.device, torch.float32),
                encoder_hidden_states=conditioning.tokens,
                pooled_projections=conditioning.pooled,
                return_dict=False,
            )[0]
        return output.float()

    @torch.no_grad()
    def decode(self, latents: Tensor) -> NDArray[np.uint8]:
        """Images [b, h, w, 3] of latents [b, c, h, w], a few at a time: they need far more memory than latents.

        As many as fit. Raises torch.OutOfMemoryError where even one does not.
        """

        def at_once(size: int) -> NDArray[np.uint8]:
            return np.concatenate([self._decode(part) for part in torch.split(latents, size)])

        images, self._decoded_at_once = in_memory(self._decoded_at_once, at_once)
        return images

    def _decode(self, latents: Tensor) -> NDArray[np.uint8]:
        vae = self.pipe.vae
        scaled = (latents / vae.config.scaling_factor + vae.config.shift_factor).to(vae.dtype)
        scaled = scaled.contiguous(memory_format=torch.channels_last)
        images = vae.decode(scaled, return_dict=False)[0].float().clamp(-1, 1)
        decoded: NDArray[np.uint8] = ((images + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        return decoded

    @contextmanager
    def using(self, weights: Weights) -> Iterator[None]:
        """Exchange the trained weights for others; only where no gradient of the current ones is pending."""
        if weights == "current":
            yield
            return
        current = [p.data for p in self.trainable]
        for p, copy in zip(self.trainable, self._copies[weights], strict=True):
            p.data = copy
        try:
            yield
        finally:
            for p, data in zip(self.trainable, current, strict=True):
                p.data = data

    @torch.no_grad()
    def blend(self, weights: Weights, decay: float) -> None:
        """weights <- decay weights + (1 - decay) current."""
        self._refreshed |= weights == "reference"
        current = [p.data for p in self.trainable]
        torch._foreach_lerp_(self._copies[weights], current, 1 - decay)

    def state(self) -> dict[str, list[Tensor]]:
        """All weights a checkpoint needs; the reference only where it was refreshed, else it is the model's own."""
        kept = [name for name in self._copies if name != "reference" or self._refreshed]
        return {"current": [p.data for p in self.trainable], **{name: self._copies[name] for name in kept}}

    @torch.no_grad()
    def load_state(self, state: dict[str, list[Tensor]]) -> None:
        """Take over what `state` returned."""
        self._refreshed = "reference" in state
        mine = self.state()
        for name, tensors in state.items():
            torch._foreach_copy_(mine[name], tensors)


def _cache(recipe: ModelRecipe) -> Path:
    """The folder of this recipe's embeddings; local encoders count with the size and time of their files.

    Those of the hub count with their commit, which a branch such as `main` does not name for ever.
    """
    folder = Path(model_path(recipe.path))
    files = sorted(p for name in ENCODERS for p in (folder / name).glob("*") if p.is_file())
    return cache_folder(
        model=str(folder.resolve()) if folder.exists() else recipe.path,
        revision=cached_commit(recipe) or recipe.revision,
        files=[(str(p.relative_to(folder)), p.stat().st_size, p.stat().st_mtime_ns) for p in files],
        max_sequence_length=recipe.max_sequence_length,
        dtype=recipe.dtype,
    )


def _load(recipe: ModelRecipe) -> StableDiffusion3Pipeline:
    without_t5 = {} if recipe.max_sequence_length else {"text_encoder_3": None, "tokenizer_3": None}
    logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    try:
        return StableDiffusion3Pipeline.from_pretrained(
            model_path(recipe.path),
            revision=recipe.revision,
            dtype=getattr(torch, recipe.dtype),
            use_safetensors=True,
            **without_t5,
        )
    except OSError as error:
        raise InputError(
            f"model.path: {recipe.path!r} is neither a local pipeline nor reachable on the hub "
            f"({str(error).splitlines()[0]}). A gated model needs its licence accepted and `hf auth login`."
        ) from None
