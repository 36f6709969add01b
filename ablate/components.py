"""One value of a component axis: from YAML to an instance with every parameter spelled out, and back."""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
import typing
from collections.abc import Mapping
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError

from ablate.plugins import import_plugin
from ablate.recipe import Strict, recipe_fields
from ablate.source import FieldError, InputError, Location, Source, choices, message, shown

MEMBERS = {  # what a class from the outside must have; the protocols say it in full
    "objective": ("needs", "level", "__call__"),
    "estimator": ("needs", "pool", "num_points", "probe", "log_prob"),
    "sampler": ("leaves", "num_scored", "problem", "sample"),
}
DECLARED = {  # the words of `needs`, and for a sampler of `leaves`
    "objective": ("old", "reference", "reward", "velocity", "target", "transitions"),
    "estimator": ("transitions", "density", "latents"),
    "sampler": ("transitions", "density"),
}
ONE_OF = {"objective": {"level": ("term", "sample", "group")}, "estimator": {"pool": ("each", "mean", "sum")}}


class Component(Strict):
    """One value of an axis with every parameter spelled out: {"name": "grpo", "clip_range": 0.001}."""

    model_config = ConfigDict(extra="allow", frozen=True)
    name: str

    @property
    def parameters(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


def resolve(axis: str, value: Any, source: Source, location: Location) -> tuple[Component, Any]:
    """A value of an axis, `grpo` or `{name: grpo, clip_range: 1e-4}`, with all its parameters, and its instance."""
    spec = {"name": value} if isinstance(value, str) else value
    if not isinstance(spec, dict) or not isinstance(spec.get("name"), str):
        expected = "a name or a mapping with 'name', as in {name: elbo, weight: simple}"
        raise source.error(location, f"got {shown(value)}, expected {expected}")
    name, given = spec["name"], {key: v for key, v in spec.items() if key != "name"}
    try:
        return spell_out(axis, name, given)
    except FieldError as error:
        raise source.error((*location, *error.location), str(error)) from None
    except InputError as error:
        raise source.error(location, str(error)) from None
    except (ValueError, TypeError) as error:
        raise source.error(location, f"{name}: {error}") from None


def spell_out(axis: str, name: str, given: Mapping[str, Any]) -> tuple[Component, Any]:
    """A component with all its parameters, those not given at their defaults, and its instance.

    Raises InputError for a name that does not exist, and what `instantiate` raises.
    """
    instance = instantiate(_kind(axis, name), name, given)
    check_declarations(axis, instance)
    return Component(name=name, **dataclasses.asdict(instance)), instance


def instantiate(kind: Any, name: str, given: Mapping[str, Any]) -> Any:
    """An instance of a dataclass with the parameters that a YAML file gives.

    Raises FieldError for a parameter that does not exist or has another type, ValueError for values that the class
    refuses or that are missing.
    """
    hints, fields = typing.get_type_hints(kind), {f.name: f for f in dataclasses.fields(kind) if f.init}
    values = {}
    for key, v in given.items():
        if key not in fields:
            raise FieldError(key, f"{name} has no parameter {key!r}{choices(key, fields)}")
        try:
            values[key] = TypeAdapter(hints[key]).validate_json(json.dumps(v, default=str), strict=True)
        except ValidationError as error:
            raise FieldError(key, f"{name}: {message(error.errors()[0])}") from None
        if isinstance(v, float) and not math.isfinite(v):
            raise FieldError(key, f"{name}: got {v}, expected a finite number")
    needed = [key for key, f in fields.items() if f.default is f.default_factory is dataclasses.MISSING]
    if missing := [key for key in needed if key not in values]:
        raise ValueError(f"give a value for {', '.join(missing)}, which has no default")
    return kind(**values)


def build(axis: str, component: Component) -> Any:
    """The instance of a resolved component."""
    return _kind(axis, component.name)(**component.parameters)


def unique_labels(axis: str, values: list[Component]) -> tuple[str, ...]:
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
        raise InputError(f"unknown {axis} {shown(name)}{choices(name, table)}, or 'module:Class' of your own")
    return table[name]


def _outside(axis: str, name: str) -> Any:
    """The class that `module:Class` names."""
    path, _, attribute = name.partition(":")
    if not path or not attribute:
        raise InputError(f"got {axis} {name!r}, expected 'module:Class'")
    try:
        module = import_plugin(path)
    except InputError as error:
        raise InputError(f"{axis} {name!r} {error}") from None
    kinds = {key: v for key, v in vars(module).items() if isinstance(v, type) and dataclasses.is_dataclass(v)}
    if attribute not in kinds:
        kinds = {key: v for key, v in kinds.items() if all(hasattr(v, member) for member in MEMBERS[axis])}
        problem = "is no dataclass" if hasattr(module, attribute) else "does not exist"
        raise InputError(f"{axis} {name!r} {problem}{choices(attribute, kinds)}")
    for member in MEMBERS[axis]:
        if not hasattr(kinds[attribute], member):
            raise InputError(f"{axis} {name!r} has no {member!r}; see ablate/{axis}s/protocol.py")
    return kinds[attribute]


def check_declarations(axis: str, instance: Any) -> None:
    """Refuse declarations that nobody knows: `needs`, `leaves`, `level`, `pool`, `demands`. Raises ValueError."""
    member = "leaves" if axis == "sampler" else "needs"
    declared = getattr(instance, member)
    if not isinstance(declared, frozenset):
        raise ValueError(
            f"{member}: got {declared!r}, expected a set of words, as in frozenset({{{DECLARED[axis][0]!r}}})"
        )
    for word in declared:
        if word not in DECLARED[axis]:
            raise ValueError(f"{member} {word!r} is unknown{choices(word, DECLARED[axis])}")
    for member, allowed in ONE_OF.get(axis, {}).items():
        if (got := getattr(instance, member)) not in allowed:
            raise ValueError(f"{member} {got!r} is unknown{choices(str(got), allowed)}")
    for path in getattr(instance, "demands", {}):
        if path not in (fields := list(recipe_fields())):
            raise ValueError(f"demands {path!r} is no recipe field{choices(path, fields, [])}")
