"""A grid file: axes, seeds and a recipe. See grids/*.yaml."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError, field_validator

from ablate.recipe import Recipe, Strict
from ablate.source import InputError, Location, Source, choices, explain, merge, set_path

COMPONENT_AXES = ("objective", "estimator", "sampler")


class GridFile(Strict):
    """The keys of a grid file."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]
    recipe: str
    """Name of a file in `recipes/` beside the grid, or a path."""
    axes: dict[str, list[Any]]
    seeds: list[Annotated[int, Field(ge=0)]]
    override: dict[str, Any] = {}

    @field_validator("axes")
    @classmethod
    def _axes(cls, axes: dict[str, list[Any]]) -> dict[str, list[Any]]:
        for name in COMPONENT_AXES:
            if name not in axes:
                raise ValueError(f"axis {name!r} is missing; a grid crosses objective, estimator and sampler")
        for name, values in axes.items():
            if not values:
                raise ValueError(f"axis {name!r} is empty; give at least one value")
            for i, value in enumerate(values):
                if value in values[:i]:
                    raise ValueError(f"axis {name!r} has {value!r} twice")
            _known_axis(name)
        return axes

    @field_validator("seeds")
    @classmethod
    def _seeds(cls, seeds: list[int]) -> list[int]:
        if not seeds:
            raise ValueError("is empty; give at least one seed")
        for i, seed in enumerate(seeds):
            if seed in seeds[:i]:
                raise ValueError(f"seed {seed} is there twice; two cells would be the same")
        return seeds


@dataclass(frozen=True, kw_only=True)
class Grid:
    """A grid file with its recipe, every value validated."""

    file: GridFile
    source: Source
    recipe_source: Source
    recipe: dict[str, Any]  # the recipe file with `override` applied

    def recipe_with(self, settings: dict[str, Any]) -> Recipe:
        """The recipe with recipe axes set, e.g. {"kl.coef": 1e-4}. Raises InputError with file and line."""
        data = self.recipe
        for path, value in settings.items():
            data = set_path(data, path.split("."), value)
        try:
            return Recipe.model_validate(data)
        except ValidationError as error:
            raise self._locate(error, settings) from None

    def _locate(self, error: ValidationError, settings: dict[str, Any]) -> InputError:
        """Each problem in the file that wrote it: an axis, the override, or the recipe."""
        lines = []
        for problem in error.errors():
            location = tuple(problem["loc"])
            source = self.recipe_source
            prefix: Location = ()
            single = ValidationError.from_exception_data("recipe", [problem])  # type: ignore[list-item]
            path = ".".join(map(str, location))
            if path in settings:
                values = self.file.axes[path]
                place: Location = ("axes", path, values.index(settings[path]))
                lines.append(str(self.source.error(place, str(explain(single, Recipe, source)).split(": ", 2)[-1])))
                continue
            if _holds(self.file.override, location):
                source, prefix = self.source, ("override",)
            lines.append(str(explain(single, Recipe, source, prefix)))
        return InputError("\n".join(lines))


def _holds(data: Any, location: Location) -> bool:
    for step in location:
        if not isinstance(data, dict) or step not in data:
            return False
        data = data[step]
    return bool(location)


def _known_axis(path: str) -> None:
    """Refuse an axis that is neither a component nor a dotted path to a recipe field."""
    if path in COMPONENT_AXES:
        return
    model: Any = Recipe
    allowed = [*COMPONENT_AXES, *Recipe.model_fields]
    for step in path.split("."):
        fields = getattr(model, "model_fields", {})
        if step not in fields:
            raise ValueError(f"unknown axis {path!r}{choices(step, allowed)}")
        model = fields[step].annotation
        allowed = list(getattr(model, "model_fields", {}))
    if allowed:
        raise ValueError(f"axis {path!r} is a group of fields; name one: {', '.join(f'{path}.{a}' for a in allowed)}")


def load_grid(path: Path, settings: dict[str, Any] | None = None) -> Grid:
    """Read and validate a grid. `settings` are dotted paths into the recipe (`--set`), applied over `override`.

    Raises InputError naming file, line, what was got, what is allowed, and the nearest match.
    """
    source = Source.read(path)
    try:
        file = GridFile.model_validate(source.data)
    except ValidationError as error:
        raise explain(error, GridFile, source) from None
    for key, value in (settings or {}).items():
        _known_axis_setting(key)
        file = file.model_copy(update={"override": set_path(file.override, key.split("."), value)})
    recipe_source = Source.read(_recipe_path(file.recipe, path, source))
    grid = Grid(file=file, source=source, recipe_source=recipe_source, recipe=merge(recipe_source.data, file.override))
    grid.recipe_with({})
    return grid


def _known_axis_setting(key: str) -> None:
    try:
        _known_axis(key)
    except ValueError as error:
        raise InputError(f"--set {key}: {error}") from None


def _recipe_path(name: str, grid: Path, source: Source) -> Path:
    if name.endswith((".yaml", ".yml")):
        return grid.parent / name
    folder = grid.parent / "recipes"
    found = folder / f"{name}.yaml"
    if not found.exists():
        names = sorted(p.stem for p in folder.glob("*.yaml"))
        raise source.error(("recipe",), f"no recipe {name!r} in {folder}{choices(name, names)}")
    return found
