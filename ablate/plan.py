"""A grid becomes cells with ids, or reasons why a combination is impossible; and what each cell will cost."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import itertools
import json
import math
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError

from ablate.grid import COMPONENT_AXES, Grid
from ablate.recipe import Recipe, Strict
from ablate.source import FieldError, InputError, Location, choices, message, shown

MEMBERS = {  # what a class from the outside must have; the protocols say it in full
    "objective": ("needs", "level", "__call__"),
    "estimator": ("needs_transitions", "probe", "log_prob"),
    "sampler": ("stochastic", "num_scored", "problem", "sample"),
}
FORMAT = 1  # of the files in results/; a change in meaning raises it


class Component(Strict):
    """One value of an axis with every parameter spelled out: {"name": "grpo", "clip_range": 0.001}."""

    model_config = ConfigDict(extra="allow", frozen=True)
    name: str

    @property
    def parameters(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


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
class Passes:
    """Network calls per trained image: `forward` without gradient, `backward` with (a forward and a backward)."""

    rollout: float
    forward: float
    backward: float

    @property
    def nfe(self) -> float:
        """Calls in all; one with gradient counts three, as its backward costs about two forwards."""
        return self.rollout + self.forward + 3 * self.backward


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
    names = {axis: _labels(axis, [component for component, _ in values]) for axis, values in components.items()}
    every = [dict(zip(COMPONENT_AXES, labels, strict=True)) for labels in itertools.product(*names.values())]
    for i, exclusion in enumerate(grid.file.exclude):
        if not any(exclusion.covers(labels) for labels in every):
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
        for combination, labels in zip(itertools.product(*components.values()), every, strict=True):
            parts = {axis: component for axis, (component, _) in zip(COMPONENT_AXES, combination, strict=True)}
            _, estimator, sampler = (instance for _, instance in combination)
            reason = impossible(parts["estimator"].name, estimator, sampler, recipe)
            reason = reason or next((e.reason for e in grid.file.exclude if e.covers(labels)), None)
            if reason:
                excluded.append(Excluded(**labels, axes=settings, reason=reason))
                continue
            cells += [
                _cell(grid.file.name, parts, labels, seed, settings, recipe, identities) for seed in grid.file.seeds
            ]
    return Plan(grid=grid.file.name, order=names, cells=tuple(cells), excluded=tuple(excluded))


def impossible(name: str, estimator: Any, sampler: Any, recipe: Recipe) -> str | None:
    """Why an estimator of this name and a sampler cannot be in one cell, in words; None if they can."""
    if estimator.needs_transitions and not sampler.stochastic:
        return f"{name} needs transition densities; this sampler is deterministic"
    if estimator.needs_transitions and recipe.rollout.guidance_scale != recipe.update.guidance_scale:
        return f"{name} scores the rollout's own steps, so rollout and update need the same guidance_scale"
    problem: str | None = sampler.problem(recipe.rollout.num_steps)
    return problem


def passes(cell: Cell) -> Passes:
    """The forward plan of a cell, per image: which policies are asked, and how often.

    The old policy is not asked when the objective does not read it, when the sampler has recorded its answers, or when
    it still equals the current one; the reference only when the objective or the KL reads it. An objective that
    couples more than a micro-batch holds needs its log-probs once more, without gradient.
    """
    objective, estimator, sampler = (build(axis, cell.components[axis]) for axis in COMPONENT_AXES)
    recipe = cell.recipe
    points = _num_points(cell, estimator, sampler)
    sampling, training = (1 + (scale > 1) for scale in (recipe.rollout.guidance_scale, recipe.update.guidance_scale))
    old = float("old" in objective.needs and not estimator.needs_transitions)  # a trajectory records its answers
    if recipe.old_policy.decay == "none":
        old *= 1 - 1 / recipe.update.updates_per_epoch
    reference = "reference" in objective.needs or recipe.kl.coef > 0
    single = one_pass(objective.level, points, recipe.update.micro_batch_size, recipe.rollout.group_size)
    return Passes(
        rollout=recipe.rollout.num_steps * sampling,
        forward=points * (old + reference + (not single)) * training,
        backward=points * training,
    )


def one_pass(level: str, num_points: int, micro_batch_size: int, group_size: int) -> bool:
    """Whether a micro-batch holds all the entries that the objective's loss couples."""
    samples = micro_batch_size // num_points
    return {"term": True, "sample": samples >= 1, "group": samples >= group_size}[level]


def _num_points(cell: Cell, estimator: Any, sampler: Any) -> int:
    steps, asked = cell.recipe.rollout.num_steps, cell.recipe.update.num_points
    if estimator.needs_transitions:
        scored: int = sampler.num_scored(steps)
        return min(asked or scored, scored)
    points = asked or steps - 1
    return min(points, steps) if getattr(estimator, "law", None) == "sampler_grid" else points


def resolve(axis: str, value: Any, grid: Grid, location: Location) -> tuple[Component, Any]:
    """A value of an axis, `grpo` or `{name: grpo, clip_range: 1e-4}`, with all its parameters, and its instance."""
    spec = {"name": value} if isinstance(value, str) else value
    if not isinstance(spec, dict) or not isinstance(spec.get("name"), str):
        expected = "a name or a mapping with 'name', as in {name: elbo, weight: simple}"
        raise grid.source.error(location, f"got {shown(value)}, expected {expected}")
    name, given = spec["name"], {key: v for key, v in spec.items() if key != "name"}
    try:
        kind = _kind(axis, name)
    except InputError as error:
        raise grid.source.error(location, str(error)) from None
    hints = typing.get_type_hints(kind)
    fields = [f.name for f in dataclasses.fields(kind)]
    for key, v in given.items():
        if key not in fields:
            raise grid.source.error((*location, key), f"{name} has no parameter {key!r}{choices(key, fields)}")
        try:
            given[key] = TypeAdapter(hints[key]).validate_json(json.dumps(v, default=str), strict=True)
        except ValidationError as error:
            raise grid.source.error((*location, key), f"{name}: {message(error.errors()[0])}") from None
        if isinstance(v, float) and not math.isfinite(v):
            raise grid.source.error((*location, key), f"{name}: got {v}, expected a finite number")
    try:
        instance = kind(**given)
    except (ValueError, TypeError) as error:
        raise grid.source.error(location, f"{name}: {error}") from None
    return Component(name=name, **dataclasses.asdict(instance)), instance


def build(axis: str, component: Component) -> Any:
    """The instance of a resolved component."""
    return _kind(axis, component.name)(**component.parameters)


def _labels(axis: str, values: list[Component]) -> tuple[str, ...]:
    """Short labels where they tell the values of an axis apart, full ones where they do not."""
    short = [short_label(axis, value) for value in values]
    return tuple(label(axis, v) if short.count(s) > 1 else s for v, s in zip(values, short, strict=True))


def short_label(axis: str, component: Component) -> str:
    """The name and the parameters that its class always shows: `elbo-adaptive`."""
    shown = getattr(_kind(axis, component.name), "shown", ())
    return "-".join([component.name.replace(":", "."), *(str(component.parameters[key]) for key in shown)])


def label(axis: str, component: Component) -> str:
    """The short label and every other parameter off its default: unique among the values of an axis."""
    kind = _kind(axis, component.name)
    changed = [
        f"{field.name}={component.parameters[field.name]}"
        for field in dataclasses.fields(kind)
        if field.name not in getattr(kind, "shown", ()) and component.parameters[field.name] != field.default
    ]
    return " ".join([short_label(axis, component), *changed])


def _kind(axis: str, name: str) -> Any:
    """The class of a component: from its table, or from the outside as `module:Class`."""
    if ":" in name:
        return _outside(axis, name)
    table = getattr(importlib.import_module(f"ablate.{axis}s"), f"{axis}s".upper())
    if name not in table:
        raise InputError(f"unknown {axis} {name!r}{choices(name, table)}, or 'module:Class' of your own")
    return table[name]


def _outside(axis: str, name: str) -> Any:
    """The class that `module:Class` names."""
    path, _, attribute = name.partition(":")
    if not path or not attribute:
        raise InputError(f"got {axis} {name!r}, expected 'module:Class'")
    try:
        module = importlib.import_module(path)
    except Exception as error:  # whatever the file of a user does when it is run
        raise InputError(f"{axis} {name!r} cannot be imported: {type(error).__name__}: {error}") from None
    kinds = {key: v for key, v in vars(module).items() if isinstance(v, type) and dataclasses.is_dataclass(v)}
    if attribute not in kinds:
        problem = "is no dataclass" if hasattr(module, attribute) else "does not exist"
        raise InputError(f"{axis} {name!r} {problem}{choices(attribute, kinds)}")
    for member in MEMBERS[axis]:
        if not hasattr(kinds[attribute], member):
            raise InputError(f"{axis} {name!r} has no {member!r}; see ablate/{axis}s/protocol.py")
    return kinds[attribute]


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
