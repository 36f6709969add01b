"""A combination with other values of single fields: what a grid's `tuned` rows and the trials of tuning are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from ablate.components import Component, spell_out
from ablate.part import COMPONENT_AXES
from ablate.recipe import Recipe
from ablate.source import FieldError, choices, dotted, problems, set_path, validate

Varied = tuple[Recipe, dict[str, Component], dict[str, Any]]  # with the instances of the components


def vary(recipe: Recipe, components: Mapping[str, Component], fields: Mapping[str, Any]) -> Varied:
    """Set fields by dotted path: `update.learning_rate` of the recipe, `objective.clip_range` of a component.

    Raises FieldError for a parameter that does not exist, or a value that is not allowed.
    """
    data = recipe.model_dump(mode="json")
    given = {axis: component.parameters for axis, component in components.items()}
    for path, value in fields.items():
        head, _, parameter = path.partition(".")
        if head not in COMPONENT_AXES:
            data = set_path(data, path.split("."), value)
        elif parameter in given[head]:
            given[head] = {**given[head], parameter: value}
        else:
            known = choices(parameter, given[head])
            raise FieldError(path, f"{components[head].name} has no parameter {parameter!r}{known}")
    try:
        varied = validate(Recipe, data)
    except ValidationError as error:
        location, text = problems(error, Recipe)[0]
        raise FieldError(dotted(location) if dotted(location) in fields else next(iter(fields)), text) from None
    spelled = {axis: _spelled(axis, component.name, given[axis]) for axis, component in components.items()}
    return varied, {axis: c for axis, (c, _) in spelled.items()}, {axis: i for axis, (_, i) in spelled.items()}


def _spelled(axis: str, name: str, given: Mapping[str, Any]) -> tuple[Component, Any]:
    try:
        return spell_out(axis, name, given)
    except FieldError as error:
        raise FieldError(f"{axis}.{dotted(error.location)}", str(error)) from None
    except (ValueError, TypeError) as error:
        raise FieldError(axis, f"{name}: {error}") from None
