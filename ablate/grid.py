"""A grid file: axes or single cells, seeds and a recipe. See grids/*.yaml."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError

from ablate.part import COMPONENT_AXES, Part, holds
from ablate.recipe import Strict, recipe_fields
from ablate.secrets import refuse_secret_setting, refuse_secrets
from ablate.source import InputError, Location, Source, choices, explain, merge, set_path, shown, validate

BESIDE = re.compile(  # what results/ keeps beside the folders of grids
    r"mlflow\.db(-\w+)?|mlruns|mlartifacts|published|.*-tune", re.IGNORECASE
)
PRESETS = (Path(__file__).parent / "recipes", Path(__file__).parents[1] / "grids" / "recipes")  # of a wheel; of sources


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


class Tuned(Strict):
    """Values that single combinations have in place of the recipe's, as `ablate tune` writes them."""

    objective: str
    estimator: str
    sampler: str
    axes: dict[str, Any] = {}
    """Values of recipe axes; those that are not named may be any."""
    set: dict[str, Any]
    """Recipe fields and parameters of components: {update.learning_rate: 3e-4, objective.clip_range: 0.01}."""

    def covers(self, called: Mapping[str, tuple[str, str]], axes: Mapping[str, Any]) -> bool:
        """Whether these values are a combination's; `called` has the label and the name of each component."""
        named = all(getattr(self, axis) in called[axis] for axis in COMPONENT_AXES)
        return named and all(name in axes and axes[name] == value for name, value in self.axes.items())


class GridFile(Strict):
    """The keys of a grid file."""

    name: str
    """Of the folder under results/."""
    recipe: str | None = None
    """Name of a file in `recipes/` beside the grid, or a path."""
    axes: dict[str, list[Any]] = {}
    """What is crossed: components and recipe fields. A component that is not named is that of the recipe's `method`."""
    cells: list[dict[str, Any]] = []
    """In place of axes, one combination each: a `recipe`, components and recipe fields, all with the defaults above."""
    seeds: list[Annotated[int, Field(ge=0)]]
    override: dict[str, Any] = {}
    exclude: list[Exclusion] = []
    tuned: list[Tuned] = []


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


@dataclass(frozen=True, kw_only=True)
class Grid:
    """A grid file with its recipes, every value validated."""

    file: GridFile
    source: Source
    parts: tuple[Part, ...]  # one for `axes`, one for each of `cells`


def _check_name(file: GridFile, source: Source) -> None:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}", file.name):
        allowed = "letters, digits, '_', '-' and '.', at most 100, the first a letter or digit, as it names a folder"
        raise source.error(("name",), f"got {shown(file.name)}. Allowed: {allowed}")
    if BESIDE.fullmatch(file.name):
        taken = "results/ keeps something else under this name, expected another"
        raise source.error(("name",), f"got {shown(file.name)}: {taken}")


def _check(file: GridFile, source: Source) -> None:
    """What the types cannot say. Raises InputError at the line."""
    _check_name(file, source)
    if bool(file.axes) == bool(file.cells):
        got = "both" if file.axes else "neither"
        raise source.error(("cells",) if file.cells else (), f"expected either axes or cells, got {got}")
    for name, values in file.axes.items():
        _check_axis(name, ("axes", name), file, source)
        if not values:
            raise source.error(("axes", name), "got an empty axis, expected at least one value")
        for i, value in enumerate(values):
            if value in values[:i]:
                raise source.error(("axes", name, i), f"got {shown(value)} twice; two cells would be the same")
    for i, cell in enumerate(file.cells):
        for name in cell:
            if name != "recipe":
                _check_axis(name, ("cells", i, name), file, source)
    _check_tuned(file, source)
    if not file.seeds:
        raise source.error(("seeds",), "got no seeds, expected at least one")
    for i, seed in enumerate(file.seeds):
        if seed in file.seeds[:i]:
            raise source.error(("seeds", i), f"got {seed} twice; two cells would be the same")


def _check_axis(name: str, location: Location, file: GridFile, source: Source) -> None:
    if name in COMPONENT_AXES:
        return
    if problem := _unknown(name, "axis", COMPONENT_AXES):
        raise source.error(location, problem)
    if holds(file.override, tuple(name.split("."))):
        raise source.error(("override", *name.split(".")), "is an axis of this grid too; give its values there")


def _check_tuned(file: GridFile, source: Source) -> None:
    for i, field in ((i, field) for i, row in enumerate(file.tuned) for field in row.set):
        place = ("tuned", i, "set", field)
        if field.partition(".")[0] in COMPONENT_AXES and "." in field:
            continue  # which parameters there are, its component says
        if problem := _unknown(field, "field"):
            raise source.error(place, problem)
        if field in file.axes or any(field in cell for cell in file.cells):
            raise source.error(place, "is an axis of this grid too; give its values there")


def load_grid(path: Path, settings: dict[str, Any] | None = None) -> Grid:
    """Read and validate a grid. `settings` are dotted paths into the recipe (`--set`), applied over `override`.

    Raises InputError naming file, line, what was got, what is allowed, and the nearest match.
    """
    source = Source.read(path)
    refuse_secrets(source)
    for key, value in (settings or {}).items():
        refuse_secret_setting(key, value)
    try:
        file = validate(GridFile, source.data)
    except ValidationError as error:
        raise explain(error, GridFile, source) from None
    _check(file, source)
    places: list[Location] = [("axes",)] if file.axes else [("cells", i) for i in range(len(file.cells))]
    parts = tuple(_part(path, file, source, place, settings or {}) for place in places)
    return Grid(file=file, source=source, parts=parts)


def _part(path: Path, file: GridFile, source: Source, place: Location, settings: Mapping[str, Any]) -> Part:
    """Axes with their recipe: its method fills in components, `override` and `settings` change its fields."""
    single = place != ("axes",)
    written: Mapping[str, Any] = file.cells[int(place[1])] if single else file.axes
    axes = {name: [value] for name, value in written.items() if name != "recipe"} if single else file.axes
    recipe_name = written.get("recipe", file.recipe)
    if not isinstance(recipe_name, str):
        got = f"got {shown(recipe_name)}, expected" if recipe_name is not None else "is missing:"
        raise source.error((*place, "recipe") if single else ("recipe",), f"{got} the name of a recipe")
    named = (*place, "recipe") if "recipe" in written else ("recipe",)
    recipe_source = Source.read(_recipe_path(recipe_name, path, source, named))
    refuse_secrets(recipe_source)
    data = {key: value for key, value in recipe_source.data.items() if key != "method"}
    method = recipe_source.data.get("method", {})
    if not isinstance(method, dict) or not set(method) <= set(COMPONENT_AXES):
        allowed = f"expected a mapping with {', '.join(COMPONENT_AXES)}"
        raise recipe_source.error(("method",), f"got {shown(method)}, {allowed}")
    for axis in COMPONENT_AXES:
        if axis not in axes and axis not in method:
            raise source.error(place, f"{axis!r} is missing, and recipe {recipe_name!r} has no method that names one")
    recipe = merge(data, file.override)
    for key, value in settings.items():
        if problem := _unknown(key, "field"):
            raise InputError(f"--set {key}={value}: {problem}")
        if any(key in row.set for row in file.tuned):
            raise InputError(f"--set {key}={value}: {path} has tuned values of it, combination by combination")
        if key in axes:
            values = ", ".join(map(shown, axes[key]))
            kept = "" if single else f"; --only {key}=VALUE keeps one"
            raise InputError(f"--set {key}={value}: is an axis of {path} ({values}){kept}")
        recipe = set_path(recipe, key.split("."), value)
    ordered = {axis: axes[axis] if axis in axes else [method[axis]] for axis in COMPONENT_AXES}
    part = Part(
        source=source,
        override=file.override,
        written=written,
        axes={**ordered, **axes},
        place=place,
        recipe_name=recipe_name,
        recipe_source=recipe_source,
        recipe=recipe,
        settings=settings,
    )
    part.recipe_with({name: values[0] for name, values in part.recipe_axes.items()})
    return part


def _recipe_path(name: str, grid: Path, source: Source, location: Location) -> Path:
    """The file of a recipe: one beside the grid goes before one of `ablate`'s own."""
    if name.endswith((".yaml", ".yml")):
        if not (found := grid.parent / name).is_file():
            raise source.error(location, f"no such file: {found}")
        return found
    own = {path.stem: path for folder in PRESETS for path in sorted(folder.glob("*.yaml"))}
    beside = {path.stem: path for path in sorted((grid.parent / "recipes").glob("*.yaml"))}
    known = {**own, **beside}
    if name not in known:
        raise source.error(
            location, f"no recipe {name!r} in {grid.parent / 'recipes'}, or built in{choices(name, sorted(known))}"
        )
    return known[name]
