"""`ablate eval`: images and scores of finished cells, and of the base model, under the frozen protocol."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from ablate.flow import diffusers_sigmas
from ablate.plan import Cell
from ablate.recipe import EvaluationRecipe, RewardSpec
from ablate.record import read_cell, write_atomic
from ablate.source import InputError
from runners.distributed import this_device
from runners.evaluation import NUM_PICTURED, contact_sheet, generate, means
from runners.export import WEIGHTS, load
from runners.policy import SD3Policy
from runners.prompts import load_prompts
from runners.rewards import load_reward


def evaluate_cells(
    results: Path, rewards: Sequence[str], guidance_scales: Sequence[float | None], ids: Sequence[str] = ()
) -> Iterator[dict[str, object]]:
    """One row per model, guidance scale and reward (by default the cell's own): the base, then cells with weights.

    Writes evaluations/<id>.json and a picture of each into the results. A guidance scale of None is the recipe's.
    Raises InputError where no cell has weights.
    """
    cells = [
        read_cell(path.parent)
        for path in sorted(results.glob("*/cell.json"))
        if (path.parent / WEIGHTS).is_dir() and (not ids or path.parent.name in ids)
    ]
    if not cells:
        raise InputError(f"{results}: no cell with exported weights{' among those asked for' if ids else ''}")
    target = results / "evaluations"
    target.mkdir(exist_ok=True)
    bases: dict[str, SD3Policy] = {}
    for cell in cells:
        key = cell.recipe.model.model_dump_json()
        new = key not in bases
        if new:
            bases[key] = SD3Policy(cell.recipe.model, this_device())
        policy = bases[key]
        if new:
            yield from _evaluate("base", cell, policy, rewards, guidance_scales, target)
        load(results / cell.id, policy)
        yield from _evaluate(cell.id, cell, policy, rewards, guidance_scales, target)


def _evaluate(
    name: str,
    cell: Cell,
    policy: SD3Policy,
    rewards: Sequence[str],
    guidance_scales: Sequence[float | None],
    target: Path,
) -> Iterator[dict[str, object]]:
    recipe = cell.recipe.evaluation
    prompts = load_prompts(cell.recipe.prompts).fixed(recipe.split, recipe.num_prompts)
    sigmas = diffusers_sigmas(recipe.num_steps, policy.shift)
    for scale in guidance_scales:
        chosen: EvaluationRecipe = recipe if scale is None else recipe.model_copy(update={"guidance_scale": scale})
        images = generate(policy, prompts, range(len(prompts)), chosen, sigmas, cell.recipe.rollout.batch_size)
        label = f"{name}-guidance-{chosen.guidance_scale:g}"
        contact_sheet(images[:NUM_PICTURED]).save(target / f"{label}.png")
        found: dict[str, Mapping[str, float]] = {}
        wanted: list[RewardSpec] = [*rewards] or [cell.recipe.reward]
        for reward in wanted:
            values = means("eval", load_reward(reward)(images, prompts), prompts)
            found[str(reward)] = {key.removeprefix("eval/"): value for key, value in values.items()}
            yield {
                "model": name,
                "guidance": chosen.guidance_scale,
                "reward": str(reward),
                **{key: value for key, value in found[str(reward)].items() if "/" not in key},
            }
        content = {"model": name, "evaluation": chosen.model_dump(mode="json"), "rewards": found}
        write_atomic(target / f"{label}.json", json.dumps(content, indent=1) + "\n")
