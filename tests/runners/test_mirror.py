"""MLflow beside cells that run, die and resume in parallel: one writer, no gap, nothing twice, and rebuilt alike."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from commands import wait_until
from postgresql_server import database

from ablate.grid import load_grid
from ablate.lock import is_locked
from ablate.plan import make_plan
from ablate.source import InputError
from runners import mlflow_writer
from runners.identity import identify
from runners.mlflow_writer import cell_params
from runners.sweep import freeze
from runners.tracking import Mirror, Mirrored, default_uri, sync

GRID = Path(__file__).parents[2] / "grids" / "quickstart.yaml"
PLAN = make_plan(load_grid(GRID), identify)
PLAN = PLAN.keep(lambda cell: cell in PLAN.cells[:3])
EPOCHS = 12
CELL = f"""\
import json, sys, time
from pathlib import Path
folder = Path(sys.argv[1])
with (folder / "attempts.jsonl").open("a") as file:
    file.write(json.dumps({{"started": time.time(), "host": "here"}}) + "\\n")
saved = folder / "saved.json"
epoch, size = json.loads(saved.read_text()) if saved.exists() else (0, 0)
with (folder / "metrics.jsonl").open("ab", buffering=0) as file:
    file.truncate(size)
    while epoch < {EPOCHS}:
        epoch += 1
        line = {{"epoch": epoch, "device_hours": time.time() % 1000, "nfe": 9 * epoch, "eval/score": 0.5}}
        text = json.dumps(line) + "\\n"
        for part in (text[:30], text[30:]):  # a kill may leave half a line
            file.write(part.encode())
            time.sleep(0.03)
        size += len(text)
        if epoch % 4 == 0:
            (folder / "partial").write_text(json.dumps([epoch, size]))
            (folder / "partial").replace(saved)
attempts = len((folder / "attempts.jsonl").read_text().splitlines())
record = {{"format": 1, "id": folder.name, "status": "done", "seed": 0, "attempts": attempts, "epochs": epoch}}
(folder / "record.json").write_text(json.dumps(record))
"""  # stands in for a cell: appends, saves itself now and then, and goes on from there


@pytest.fixture
def results(tmp_path: Path, empty_database: Path) -> Path:
    """The folder of a grid whose cells wait."""
    shutil.copy(empty_database, tmp_path / "mlflow.db")
    freeze(tmp_path / PLAN.grid, PLAN, GRID.read_text())
    return tmp_path / PLAN.grid


def start(folder: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", CELL, str(folder)])


def end(folder: Path) -> None:
    assert start(folder).wait() == 0


def content(results: Path, uri: str | None = None) -> dict[str, Any]:
    """All that MLflow has of a grid but its own ids: by run, params, tags, state, times, last values and histories."""
    client = mlflow_writer._client(uri or default_uri(results))
    experiment = client.get_experiment_by_name(PLAN.grid)
    assert experiment is not None
    found = {}
    for run in client.search_runs([experiment.experiment_id]):
        assert run.info.run_name not in found
        histories = {
            name: sorted((p.step, p.timestamp, p.value) for p in client.get_metric_history(run.info.run_id, name))
            for name in run.data.metrics
        }
        state = (run.info.status, run.info.start_time, run.info.end_time)
        tags = {key: value for key, value in run.data.tags.items() if key != "mlflow.user"}
        files = sorted(file.path for file in client.list_artifacts(run.info.run_id))
        found[run.info.run_name] = (run.data.params, tags, state, run.data.metrics, histories, files)
    return found


def lines(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_equal_to_the_files(results: Path, found: dict[str, Any]) -> None:
    assert found.keys() == {cell.id for cell in PLAN.cells}
    for cell in PLAN.cells:
        params, tags, state, last, histories, _ = found[cell.id]
        written = lines(results / cell.id)
        assert [line["epoch"] for line in written] == list(range(1, EPOCHS + 1))
        assert params == {key: value[:500] for key, value in cell_params(cell).items()}
        assert (state[0], tags["ablate.status"]) == ("FINISHED", "done")
        assert last == {name: value for name, value in written[-1].items() if name != "epoch"}
        for name, points in histories.items():
            assert [(step, value) for step, _, value in points] == [(line["epoch"], line[name]) for line in written]


def test_cells_that_are_killed_in_parallel_and_the_mirror_too(results: Path, empty_database: Path) -> None:
    """Cells are killed at any time, and the only writer too, whose place another takes; a sync builds the same."""
    chance = random.Random(0)
    code = f"import time, pathlib, runners.tracking as t; t.Mirror(pathlib.Path({str(results)!r}), seconds=0.01)"
    first = subprocess.Popen([sys.executable, "-c", f"{code}.start(); time.sleep(600)"])
    folders = [results / cell.id for cell in PLAN.cells]
    with ExitStack() as ended:
        ended.callback(first.kill)
        assert wait_until(lambda: is_locked(results))
        mirrors = [ended.enter_context(Mirror(results, seconds=0.05)) for _ in range(2)]  # of two further `ablate run`
        for attempt in range(4):
            running = [start(folder) for folder in folders]
            if attempt == 3:
                assert [cell.wait() for cell in running] == [0, 0, 0]
            for cell in running if attempt < 3 else ():
                time.sleep(chance.uniform(0.05, 0.4))
                cell.send_signal(signal.SIGKILL)
                cell.wait()
            if attempt == 1:
                assert wait_until(lambda: runs_of(results))
                assert [mirror.summary for mirror in mirrors] == [None, None]
                with pytest.raises(Mirrored, match="another process mirrors it"):
                    sync(results)
                first.kill()
                first.wait()
                assert wait_until(lambda: any(mirror.summary for mirror in mirrors))
    assert any(mirror.summary for mirror in mirrors)
    found = content(results)
    assert_equal_to_the_files(results, found)
    shutil.copy(empty_database, results.parent / "again.db")
    again = f"sqlite:///{results.parent / 'again.db'}"
    sync(results, again)
    for name, run in content(results, again).items():
        assert run == found[name]


def runs_of(results: Path) -> dict[str, str]:
    """MLflow's run ids by name."""
    client = mlflow_writer._client(default_uri(results))
    experiment = client.get_experiment_by_name(PLAN.grid)
    found = client.search_runs([experiment.experiment_id]) if experiment else []
    return {run.info.run_name: run.info.run_id for run in found}


def test_a_cell_that_saved_itself_continues_its_run(results: Path) -> None:
    folder = results / PLAN.cells[0].id
    end(folder)
    whole = (folder / "metrics.jsonl").read_text()
    (folder / "record.json").unlink()
    (folder / "metrics.jsonl").write_text("".join(whole.splitlines(keepends=True)[:8]))
    (folder / "saved.json").write_text(json.dumps([8, (folder / "metrics.jsonl").stat().st_size]))
    before = sync(results)
    end(folder)
    after = sync(results)
    assert after.runs == before.runs
    assert after.num_points == 4 * (len(lines(folder)[0]) - 1)
    assert [step for step, *_ in content(results)[folder.name][4]["nfe"]] == list(range(1, EPOCHS + 1))


def test_a_run_that_is_built_again_keeps_what_people_wrote_on_it(results: Path) -> None:
    folder = results / PLAN.cells[0].id
    end(folder)
    client, before = mlflow_writer._client(default_uri(results)), sync(results).runs[folder.name]
    client.set_tag(before, "mlflow.note.content", "look at epoch 7")
    client.set_tag(before, "team", "blue")
    (folder / "record.json").unlink()
    (folder / "saved.json").unlink()  # as if it had been killed before its first checkpoint
    end(folder)
    assert sync(results).runs[folder.name] != before
    tags = content(results)[folder.name][1]
    assert (tags["mlflow.note.content"], tags["team"]) == ("look at epoch 7", "blue")


def test_a_damaged_cell_does_not_keep_the_others_from_mlflow(results: Path) -> None:
    for cell in PLAN.cells:
        end(results / cell.id)
    damaged = results / PLAN.cells[0].id / "metrics.jsonl"
    damaged.write_text(damaged.read_text().replace('"epoch": 3', '"epoch": "three"'))
    with pytest.raises(InputError, match=rf"^{damaged}:3: epoch: got 'three', expected a number$"):
        sync(results)
    complete = [len(run[4].get("nfe", ())) for run in content(results).values()]
    assert sorted(complete) == [0, EPOCHS, EPOCHS]


@contextmanager
def server(folder: Path, port: int) -> Iterator[None]:
    words = ["server", "--backend-store-uri", f"sqlite:///{folder}/served.db", "--artifacts-destination"]
    words += [str(folder / "artifacts"), "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    with (folder / "server.txt").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "mlflow", *words],
            stdout=log,
            stderr=log,
            start_new_session=True,
            env={**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true"},
        )
    try:
        yield
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_a_tracking_server_that_comes_late_gets_everything(
    results: Path, empty_database: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    shutil.copy(empty_database, results.parent / "served.db")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    uri = f"http://127.0.0.1:{port}"
    (results / PLAN.cells[0].id / "samples").mkdir()
    (results / PLAN.cells[0].id / "samples" / "after.png").write_bytes(b"picture")
    with Mirror(results, uri, seconds=0.2) as mirror:
        for cell in PLAN.cells:
            end(results / cell.id)
        assert mirror.summary is None
        with server(results.parent, port):
            assert wait_until(lambda: mirror.summary and len(mirror.summary.runs) == len(PLAN.cells))
            mirror.close()
            found = content(results, uri)
    assert_equal_to_the_files(results, found)
    assert found[PLAN.cells[0].id][5] == ["samples"]
    sync(results)
    assert content(results) == found


def test_a_database_of_postgresql_has_the_same(results: Path, postgresql_url: str) -> None:
    for cell in PLAN.cells:
        end(results / cell.id)
    uri = database(postgresql_url, "mlflow")
    assert len(sync(results, uri).runs) == len(PLAN.cells)
    assert sync(results, uri).num_points == 0
    found = content(results, uri)
    assert_equal_to_the_files(results, found)
    sync(results)
    assert content(results) == found
