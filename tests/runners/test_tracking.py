"""MLflow is a mirror of the files: complete, without repetitions, and unable to stop anything."""

from __future__ import annotations

import json
import logging
import math
import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import pytest

from ablate.components import Component
from ablate.plan import Cell
from ablate.recipe import Recipe
from ablate.record import Provenance, Record, Status
from ablate.source import InputError
from runners import mlflow_writer
from runners.mlflow_writer import cell_params
from runners.tracking import Mirror, compare_link, default_uri, server_command, sync

LINE = {"update": 3, "nfe": 100, "train/loss": 0.5, "eval/accuracy": 0.25}


@pytest.fixture
def results(tmp_path: Path, empty_database: Path) -> Path:
    """A results folder of two cells: one done after 4 epochs, one running, after 2."""
    shutil.copy(empty_database, tmp_path / "mlflow.db")
    folder = tmp_path / "study"
    cells = [make_cell(objective, coef) for objective, coef in (("grpo", 0.0), ("dpo", 0.1))]
    folder.mkdir()
    (folder / "grid.yaml").write_text("name: study\n")
    (folder / "plan.json").write_text(
        json.dumps({"format": 1, "grid": "study", "cells": [cell.model_dump(mode="json") for cell in cells]})
    )
    for cell, num_epochs in zip(cells, (4, 2), strict=True):
        (folder / cell.id / "samples").mkdir(parents=True)
        (folder / cell.id / "cell.json").write_text(cell.model_dump_json())
        (folder / cell.id / "attempts.jsonl").write_text('{"started": 1700000000.5, "host": "here"}\n')
        (folder / cell.id / "samples" / "before.png").write_bytes(b"picture")
        append(folder / cell.id, *range(num_epochs))
    end(folder / "a-grpo", Status.DONE)
    return folder


def make_cell(objective: str, coef: float) -> Cell:
    return Cell(
        id=f"a-{objective}",
        grid="study",
        objective=objective,
        estimator="trajectory",
        sampler="sde",
        seed=7,
        axes={"kl.coef": coef},
        components={"objective": Component.model_validate({"name": objective, "clip_range": 0.001})},
        recipe=Recipe.model_validate({"kl": {"coef": coef}, "budget": {"epochs": 4}}),
        versions={"reward": "scenes-1"},
    )


def append(folder: Path, *epochs: int, **values: Any) -> None:
    with (folder / "metrics.jsonl").open("a") as file:
        for epoch in epochs:
            file.write(json.dumps({"epoch": epoch, "device_hours": epoch / 10, **LINE, **values}) + "\n")


def end(folder: Path, status: Status, message: str = "") -> None:
    provenance = Provenance(
        versions={}, commit="abc123", python="3.11", platform="", device="cpu", num_devices=1, num_threads=1
    )
    record = Record(id=folder.name, status=status, message=message, seed=7, provenance=provenance)
    (folder / "record.json").write_text(record.model_dump_json())


def runs(results: Path, uri: str | None = None) -> dict[str, Any]:
    client = mlflow_writer._client(uri or default_uri(results))
    experiment = client.get_experiment_by_name("study")
    assert experiment is not None
    return {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}


def points(results: Path, cell: str, uri: str | None = None) -> list[tuple[str, int, int, str]]:
    """Every point of a cell as (name, step, timestamp, value), from the database's own table."""
    database = (uri or default_uri(results)).removeprefix("sqlite:///")
    query = "SELECT key, step, timestamp, value, is_nan FROM metrics WHERE run_uuid = ?"
    rows = sqlite3.connect(database).execute(query, [runs(results, uri)[cell].info.run_id]).fetchall()
    return sorted((key, step, at, "nan" if is_nan else str(value)) for key, step, at, value, is_nan in rows)


def test_one_flat_run_per_cell(results: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (results / "report").mkdir()
    (results / "report" / "figure.png").write_bytes(b"figure")
    summary = sync(results)
    assert capfd.readouterr() == ("", "")
    found = runs(results)
    assert set(found) == {"a-grpo", "a-dpo", "report"}
    assert summary.runs == {cell: found[cell].info.run_id for cell in ("a-grpo", "a-dpo")}
    assert summary.num_points == (4 + 2) * (len(LINE) + 1)
    done, running = found["a-grpo"], found["a-dpo"]
    assert not any("mlflow.parentRunId" in run.data.tags for run in found.values())
    tags = done.data.tags
    assert {tags[f"ablate.{key}"] for key in ("grid", "cell", "kind", "status", "commit")} == {
        "study", "a-grpo", "cell", "done", "abc123"
    }  # fmt: skip
    assert len(tags["ablate.grid_sha"]) == 12
    assert found["report"].data.tags["ablate.kind"] == "report"
    assert (done.info.status, running.info.status) == ("FINISHED", "RUNNING")
    assert done.info.start_time == 1700000000500
    assert done.data.params == cell_params(make_cell("grpo", 0.0))
    assert running.data.params["kl.coef"] == running.data.params["recipe.kl.coef"] == "0.1"
    assert done.data.params["components.objective.clip_range"] == "0.001"
    assert done.data.metrics == {**LINE, "device_hours": 0.3}
    history = [point for point in points(results, "a-grpo") if point[0] == "eval/accuracy"]
    hour = 3_600_000
    assert history == [("eval/accuracy", i, 1700000000500 + i * hour // 10, "0.25") for i in range(4)]
    artifacts = results.parent / "mlartifacts" / "study"
    assert (artifacts / done.info.run_id / "artifacts/samples/before.png").read_bytes() == b"picture"
    assert (artifacts / found["report"].info.run_id / "artifacts/report/figure.png").read_bytes() == b"figure"


def test_only_new_lines_are_sent(results: Path) -> None:
    before = sync(results)
    assert sync(results).num_points == 0
    append(results / "a-dpo", 2)
    with (results / "a-dpo" / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 3, "trai')
    after = sync(results)
    assert after.num_points == len(LINE) + 1
    assert after.runs == before.runs
    assert len(points(results, "a-dpo")) == 3 * (len(LINE) + 1)


@pytest.mark.parametrize("value", [0.25, float("nan"), float("inf")])
def test_killed_between_points_and_tag(results: Path, value: float, monkeypatch: pytest.MonkeyPatch) -> None:
    append(results / "a-dpo", 2, **{"train/loss": value})
    tag = mlflow_writer.Writer._tag

    def killed(writer: mlflow_writer.Writer, run: Any, tags: dict[str, str]) -> None:
        if "ablate.synced_lines" in tags:
            raise KeyboardInterrupt
        tag(writer, run, tags)

    with monkeypatch.context() as patch:
        patch.setattr(mlflow_writer.Writer, "_tag", killed)
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                sync(results)
    append(results / "a-dpo", 3)
    sync(results)
    for cell, num_lines in (("a-grpo", 4), ("a-dpo", 4)):
        assert len(points(results, cell)) == num_lines * (len(LINE) + 1)
    assert sync(results).num_points == 0


def test_rewritten_epochs_rebuild_the_run(results: Path) -> None:
    before = sync(results)
    path = results / "a-dpo" / "metrics.jsonl"
    path.write_text(path.read_text().splitlines(keepends=True)[0])
    append(results / "a-dpo", 1, 2, **{"train/loss": 0.125})
    after = sync(results)
    assert after.runs["a-grpo"] == before.runs["a-grpo"]
    assert after.runs["a-dpo"] != before.runs["a-dpo"]
    losses = [point[3] for point in points(results, "a-dpo") if point[0] == "train/loss"]
    assert losses == ["0.5", "0.125", "0.125"]
    path.write_text("")
    end(results / "a-dpo", Status.FAILED)
    sync(results)
    assert points(results, "a-dpo") == []
    assert runs(results)["a-dpo"].info.status == "FAILED"
    assert sync(results).num_points == 0


def test_lost_database_is_rebuilt(results: Path, empty_database: Path) -> None:
    sync(results)
    shutil.copy(empty_database, results.parent / "second.db")
    uri = f"sqlite:///{results.parent / 'second.db'}"
    sync(results, uri)
    for cell in ("a-grpo", "a-dpo"):
        old, new = runs(results)[cell], runs(results, uri)[cell]
        assert points(results, cell) == points(results, cell, uri)
        assert (old.data.tags, old.data.params) == (new.data.tags, new.data.params)
        assert (old.info.start_time, old.info.end_time) == (new.info.start_time, new.info.end_time)


def test_not_finite_values(results: Path) -> None:
    append(results / "a-dpo", 2, **{"train/loss": float("nan"), "train/grad_norm": float("-inf"), "note": None})
    sync(results)
    client = mlflow_writer._client(default_uri(results))
    history = client.get_metric_history(runs(results)["a-dpo"].info.run_id, "train/loss")
    assert [math.isnan(metric.value) for metric in history] == [False, False, True]
    assert "note" not in runs(results)["a-dpo"].data.metrics


@pytest.mark.parametrize(
    ("status", "expected"),
    [(Status.DIVERGED, "FINISHED"), (Status.FAILED, "FAILED"), (Status.INTERRUPTED, "KILLED")],
)
def test_status(results: Path, status: Status, expected: str) -> None:
    end(results / "a-dpo", status, "the reason")
    sync(results)
    run = runs(results)["a-dpo"]
    assert run.info.status == expected
    assert (run.data.tags["ablate.status"], run.data.tags["ablate.message"]) == (status.value, "the reason")
    if status is Status.INTERRUPTED:
        with (results / "a-dpo" / "attempts.jsonl").open("a") as file:
            file.write('{"started": 1700000100.5, "host": "here"}\n')
        sync(results)
        assert runs(results)["a-dpo"].info.status == "RUNNING"


def test_a_cell_that_has_only_begun_has_a_run_and_a_waiting_one_has_none(results: Path) -> None:
    for name in ("metrics.jsonl", "samples/before.png"):
        (results / "a-dpo" / name).unlink()
    attempts = (results / "a-dpo" / "attempts.jsonl").read_text()
    (results / "a-dpo" / "attempts.jsonl").unlink()
    sync(results)
    assert "a-dpo" not in runs(results)
    (results / "a-dpo" / "attempts.jsonl").write_text(attempts)
    sync(results)
    run = runs(results)["a-dpo"]
    assert (run.info.status, run.data.tags["ablate.status"], run.data.metrics) == ("RUNNING", "running", {})
    assert run.data.params["objective"] == "dpo"


def test_two_runs_of_a_cell_become_one(results: Path) -> None:
    sync(results)
    mlflow_writer.Writer(results, default_uri(results))._create("a-dpo", 0.0, kind="cell", cell="a-dpo")
    sync(results)
    client = mlflow_writer._client(default_uri(results))
    found = client.search_runs([sync(results).experiment_id], "tags.`ablate.cell` = 'a-dpo'")
    assert len(found) == 1
    assert len(points(results, "a-dpo")) == 2 * (len(LINE) + 1)


def test_mirror_follows_the_files(results: Path) -> None:
    with Mirror(results, seconds=0.05) as mirror:
        wait_for(lambda: mirror.summary is not None)
        append(results / "a-dpo", 2)
    assert mirror.summary
    assert len(points(results, "a-dpo")) == 3 * (len(LINE) + 1)


@pytest.mark.parametrize("uri", ["http://127.0.0.1:9", "nonsense://user:secret@host", "sqlite:////dev/null/mlflow.db"])
def test_mirror_never_raises(
    results: Path, uri: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with caplog.at_level(logging.WARNING, "runners.tracking"):
        mirror = Mirror(results, uri, seconds=0.05)
        mirror.start()
        time.sleep(0.5)
        mirror.close(timeout=0.5)
        mirror.close(timeout=0.5)
    warnings = [record.message for record in caplog.records if record.name == "runners.tracking"]
    assert len(warnings) == 1
    assert f"ablate sync {results}" in warnings[0]
    assert "secret" not in warnings[0]


def test_mirror_recovers(results: Path) -> None:
    plan = (results / "plan.json").read_text()
    (results / "plan.json").write_text("{")
    with Mirror(results, seconds=0.05) as mirror:
        time.sleep(0.2)
        (results / "plan.json").write_text(plan)
    assert mirror.summary
    assert len(mirror.summary.runs) == 2


def test_not_a_results_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not a results folder"):
        sync(tmp_path)
    assert not (tmp_path.parent / "mlflow.db").exists()


def test_unusable_uri_is_an_input_error(results: Path) -> None:
    with pytest.raises(InputError, match="study: cannot be mirrored to nonsense://\\*\\*\\*@host"):
        sync(results, "nonsense://user:secret@host")


def test_links(tmp_path: Path) -> None:
    link = compare_link("sqlite:///x.db", "3", ["a1", "b2"])
    page, _, query = link.partition("?")
    assert page == "http://127.0.0.1:5000/#/compare-runs"
    assert {key: json.loads(value) for key, [value] in parse_qs(query).items()} == {
        "runs": ["a1", "b2"],
        "experiments": ["3"],
    }
    assert compare_link("https://ann:word@mlflow.lab/", "3", ["a"]).startswith("https://mlflow.lab/#/compare-runs?")
    assert default_uri(tmp_path / "study") == f"sqlite:///{tmp_path}/mlflow.db"
    assert f"--backend-store-uri sqlite:///{tmp_path}/mlflow.db" in server_command(tmp_path / "study")


def test_importing_does_not_import_mlflow() -> None:
    code = "import runners.tracking, sys; assert 'mlflow' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def wait_for(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)
