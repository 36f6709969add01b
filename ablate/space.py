"""What tuning may change: `learning_rate=1e-5..1e-3:log`, `num_points=1..8:int`, `group_probe=shared|independent`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from ablate.part import COMPONENT_AXES
from ablate.recipe import recipe_fields
from ablate.source import InputError, choices, finite_number

JUDGES = ("evaluation", "budget", "prompts", "reward", "scoring", "model.path", "model.revision")
FIXED = (*JUDGES, "devices", "export_weights", "checkpoint_every")  # what judges trials, and what changes no result
FORMS = "NAME=LOW..HIGH with :log or :int behind it if need be, or NAME=A|B|C"
FLAGS = ("log", "int")
PLACES = ("the fields of a recipe", *(f"{axis}.PARAMETER" for axis in COMPONENT_AXES))


@dataclass(frozen=True, kw_only=True)
class Dimension:
    """The values that one field may take: an interval with both ends, or a list."""

    text: str  # as it was given
    field: str  # a recipe field, or objective.clip_range
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    integer: bool = False
    values: tuple[Any, ...] = ()

    @property
    def component(self) -> tuple[str, str] | None:
        """Axis and parameter, for a parameter of a component."""
        axis, _, parameter = self.field.partition(".")
        return (axis, parameter) if axis in COMPONENT_AXES else None

    @property
    def extremes(self) -> tuple[Any, ...]:
        """All listed values, or both ends."""
        return self.values or (self.low, self.high)

    def holds(self, value: object) -> bool:
        """Whether a value is one of the dimension's."""
        if self.values:
            return value in self.values
        if not isinstance(value, int | float) or isinstance(value, bool):
            return False
        return self.low <= value <= self.high and (not self.integer or value % 1 == 0)

    def suggest(self, trial: Any) -> Any:
        """The value of an Optuna trial."""
        if self.values:
            return trial.suggest_categorical(self.field, self.values)
        if self.integer:
            return trial.suggest_int(self.field, int(self.low), int(self.high), log=self.log)
        return trial.suggest_float(self.field, self.low, self.high, log=self.log)


def parse_space(texts: Sequence[str]) -> tuple[Dimension, ...]:
    """The dimensions of `--space`. Raises InputError for a name or values that cannot be used."""
    dimensions = [_parse(text) for text in texts]
    for i, dimension in enumerate(dimensions):
        if dimension.field in (other.field for other in dimensions[:i]):
            raise InputError(f"--space {dimension.text}: {dimension.field} is given twice")
    return tuple(dimensions)


def _parse(text: str) -> Dimension:
    name, separator, given = text.partition("=")
    if not separator or not name or not given:
        raise InputError(f"--space {text}: expected {FORMS}")
    field = _field(text, name)
    if ".." in given:
        return _interval(text, field, given)
    values = tuple(_scalar(text, value) for value in given.split("|"))
    if len(set(map(repr, values))) < max(2, len(values)):
        raise InputError(f"--space {text}: expected two different values at least, or {FORMS}")
    return Dimension(text=text, field=field, values=values)


def _field(text: str, name: str) -> str:
    """The whole path of a field, which a short name may be the end of."""
    if name.partition(".")[0] in COMPONENT_AXES and "." in name:
        return name
    fields = [field for field in recipe_fields() if not any(f"{field}.".startswith(f"{f}.") for f in FIXED)]
    if name in fields:
        return name
    found = [field for field in fields if field.endswith(f".{name}")]
    if len(found) > 1:
        raise InputError(f"--space {text}: {name!r} is the name of several fields; give one of {', '.join(found)}")
    if not found:
        fixed = [field for field in recipe_fields() if field not in fields]
        if name in fixed or any(field.endswith(f".{name}") for field in fixed):
            raise InputError(f"--space {text}: {name!r} cannot be tuned: it is the same for all that are compared")
        raise InputError(f"--space {text}: unknown field {name!r}{choices(name, fields, PLACES)}")
    return found[0]


def _interval(text: str, field: str, given: str) -> Dimension:
    ends, *flags = given.split(":")
    for flag in flags:
        if flag not in FLAGS:
            raise InputError(f"--space {text}: unknown flag {flag!r}{choices(flag, FLAGS)}")
    low_text, _, high_text = ends.partition("..")
    low, high = (_number(text, end) for end in (low_text, high_text))
    if not low < high:
        raise InputError(f"--space {text}: expected the lower end first, and two different ends")
    if "log" in flags and low <= 0:
        raise InputError(f"--space {text}: got {low:g} as the lower end, expected more than 0 with :log")
    if "int" in flags and (low % 1 or high % 1):
        raise InputError(f"--space {text}: expected whole numbers as ends with :int")
    if "int" in flags:
        low, high = int(low), int(high)
    return Dimension(text=text, field=field, low=low, high=high, log="log" in flags, integer="int" in flags)


def _number(text: str, end: str) -> float:
    value = finite_number(end)
    if value is None:
        raise InputError(f"--space {text}: got {end!r} as an end, expected a finite number")
    return value


def _scalar(text: str, value: str) -> Any:
    try:
        found = YAML(typ="safe", pure=True).load(value)
    except YAMLError:
        raise InputError(f"--space {text}: got {value!r}, which is not valid YAML") from None
    if found is not None and not isinstance(found, str | bool | int | float):
        raise InputError(f"--space {text}: got {value!r}, expected numbers or words")
    return found
