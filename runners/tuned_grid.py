"""What tuning has found, as a grid file: the grid as it was, and `tuned` rows with their evidence as comments."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ablate.grid import load_grid
from ablate.part import COMPONENT_AXES
from ablate.plan import make_plan
from ablate.record import write_atomic
from ablate.source import InputError, counted
from runners.identity import identify
from runners.trials import IMPOSSIBLE, SPLIT, Family, writing

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

MARK = "# Written by `ablate tune`"
ENDINGS = ("to the end", "ended early", IMPOSSIBLE, "failed")
NAME = re.compile(r"^name:\s*(?P<name>[\w.-]+|'[^']*'|\"[^\"]*\")", re.MULTILINE)


def check_target(grid: Path) -> Path:
    """Where the tuned grid goes. Raises InputError where it cannot be written, before anything is trained."""
    target = grid.with_name(f"{grid.stem}-tuned.yaml")
    if target.exists() and MARK not in target.read_text(encoding="utf-8", errors="replace"):
        raise InputError(f"{target}: is there already, and `ablate tune` has not written it; rename it")
    loaded = load_grid(grid)
    if loaded.file.tuned:
        raise InputError(f"{grid}: has tuned values already; tune the grid that they were found for")
    if not NAME.search(loaded.source.text):
        raise InputError(f"{grid}: expected its name in a line of its own, as in name: {loaded.file.name}")
    return target


def write_tuned_grid(
    grid: Path, found: Mapping[str, tuple[Family, Sequence[FrozenTrial]]], settings: Sequence[str] = ()
) -> Path:
    """GRID-tuned.yaml with the best values of each family; `found` has all its trials, which have ended."""
    target, loaded = check_target(grid), load_grid(grid)
    text = NAME.sub(f"name: {loaded.file.name}-tuned", loaded.source.text, count=1).rstrip("\n") + "\n"
    rows = "".join(_rows(family, trials) for family, trials in found.values())
    key = "tuned:" if any(line.startswith("  - ") for line in rows.splitlines()) else "tuned: []"
    with writing(target):
        write_atomic(target, f"{_header(grid, found, settings)}{text}{key}\n{rows}")
    make_plan(load_grid(target), identify)
    return target


def _header(grid: Path, found: Mapping[str, tuple[Family, Sequence[FrozenTrial]]], settings: Sequence[str]) -> str:
    family, _ = next(iter(found.values()))
    counts = sorted({len(trials) for _, trials in found.values()})
    each = f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else str(counts[0])
    space = dict.fromkeys(dimension.text for family, _ in found.values() for dimension in family.space)
    lines = [
        f"{MARK} from {grid.name}: {counted(len(found), 'combination')}, {each} trials each.",
        f"Space: {', '.join(space)}.",
        f"Budget of a trial: {_budget(family)}; seed {family.base.seed}, which this grid does not have.",
        f"Chosen by the last accuracy on the first {family.base.recipe.evaluation.num_prompts} {SPLIT} prompts (score, "
        "where the reward has no accuracy).",
        "A combination without a row has the recipe's values: none of these are its own, or no trial has a result.",
        *([f"Other settings of the trials: {', '.join(settings)}."] if settings else []),
    ]
    return lines[0] + "\n" + "".join(f"# {line}\n" for line in lines[1:])


def _budget(family: Family) -> str:
    budget = family.base.recipe.budget.model_dump(exclude_none=True)
    return ", ".join(f"{value:g} {name.replace('_', '-')}" for name, value in budget.items())


def _rows(family: Family, trials: Sequence[FrozenTrial]) -> str:
    """The row of a family below its evidence; the evidence alone where no trial has a result."""
    complete = [trial for trial in trials if trial.state.name == "COMPLETE"]
    comments = [f"  # {line}\n" for line in _evidence(family, trials, complete)]
    if not complete:
        return "".join(comments)
    best = best_of(complete)
    key = {axis: getattr(family.base, axis) for axis in COMPONENT_AXES}
    axes = {"axes": family.base.axes} if family.base.axes else {}
    row = json.dumps({**key, **axes, "set": best.params}, default=str, ensure_ascii=False)
    return "".join(comments) + f"  - {row}\n"


def best_of(complete: Sequence[FrozenTrial]) -> FrozenTrial:
    """The trial with the highest value; of equals, the first."""
    return max(complete, key=lambda trial: (trial.value or 0.0, -trial.number))


def _evidence(family: Family, trials: Sequence[FrozenTrial], complete: Sequence[FrozenTrial]) -> list[str]:
    spent = {t.user_attrs["cell"]: t.user_attrs.get("device_hours", 0.0) for t in trials if "cell" in t.user_attrs}
    counts = Counter(map(_ending, trials))
    ended = ", ".join(f"{counts[word]} {word}" for word in ENDINGS if counts[word])
    lines = [f"{family.name}: {counted(len(trials), 'trial')} ({ended}), {sum(spent.values()):.3g} device-hours."]
    if complete:
        best = best_of(complete)
        own = next((trial for trial in complete if trial.user_attrs.get("own")), None)
        before = f"; the recipe's own values: {own.value:.4f}" if own else ""
        lines.append(f"Best {best.value:.4f}, trial {best.number}{before}.")
    else:
        lines.append("No trial has come to its end: the values stay the recipe's.")
    for trial in sorted(trials, key=lambda trial: trial.number):
        lines.append(f"  {trial.number}: {_values(trial.params)} -> {_result(trial)}")
    return lines


def _values(params: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value:.4g}" if isinstance(value, float) else f"{name}={value}" for name, value in
                     params.items())  # fmt: skip


def _ending(trial: FrozenTrial) -> str:
    """One of ENDINGS."""
    to_the_end, early, impossible, failed = ENDINGS
    if trial.state.name == "FAIL":
        return impossible if str(trial.user_attrs.get("why", "")).startswith(IMPOSSIBLE) else failed
    return to_the_end if trial.state.name == "COMPLETE" else early


def _result(trial: FrozenTrial) -> str:
    if trial.state.name == "COMPLETE":
        return f"{trial.value:.4f}"
    return str(trial.user_attrs.get("why", "")).replace("\n", " ")
