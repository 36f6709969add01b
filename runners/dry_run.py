"""The first cell of a grid, as small as it can be, through all that a cell goes through."""

from __future__ import annotations

from pathlib import Path

from ablate.components import build
from ablate.plan import Cell
from runners import checkpoint
from runners.evaluation import evaluate
from runners.export import export, load
from runners.preflight import with_fields
from runners.run import set_up
from runners.train import train_epoch


def dry_run(folder: Path, cell: Cell) -> None:
    """Evaluate, train an epoch, save, restore, train another epoch, and load what is exported; in this folder.

    Raises whatever would end the cell.
    """
    small = smallest(cell)
    run = set_up(folder, small)
    evaluate(run)
    train_epoch(run)
    run.progress.epoch += 1
    checkpoint.save(folder, run.progress, run.policy, run.optimizer, run.scaler)
    run = set_up(folder, small, run.policy, run.world)
    if run.progress.epoch != 1:
        raise RuntimeError("the checkpoint that was just saved is not found again")
    train_epoch(run)
    evaluate(run)
    export(folder, small, run.policy)
    load(folder, run.policy)


def smallest(cell: Cell) -> Cell:
    """The cell with one group of two images per update, two held-out images, and the fewest steps of its sampler."""
    recipe, sampler = cell.recipe, build("sampler", cell.components["sampler"])
    steps = next((n for n in range(2, recipe.rollout.num_steps) if not sampler.problem(n)), recipe.rollout.num_steps)
    return with_fields(
        cell,
        {
            "devices": 1,
            "rollout.num_groups": recipe.update.updates_per_epoch,
            "rollout.group_size": 2,
            "rollout.candidates": None,
            "rollout.resample_rounds": 0,
            "rollout.num_steps": steps,
            "evaluation.num_prompts": min(2, recipe.evaluation.num_prompts),
            "evaluation.num_steps": min(2, recipe.evaluation.num_steps),
            "budget.target": None,
        },
    )
