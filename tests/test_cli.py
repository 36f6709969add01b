"""The command line: what each option keeps, and mistakes in options."""

from __future__ import annotations

import errno
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock
from uuid import UUID

import pytest
from commands import Command
from scale import write_grid

from ablate.grid import load_grid
from ablate.plan import make_plan
from ablate.record import Record, Status
from runners.identity import identify
from runners.sweep import freeze

ROOT = Path(__file__).parents[1]
TINY = str(ROOT / "grids" / "tiny.yaml")


@pytest.fixture
def columns() -> int:
    return 80


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--only", "objectve=grpo"], ["--only objectve=grpo", "'objective'?", "objective, estimator, sampler, id"]),
        (["--only", "objective=grop"], ["--only objective=grop", "did you mean 'grpo'?", "grpo, gspo, reinforce, dpo"]),
        (["--only", "estimator=simple"], ["no cell has estimator 'simple'", "elbo-simple", "elbo-path_kl"]),
        (["--only", "grpo"], ["--only grpo: expected AXIS=VALUE"]),
        (["--only", "estimator=trajectory", "--only", "sampler=ode"], ["none of its 132 cells fits"]),
        (["--seeds", "0,7"], ["--seeds 0,7", "no seed 7", "Allowed: 0, 1, 2"]),
        (["--seeds", "a"], ["--seeds 'a'", "whole numbers separated by commas"]),
        (["--seeds", ""], ["--seeds ''", "whole numbers separated by commas"]),
        (["--set", "kl.coef"], ["--set kl.coef: expected FIELD=VALUE"]),
        (["--set", "kl.coef="], ["--set kl.coef=: expected FIELD=VALUE"]),
        (["--set", "kl.coef=[1"], ["--set kl.coef=[1", "not valid YAML"]),
        (["--set", "kl.ceof=1"], ["--set kl.ceof=1", "did you mean 'kl.coef'?"]),
        (["--set", "kl.coef=-1"], ["--set kl.coef=-1", "got -1", "at least 0"]),
        (["--rate", "0"], ["--rate 0", "more than 0"]),
        (["--rate", "nan"], ["--rate nan", "more than 0"]),
        (["--rate", "9", "--bench", "b.json"], ["--rate and --bench: each gives the speed; expected one of them"]),
        (["--calibrate", "--bench", "b.json"], ["--calibrate and --bench: each gives the speed"]),
        (["--rate", "9", "--calibrate"], ["--rate and --calibrate: each gives the speed"]),
    ],
)
def test_a_mistake_in_an_option_is_one_line(ablate: Command, words: list[str], parts: list[str]) -> None:
    code, out, err = ablate("plan", TINY, *words)
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    for part in parts:
        assert part in err


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["run", TINY, "--stop-when", "rewrd >= 0.95"], "unknown metric 'rewrd', did you mean 'reward'?"),
        (["run", TINY, "--stop-when", "reward >= high"], "got 'high', expected a finite number"),
        (["tune", TINY, "--trials", "2", "--space", "learning_rat=1e-5..1e-3"], "did you mean 'update.learning_rate'?"),
        (["tune", TINY, "--trials", "2", "--space", "objective.clip_rang=1..2"], "did you mean 'clip_range'?"),
        (
            ["tune", TINY, "--trials", "2", "--space", "kl.coef=0..1", "--storage", "sqlite:///a.db", "--workers", "2"],
            "SQLite hands one trial to two workers",
        ),
    ],
)
def test_a_mistake_in_what_ends_cells_or_is_tuned_starts_nothing(
    ablate: Command, tmp_path: Path, words: list[str], part: str
) -> None:
    code, out, err = ablate(*words, "--results", tmp_path / "results")
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert part in err
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--stop-when", "reward>=0.95"], {"stop_when": "rollout/score >= 0.95", "share": 1.0}),
        (["--halving", "2"], {"stop_when": None, "share": 0.25}),
        (["--halving", "1", "--stop-when", "epoch > 3"], {"stop_when": "epoch > 3", "share": 0.5}),
        ([], None),
    ],
)
def test_a_run_limits_its_cells_as_it_was_asked(
    ablate: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], expected: dict[str, Any] | None
) -> None:
    started: list[list[str]] = []
    monkeypatch.setattr("runners.sweep.run_cells", lambda _, cells, **__: started.append([c.id for c in cells]))
    monkeypatch.setattr("runners.preflight.preflight", lambda *_, **__: [])
    options = ["--only", "objective=dpo", "--seeds", "0", "--no-tracking", "--results", str(tmp_path)]
    code, _, err = ablate("run", TINY, *options, *words)
    assert (code, err) == (1, "")  # nothing is done
    (cells,) = started
    assert len(cells) == 11
    for cell in cells:
        path = tmp_path / "tiny" / cell / "limits.json"
        assert (json.loads(path.read_text()) if path.exists() else None) == (expected and {"format": 1, **expected})
    assert (tmp_path / "tiny" / "halving.json").exists() == ("--halving" in words)


def plan(ablate: Command, *words: str) -> list[dict[str, Any]]:
    code, out, err = ablate("plan", TINY, "--json", *words)
    assert (code, err) == (0, "")
    return json.loads(out)["cells"]


def test_only_keeps_by_label_by_name_by_id_and_by_axis(ablate: Command) -> None:
    assert len(plan(ablate)) == 132
    assert len(plan(ablate, "--only", "estimator=elbo")) == 4 * 3 * 3 * 3
    assert len(plan(ablate, "--only", "estimator=elbo-simple", "--only", "sampler=ode", "--seeds", "1,2")) == 8
    assert len(plan(ablate, "--only", "sampler=ode", "--only", "sampler=sde", "--seeds", "0")) == 4 * 3 + 4 * 4
    name = plan(ablate)[17]["id"]
    assert [cell["id"] for cell in plan(ablate, "--only", f"id={name}")] == [name]


def test_only_keeps_values_of_recipe_axes(ablate: Command, tmp_path: Path) -> None:
    (tmp_path / "recipes").symlink_to(ROOT / "grids" / "recipes")
    text = Path(TINY).read_text().replace("seeds:", "  kl.coef: [0, 0.5]\nseeds:")
    (tmp_path / "g.yaml").write_text(text)
    code, out, _ = ablate("plan", tmp_path / "g.yaml", "--json", "--only", "kl.coef=0.5")
    assert code == 0
    assert {cell["axes"]["kl.coef"] for cell in json.loads(out)["cells"]} == {0.5}
    _, _, err = ablate("plan", tmp_path / "g.yaml", "--only", "kl.coef=5")
    assert "Allowed: 0, 0.5" in err


def test_the_table_has_a_row_per_combination(ablate: Command) -> None:
    code, out, _ = ablate("plan", TINY, "--seeds", "0", "--rate", "200")
    assert code == 0
    assert len(re.findall(r"^(grpo|gspo|reinforce|dpo) +\S+ +(sde|ode|mixed) +1 ", out, re.MULTILINE)) == 44
    assert max(map(len, out.splitlines())) <= 80


def test_a_rate_turns_epochs_into_hours(ablate: Command) -> None:
    budget = ["--set", "budget.epochs=3", "--set", "budget.device_hours=null"]
    (cell, *_) = plan(ablate, "--only", "objective=reinforce", *budget, "--rate", "100")
    images = 3 * 24 * 16
    assert cell["device_hours"] == pytest.approx(images * (8 + 3 + 3 * 3) / 100 / 3600)  # rollout, reference, update


def test_components_are_listed_with_what_they_are(ablate: Command) -> None:
    code, out, _ = ablate("list")
    assert code == 0
    for word in ("objectives", "reinforce", "grpo", "estimators", "elbo", "samplers", "mixed"):
        assert word in out


def test_help_is_instant_and_needs_no_torch() -> None:
    code = "import sys\nfrom ablate import cli\nsys.argv = ['ablate', '--help']\ntry:\n    cli.main()\nfinally:\n    "
    code += "print({'torch', 'pandas', 'mlflow'} & set(sys.modules), file=sys.stderr)"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert (ended.returncode, ended.stderr) == (0, "set()\n")
    for command in ("plan", "run", "tune", "cell", "status", "report", "sync", "list"):
        assert command in ended.stdout


# results that cannot be used


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """A folder as `ablate run` makes it, with one cell that is done."""
    grid = load_grid(Path(TINY))
    planned = make_plan(grid, identify).keep(lambda c: c.seed == 0 and c.objective == "dpo" and c.sampler == "ode")
    folder = tmp_path / "tiny"
    freeze(folder, planned, grid.source.text)
    cell = planned.cells[0]
    record = Record(id=cell.id, status=Status.DONE, seed=0)
    (folder / cell.id / "record.json").write_text(record.model_dump_json())
    return folder


DAMAGE = {
    "plan of another version": ("plan.json", '{"format": 7}', ["plan.json:1: results of format 7", "reads format 1"]),
    "plan cut short": ("plan.json", '{"format": 1,', ["plan.json:1: cannot be read as JSON"]),
    "plan that is a list": ("plan.json", "[]", ["plan.json:1: got []"]),
    "record of another version": ("*/record.json", '{"format": 0}', ["record.json:1: results of format 0"]),
    "record cut short": ("*/record.json", '{"format"', ["record.json:1: cannot be read as JSON"]),
    "record without a seed": ("*/record.json", '{"format": 1, "id": "x", "status": "done"}', ["record.json", "seed"]),
}


@pytest.mark.parametrize("command", ["report", "sync"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_results_are_one_line(ablate: Command, results: Path, command: str, damage: str) -> None:
    name, content, parts = DAMAGE[damage]
    next(results.glob(name)).write_text(content)
    code, out, err = ablate(command, results)
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    for part in parts:
        assert part in err


@pytest.mark.parametrize("damage", [name for name in DAMAGE if name.startswith("record")])
def test_a_damaged_record_is_shown_beside_the_other_cells(ablate: Command, results: Path, damage: str) -> None:
    name, content, parts = DAMAGE[damage]
    (path,) = results.glob(name)
    path.write_text(content)
    code, out, _ = ablate("status", results)
    assert code == 1
    out = out.replace("\n", "")
    for part in (f"{path.parent.name} damaged: ", "1 damaged", *parts):
        assert part in out


def test_results_of_another_version_are_not_written_over(ablate: Command, results: Path) -> None:
    (results / "plan.json").write_text('{"format": 7}')
    code, _, err = ablate("run", TINY, "--results", results.parent, "--no-tracking")
    assert (code, len(err.splitlines())) == (2, 1)
    assert "results of format 7" in err
    assert (results / "plan.json").read_text() == '{"format": 7}'


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ('{"format": 1}', "plan.json:1: cannot be read: grid: Field required"),
        ('{"format": 1, "grid": "tiny", "cells": 5}', "plan.json:1: cannot be read: cells: "),
        ('{"format": 1, "grid": "tiny", "cells": [{"id": 3}]}', "plan.json:1: cannot be read: cells.0.id: "),
        ('{"format": 1, "grid": "tiny", "cells": [{"id": "../../x"}]}', "plan.json:1: cannot be read: cells.0.id: "),
    ],
)
@pytest.mark.parametrize("command", ["status", "clean"])
def test_a_plan_that_says_something_else_is_one_line(
    ablate: Command, results: Path, command: str, content: str, part: str
) -> None:
    (results / "plan.json").write_text(content)
    code, out, err = ablate(command, results)
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert part in err


# a disk that does not do its part


def test_a_full_disk_is_one_line(ablate: Command, results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ablate.record.uuid.uuid4", lambda: UUID(int=0))
    (results / f"..stop.{'0' * 12}").symlink_to("/dev/full")  # where a request is written first
    code, out, err = ablate("stop", results)
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert "No space left on device" in err


@pytest.mark.parametrize("command", ["stop", "retry", "report"])
def test_what_cannot_be_written_is_one_line(ablate: Command, results: Path, command: str) -> None:
    """Folders where files belong stand in for a disk that is read-only, which stops nobody who is root."""
    (path,) = results.glob("*/record.json")
    path.write_text(Record(id=path.parent.name, status=Status.FAILED, seed=0).model_dump_json())
    for folder in (results / ".stop" / "x", path.parent / ".lock", results / "report" / "table.csv"):
        folder.mkdir(parents=True)
    code, _, err = ablate(command, results)
    assert (code, len(err.splitlines())) == (2, 1)
    assert re.match(rf"{re.escape(str(results))}/\S+: .*Is a directory", err)


def test_what_cannot_be_deleted_is_one_line(ablate: Command, results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (path,) = results.glob("*/record.json")
    (kept := path.with_name("damaged-record.json")).touch()
    refused = PermissionError(errno.EACCES, "Permission denied", str(kept))
    monkeypatch.setattr("runners.cleaning._delete", mock.Mock(side_effect=refused))
    assert ablate("clean", results, "--yes") == (2, "", f"{kept}: Permission denied\n")


def test_an_error_of_no_file_is_a_mistake_of_ours(
    ablate: Command, results: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runners.stop_files.ask_launchers", mock.Mock(side_effect=ConnectionResetError(104, "reset")))
    code, _, err = ablate("stop", results)
    assert (code, err.splitlines()[-1]) == (1, "ConnectionResetError: [Errno 104] reset")


# names among a thousand


def test_a_misspelt_cell_of_a_thousand_is_named_with_the_nearest(ablate: Command, tmp_path: Path) -> None:
    grid = write_grid(tmp_path, 1000)
    loaded = load_grid(grid)
    planned = make_plan(loaded, identify)
    freeze(tmp_path / "synthetic", planned, loaded.source.text)
    for cell in planned.cells[:200]:
        (tmp_path / "synthetic" / cell.id / "weights").mkdir()
        record = Record(id=cell.id, status=Status.DONE, seed=cell.seed)
        (tmp_path / "synthetic" / cell.id / "record.json").write_text(record.model_dump_json())
    meant = planned.cells[7].id
    wrong = meant[:-1] + "~"
    for words in (
        ["plan", grid, "--only", f"id={wrong}"],
        ["eval", tmp_path / "synthetic", "--cell", wrong],
        ["logs", wrong, "--results", tmp_path],
    ):
        code, _, err = ablate(*words)
        assert (code, f"did you mean {meant!r}?" in err) == (2, True)
        assert len(err) < 600


def test_results_in_the_place_of_a_file(ablate: Command, tmp_path: Path) -> None:
    (tmp_path / "results").write_text("")
    code, _, err = ablate("run", TINY, "--results", tmp_path / "results", "--no-tracking")
    assert (code, len(err.splitlines())) == (2, 1)
    assert "cannot be made a folder" in err


@pytest.mark.parametrize("command", ["report", "sync", "cell"])
def test_a_folder_that_is_none(ablate: Command, tmp_path: Path, command: str) -> None:
    code, out, err = ablate(command, tmp_path / "nowhere")
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert str(tmp_path / "nowhere") in err


def test_a_damaged_cell_is_one_line(ablate: Command, results: Path) -> None:
    path = next(results.glob("*/cell.json"))
    path.write_text('{"format": 1, "id": "x"}')
    code, out, err = ablate("cell", path.parent)
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert "cell.json:1: cannot be read: grid" in err


def test_status_and_dry_run_show_where_each_cell_is(ablate: Command, results: Path) -> None:
    words = [TINY, "--only", "objective=dpo", "--only", "sampler=ode", "--seeds", "0", "--results", results.parent]
    code, out, _ = ablate("status", *words)
    assert code == 1  # not all are done
    assert "3 cells: 1 done, 2 waiting; 0.00 device-hours" in out
    done = next(results.glob("*/record.json")).parent.name
    assert re.search(rf"^{done} +done ", out, re.MULTILINE)
    code, out, _ = ablate("run", *words, "--dry-run")
    assert code == 0
    assert sorted(line.split()[0] for line in out.splitlines()) == ["done", "waiting", "waiting"]
    assert not list(results.glob("*/log.txt"))
