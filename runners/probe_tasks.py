"""What a probe has to measure: each thing once, under a key of all that it depends on."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ablate.plan import FORMAT, Cell
from ablate.source import InputError
from runners import probe_model, probe_worlds
from runners.digest import digest as text_digest
from runners.digest import file_digest
from runners.export import WEIGHTS, weights_file

BASE = "base"
WORLD_SAMPLES, WORLD_POINTS = 1024, 128
MODEL_GROUPS, MODEL_GROUP_SIZE, MODEL_SIGNS, MODEL_DRAWS = 6, 4, 2, 6


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How much is measured."""

    points: tuple[int, ...] = (1, 2, 5, 10)
    draws: int = 2  # probes on the same rollouts
    groups: int | None = None  # prompts of a rollout; by default an epoch's
    bias: bool = True

    def __post_init__(self) -> None:
        if not self.points or min(self.points) < 1:
            raise InputError(f"--points {','.join(map(str, self.points))}: expected whole numbers from 1 on")
        for name, value in (("draws", self.draws), ("groups", self.groups)):
            if value is not None and value < 2:
                raise InputError(f"--{name} {value}: a variance needs at least 2")


@dataclass(frozen=True, kw_only=True)
class Weights:
    """A policy to be probed: the base model, or what a folder holds."""

    label: str = BASE
    folder: Path | None = None


@dataclass(frozen=True, kw_only=True)
class Task:
    """One measurement."""

    kind: str  # gradient, world or model
    key: str
    cell: Cell
    weights: Weights
    size: float  # about so many network calls with gradient
    world: tuple[probe_worlds.World, probe_worlds.Subject] | None = None


def tasks_of(cells: Sequence[Cell], weights: Sequence[Weights], settings: Settings) -> Iterator[Task]:
    """Each estimator, sampler and rollout once, whatever the objective: on-policy they have one gradient."""
    distinct = {digest(identity(cell)): _resized(cell, settings.groups) for cell in cells}
    for chosen in weights:
        mark = _mark(chosen, cells[0])
        for cell in distinct.values():
            rollout = cell.recipe.rollout
            num_points = sum({*settings.points, rollout.num_steps})
            yield Task(
                kind="gradient",
                key=digest(identity(cell), mark, settings.points, settings.draws),
                cell=cell,
                weights=chosen,
                size=num_points * settings.draws * rollout.num_groups * rollout.group_size,
            )
    if not settings.bias:
        return
    lowest = min(cells, key=lambda cell: cell.seed)
    for world in probe_worlds.worlds():
        for subject in probe_worlds.subjects():
            given = (world.name, subject.label, asdict(subject.estimator), subject.sampler)
            rollout = lowest.recipe.rollout
            schedule = (rollout.num_steps, rollout.noise_schedule, WORLD_SAMPLES, WORLD_POINTS)
            yield Task(
                kind="world",
                key=digest(given, schedule, lowest.seed),
                cell=lowest,
                weights=Weights(),
                size=200,
                world=(world, subject),
            )
    small = {
        digest(identity(cell)): _resized(cell, MODEL_GROUPS, MODEL_GROUP_SIZE)
        for cell in sorted(cells, key=lambda cell: cell.sampler)  # those of one sampler share the truth
        if cell.seed == lowest.seed
    }
    for chosen in weights:
        mark = _mark(chosen, cells[0])
        for cell in small.values():
            yield Task(
                kind="model",
                key=digest(identity(cell), mark, MODEL_SIGNS, MODEL_DRAWS),
                cell=cell,
                weights=chosen,
                size=8 * MODEL_GROUPS * MODEL_GROUP_SIZE * 2 * MODEL_SIGNS * probe_model.NUM_STEPS,
            )


def _resized(cell: Cell, groups: int | None, group_size: int | None = None) -> Cell:
    """The cell with so many prompts and images in its rollout, all of them kept."""
    rollout = cell.recipe.rollout
    size = {"group_size": group_size, "candidates": None} if group_size else {}
    update = {"num_groups": groups or rollout.num_groups, "resample_rounds": 0, **size}
    changed = cell.recipe.model_copy(update={"rollout": rollout.model_copy(update=update)})
    return cell.model_copy(update={"recipe": changed})


def identity(cell: Cell) -> dict[str, Any]:
    """All that a probe of a cell depends on; the objective and the optimizer are not among it."""
    recipe = cell.recipe
    parts = {"model", "prompts", "reward", "rollout", "advantage"}
    return {
        "format": FORMAT,
        "components": {axis: cell.components[axis].model_dump() for axis in ("estimator", "sampler")},
        "recipe": recipe.model_dump(include=parts)
        | {"update": recipe.update.model_dump(include={"group_probe", "guidance_scale"})},
        "seed": cell.seed,
        "versions": cell.versions,
    }


def digest(*parts: Any) -> str:
    return text_digest(json.dumps(parts, sort_keys=True, default=str))


def _mark(weights: Weights, cell: Cell) -> str:
    """What tells weights from others: the digest of their file."""
    if weights.folder is None:
        return BASE
    return file_digest(file_of(weights.folder, cell))


def file_of(folder: Path, cell: Cell) -> Path:
    """The file of weights in a cell's folder, finished or not, or in an exported folder. Raises InputError."""
    candidates = [
        weights_file(folder / WEIGHTS, cell.recipe.model),
        folder / "checkpoint" / "state.pt",
        weights_file(folder, cell.recipe.model),
    ]
    if found := next((path for path in candidates if path.exists()), None):
        return found
    raise InputError(f"--weights {folder}: holds neither {WEIGHTS}/ nor a checkpoint nor exported weights")
