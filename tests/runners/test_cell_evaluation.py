"""`ablate eval` scores what training scored, finished or not, and each cell beside the base it started from."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sd35 import ODE, cell, write_pipeline
from typer.testing import CliRunner

from ablate.cli import app
from ablate.plan import Cell
from ablate.recipe import RewardTerm
from ablate.record import Status, read_metrics
from ablate.source import InputError
from runners import cell_evaluation, train
from runners.cell_evaluation import evaluate_cells
from runners.prompts import Prompt
from runners.rewards import WeightedSum
from runners.rewards.jpeg import JpegReward


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pipeline(tmp_path_factory.mktemp("sd35"))


def written(cell: Cell, results: Path) -> Path:
    home = results / cell.id
    home.mkdir(parents=True)
    (home / "cell.json").write_text(cell.model_dump_json())
    return home


@pytest.fixture(scope="module")
def finished(pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cell that is done."""
    folder = tmp_path_factory.mktemp("finished")
    home = written(cell(pipeline, ODE, folder), folder / "g")
    assert train.train_cell(home).status is Status.DONE
    return home


@pytest.fixture(scope="module")
def stopped(pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cell that was killed in its third epoch: checkpoints of the first and the second, an evaluation after each."""
    return stop(cell(pipeline, ODE, tmp_path_factory.mktemp("grid")), tmp_path_factory.mktemp("results"))


def stop(cell: Cell, results: Path, ema_decay: float = 0.9) -> Path:
    recipe = cell.recipe
    changed = {
        "evaluation": recipe.evaluation.model_copy(update={"every": 1, "ema_decay": ema_decay}),
        "budget": recipe.budget.model_copy(update={"epochs": 5}),
        "update": recipe.update.model_copy(update={"learning_rate": 0.03}),  # so that scores of each epoch differ
        "checkpoint_every": 1,
    }
    home = written(cell.model_copy(update={"recipe": recipe.model_copy(update=changed)}), results)
    real = train.train_epoch

    def killed(run):
        if run.progress.epoch == 2:
            raise SystemExit(9)
        return real(run)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(train, "train_epoch", killed)
        with pytest.raises(SystemExit):
            train.train_cell(home)
    return home


def test_the_base_and_finished_cells_are_scored(finished: Path) -> None:
    rows = list(evaluate_cells(finished.parent, ["jpeg", "scenes"], [None, 3.0]))
    assert [(row["model"], row["guidance"], row["reward"]) for row in rows] == [
        (model, scale, reward)
        for scale in (1.0, 3.0)
        for model in ("base", finished.name)
        for reward in ("jpeg", "scenes")
    ]
    lines = read_metrics(finished)
    assert rows[0]["score"] == pytest.approx(lines[0]["eval/score"])
    assert rows[2]["score"] == pytest.approx(lines[-1]["eval/score"])
    assert rows[0]["score"] != rows[2]["score"]
    target = finished.parent / "evaluations"
    document = json.loads((target / f"{finished.name}-guidance-3.json").read_text())
    assert document["evaluation"]["guidance_scale"] == 3
    assert document["base"] != json.loads((target / f"{finished.name}-guidance-1.json").read_text())["base"]
    assert (target / f"{document['base']}-guidance-3.png").exists()
    assert document["rewards"]["jpeg"]["identities"] == {"jpeg": "jpeg-1"}
    assert document["rewards"]["jpeg"]["missing"] == rows[0]["missing"] == 0
    first = document["images"][0]
    image = np.asarray(Image.open(target / first["file"]))
    scores = JpegReward()(image[None], [Prompt(text=first["prompt"])])
    assert first["scores"]["jpeg"] == pytest.approx(float(scores.score[0]))
    shown = [document["images"][i]["scores"]["jpeg"] for i in range(len(document["images"]))]
    assert document["rewards"]["jpeg"]["score"] == pytest.approx(np.mean(shown))
    assert len(list((target / f"{finished.name}-guidance-3").glob("*.png"))) == len(shown) == 6


def test_a_stopped_cell_is_scored_as_training_scored_it(stopped: Path, tmp_path: Path) -> None:
    before = stopped / "checkpoint" / "before.pt"
    rows = list(evaluate_cells(tmp_path / "new", [], [None], checkpoints=[stopped, before]))
    lines = read_metrics(stopped)
    assert [row["model"] for row in rows] == ["base", f"{stopped.name}-epoch-2", f"{stopped.name}-epoch-1"]
    for row, line in zip(rows, (lines[0], lines[2], lines[1]), strict=True):
        assert row["score"] == pytest.approx(line["eval/score"])
    assert len({row["score"] for row in rows}) == 3
    assert (tmp_path / "new" / "evaluations" / f"{stopped.name}-epoch-2-guidance-1.json").exists()


def test_without_an_average_the_current_weights_are_scored(pipeline: Path, tmp_path: Path) -> None:
    home = stop(cell(pipeline, ODE, tmp_path), tmp_path / "results", ema_decay=0.0)
    state = torch.load(home / "checkpoint" / "state.pt", weights_only=True)
    assert state["update"] == 2
    _, row = evaluate_cells(home.parent, [], [None], checkpoints=[home])
    assert row["score"] == pytest.approx(read_metrics(home)[2]["eval/score"])


@pytest.mark.parametrize("length", [0, 100, 5000])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_scored(
    stopped: Path, tmp_path: Path, length: int, capsys: pytest.CaptureFixture[str]
) -> None:
    home = tmp_path / "results" / stopped.name
    shutil.copytree(stopped, home)
    newest = home / "checkpoint" / "state.pt"
    newest.write_bytes(newest.read_bytes()[:length])
    _, row = evaluate_cells(home.parent, [], [None], checkpoints=[home])
    assert row["model"] == f"{stopped.name}-epoch-1"
    assert row["score"] == pytest.approx(read_metrics(stopped)[1]["eval/score"])
    assert f"{newest} is damaged and left out" in capsys.readouterr().err
    with pytest.raises(InputError, match="no intact checkpoint"):  # the very file was asked for
        list(evaluate_cells(home.parent, [], [None], checkpoints=[newest]))


def test_each_protocol_has_its_base_and_each_base_is_scored_once(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two cells under one protocol, one with more steps, one with another reward; one model and one load for all."""
    whole = Cell.model_validate_json((finished / "cell.json").read_text())

    def variant(name: str, reward: str = "jpeg", **evaluation: object) -> None:
        recipe = whole.recipe
        changed = {"evaluation": recipe.evaluation.model_copy(update=evaluation), "reward": reward}
        home = tmp_path / name
        shutil.copytree(finished, home)
        named = whole.model_copy(update={"id": name, "recipe": recipe.model_copy(update=changed)})
        (home / "cell.json").write_text(named.model_dump_json())

    variant("a")
    variant("b", num_steps=3, guidance_scale=2.0)
    variant("c", every=7)  # no part of what images depend on
    variant("d", reward="scenes")
    counts = {"generate": 0, "SD3Policy": 0, "load": 0}
    for owner, name in ((cell_evaluation, "generate"), (cell_evaluation, "SD3Policy"), (WeightedSum, "load")):
        real = getattr(owner, name)

        def counted(*given, name=name, real=real, **more):
            counts[name] += 1
            return real(*given, **more)

        monkeypatch.setattr(owner, name, counted)
    rows = list(evaluate_cells(tmp_path, [], [None]))
    assert [(row["model"], row["guidance"], row["reward"]) for row in rows] == [
        ("base", 1.0, "jpeg"),
        ("base", 1.0, "scenes"),
        ("a", 1.0, "jpeg"),
        ("c", 1.0, "jpeg"),
        ("d", 1.0, "scenes"),
        ("base", 2.0, "jpeg"),
        ("b", 2.0, "jpeg"),
    ]
    assert counts == {"generate": 2 + 4, "SD3Policy": 1, "load": 2}
    assert rows[0]["score"] != rows[5]["score"]
    bases = {name: json.loads((tmp_path / "evaluations" / f"{name}.json").read_text())["base"] for name in
             ("a-guidance-1", "b-guidance-2", "c-guidance-1", "d-guidance-1")}  # fmt: skip
    assert bases["a-guidance-1"] == bases["c-guidance-1"] == bases["d-guidance-1"] != bases["b-guidance-2"]


def test_what_is_missing_is_said(finished: Path, stopped: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no finished cell with exported weights; --checkpoint scores one"):
        list(evaluate_cells(tmp_path, ["jpeg"], [None]))
    with pytest.raises(
        InputError, match=f"--cell epg: no such finished cell with exported weights.*Allowed: {finished.name}"
    ):
        list(evaluate_cells(finished.parent, ["jpeg"], [None], ["epg"]))
    with pytest.raises(InputError, match="no intact checkpoint; a cell writes one"):
        list(evaluate_cells(finished.parent, ["jpeg"], [None], checkpoints=[finished]))
    with pytest.raises(InputError, match=r"no cell\.json here"):
        list(evaluate_cells(finished.parent, ["jpeg"], [None], checkpoints=[stopped / "checkpoint" / "other.pt"]))
    with pytest.raises(InputError, match="--reward jepg: unknown reward 'jepg', did you mean 'jpeg'"):
        list(evaluate_cells(finished.parent, ["jepg"], [None]))


def test_a_cell_that_is_not_finished_is_scored_by_its_checkpoint_alone(finished: Path, tmp_path: Path) -> None:
    """As after a start anew: the weights of the attempt before are still there."""
    home = tmp_path / finished.name
    shutil.copytree(finished, home)
    record = json.loads((home / "record.json").read_text())
    for change in ({"status": "failed"}, None):
        if change:
            (home / "record.json").write_text(json.dumps(record | change))
        else:
            (home / "record.json").unlink()
        with pytest.raises(InputError, match="no finished cell"):
            list(evaluate_cells(tmp_path, [], [None]))


def test_missing_scores_are_counted_and_no_number_in_the_file(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / finished.name)
    base, _ = evaluate_cells(tmp_path, ["own_rewards:of_the_self_check"], [None])
    assert (base["missing"], str(base["score"])) == (6, "nan")
    (file,) = (tmp_path / "evaluations").glob(f"{finished.name}*.json")
    document = json.loads(file.read_text(), parse_constant=pytest.fail)
    found = document["rewards"]["own_rewards:of_the_self_check"]
    assert (found["missing"], found["score"]) == (6, None)
    assert [image["scores"] for image in document["images"]] == [{"own_rewards:of_the_self_check": None}] * 6


def test_a_reward_that_cannot_score_here_is_an_error_before_anything_is_loaded(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(finished, tmp_path / finished.name)
    monkeypatch.setattr(cell_evaluation, "SD3Policy", None)
    with pytest.raises(InputError, match="reward own_rewards:raises: ConnectionError: no server at port 18085"):
        list(evaluate_cells(tmp_path, ["own_rewards:raises"], [None]))
    assert not (tmp_path / "evaluations").exists()


def test_rewards_of_one_name_and_other_parameters_are_two(finished: Path, tmp_path: Path) -> None:
    whole = Cell.model_validate_json((finished / "cell.json").read_text())
    for name, given in (("a", True), ("b", False)):
        shutil.copytree(finished, tmp_path / name)
        recipe = whole.recipe.model_copy(update={"reward": (RewardTerm(name="jpeg", incompressible=given),)})
        (tmp_path / name / "cell.json").write_text(
            whole.model_copy(update={"id": name, "recipe": recipe}).model_dump_json()
        )
    rows = list(evaluate_cells(tmp_path, [], [None]))
    assert [(row["model"], row["reward"]) for row in rows] == [
        ("base", "jpeg(incompressible=true)"),
        ("base", "jpeg(incompressible=false)"),
        ("a", "jpeg(incompressible=true)"),
        ("b", "jpeg(incompressible=false)"),
    ]
    assert rows[0]["score"] == pytest.approx(-rows[1]["score"])


def test_a_checkpoint_is_scored_from_the_command_line(stopped: Path, tmp_path: Path) -> None:
    given = ["eval", str(tmp_path), "--checkpoint", str(stopped), "--reward", "scenes"]
    result = CliRunner().invoke(app, given, env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.exception
    assert f"{stopped.name}-epoch-2" in result.stdout
    assert "base" in result.stdout
