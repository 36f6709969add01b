"""Folders of cells, as `ablate run` writes them."""

from __future__ import annotations

from pathlib import Path

from ablate.plan import Cell

BRIEF = {  # settings under which an epoch takes a fraction of a second, and each has its checkpoint
    "checkpoint_every": 1,
    "rollout.num_groups": 2,
    "rollout.group_size": 2,
    "rollout.num_steps": 2,
    "update.updates_per_epoch": 1,
    "evaluation.num_steps": 2,
}


def folder_of(cell: Cell, path: Path, **recipe: object) -> Path:
    """A folder with the cell.json of this cell, some parts of its recipe changed."""
    changed = cell.model_copy(update={"recipe": cell.recipe.model_copy(update=recipe)})
    path.mkdir(exist_ok=True)
    (path / "cell.json").write_text(changed.model_dump_json())
    return path
