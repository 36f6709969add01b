"""How the embedded model was made: `python -m runners.tiny.pretrain --out DIR`. Seeded, resumable, under an hour.

Four stages, each saved when done and during its run, so that the same command continues an interrupted one:

1. `vae`: an AutoencoderKL on clean renders (32x32x3 -> 8x8x4).
2. `draw`: text encoders and transformer together, by flow matching on true captions. The model learns to draw well.
3. `disobey`: the transformer alone, with a share of the captions exchanged for another scene's, as captions of the
   web are. What it can draw stays, what it obeys drops: this leaves to reinforcement learning the room that it has
   on SD 3.5-M (0.24 on GenEval without guidance, 0.63 with).
4. `pipeline`: everything saved as a `StableDiffusion3Pipeline`, evaluated, with its model card.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import AdamW, Muon
from torch.optim.lr_scheduler import LambdaLR

from runners.prompts import Prompt
from runners.tiny.architecture import TextToLatent, autoencoder, tokenizer
from runners.tiny.card import write_card
from runners.tiny.scenes import all_prompts, draw_objects, render

Model = TypeVar("Model", bound=nn.Module)

SHIFT = 3.0  # of the noise schedule, as in SD 3
# How often each family is drawn: those that bind colours or places to objects are learned last. Stage 3 evens it out.
SHARES = {"single_object": 1, "two_object": 1, "counting": 2, "colors": 1, "position": 2, "color_attr": 3}


@dataclass(frozen=True, kw_only=True)
class Settings:
    seed: int = 0
    num_scenes: int = 80_000
    batch_size: int = 64
    vae_steps: int = 1_000
    draw_steps: int = 10_000
    disobey_steps: int = 1_500
    swap: float = 0.5  # share of captions exchanged in stage 3
    caption_dropout: float = 0.1  # the empty caption of classifier-free guidance
    width: int = 96
    num_blocks: int = 4
    ema_decay: float = 0.999


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the pipeline; work files beside it")
    parser.add_argument("--threads", type=int, default=1)
    for name, value in asdict(Settings()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    arguments = vars(parser.parse_args())
    out, threads = arguments.pop("out"), arguments.pop("threads")
    torch.set_num_threads(threads)
    settings = Settings(**arguments)
    work = out.with_name(out.name + ".work")
    work.mkdir(parents=True, exist_ok=True)

    captions, images = scenes(settings)
    vae = train_vae(settings, images, work / "vae.pt")
    latents = encode(vae, images)
    vae.register_to_config(scaling_factor=float(1 / latents.std()), shift_factor=float(latents.mean()))
    latents = (latents - vae.config.shift_factor) * vae.config.scaling_factor
    sentences = [p.text for family in all_prompts().values() for p in family] + [""]
    index = {text: i for i, text in enumerate(sentences)}
    caption_ids = torch.tensor([index[p.text] for p in captions])

    torch.manual_seed(settings.seed + 1)
    model = TextToLatent(tokenizer(sentences), sentences, width=settings.width, num_blocks=settings.num_blocks)
    model = train_draw(settings, model, latents, caption_ids, work / "draw.pt")
    evenly = torch.tensor([1 / SHARES[p.tag] for p in captions])
    transformer = train_disobey(settings, model, latents, caption_ids, evenly, work / "disobey.pt")
    StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=SHIFT),
        vae=vae,
        text_encoder=model.text_encoder,
        tokenizer=model.tokenizer,
        text_encoder_2=model.text_encoder_2,
        tokenizer_2=model.tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
    ).save_pretrained(out, safe_serialization=True)
    (out / "pretraining.json").write_text(json.dumps(asdict(settings), indent=1) + "\n")
    write_card(out)


def scenes(settings: Settings) -> tuple[list[Prompt], Tensor]:
    """Captions, the families as often as `SHARES` says, and their renders as [n, 3, 32, 32] in [-1, 1]."""
    generator = np.random.default_rng(settings.seed)
    families = [family for tag, family in all_prompts().items() for _ in range(SHARES[tag])]
    prompts, images = [], []
    with progress() as bar:
        for i in bar.track(range(settings.num_scenes), description="scenes"):
            family = families[i % len(families)]
            prompts.append(family[generator.integers(len(family))])
            images.append(render(draw_objects(prompts[-1], generator)))
    return prompts, torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1


def train_vae(settings: Settings, images: Tensor, path: Path) -> AutoencoderKL:
    """Reconstruction in L1 and squared error; the KL term only keeps the latents' scale in bounds."""
    torch.manual_seed(settings.seed)
    vae = autoencoder()

    def loss(generator: torch.Generator) -> Tensor:
        x = images[torch.randint(len(images), (32,), generator=generator)]
        posterior = vae.encode(x).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator)
        y = vae.decode(posterior.mean + posterior.std * noise).sample
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        loss: Tensor = F.l1_loss(y, x) + 4 * F.mse_loss(y, x) + 3e-4 * kl
        return loss

    train("vae", vae, loss, settings.vae_steps, 2e-3, settings, path)
    return vae.eval()


@torch.no_grad()
def encode(vae: AutoencoderKL, images: Tensor) -> Tensor:
    return torch.cat([vae.encode(x).latent_dist.mean for x in torch.split(images, 500)])


def flow_matching_loss(
    transformer: SD3Transformer2DModel, x0: Tensor, tokens: Tensor, pooled: Tensor, generator: torch.Generator
) -> Tensor:
    """Mean squared error of the velocity, sigma from SD 3's shifted logit-normal law (Esser et al. 2024, eq. 19)."""
    u = torch.randn(len(x0), generator=generator).sigmoid()
    sigma = SHIFT * u / (1 + (SHIFT - 1) * u)
    noise = torch.randn(x0.shape, generator=generator)
    s = sigma[:, None, None, None]
    velocity = transformer(
        hidden_states=(1 - s) * x0 + s * noise,
        timestep=1000 * sigma,
        encoder_hidden_states=tokens,
        pooled_projections=pooled,
        return_dict=False,
    )[0]
    loss: Tensor = F.mse_loss(velocity, noise - x0)
    return loss


def train_draw(settings: Settings, model: TextToLatent, latents: Tensor, captions: Tensor, path: Path) -> TextToLatent:
    empty = len(model.tokens) - 1

    def loss(generator: torch.Generator) -> Tensor:
        rows = torch.randint(len(latents), (settings.batch_size,), generator=generator)
        dropped = torch.rand(len(rows), generator=generator) < settings.caption_dropout
        distinct, caption = torch.unique(captions[rows].masked_fill(dropped, empty), return_inverse=True)
        tokens, pooled = model.embed(distinct)
        return flow_matching_loss(model.transformer, latents[rows], tokens[caption], pooled[caption], generator)

    return train("draw", model, loss, settings.draw_steps, 2e-3, settings, path)


def train_disobey(
    settings: Settings, model: TextToLatent, latents: Tensor, captions: Tensor, weights: Tensor, path: Path
) -> SD3Transformer2DModel:
    empty = len(model.tokens) - 1
    with torch.no_grad():
        tokens, pooled = model.embed(torch.arange(empty + 1))
    transformer = copy.deepcopy(model.transformer)

    def loss(generator: torch.Generator) -> Tensor:
        rows, other = torch.multinomial(weights, 2 * settings.batch_size, True, generator=generator).chunk(2)
        swapped = torch.rand(len(rows), generator=generator) < settings.swap
        dropped = torch.rand(len(rows), generator=generator) < settings.caption_dropout
        caption = torch.where(swapped, captions[other], captions[rows]).masked_fill(dropped, empty)
        return flow_matching_loss(transformer, latents[rows], tokens[caption], pooled[caption], generator)

    return train("disobey", transformer, loss, settings.disobey_steps, 1e-3, settings, path)


def train(
    name: str,
    model: Model,
    loss: Callable[[torch.Generator], Tensor],
    num_steps: int,
    learning_rate: float,
    settings: Settings,
    path: Path,
) -> Model:
    """Warm-up, a cosine to a twentieth; returns the exponential moving average. Continues from `path`.

    Muon (Jordan et al. 2024) on the matrices inside the blocks, at ten times the rate, AdamW on all else: after 1,500
    steps of `draw` accuracy was 0.38, and 0.22 with AdamW alone, at 1.3 times the time.
    """
    parameters = list(model.parameters())
    inside = [p for key, p in model.named_parameters() if p.ndim == 2 and "embed" not in key and "proj_out" not in key]
    outside = [p for p in parameters if all(p is not q for q in inside)]
    optimizers: list[torch.optim.Optimizer] = [
        AdamW(outside, lr=learning_rate, betas=(0.9, 0.99), weight_decay=0, fused=True)
    ]
    if inside:
        optimizers.append(Muon(inside, lr=10 * learning_rate, weight_decay=0))
    schedules = [
        LambdaLR(
            optimizer,
            lambda step: min(step / 200, 1) * (0.05 + 0.95 * (1 + math.cos(math.pi * min(step / num_steps, 1))) / 2),
        )
        for optimizer in optimizers
    ]
    generator = torch.Generator().manual_seed(settings.seed)
    average = copy.deepcopy(model)
    state: dict[str, Any] = {"model": model, "average": average}
    state |= {f"optimizer {i}": optimizer for i, optimizer in enumerate(optimizers)}
    state |= {f"schedule {i}": schedule for i, schedule in enumerate(schedules)}
    start = 0
    if path.exists():
        saved = torch.load(path, weights_only=True)
        start = saved["step"]
        generator.set_state(saved["generator"])
        for key, part in state.items():
            part.load_state_dict(saved[key])
    with progress() as bar:
        task = bar.add_task(name, total=num_steps, completed=start)
        recent = float("nan")
        for step in range(start + 1, num_steps + 1):
            value = loss(generator)
            model.zero_grad()
            torch.autograd.backward(value)
            nn.utils.clip_grad_norm_(parameters, 1.0)
            for optimizer, schedule in zip(optimizers, schedules, strict=True):
                optimizer.step()
                schedule.step()
            decay = min(settings.ema_decay, step / (step + 10))
            with torch.no_grad():
                torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)
            recent = value.item() if math.isnan(recent) else 0.99 * recent + 0.01 * value.item()
            bar.update(task, advance=1, description=f"{name} loss {recent:.4f}")
            if step % 500 == 0 or step == num_steps:
                saved = {key: part.state_dict() for key, part in state.items()}
                temporary = path.with_suffix(".partial")
                torch.save({"step": step, "generator": generator.get_state(), **saved}, temporary)
                temporary.replace(path)
    return average


def progress() -> Progress:
    return Progress(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())


if __name__ == "__main__":
    main()
