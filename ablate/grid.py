"""A grid file: axes, seeds and a recipe. See grids/*.yaml."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, Field, ValidationError

from ablate.recipe import Recipe, Strict
from ablate.source import InputError, Location, Source, choices, explain, merge, problems, set_path, shown, validate

COMPONENT_AXES = ("objective", "estimator", "sampler")


class Exclusion(Strict):
    """Combinations that a grid leaves out on purpose: those with all the named values."""

    objective: str | None = None
    estimator: str | None = None
    sampler: str | None = None
    reason: str
    """Shown wherever excluded combinations are."""

    def covers(self, called: Mapping[str, tuple[str, str]]) -> bool:
        """Whether a combination is left out; `called` has the label and the name of its component on each axis."""
        named = {axis: value for axis in COMPONENT_AXES if (value := getattr(self, axis)) is not None}
        return all(value in called[axis] for axis, value in named.items())


class GridFile(Strict):
    """The keys of a grid file."""

    name: str
    """Of the folder under results/."""
    recipe: str
    """Name of a file in `recipes/` beside the grid, or a path."""
    axes: dict[str, list[Any]]
    seeds: list[Annotated[int, Field(ge=0)]]
    override: dict[str, Any] = {}
    exclude: list[Exclusion] = []


@dataclass(frozen=True, kw_only=True)
class Grid:
    """A grid file with its recipe, every value validated."""

    file: GridFile
    source: Source
    recipe_source: Source
    recipe: dict[str, Any]  # the recipe file with `override` and then `settings` applied
    settings: dict[str, Any] = field(default_factory=dict)  # of --set, by dotted path

    def recipe_with(self, values: dict[str, Any]) -> Recipe:
        """The recipe with recipe axes set, e.g. {"kl.coef": 1e-4}. Raises InputError with file and line."""
        data = self.recipe
        for path, value in values.items():
            data = set_path(data, path.split("."), value)
        try:
            return validate(Recipe, data)
        except ValidationError as error:
            lines = [str(self.error(*problem, values)) for problem in problems(error, Recipe)]
            raise InputError("\n".join(lines)) from None

    def error(self, location: Location, message: str, values: dict[str, Any]) -> InputError:
        """An InputError about a recipe field, where its value was written: --set, an axis, `override` or the recipe."""
        named = re.findall(r"[\w.]+", message)  # a problem between fields names them
        fields = [location] if location else [tuple(f.split(".")) for f in recipe_fields() if f in named]
        for place in fields:
            for path, value in self.settings.items():
                if _starts(place, path):
                    return InputError(f"--set {path}={value}: {message}")
            for path, value in values.items():
                if _starts(place, path):
                    return self.source.error(("axes", path, self.file.axes[path].index(value)), message)
        for place in fields:
            if _holds(self.file.override, place):
                return self.source.error(("override", *place), message)
        return self.recipe_source.error(fields[0] if fields else (), message)


def _starts(location: Location, path: str) -> bool:
    steps = tuple(path.split("."))
    return location[: len(steps)] == steps


def _holds(data: Any, location: Location) -> bool:
    """Whether a document wrote a place, or a value in place of the mapping that would hold it."""
    for step in location:
        if isinstance(data, dict) and step not in data:
            return False
        if not isinstance(data, dict):
            break
        data = data[step]
    return bool(location)


def recipe_fields(model: type[BaseModel] = Recipe) -> Iterator[str]:
    """Dotted paths of all fields of the recipe: kl.coef, rollout.num_steps, ..."""
    for name, info in model.model_fields.items():
        inner = info.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            yield from (f"{name}.{path}" for path in recipe_fields(inner))
        else:
            yield name


def _unknown(path: str, kind: str, others: tuple[str, ...] = ()) -> str | None:
    """What is wrong with a dotted path to a recipe field; None if nothing is."""
    fields = list(recipe_fields())
    if path in fields:
        return None
    if inside := [f for f in fields if f.startswith(f"{path}.")]:
        return f"is a group of fields; name one of {', '.join(inside)}"
    group = path.partition(".")[0] + "."
    siblings = [f for f in fields if f.startswith(group)]
    groups = list(dict.fromkeys(f.split(".")[0] + ".*" if "." in f else f for f in fields))
    return f"unknown {kind}{choices(path, [*others, *fields], siblings or [*others, *groups])}"


def _check(file: GridFile, source: Source) -> None:
    """What the types cannot say. Raises InputError at the line."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", file.name):
        allowed = "letters, digits, '_', '-' and '.', the first a letter or digit, as it names a folder"
        raise source.error(("name",), f"got {file.name!r}. Allowed: {allowed}")
    for name, values in file.axes.items():
        if name not in COMPONENT_AXES and (problem := _unknown(name, "axis", COMPONENT_AXES)):
            raise source.error(("axes", name), problem)
        if name not in COMPONENT_AXES and _holds(file.override, tuple(name.split("."))):
            raise source.error(("override", *name.split(".")), "is an axis of this grid too; give its values there")
        if not values:
            raise source.error(("axes", name), "got an empty axis, expected at least one value")
        for i, value in enumerate(values):
            if value in values[:i]:
                raise source.error(("axes", name, i), f"got {shown(value)} twice; two cells would be the same")
    for name in COMPONENT_AXES:
        if name not in file.axes:
            raise source.error(("axes",), f"{name!r} is missing; a grid crosses {', '.join(COMPONENT_AXES)}")
    if not file.seeds:
        raise source.error(("seeds",), "got no seeds, expected at least one")
    for i, seed in enumerate(file.seeds):
        if seed in file.seeds[:i]:
            raise source.error(("seeds", i), f"got {seed} twice; two cells would be the same")


def load_grid(path: Path, settings: dict[str, Any] | None = None) -> Grid:
    """Read and validate a grid. `settings` are dotted paths into the recipe (`--set`), applied over `override`.

    Raises InputError naming file, line, what was got, what is allowed, and the nearest match.
    """
    source = Source.read(path)
    try:
        file = validate(GridFile, source.data)
    except ValidationError as error:
        raise explain(error, GridFile, source) from None
    _check(file, source)
    recipe_source = Source.read(_recipe_path(file.recipe, path, source))
    recipe = merge(recipe_source.data, file.override)
    for key, value in (settings or {}).items():
        if problem := _unknown(key, "field"):
            raise InputError(f"--set {key}={value}: {problem}")
        if key in file.axes:
            values = ", ".join(map(shown, file.axes[key]))
            raise InputError(f"--set {key}={value}: is an axis of {path} ({values}); --only {key}=VALUE keeps one")
        recipe = set_path(recipe, key.split("."), value)
    grid = Grid(file=file, source=source, recipe_source=recipe_source, recipe=recipe, settings=settings or {})
    grid.recipe_with({name: values[0] for name, values in file.axes.items() if name not in COMPONENT_AXES})
    return grid


def _recipe_path(name: str, grid: Path, source: Source) -> Path:
    folder = grid.parent / "recipes"
    names = sorted(p.stem for p in folder.glob("*.yaml"))
    found = grid.parent / name if name.endswith((".yaml", ".yml")) else folder / f"{name}.yaml"
    if not found.is_file():
        where = f"no such file: {found}" if found.parent != folder else f"no recipe {name!r} in {folder}"
        raise source.error(("recipe",), f"{where}{choices(name, names)}")
    return found
