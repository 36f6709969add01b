"""A grid becomes cells with ids, or reasons why a combination is impossible."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
import operator
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field

from ablate.compatibility import impossible
from ablate.components import Component, resolve, short_label, unique_labels
from ablate.grid import Grid
from ablate.part import COMPONENT_AXES, Part
from ablate.recipe import Recipe, Strict
from ablate.source import FieldError, InputError, Location, dotted
from ablate.variation import vary

FORMAT = 1  # of the files in results/; a change in meaning raises it

MOST_CELLS = 100_000
SAME_RESULT = {"scoring", "devices"}  # of a recipe: with more patience, or on more devices, it is the same cell
FolderName = Annotated[str, Field(pattern=r"^\w[^/\\\x00-\x1f]{0,199}$")]  # of one folder, and no path to another


class Cell(Strict):
    """A resolved cell: all that its result depends on. Written to cell.json."""

    format: int = FORMAT
    id: FolderName
    grid: FolderName
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
    listed: bool = False  # single combinations, not a product of axes

    def keep(self, wanted: Callable[[Cell], bool]) -> Plan:
        """The plan of some of its cells. Raises InputError if there are none."""
        cells = tuple(cell for cell in self.cells if wanted(cell))
        if not cells:
            raise InputError(f"grid {self.grid!r}: none of its {len(self.cells)} cells fits all of --only and --seeds")
        return dataclasses.replace(self, cells=cells)

    def without_cells(self) -> str:
        """Why a plan has no cells, combination by combination."""
        reasons = dict.fromkeys(f"{e.objective} x {e.estimator} x {e.sampler}: {e.reason}" for e in self.excluded)
        return "\n  ".join(["no combination is possible", *reasons])

    def to_json(self) -> str:
        """plan.json in a grid's results: what was asked for, so that reports can show what is missing."""
        shown = {"id", "objective", "estimator", "sampler", "seed", "axes"}
        document = {
            "format": FORMAT,
            "grid": self.grid,
            "order": self.order,
            "listed": self.listed,
            "cells": [cell.model_dump(mode="json", include=shown) for cell in self.cells],
            "excluded": [combination.model_dump(mode="json") for combination in self.excluded],
        }
        return json.dumps(document, indent=1) + "\n"


def make_plan(grid: Grid, versions: Callable[[Recipe], Mapping[str, str]] = lambda _: {}) -> Plan:
    """Cross the axes. `versions` identify what lies outside the grid file, such as reward and embedded model.

    Raises InputError for a component that does not exist or has impossible parameters, with file and line; also for a
    FieldError of `versions`.
    """
    combinations = list(_combinations(grid, versions))
    labels = _labels(combinations)
    cells: dict[str, Cell] = {}
    excluded: list[Excluded] = []
    unused = list(grid.file.exclude)
    untuned = list(range(len(grid.file.tuned)))
    for written in combinations:
        called = {axis: (labels[axis][component], component.name) for axis, component in written.components.items()}
        named = {axis: label for axis, (label, _) in called.items()}
        rows = [i for i, row in enumerate(grid.file.tuned) if row.covers(called, written.axes)]
        untuned = [i for i in untuned if i not in rows]
        c = _with_tuned(grid, written, rows, versions)
        left_out = [e for e in grid.file.exclude if e.covers(called)]
        unused = [e for e in unused if e not in left_out]
        names = {axis: component.name for axis, component in c.components.items()}
        reason = impossible(names, recipe=c.recipe, **c.instances)
        reason = reason or next((e.reason for e in left_out), None)
        if reason:
            excluded.append(Excluded(**named, axes=c.axes, reason=reason))
            continue
        for seed in grid.file.seeds:
            cell = _cell(grid.file.name, c, named, seed)
            if cell.id in cells:
                raise grid.source.error(c.place, f"is the same cell as one before it, {cell.id}")
            cells[cell.id] = cell
    if unused:
        place = ("exclude", grid.file.exclude.index(unused[0]))
        raise grid.source.error(place, "fits no combination of the axes")
    if untuned:
        raise grid.source.error(("tuned", untuned[0]), "fits no combination of the axes")
    order = {axis: tuple(labels[axis].values()) for axis in COMPONENT_AXES}
    return Plan(
        grid=grid.file.name,
        order=order,
        cells=tuple(cells.values()),
        excluded=tuple(excluded),
        listed=bool(grid.file.cells),
    )


@dataclass(frozen=True, kw_only=True)
class _Combination:
    """Values of all axes."""

    components: dict[str, Component]
    instances: dict[str, Any]
    axes: dict[str, Any]  # of the recipe
    recipe: Recipe
    versions: dict[str, str]
    place: Location  # in the grid file


def _combinations(grid: Grid, versions: Callable[[Recipe], Mapping[str, str]]) -> Iterator[_Combination]:
    """The product of each part. Where parts differ in recipe or field, all show theirs."""
    for part in grid.parts:
        number = math.prod(map(len, part.axes.values())) * len(grid.file.seeds)
        if number > MOST_CELLS:
            raise grid.source.error(part.place, f"stands for {number} cells, expected at most {MOST_CELLS}")
    recipes = {part.recipe_name for part in grid.parts}
    fields = list(dict.fromkeys(field for part in grid.parts for field in part.recipe_axes))
    for part in grid.parts:
        components = _components(part)
        for chosen in itertools.product(*part.recipe_axes.values()):
            settings = dict(zip(part.recipe_axes, chosen, strict=True))
            recipe = part.recipe_with(settings)
            try:
                identities = dict(versions(recipe))
            except FieldError as error:
                raise part.error(error.location, str(error), settings) from None
            axes = {field: settings.get(field, operator.attrgetter(field)(recipe)) for field in fields}
            for combination in itertools.product(*components.values()):
                values = dict(zip(COMPONENT_AXES, combination, strict=True))
                yield _Combination(
                    components={axis: component for axis, (component, _) in values.items()},
                    instances={axis: instance for axis, (_, instance) in values.items()},
                    axes={"recipe": part.recipe_name, **axes} if len(recipes) > 1 else axes,
                    recipe=recipe,
                    versions=identities,
                    place=part.place,
                )


def _with_tuned(
    grid: Grid, c: _Combination, rows: list[int], versions: Callable[[Recipe], Mapping[str, str]]
) -> _Combination:
    """The combination with the values of its row of `tuned`, if it has one."""
    if not rows:
        return c
    if len(rows) > 1:
        raise grid.source.error(("tuned", rows[1]), f"fits a combination that row {rows[0] + 1} fits too")
    try:
        recipe, components, instances = vary(c.recipe, c.components, grid.file.tuned[rows[0]].set)
        identities = dict(versions(recipe))
    except FieldError as error:
        field = dotted(error.location)
        raise grid.source.error(("tuned", rows[0], "set", field), str(error)) from None
    return dataclasses.replace(c, recipe=recipe, components=components, instances=instances, versions=identities)


def _labels(combinations: list[_Combination]) -> dict[str, dict[Component, str]]:
    """A label for every value of each component axis, in the order of the grid."""
    values = {axis: list(dict.fromkeys(c.components[axis] for c in combinations)) for axis in COMPONENT_AXES}
    return {axis: dict(zip(values[axis], unique_labels(axis, values[axis]), strict=True)) for axis in COMPONENT_AXES}


def _components(part: Part) -> dict[str, list[tuple[Component, Any]]]:
    """The values of each component axis with their instances, all parameters spelled out and all different."""
    resolved: dict[str, list[tuple[Component, Any]]] = {}
    for axis in COMPONENT_AXES:
        resolved[axis] = []
        for i, value in enumerate(part.axes[axis]):
            source, place = part.where(axis, i)
            component, instance = resolve(axis, value, source, place)
            if component in [c for c, _ in resolved[axis]]:
                spelled = f"got {component.name!r} with the same parameters twice; two cells would be the same"
                raise source.error(place, spelled)
            resolved[axis].append((component, instance))
    return resolved


def _cell(grid: str, c: _Combination, labels: dict[str, str], seed: int) -> Cell:
    return make_cell(
        grid=grid, **labels, seed=seed, axes=c.axes, components=c.components, recipe=c.recipe, versions=c.versions
    )


def make_cell(
    *, components: Mapping[str, Component], seed: int, recipe: Recipe, versions: Mapping[str, str], **names: Any
) -> Cell:
    """A cell with the id that its content gives it; `names` are the fields that its result does not depend on."""
    content = {
        "format": FORMAT,
        "components": {axis: part.model_dump(mode="json") for axis, part in components.items()},
        "seed": seed,
        "recipe": recipe.model_dump(mode="json", exclude=SAME_RESULT),
        "versions": versions,
    }
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:8]
    readable = "-".join(short_label(axis, components[axis]) for axis in COMPONENT_AXES)
    readable = re.sub(r"[^\w.+=-]", "_", readable)[:150]  # a parameter of one's own class may be any text
    return Cell(
        id=f"{readable}-s{seed}-{digest}",
        components=dict(components),
        seed=seed,
        recipe=recipe,
        versions=dict(versions),
        **names,
    )
