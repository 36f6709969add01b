"""Compiling is booked apart, and changes nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from cells import folder_of

from ablate.grid import load_grid
from ablate.plan import make_plan
from ablate.record import read_metrics
from runners import compiling, train
from runners.run import set_up

SMALL = {
    "rollout.num_groups": 3,
    "rollout.group_size": 4,
    "rollout.num_steps": 4,
    "update.micro_batch_size": 16,
    "evaluation.num_prompts": 6,
    "evaluation.num_steps": 2,
    "budget.epochs": 1,
}
CELL = make_plan(load_grid(Path(__file__).parents[2] / "grids" / "quickstart.yaml", SMALL)).cells[0]


def test_compiling_is_booked_apart_from_the_phase_that_caused_it(tmp_path: Path) -> None:
    """With torch's own tracer but no code generation, which takes a minute here."""
    run = set_up(tmp_path, CELL)
    compiling._CLOCK.run()
    compiled = torch.compile(lambda x: (x.sin() + x.cos()).sum(), backend="eager")
    before = compiling.compile_seconds()
    with run.booked("rollout"):
        compiled(torch.ones(3))
    first = run.progress.cost
    assert first.compile == pytest.approx(compiling.compile_seconds() - before)
    assert first.compile > 0
    assert first.rollout >= 0
    with run.booked("rollout"):
        compiled(torch.ones(3))
    assert run.progress.cost.compile == first.compile
    assert first.device_hours == pytest.approx(first.rollout / 3600)


@pytest.mark.slow
def test_a_compiled_cell_trains_to_the_same_numbers(tmp_path: Path) -> None:
    models = [CELL.recipe.model.model_copy(update={"compile": compiled}) for compiled in (False, True)]
    folders = [folder_of(CELL, tmp_path / str(model.compile), model=model) for model in models]
    records = [train.train_cell(folder) for folder in folders]
    assert [record.status for record in records] == ["done", "done"]
    assert records[0].cost.compile == 0
    assert records[1].cost.compile > records[1].cost.rollout
    plain, compiled = (read_metrics(folder)[-1] for folder in folders)
    for name in ("rollout/score", "eval/score", "train/loss", "train/grad_norm"):
        assert compiled[name] == pytest.approx(plain[name], rel=1e-2, abs=1e-4)
