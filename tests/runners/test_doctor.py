"""Every finding of the doctor has its cause, and its remedy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from ablate.cli import app
from ablate.grid import load_grid
from ablate.plan import Cell, make_plan
from runners import doctor
from runners.doctor import examine, smallest

GRIDS = Path(__file__).parents[2] / "grids"


def cells(name: str = "quickstart", **settings: Any) -> tuple[Cell, ...]:
    given = {key.replace("__", "."): value for key, value in settings.items()}
    return make_plan(load_grid(GRIDS / f"{name}.yaml", given)).cells


def levels(found: list[doctor.Finding]) -> dict[str, str]:
    return {f"{finding.what}: {finding.remedy}": finding.level for finding in found}


def test_nothing_stands_between_the_quickstart_and_its_first_cell(tmp_path: Path) -> None:
    found = list(examine(cells(), tmp_path))
    assert {finding.level for finding in found} == {"ok"}
    assert any("rolled out, scored and updated once" in finding.what for finding in found)
    assert any("GiB for weights and checkpoints" in finding.what for finding in found)


@pytest.mark.parametrize(
    ("settings", "level", "part"),
    [
        ({"model__resolution": 33}, "problem", "model.resolution 33 is no multiple of 16: such as 32"),
        ({"model__resolution": 64}, "warning", "reward scenes looks for shapes of the embedded world, 32 pixels wide"),
        ({"evaluation__num_prompts": 5000}, "ok", "reward scenes-1"),
        ({"update__num_points": 500}, "warning", "update.num_points 500: elbo-adaptive and ode have 8"),
        ({"model__path": "nobody/nothing"}, "problem", "the hub cannot be reached"),
    ],
)
def test_each_finding(settings: dict[str, Any], level: str, part: str, tmp_path: Path, monkeypatch) -> None:
    def offline(*_: object, **__: object) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr("runners.hub.HfApi.model_info", offline)
    found = levels(list(examine(cells(**settings), tmp_path, dry_run=False)))
    assert [value for text, value in found.items() if part in text] == [level]


def test_fewer_prompts_than_asked_for_are_named(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("a\nb\nc\n")
    (tmp_path / "held-out.txt").write_text("d\ne\nf\ng\n")
    given = {"train": str(tmp_path / "train.txt"), "evaluation": str(tmp_path / "held-out.txt")}
    found = levels(
        list(
            examine(
                cells(prompts__train=given["train"], prompts__evaluation=given["evaluation"]), tmp_path, dry_run=False
            )
        )
    )
    assert any(
        "2 prompts in split evaluation, of 300 asked for: set evaluation.num_prompts to 2" in text for text in found
    )


def test_a_dry_run_that_fails_is_a_problem_with_its_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: object) -> None:
        raise torch.OutOfMemoryError("too large")

    monkeypatch.setattr(doctor, "train_epoch", broken)
    found = list(examine(cells(), tmp_path))
    problem = next(finding for finding in found if finding.level == "problem")
    assert "OutOfMemoryError: too large" in problem.what


def test_a_disk_that_is_too_small_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: usage)
    last = list(examine(cells(), tmp_path))[-1]
    assert (last.level, last.remedy) == ("problem", "give --results another disk, or set export_weights to false")


@pytest.mark.parametrize("name", ["tiny", "baselines", "paper_table"])
def test_the_smallest_form_of_every_cell_is_legal(name: str) -> None:
    for cell in cells(name):
        small = smallest(cell)
        rollout = small.recipe.rollout
        assert rollout.num_groups % small.recipe.update.updates_per_epoch == 0
        assert type(small.recipe).model_validate(small.recipe.model_dump()) == small.recipe


def test_the_exit_code_says_whether_there_is_a_problem(tmp_path: Path) -> None:
    given = ["doctor", str(GRIDS / "quickstart.yaml"), "--no-dry-run", "--results", str(tmp_path)]
    assert CliRunner().invoke(app, given).exit_code == 0
    result = CliRunner().invoke(app, [*given, "--set", "model.resolution=33"])
    assert result.exit_code == 1
    assert "problem" in result.output
