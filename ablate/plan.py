"""A grid becomes cells with ids, or reasons why a combination is impossible."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ablate.components import Component, resolve, short_label, unique_labels
from ablate.grid import COMPONENT_AXES, Grid
from ablate.recipe import Recipe, Strict
from ablate.source import FieldError, InputError

FORMAT = 1  # of the files in results/; a change in meaning raises it


class Cell(Strict):
    """A resolved cell: all that its result depends on. Written to cell.json."""

    format: int = FORMAT
    id: str
    grid: str
    objective: str
    estimator: str
    sampler: str
    seed: int
    axes: dict[str, Any]  # values of recipe axes, by dotted path
    components: dict[str, Component]
    recipe: Recipe
    versions: dict[str, str]  # of the reward and the embedded model


class Excluded(Strict):
    """A combination that cannot exist, and why."""

    objective: str
    estimator: str
    sampler: str
    axes: dict[str, Any] = {}
    reason: str


@dataclass(frozen=True, kw_only=True)
class Plan:
    """All cells of a grid and all excluded combinations: together, per seed, the full product."""

    grid: str
    order: Mapping[str, tuple[str, ...]]  # the labels of each component axis as the grid lists them
    cells: tuple[Cell, ...]
    excluded: tuple[Excluded, ...]

    def keep(self, wanted: Callable[[Cell], bool]) -> Plan:
        """The plan of some of its cells. Raises InputError if there are none."""
        cells = tuple(cell for cell in self.cells if wanted(cell))
        if not cells:
            raise InputError(f"grid {self.grid!r}: none of its {len(self.cells)} cells fits all of --only and --seeds")
        return dataclasses.replace(self, cells=cells)

    def to_json(self) -> str:
        """plan.json in a grid's results: what was asked for, so that reports can show what is missing."""
        shown = {"id", "objective", "estimator", "sampler", "seed", "axes"}
        document = {
            "format": FORMAT,
            "grid": self.grid,
            "order": self.order,
            "cells": [cell.model_dump(mode="json", include=shown) for cell in self.cells],
            "excluded": [combination.model_dump(mode="json") for combination in self.excluded],
        }
        return json.dumps(document, indent=1) + "\n"


def make_plan(grid: Grid, versions: Callable[[Recipe], Mapping[str, str]] = lambda _: {}) -> Plan:
    """Cross the axes. `versions` identify what lies outside the grid file, such as reward and embedded model.

    Raises InputError for a component that does not exist or has impossible parameters, with file and line; also for a
    FieldError of `versions`.
    """
    axes = grid.file.axes
    components = {
        axis: [resolve(axis, value, grid, ("axes", axis, i)) for i, value in enumerate(axes[axis])]
        for axis in COMPONENT_AXES
    }
    for axis, values in components.items():
        for i, (component, _) in enumerate(values):
            if component in [c for c, _ in values[:i]]:
                spelled = f"got {component.name!r} with the same parameters twice; two cells would be the same"
                raise grid.source.error(("axes", axis, i), spelled)
    names = {axis: unique_labels(axis, [component for component, _ in values]) for axis, values in components.items()}
    pairs = [
        [(label, component.name) for label, (component, _) in zip(names[axis], components[axis], strict=True)]
        for axis in COMPONENT_AXES
    ]
    every = [dict(zip(COMPONENT_AXES, called, strict=True)) for called in itertools.product(*pairs)]
    for i, exclusion in enumerate(grid.file.exclude):
        if not any(exclusion.covers(called) for called in every):
            raise grid.source.error(("exclude", i), "fits no combination of the axes")
    recipe_axes = {name: values for name, values in axes.items() if name not in COMPONENT_AXES}
    cells, excluded = [], []
    for chosen in itertools.product(*recipe_axes.values()):
        settings = dict(zip(recipe_axes, chosen, strict=True))
        recipe = grid.recipe_with(settings)
        try:
            identities = dict(versions(recipe))
        except FieldError as error:
            raise grid.error(error.location, str(error), settings) from None
        for combination, called in zip(itertools.product(*components.values()), every, strict=True):
            labels = {axis: label for axis, (label, _) in called.items()}
            parts = {axis: component for axis, (component, _) in zip(COMPONENT_AXES, combination, strict=True)}
            instances = {axis: instance for axis, (_, instance) in zip(COMPONENT_AXES, combination, strict=True)}
            reason = impossible({axis: part.name for axis, part in parts.items()}, recipe=recipe, **instances)
            reason = reason or next((e.reason for e in grid.file.exclude if e.covers(called)), None)
            if reason:
                excluded.append(Excluded(**labels, axes=settings, reason=reason))
                continue
            cells += [
                _cell(grid.file.name, parts, labels, seed, settings, recipe, identities) for seed in grid.file.seeds
            ]
    return Plan(grid=grid.file.name, order=names, cells=tuple(cells), excluded=tuple(excluded))


def impossible(names: Mapping[str, str], objective: Any, estimator: Any, sampler: Any, recipe: Recipe) -> str | None:
    """Why the components of these names cannot be in one cell under a recipe, in words; None if they can."""
    return next(filter(None, _problems(names, objective, estimator, sampler, recipe)), None)


def _problems(
    names: Mapping[str, str], objective: Any, estimator: Any, sampler: Any, recipe: Recipe
) -> Iterator[str | None]:
    o, e, s = (names[axis] for axis in COMPONENT_AXES)
    on_steps = "transitions" in estimator.needs
    if on_steps and "transitions" not in sampler.leaves:
        yield f"{e} needs transition densities; this sampler is deterministic"
    if "density" in estimator.needs - sampler.leaves:
        yield f"{e} needs a density, and {s} was published with a distance: use estimator cps_distance"
    if on_steps and recipe.rollout.guidance_scale != recipe.update.guidance_scale:
        yield f"{e} scores the rollout's own steps, so rollout and update need the same guidance_scale"
    yield sampler.problem(recipe.rollout.num_steps)
    if "transitions" in objective.needs and not on_steps:
        yield f"{o} needs the steps of a rollout, their mean and deviation, and {e} has none: use estimator trajectory"
    if "target" in objective.needs and on_steps:
        yield f"{o} regresses on velocities at noised final samples, and {e} has none: use estimator elbo"
    if "velocity" in objective.needs and estimator.pool != "each":
        yield f"{o} reads the velocity of each point, so {e} cannot pool them: set pool to each"
    if recipe.kl.coef > 0 and recipe.kl.kind.endswith("gaussian_step") and not on_steps:
        yield f"kl.kind {recipe.kl.kind} compares the Gaussians of a rollout's steps, and {e} has none: use velocity"
    for path, wanted in getattr(objective, "demands", {}).items():
        if (got := operator.attrgetter(path)(recipe)) != wanted:
            yield f"{o} is defined by {path}: {wanted}, and the recipe has {got}"


def _cell(
    grid: str,
    parts: dict[str, Component],
    labels: dict[str, str],
    seed: int,
    settings: dict[str, Any],
    recipe: Recipe,
    versions: dict[str, str],
) -> Cell:
    content = {
        "format": FORMAT,
        "components": {axis: part.model_dump(mode="json") for axis, part in parts.items()},
        "seed": seed,
        "recipe": recipe.model_dump(mode="json"),
        "versions": versions,
    }
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:8]
    readable = "-".join(short_label(axis, parts[axis]) for axis in COMPONENT_AXES)
    return Cell(
        id=f"{readable}-s{seed}-{digest}",
        grid=grid,
        **labels,
        seed=seed,
        axes=settings,
        components=parts,
        recipe=recipe,
        versions=versions,
    )
