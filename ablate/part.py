"""A part of a grid: axes, or one single combination, with the recipe that they belong to."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from ablate.recipe import Recipe, recipe_fields
from ablate.source import InputError, Location, Source, dotted, problems, set_path, validate

COMPONENT_AXES = ("objective", "estimator", "sampler")


@dataclass(frozen=True, kw_only=True)
class Part:
    """The axes of a grid, or one of its single cells, with its recipe: what is crossed by itself."""

    source: Source
    override: Mapping[str, Any]
    written: Mapping[str, Any]  # what the grid file itself says: its axes, or the combination
    axes: Mapping[str, list[Any]]  # the recipe's method included
    place: Location  # of the axes in the grid file: ("axes",) or ("cells", 2)
    recipe_name: str
    recipe_source: Source
    recipe: dict[str, Any]  # the recipe file with `override` and then `settings` applied
    settings: Mapping[str, Any]  # of --set, by dotted path

    @property
    def recipe_axes(self) -> dict[str, list[Any]]:
        """The axes that are recipe fields."""
        return {name: values for name, values in self.axes.items() if name not in COMPONENT_AXES}

    def where(self, axis: str, index: int = 0) -> tuple[Source, Location]:
        """Where a value of an axis is written: in the grid, or in the recipe's method."""
        if axis not in self.written:
            return self.recipe_source, ("method", axis)
        return self.source, (*self.place, axis, *([index] if self.place == ("axes",) else []))

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
        known = [tuple(field.split(".")) for field in recipe_fields()]
        fields = (
            [location] if location[:2] in known else [f for word in named for f in known if word in (f[-1], dotted(f))]
        )
        fields = [f for f in fields if f[: len(location)] == location] or [location]
        for place in fields:
            for path, value in self.settings.items():
                if _starts(place, path):
                    return InputError(f"--set {path}={value}: {message}")
            for path, value in values.items():
                if _starts(place, path):
                    source, where = self.where(path, self.axes[path].index(value))
                    return source.error(where, message)
        for place in fields:
            if holds(self.override, place):
                return self.source.error(("override", *place), message)
        return self.recipe_source.error(fields[0] if fields else (), message)


def holds(data: Any, location: Location) -> bool:
    """Whether a document wrote a place, or a value in place of the mapping that would hold it."""
    for step in location:
        if isinstance(data, dict) and step not in data:
            return False
        if not isinstance(data, dict):
            break
        data = data[step]
    return bool(location)


def _starts(location: Location, path: str) -> bool:
    steps = tuple(path.split("."))
    return location[: len(steps)] == steps
