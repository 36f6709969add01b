"""Scores under the frozen protocol: fixed prompts, fixed noise, Euler steps."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ablate.flow import diffusers_sigmas
from ablate.recipe import EvaluationRecipe
from ablate.record import write_atomic
from ablate.samplers.ode import ODE
from ablate.seeding import streams
from runners.policy import SD3Policy
from runners.prompts import Prompt
from runners.rewards import RewardOutput
from runners.run import Run

NUM_PICTURED = 24  # images that are kept, in rows of six, with what the reward said of them


def evaluate(run: Run) -> dict[str, float]:
    """Score the fixed prompts with the average weights, and keep the first images as a picture."""
    recipe, policy = run.recipe.evaluation, run.policy
    prompts = run.prompts.fixed(recipe.split, recipe.num_prompts)
    with run.booked("eval"):
        with policy.using("average" if recipe.ema_decay and run.progress.update else "current"):
            sigmas = diffusers_sigmas(recipe.num_steps, policy.shift)
            images = generate(policy, [p.text for p in prompts], recipe, sigmas, run.recipe.rollout.batch_size)
        scores = run.reward(images, prompts)
    (run.folder / "samples").mkdir(exist_ok=True)
    picture = "after" if run.progress.epoch else "before"
    contact_sheet(images[:NUM_PICTURED]).save(run.folder / "samples" / f"{picture}.png")
    pictured = zip(prompts[:NUM_PICTURED], scores.score, scores.reasons, strict=False)
    lines = [json.dumps({"prompt": p.text, "score": float(score), "reason": why}) + "\n" for p, score, why in pictured]
    write_atomic(run.folder / "samples" / f"{picture}.jsonl", "".join(lines))
    found = means("eval", scores, prompts)
    target = run.recipe.budget.target
    run.target_reached = target is not None and found.get("eval/accuracy", found["eval/score"]) >= target
    return found


@torch.no_grad()
def generate(
    policy: SD3Policy, texts: Sequence[str], recipe: EvaluationRecipe, sigmas: Tensor, batch_size: int
) -> NDArray[np.uint8]:
    """One image [h, w, 3] per text by Euler steps; text i of a split always starts from the same noise."""
    conditioning = policy.encode(texts)
    images = []
    for rows in batches(len(texts), batch_size):
        own = streams(recipe.seed, recipe.split, samples=range(rows.start, rows.stop))
        noise = own.normal(policy.latent_shape, torch.empty((), device=policy.device))
        field = policy.field(conditioning.rows(rows), recipe.guidance_scale)
        images.append(policy.decode(ODE().sample(field, noise, sigmas=sigmas, epoch=0, streams=own).x0))
    return np.concatenate(images)


def contact_sheet(images: NDArray[np.uint8], columns: int = 6) -> Image.Image:
    """A grid of images [b, h, w, 3], small ones enlarged, with a thin margin."""
    zoom = max(1, 96 // images.shape[1])
    tiles = images.repeat(zoom, 1).repeat(zoom, 2)
    tiles = np.pad(tiles, ((0, 0), (2, 2), (2, 2), (0, 0)), constant_values=90)
    rows = [np.concatenate(list(tiles[i : i + columns]), 1) for i in range(0, len(tiles) - columns + 1, columns)]
    return Image.fromarray(np.concatenate(rows or [np.concatenate(list(tiles), 1)], 0))


def means(phase: str, scores: RewardOutput, prompts: Sequence[Prompt] = ()) -> dict[str, float]:
    values = {"score": scores.score, **scores.parts}
    found = {f"{phase}/{name}": float(v.mean()) for name, v in values.items()}
    tags = np.array([p.tag for p in prompts])
    for tag in dict.fromkeys(tags.tolist()):
        found |= {f"{phase}/{name}/{tag}": float(v[tags == tag].mean()) for name, v in scores.parts.items()}
    return found


def batches(num_samples: int, batch_size: int) -> Iterator[slice]:
    for start in range(0, num_samples, batch_size):
        yield slice(start, min(start + batch_size, num_samples))
