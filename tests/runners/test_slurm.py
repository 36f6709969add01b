"""A grid on SLURM: its controller, two nodes and munge here; time limit, preemption and the loss of a node."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from slurm_cluster import SlurmCluster, slurm_cluster

from ablate.attempts import read_attempts
from ablate.grid import load_grid
from ablate.plan import make_plan
from ablate.record import Status, read_metrics, read_record
from runners.identity import identify

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif(not shutil.which("slurmctld"), reason="SLURM is not installed (Debian: slurm-wlm munge)"),
]
GRID = Path(__file__).parents[2] / "grids" / "quickstart.yaml"
NUM_EPOCHS = 30
SETTINGS = {
    "budget.epochs": NUM_EPOCHS,
    "checkpoint_every": 1,
    "rollout.num_groups": 2,
    "rollout.group_size": 2,
    "rollout.num_steps": 2,
    "update.updates_per_epoch": 1,
    "evaluation.num_prompts": 2,
    "evaluation.num_steps": 2,
    "evaluation.every": NUM_EPOCHS,
}
PLAN = make_plan(load_grid(GRID, SETTINGS), identify)
CELLS = [cell.id for cell in PLAN.cells[:2]]


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[SlurmCluster]:
    with slurm_cluster(tmp_path / "slurm") as cluster:
        yield cluster
        subprocess.run(["scancel", "--me"], env=cluster.environment, check=False)


def wait_until(condition: Callable[[], object], seconds: float = 180) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


def run_at_once(cluster: SlurmCluster) -> None:
    """SLURM leaves a job that was requeued in the queue for two minutes."""
    for job in cluster.ask("squeue", "--me", "--noheader", "--array", "--states=PENDING", "--format=%i").split():
        subprocess.run(
            ["scontrol", "update", f"JobId={job}", "StartTime=now"],
            env=cluster.environment,
            check=False,
            capture_output=True,
        )


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
            wait_until(lambda: run_at_once(cluster) or len(read_attempts(folder)) >= attempt)
            lines = len(read_metrics(folder))
            wait_until(lambda: len(read_metrics(folder)) > max(lines, 1) or launcher.poll() is not None)
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
        wait_until(lambda: run_at_once(cluster) or launcher.poll() is not None, 300)
        assert launcher.returncode == 0, (tmp_path / "log.txt").read_text()
    finally:
        launcher.kill()
        launcher.wait()
    for folder in folders:
        record = read_record(folder)
        assert record is not None
        assert record.status is Status.DONE
        assert [line["epoch"] for line in read_metrics(folder)] == list(range(NUM_EPOCHS + 1))
    ends = [attempt.status for attempt in read_attempts(first)]
    assert ends[:2] == [Status.INTERRUPTED, Status.FAILED]
    assert ends[-1] is Status.DONE
    assert read_attempts(second)[0].status is Status.INTERRUPTED
