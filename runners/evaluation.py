"""Scores under the frozen protocol: fixed prompts, fixed noise, Euler steps."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

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
from runners.memory import in_memory
from runners.policy import SD3Policy
from runners.prompts import Prompt
from runners.rewards import RewardOutput
from runners.rewards.protocol import Images, joined
from runners.run import Run
from runners.scoring import keep_unscored

NUM_PICTURED = 24  # images that are kept, in rows of six, with what the reward said of them


def evaluate(run: Run) -> dict[str, float]:
    """Score the fixed prompts with the average weights, and keep the first images as a picture.

    Each process takes a block of the prompts.
    """
    recipe, policy, world = run.recipe.evaluation, run.policy, run.world
    prompts = run.prompts.fixed(recipe.split, recipe.num_prompts)
    own = np.array_split(np.arange(len(prompts)), world.size)[world.rank].tolist()
    with run.booked("eval"):
        with policy.using("average" if recipe.ema_decay and run.progress.update else "current"):
            sigmas = diffusers_sigmas(recipe.num_steps, policy.shift)
            size = run.batch_sizes.get("rollout", run.recipe.rollout.batch_size)
            images = run.in_memory(
                "eval", size, lambda fitting: _in_batches(policy, prompts, own, recipe, sigmas, fitting)
            )
        run.fetch_rewards()
        asked = [replace(prompts[i], group=i) for i in own]
        own_scores = run.scorer(images, asked)
        keep_unscored(run.folder, [images], asked, own_scores, f"evaluation-{run.progress.epoch}-{world.rank}")
        run.check_missing(own_scores, own_scores.missing)
        scores, _ = run.everyones(own_scores)
        found = means("eval", scores, prompts) | measure_panel(run, images, asked)
        run.put_rewards_away()
    target = run.recipe.budget.target
    run.progress.target_reached = target is not None and found.get("eval/accuracy", found["eval/score"]) >= target
    pictures = np.concatenate(world.everyone(images[: np.searchsorted(own, NUM_PICTURED)]))
    if world.main:
        keep_pictures(run, pictures, prompts, scores)
    return found


def measure_panel(run: Run, images: Images, prompts: Sequence[Prompt]) -> dict[str, float]:
    """What the panel says of the images of all processes: means, and their standard errors over images.

    A measure that fails is missing; it ends nothing. One that compares images gets all of them, in the first process.
    """
    found: dict[str, float] = {}
    for name, (measure, scorer) in run.panel.items():
        shown, of = images, list(prompts)
        if measure.compares:
            shown = np.concatenate(run.world.everyone(images))
            of = [prompt for share in run.world.everyone(of) for prompt in share]
        outputs = []
        if not measure.compares or run.world.main:
            outputs = [scorer(shown, of)]
            label = f"panel-{name.replace(':', '-')}-{run.progress.epoch}-{run.world.rank}"
            keep_unscored(run.folder, [shown], of, outputs[0], label)
        output = joined([o for share in run.world.everyone(outputs) for o in share])
        score = output.score[~output.missing]
        found[f"eval/panel/{name}"] = float(score.mean()) if len(score) else np.nan
        found[f"eval/panel_se/{name}"] = float(score.std() / len(score) ** 0.5) if len(score) else np.nan
        if output.missing.any():
            found[f"eval/panel_missing/{name}"] = float(output.missing.mean())
    return found


def keep_pictures(run: Run, images: NDArray[np.uint8], prompts: Sequence[Prompt], scores: RewardOutput) -> None:
    """Images [b, h, w, 3] of the first prompts, with what the reward said of them."""
    (run.folder / "samples").mkdir(exist_ok=True)
    picture = "after" if run.progress.epoch else "before"
    contact_sheet(images).save(run.folder / "samples" / f"{picture}.png")
    said = [
        {"prompt": prompts[i].text, "score": None if scores.missing[i] else float(score), "reason": scores.reason(i)}
        for i, score in enumerate(scores.score[: len(images)])
    ]
    lines = [json.dumps(line) + "\n" for line in said]
    write_atomic(run.folder / "samples" / f"{picture}.jsonl", "".join(lines))


def generate(
    policy: SD3Policy,
    prompts: Sequence[Prompt],
    wanted: Sequence[int],
    recipe: EvaluationRecipe,
    sigmas: Tensor,
    batch_size: int,
) -> NDArray[np.uint8]:
    """Images [b, h, w, 3] of the `wanted` prompts by Euler steps; prompt i of a split always starts from one noise.

    Batches that do not fit into memory are halved. Raises torch.OutOfMemoryError where even one image does not fit.
    """
    return in_memory(batch_size, lambda size: _in_batches(policy, prompts, wanted, recipe, sigmas, size))[0]


@torch.no_grad()
def _in_batches(
    policy: SD3Policy,
    prompts: Sequence[Prompt],
    wanted: Sequence[int],
    recipe: EvaluationRecipe,
    sigmas: Tensor,
    batch_size: int,
) -> NDArray[np.uint8]:
    """What `generate` returns, in batches of this size."""
    conditioning = policy.encode([prompts[i].text for i in wanted])
    images = []
    for rows in batches(len(wanted), batch_size):
        own = streams(recipe.seed, recipe.split, samples=wanted[rows])
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
    """Means over the images that have a score; where prompts are given, by family and over families too.

    NaN without any.
    """
    values = {"score": scores.score, **scores.parts}
    found = {f"{phase}/{name}": _mean(v) for name, v in values.items()}
    tags = np.array([p.tag for p in prompts])
    for name, v in scores.parts.items() if len(tags) else ():
        of_family = {f"{phase}/{name}/{tag}": _mean(v[tags == tag]) for tag in dict.fromkeys(tags.tolist())}
        found |= of_family | {f"{phase}/by_family/{name}": _mean(np.array([*of_family.values()]))}
    return found


def averages(metrics: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean of each value over those that have it."""
    names = dict.fromkeys(name for of_one in metrics for name in of_one)
    return {name: float(np.mean([of_one[name] for of_one in metrics if name in of_one])) for name in names}


def _mean(values: NDArray[np.float64]) -> float:
    there = values[np.isfinite(values)]
    return float(there.mean()) if len(there) else np.nan


def batches(num_samples: int, batch_size: int) -> Iterator[slice]:
    for start in range(0, num_samples, batch_size):
        yield slice(start, min(start + batch_size, num_samples))
