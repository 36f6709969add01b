"""A grid on SLURM: its controller, two nodes and munge here; time limit, preemption and the loss of a node."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from cells import BRIEF
from commands import wait_until
from slurm_cluster import SlurmCluster, slurm_cluster

from ablate.attempts import read_attempts
from ablate.grid import load_grid
from ablate.plan import make_plan
from ablate.record import Failure, Status, read_metrics, read_record
from runners.identity import identify

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif(not shutil.which("slurmctld"), reason="SLURM is not installed (Debian: slurm-wlm munge)"),
]
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
def cluster(tmp_path: Path) -> Iterator[SlurmCluster]:
    with slurm_cluster(tmp_path / "slurm") as cluster:
        yield cluster
        subprocess.run(["scancel", "--me"], env=cluster.environment, check=False)


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
            assert wait_until(lambda: run_at_once(cluster) or len(read_attempts(folder)) >= attempt, 180, 0.2)
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
        assert wait_until(lambda: run_at_once(cluster) or launcher.poll() is not None, 300, 0.2)
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
