"""What tuning compares: families of cells, and the cell that each trial is."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ablate.compatibility import impossible
from ablate.part import COMPONENT_AXES
from ablate.plan import Cell, Plan, make_cell
from ablate.record import write_atomic
from ablate.source import FieldError, InputError, choices
from ablate.space import Dimension
from ablate.variation import vary
from runners.cell import mend

OF_DATABASES = ("sqlalchemy", "psycopg", "optuna")  # whose exceptions tell of a database, not of a mistake here
SPLIT = "development"  # of the held-out prompts that trials are judged by; never the one that is reported
SUFFIX = "-tune"  # of the folder beside the grid's own
IMPOSSIBLE = "not possible"  # begins what is said of values that no cell can have together


@dataclass(frozen=True, kw_only=True)
class Family:
    """A configuration of the grid: objective, estimator, sampler and recipe axes; and what is tuned of it."""

    base: Cell  # with the recipe's own values, development prompts and the seed of tuning
    space: tuple[Dimension, ...]

    @property
    def name(self) -> str:
        axes = ", ".join(f"{field}={value}" for field, value in self.base.axes.items())
        return " · ".join(filter(None, [*(getattr(self.base, axis) for axis in COMPONENT_AXES), axes]))

    @property
    def study(self) -> str:
        """A name that changes with anything that trials depend on, so that no study mixes two of them."""
        content = f"{self.base.id} {self.space}"
        return f"{self.name} ({hashlib.sha256(content.encode()).hexdigest()[:8]})"

    @property
    def own(self) -> dict[str, Any]:
        """The recipe's values of what is tuned."""
        return {dimension.field: value_of(self.base, dimension.field) for dimension in self.space}

    def cell(self, values: Mapping[str, Any]) -> Cell:
        """The cell of a trial. Raises FieldError for values that are not allowed or not possible."""
        recipe, components, instances = vary(self.base.recipe, self.base.components, values)
        names = {axis: component.name for axis, component in components.items()}
        if values and (reason := impossible(names, recipe=recipe, **instances)):
            raise FieldError(next(iter(values)), reason)
        return make_cell(
            **{axis: getattr(self.base, axis) for axis in COMPONENT_AXES},
            grid=self.base.grid,
            axes={**self.base.axes, **values},
            components=components,
            recipe=recipe,
            versions=self.base.versions,
            seed=self.base.seed,
        )


def families(plan: Plan, space: Sequence[Dimension]) -> list[Family]:
    """The configurations of a plan with what is tuned of each: a parameter only where the component has it, and no
    configuration without any.

    Raises InputError where nothing has a parameter, an end of the space is not allowed, or the grid reports the prompts
    that trials are judged by.
    """
    configurations: dict[str, Cell] = {}
    for cell in plan.cells:
        configurations.setdefault(str([*(getattr(cell, axis) for axis in COMPONENT_AXES), cell.axes]), cell)
    found = [_family(cell, _unused_seed(plan), space) for cell in configurations.values()]
    for dimension in space:
        if not any(dimension in family.space for family in found):
            raise InputError(f"--space {dimension.text}: {_nobody(dimension, found)}")
    tuned = [family for family in found if family.space]
    for family in tuned:
        _check(family)
    return tuned


def _family(cell: Cell, seed: int, space: Sequence[Dimension]) -> Family:
    if cell.recipe.evaluation.split == SPLIT:
        raise InputError(
            f"evaluation.split: got {SPLIT!r}, whose prompts choose the values; expected 'evaluation' to report"
        )
    for dimension in space:
        if dimension.field in cell.axes:
            raise InputError(f"--space {dimension.text}: {dimension.field} is an axis of this grid")
    recipe, _, _ = vary(cell.recipe, cell.components, {"evaluation.split": SPLIT, "export_weights": False})
    base = make_cell(
        **{axis: getattr(cell, axis) for axis in COMPONENT_AXES},
        grid=cell.grid + SUFFIX,
        axes=cell.axes,
        components=cell.components,
        recipe=recipe,
        versions=cell.versions,
        seed=seed,
    )
    return Family(base=base, space=tuple(d for d in space if d.component is None or _has(cell, *d.component)))


def _has(cell: Cell, axis: str, parameter: str) -> bool:
    return parameter in cell.components[axis].parameters


def _nobody(dimension: Dimension, found: Sequence[Family]) -> str:
    assert dimension.component is not None  # every cell has every field of the recipe
    axis, parameter = dimension.component
    known = dict.fromkeys(p for family in found for p in family.base.components[axis].parameters)
    return f"no {axis} of these cells has a parameter {parameter!r}{choices(parameter, known)}"


def _unused_seed(plan: Plan) -> int:
    """A seed that the grid does not report, lest values are chosen by the luck of one that it does."""
    return max(cell.seed for cell in plan.cells) + 1


def _check(family: Family) -> None:
    """Refuse ends, and listed values, that a trial of the family could not have."""
    for dimension in family.space:
        for value in dimension.extremes:
            try:
                family.cell({dimension.field: value})
            except FieldError as error:
                raise InputError(
                    f"--space {dimension.text}: {dimension.field} {value} of {family.name}: {error}"
                ) from None


def value_of(cell: Cell, field: str) -> Any:
    """The value that a cell has of a recipe field or of a parameter of a component."""
    head, _, rest = field.partition(".")
    if head in COMPONENT_AXES:
        return cell.components[head].parameters[rest]
    value: Any = cell.recipe.model_dump(mode="json")
    for step in field.split("."):
        value = value[step]
    return value


@contextlib.contextmanager
def writing(results: Path) -> Iterator[None]:
    """Raises InputError in place of an error of the disk, such as a full one, or of a database that has gone."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{error.filename or results}: cannot be written: {error.strerror}") from None
    except Exception as error:
        if type(error).__module__.partition(".")[0] not in OF_DATABASES:
            raise
        problem = str(error).partition("\n")[0]
        raise InputError(f"--storage postgresql://...: {problem}; the same command goes on once it is there") from None


def write_cell(results: Path, cell: Cell) -> Path:
    """The folder of a trial's cell, with its cell.json; a record that nobody could read is set aside."""
    folder = results / cell.id
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "cell.json").exists():
        write_atomic(folder / "cell.json", cell.model_dump_json(indent=1) + "\n")
    mend(folder)
    return folder


def write_plan(results: Path, cells: Sequence[Cell], grid_text: str) -> None:
    """The grid, and plan.json over all trials, whose tuned values are axes: to other commands, results as any other."""
    order = {axis: tuple(dict.fromkeys(getattr(cell, axis) for cell in cells)) for axis in COMPONENT_AXES}
    plan = Plan(grid=cells[0].grid, order=order, cells=tuple(cells), excluded=(), listed=True)
    write_atomic(results / "grid.yaml", grid_text)
    write_atomic(results / "plan.json", plan.to_json())
