"""Grids on SLURM, its controller, two nodes and munge here: time limits, preemption, lost nodes, killed launchers."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cells import BRIEF, folder_of
from commands import wait_until
from slurm_cluster import SlurmCluster, slurm_cluster

from ablate.attempts import Attempt, read_attempts, write_attempts
from ablate.grid import load_grid
from ablate.plan import make_plan
from ablate.recipe import BudgetRecipe
from ablate.record import Failure, Record, Status, read_cell, read_metrics, read_record, write_atomic
from ablate.source import InputError
from runners.closing import Before, close
from runners.identity import identify
from runners.launchers import make_launcher, slurm
from runners.launchers.protocol import Ended, Job
from runners.launchers.slurm import Queue, SlurmJob
from runners.stop_files import ask_cell
from runners.sweep import freeze

GRID = Path(__file__).parents[2] / "grids" / "quickstart.yaml"
NUM_EPOCHS = 30
SETTINGS = {
    **BRIEF,
    "budget.epochs": NUM_EPOCHS,
    "evaluation.num_prompts": 2,
    "evaluation.every": NUM_EPOCHS,
}
PLAN = make_plan(load_grid(GRID, SETTINGS), identify)
CELLS = [cell.id for cell in PLAN.cells[:2]]


@pytest.fixture
def folders(tmp_path: Path) -> list[Path]:
    """Two cells that nobody has begun."""
    freeze(tmp_path / "r" / PLAN.grid, PLAN.keep(lambda cell: cell.id in CELLS), "name: quickstart\n")
    return [tmp_path / "r" / PLAN.grid / cell for cell in CELLS]


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[SlurmCluster]:
    if not shutil.which("slurmctld"):
        pytest.skip("SLURM is not installed (Debian: slurm-wlm munge)")
    with slurm_cluster(tmp_path / "slurm") as cluster:
        yield cluster
        subprocess.run(["scancel", "--me"], env=cluster.environment, check=False)


@pytest.fixture
def submit(
    cluster: SlurmCluster, folders: list[Path], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., list[SlurmJob]]:
    """Hand cells to a launcher of their own, as one that is started anew has them."""
    monkeypatch.setenv("SLURM_CONF", cluster.environment["SLURM_CONF"])
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))

    def submit(*which: Path, **settings: Any) -> list[SlurmJob]:
        launcher = make_launcher(
            "slurm", folders[0].parent, workers=None, devices=1, settings={"time": 30, **settings}, attempts=1
        )
        return launcher.submit(which)

    return submit


def ending(job: Job) -> Ended:
    """How a job has ended, however often it goes back into the queue."""
    assert wait_until(job.poll, 180, 0.2)
    ended = job.poll()
    assert ended is not None
    return ended


def closed(folder: Path, ended: Ended, before: Before) -> Record:
    """What a launcher makes of it."""
    record = close(folder, read_cell(folder), ended, before)
    assert record is not None
    return record


@pytest.mark.slurm
def test_a_grid_outlives_its_time_limit_a_preemption_and_a_node(cluster: SlurmCluster, tmp_path: Path) -> None:
    first, second = folders = [tmp_path / "r" / PLAN.grid / cell for cell in CELLS]
    words = [str(GRID), *(word for key, value in SETTINGS.items() for word in ("--set", f"{key}={value}"))]
    words += [word for cell in CELLS for word in ("--only", f"id={cell}")]
    words += ["--results", str(tmp_path / "r"), "--no-tracking", "--launcher", "slurm", "--launcher-set", "time=30"]
    with (tmp_path / "log.txt").open("wb") as log:
        launcher = subprocess.Popen(
            [sys.executable, "-m", "ablate.cli", "run", *words],
            env={**cluster.environment, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            stdout=log,
            stderr=log,
        )
    try:

        def reach(folder: Path, attempt: int) -> str:
            """Wait until a cell has an epoch behind it in this attempt; where it runs."""
            assert wait_until(lambda: len(read_attempts(folder)) >= attempt, 180, 0.2)
            lines = len(read_metrics(folder))
            assert wait_until(lambda: len(read_metrics(folder)) > max(lines, 1) or launcher.poll() is not None, 180)
            (job,) = (
                line
                for line in cluster.ask("squeue", "--me", "--noheader", "--array", "--format=%i %N").splitlines()
                if line.split()[0].endswith(f"_{folders.index(folder)}")
            )
            return job

        job = reach(first, 1).split()[0]
        cluster.ask("scancel", "--signal=USR2", job)  # as submitit has SLURM announce the time limit
        job = reach(second, 1).split()[0]
        cluster.ask("scancel", "--signal=TERM", job)  # as SLURM announces a preemption
        node = reach(first, 2).split()[1]
        cluster.lose(node)
        assert wait_until(lambda: launcher.poll() is not None, 300, 0.2)
        assert launcher.returncode == 0, (tmp_path / "log.txt").read_text()
    finally:
        launcher.kill()
        launcher.wait()
    for folder in folders:
        record = read_record(folder)
        assert record is not None
        assert record.status is Status.DONE
        assert [line["epoch"] for line in read_metrics(folder)] == list(range(NUM_EPOCHS + 1))
    limit, node_lost, *_, last = read_attempts(first)
    assert limit.status is Status.INTERRUPTED
    assert (node_lost.status, node_lost.failure) == (Status.FAILED, Failure.NODE_LOST)
    assert last.status is Status.DONE
    assert read_attempts(second)[0].status is Status.INTERRUPTED


@pytest.mark.slurm
def test_a_job_whose_launcher_was_killed_is_kept(
    cluster: SlurmCluster, folders: list[Path], submit: Callable[..., list[SlurmJob]]
) -> None:
    cluster.ask("scontrol", "update", "PartitionName=all", "State=DOWN")  # all jobs wait
    first, second = folders
    (left,) = submit(first)
    both = submit(second, first)
    assert both[1].id == left.id
    assert [job.id for job in submit(*folders)] == [left.id, both[0].id]
    queued = cluster.ask("squeue", "--me", "--noheader", "--array", "--format=%i").split()
    assert sorted(queued) == sorted([left.id, both[0].id])
    slurm.request_of(left.word).touch()  # its launcher was killed while it waited for jobs to end
    assert submit(first)[0].id not in queued


@pytest.mark.slurm
@pytest.mark.slow
def test_a_time_limit_ends_no_cell(
    cluster: SlurmCluster, folders: list[Path], submit: Callable[..., list[SlurmJob]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """SLURM's shortest one, announced 30 to 60 seconds after the start."""
    monkeypatch.setattr(slurm, "_check_limit", lambda *_: None)
    folder = folder_of(PLAN.cells[0], folders[0], budget=BudgetRecipe(device_hours=1))
    before = Before.of(folder)
    (job,) = submit(folder, time=1, signal_delay_s=1)
    assert wait_until(lambda: read_record(folder), 120, 0.2)
    epochs = read_metrics(folder)[-1]["epoch"] + 2
    folder_of(PLAN.cells[0], folder, budget=BudgetRecipe(epochs=epochs))  # it has waited long enough
    assert closed(folder, ending(job), before).status is Status.DONE
    assert [attempt.status for attempt in read_attempts(folder)] == [Status.INTERRUPTED, Status.DONE]
    assert [line["epoch"] for line in read_metrics(folder)] == list(range(epochs + 1))


@pytest.mark.slurm
@pytest.mark.slow
def test_a_cell_that_cannot_save_itself_before_its_time_limit_says_so(
    cluster: SlurmCluster, folders: list[Path], submit: Callable[..., list[SlurmJob]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slurm, "_check_limit", lambda *_: None)
    evaluation = PLAN.cells[0].recipe.evaluation.model_copy(update={"num_prompts": 10**6})
    folder = folder_of(PLAN.cells[0], folders[0], evaluation=evaluation)
    before = Before.of(folder)
    (job,) = submit(folder, time=1, signal_delay_s=1)
    record = closed(folder, ending(job), before)
    assert (record.status, record.failure, record.attempts) == (Status.FAILED, Failure.KILLED, 1)
    assert "signal_delay_s" in record.message


@pytest.mark.slurm
def test_the_job_of_a_cell_that_is_asked_to_stop_does_not_go_back_into_the_queue(
    cluster: SlurmCluster, folders: list[Path], submit: Callable[..., list[SlurmJob]]
) -> None:
    folder = folder_of(PLAN.cells[0], folders[0], budget=BudgetRecipe(device_hours=1))
    before = Before.of(folder)
    (job,) = submit(folder)
    assert wait_until(lambda: read_metrics(folder), 60, 0.1)
    assert ask_cell(folder)
    assert closed(folder, ending(job), before).status is Status.INTERRUPTED
    assert wait_until(lambda: not cluster.ask("squeue", "--me", "--noheader"), 30, 0.1)
    assert len(read_attempts(folder)) == 1


@pytest.mark.slurm
def test_a_job_that_gets_nowhere_fails_and_says_what_to_change(
    cluster: SlurmCluster, folders: list[Path], submit: Callable[..., list[SlurmJob]]
) -> None:
    """Its time limit is announced while the cell still imports, each time."""
    folder = folders[0]
    before = Before.of(folder)
    (job,) = submit(folder)

    def starts() -> int:
        return sum(len(path.read_text().split()) for path in (folder.parent / "slurm").glob("*.starts"))

    for start in range(3):
        assert wait_until(lambda start=start: starts() > start, 60, 0.1)
        assert len(read_attempts(folder)) == start
        cluster.ask("scancel", "--signal=USR2", job.id)
    record = closed(folder, ending(job), before)
    assert (record.status, record.failure, record.attempts) == (Status.FAILED, Failure.BAD_CONFIG, 3)
    assert "--launcher-set time=MINUTES" in record.message
    assert [attempt.status for attempt in read_attempts(folder)] == [*[Status.INTERRUPTED] * 2, Status.FAILED]


@pytest.mark.slurm
def test_a_job_that_ends_before_it_listens_is_an_attempt(
    cluster: SlurmCluster, folders: list[Path], submit: Callable[..., list[SlurmJob]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slurm, "GONE", 1.0)
    monkeypatch.setattr(slurm, "LOOK", 0.2)
    folder = folders[0]
    before = Before.of(folder)
    (job,) = submit(folder)

    def has_ended() -> bool:
        """A signal may come before there is a process to meet."""
        subprocess.run(["scancel", "--signal=USR2", job.id], check=False, capture_output=True)
        return not cluster.ask("squeue", "--me", "--noheader")

    assert wait_until(lambda: f"{job.id}.0" in cluster.ask("squeue", "--steps", "--noheader", "--format=%i"), 60, 0.01)
    assert wait_until(has_ended, 60, 0.01)
    record = closed(folder, ending(job), before)
    assert (record.status, record.failure, record.attempts) == (Status.FAILED, Failure.NODE_LOST, 1)
    assert "has left the queue without a word (FAILED)" in record.message


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"time": 5}, "time=5: .* 600 s .* take time=20, or signal_delay_s=150"),
        ({"time": 1, "signal_delay_s": 30}, "time=1: .* 30 s .* take time=3$"),
        ({"time": 3, "signal_delay_s": 61}, "take time=4, or signal_delay_s=60"),
        ({"time": "1-00:00:00"}, "time: got '1-00:00:00', expected a whole number of minutes"),
        ({"signal_delay_s": 0}, "signal_delay_s: got 0, expected a whole number of seconds"),
    ],
)
def test_a_signal_that_leaves_no_time_to_train_is_refused(
    tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        make_launcher("slurm", tmp_path, workers=None, devices=1, settings=settings, attempts=1)


def test_half_of_the_limit_may_be_for_saving() -> None:
    slurm._check_limit(20, 600)
    slurm._check_limit(3, 60)


class Gone(Queue):
    """A queue without jobs."""

    def missing(self, job: str) -> float:
        return slurm.GONE


@pytest.mark.parametrize(("state", "status"), [("FAILED", Status.FAILED), ("CANCELLED", Status.INTERRUPTED)])
def test_a_later_start_that_could_not_be_noted_counts_unless_the_job_was_taken_back(
    folders: list[Path], monkeypatch: pytest.MonkeyPatch, state: str, status: Status
) -> None:
    """The first one was interrupted after the launcher had handed the cell over."""
    folder = folders[0]
    monkeypatch.setattr(slurm, "_state", lambda job: state)
    before, job = Before.of(folder), SlurmJob("7", folder / "word.json", folder, Gone())
    write_attempts(folder, [Attempt(started=1.0, status=Status.INTERRUPTED)])
    interrupted = Record(id=folder.name, status=Status.INTERRUPTED, seed=0)
    write_atomic(folder / "record.json", interrupted.model_dump_json())
    ended = job.poll()
    assert ended is not None
    close(folder, read_cell(folder), ended, before)
    assert [attempt.status for attempt in read_attempts(folder)][1:] == [Status.FAILED][: state == "FAILED"]
    record = read_record(folder)
    assert record is not None
    assert record.status is status
