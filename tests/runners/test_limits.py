"""What ends a cell before its budget does: its stop rule, or a pause at a share of the budget."""

from __future__ import annotations

from pathlib import Path

import pytest
from cells import folder_of

from ablate.grid import load_grid
from ablate.limits import Limits, reached, read_limits, write_limits
from ablate.plan import make_plan
from ablate.recipe import BudgetRecipe
from ablate.record import Status, read_metrics
from ablate.source import InputError
from runners import train

SMALL = {
    "rollout.num_groups": 3,
    "rollout.group_size": 4,
    "rollout.num_steps": 5,
    "update.micro_batch_size": 16,
    "evaluation.num_prompts": 6,
    "evaluation.num_steps": 2,
    "budget.epochs": 4,
}
(CELL,) = (
    cell
    for cell in make_plan(load_grid(Path(__file__).parents[2] / "grids" / "quickstart.yaml", SMALL)).cells
    if (cell.seed, cell.sampler) == (0, "ode")
)


def comparable(folder: Path) -> list[dict[str, float]]:
    """What was trained: without what depends on the clock or on when there was an evaluation."""
    return [
        {k: v for k, v in line.items() if not k.startswith(("cost/", "eval/")) and k != "device_hours"}
        for line in read_metrics(folder)
    ]


def test_a_cell_that_fulfils_its_rule_is_done_and_says_so(tmp_path: Path) -> None:
    folder = folder_of(CELL, tmp_path)
    write_limits(folder, Limits(stop_when="epoch >= 2"))
    record = train.train_cell(folder)
    assert (record.status, record.epochs) == (Status.DONE, 2)
    assert record.message == "stopped by its rule epoch >= 2: 2 at epoch 2"
    assert "eval/score" in read_metrics(folder)[-1]  # its result, although no evaluation was due


def test_a_rule_on_a_held_out_metric_can_end_a_cell_before_training(tmp_path: Path) -> None:
    folder = folder_of(CELL, tmp_path)
    write_limits(folder, Limits(stop_when="score >= -100"))
    record = train.train_cell(folder)
    assert (record.status, record.epochs) == (Status.DONE, 0)
    assert record.message.startswith("stopped by its rule eval/score >= -100: ")


def test_a_rule_that_nothing_could_fulfil_is_named(tmp_path: Path) -> None:
    folder = folder_of(CELL, tmp_path, budget=BudgetRecipe(epochs=1))
    write_limits(folder, Limits(stop_when="train/klx > 1"))
    record = train.train_cell(folder)
    assert record.status is Status.DONE
    assert record.message == "its stop rule 'train/klx > 1' asks for a metric that was never logged"


def test_a_paused_cell_goes_on_to_the_same_metrics(tmp_path: Path) -> None:
    whole, parts = (folder_of(CELL, tmp_path / name) for name in ("whole", "parts"))
    train.train_cell(whole)
    write_limits(parts, Limits(share=0.25))
    paused = train.train_cell(parts)
    assert (paused.status, paused.epochs, paused.message) == (Status.PAUSED, 1, "paused after 0.25 of its budget")
    assert "eval/score" in read_metrics(parts)[-1]
    again = train.train_cell(parts)
    assert (again.status, again.cost.rollout) == (Status.PAUSED, paused.cost.rollout)
    write_limits(parts, Limits())
    assert train.train_cell(parts).status is Status.DONE
    assert comparable(parts) == comparable(whole)


@pytest.mark.parametrize(
    ("budget", "epoch", "hours", "expected"),
    [
        ({"epochs": 10}, 2, 0.0, False),
        ({"epochs": 10}, 3, 0.0, True),
        ({"device_hours": 4.0}, 99, 0.9, False),
        ({"device_hours": 4.0}, 0, 1.0, True),
        ({"epochs": 10, "device_hours": 4.0}, 1, 1.0, True),
    ],
)
def test_a_share_of_the_budget_is_reached_by_epochs_or_hours(
    budget: dict[str, float], epoch: int, hours: float, expected: bool
) -> None:
    assert reached(BudgetRecipe(**budget), 0.25, epoch, hours) is expected


def test_limits_are_read_as_written_and_no_limits_leave_no_file(tmp_path: Path) -> None:
    limits = Limits(stop_when="reward >= 1", share=0.5)
    write_limits(tmp_path, limits)
    assert read_limits(tmp_path) == limits
    write_limits(tmp_path, Limits())
    assert list(tmp_path.iterdir()) == []
    assert read_limits(tmp_path) == Limits()


def test_damaged_limits_are_refused_with_the_place(tmp_path: Path) -> None:
    (tmp_path / "limits.json").write_text('{"format": 1, "share": 2}')
    with pytest.raises(InputError, match=r"limits.json:1: cannot be read: share: .*got 2"):
        read_limits(tmp_path)
