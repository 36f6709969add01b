"""Values of single combinations: `tuned` rows of a grid, and what they cannot be."""

from __future__ import annotations

from pathlib import Path

import pytest

from ablate.grid import load_grid
from ablate.plan import Plan, make_plan
from ablate.source import InputError

RECIPE = "rollout: {num_steps: 10}\nupdate: {updates_per_epoch: 2}\nbudget: {epochs: 5}\n"
GRID = """\
name: g
recipe: little
axes:
  objective: [{name: grpo, clip_range: 0.5}, epg]
  estimator: [trajectory, {name: elbo, weight: simple}]
  sampler: [sde]
  kl.coef: [0, 0.5]
seeds: [0, 1]
"""
FIRST = "objective: grpo, estimator: trajectory, sampler: sde"


def planned(folder: Path, *rows: str, grid: str = GRID, **settings: object) -> Plan:
    (folder / "recipes").mkdir(exist_ok=True)
    (folder / "recipes" / "little.yaml").write_text(RECIPE)
    tuned = "tuned:\n" + "".join(f"  - {{{row}}}\n" for row in rows) if rows else ""
    (folder / "g.yaml").write_text(grid + tuned)
    return make_plan(load_grid(folder / "g.yaml", settings))


def test_a_row_changes_the_cells_of_its_combination_alone(tmp_path: Path) -> None:
    plain = planned(tmp_path)
    row = "axes: {kl.coef: 0.5}, set: {update.learning_rate: 7e-5, objective.clip_range: 0.25}"
    tuned = planned(tmp_path, f"{FIRST}, {row}")
    changed = [(a, b) for a, b in zip(plain.cells, tuned.cells, strict=True) if a != b]
    assert len(changed) == 2  # seeds
    for before, after in changed:
        assert (after.objective, after.estimator, after.axes) == ("grpo", "trajectory", {"kl.coef": 0.5})
        assert after.recipe.update.learning_rate == 7e-5
        assert after.components["objective"].parameters["clip_range"] == 0.25
        assert after.id != before.id
        update = before.recipe.update.model_copy(update={"learning_rate": 7e-5})
        assert after.recipe == before.recipe.model_copy(update={"update": update})


def test_labels_stay_those_of_the_axes_so_that_the_grid_stays_a_product(tmp_path: Path) -> None:
    tuned = planned(tmp_path, f"{FIRST}, set: {{objective.clip_range: 0.25}}")
    assert tuned.order == planned(tmp_path).order
    assert not tuned.listed


def test_a_row_covers_all_values_of_axes_that_it_does_not_name(tmp_path: Path) -> None:
    tuned = planned(tmp_path, f"{FIRST}, set: {{update.learning_rate: 7e-5}}")
    assert [cell.axes["kl.coef"] for cell in tuned.cells if cell.recipe.update.learning_rate == 7e-5] == [
        0,
        0,
        0.5,
        0.5,
    ]


@pytest.mark.parametrize(
    ("rows", "part"),
    [
        (["objective: grpo, estimator: elbo, sampler: ode, set: {kl.kind: path}"], "fits no combination of the axes"),
        ([f"{FIRST}, set: {{kl.coef: 0.1}}"], "tuned.0.set.kl.coef: is an axis of this grid too"),
        ([f"{FIRST}, set: {{update.learning_rat: 1}}"], "did you mean 'update.learning_rate'?"),
        ([f"{FIRST}, set: {{update.learning_rate: -1}}"], "g.yaml:10: tuned.0.set.update.learning_rate: got -1"),
        (
            [f"{FIRST}, set: {{objective.clip_rang: 1}}"],
            "grpo has no parameter 'clip_rang', did you mean 'clip_range'?",
        ),
        ([f"{FIRST}, set: {{objective.clip_range: wide}}"], "tuned.0.set.objective.clip_range: grpo: got 'wide'"),
        ([f"{FIRST}, set: {{kl.kind: path}}"] * 2, "tuned.1: fits a combination that row 1 fits too"),
        ([f"{FIRST}"], "tuned.0.set: is required"),
    ],
)
def test_a_row_that_cannot_be_used_is_named(tmp_path: Path, rows: list[str], part: str) -> None:
    with pytest.raises(InputError) as error:
        planned(tmp_path, *rows)
    assert part in str(error.value)


def test_set_does_not_undo_tuning_in_silence(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has tuned values of it"):
        planned(tmp_path, f"{FIRST}, set: {{update.learning_rate: 7e-5}}", **{"update.learning_rate": 1e-3})


def test_single_combinations_can_be_tuned_too(tmp_path: Path) -> None:
    grid = """\
name: g
recipe: little
cells:
  - {objective: epg, estimator: trajectory, sampler: sde}
  - {objective: epg, estimator: trajectory, sampler: sde, kl.coef: 0.5}
seeds: [0]
"""
    row = "objective: epg, estimator: trajectory, sampler: sde, axes: {kl.coef: 0.5}, set: {update.learning_rate: 7e-5}"
    first, second = planned(tmp_path, row, grid=grid).cells
    assert (first.recipe.update.learning_rate, second.recipe.update.learning_rate) == (3e-4, 7e-5)
