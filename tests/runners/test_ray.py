"""A grid on a Ray cluster of two nodes on this machine, whose GPUs are only said to be there."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cells import BRIEF
from commands import wait_until
from rich.console import Console

from ablate.attempts import Attempt, begin, read_attempts
from ablate.grid import load_grid
from ablate.lock import is_locked, owner
from ablate.plan import make_plan
from ablate.record import Failure, Status, read_metrics, read_record
from ablate.source import InputError
from runners.identity import identify
from runners.launchers import make_launcher
from runners.sweep import freeze, run_cells

pytestmark = pytest.mark.ray
pytest.importorskip("ray", reason="Ray is not installed (pip install 'ablate[ray]')")
GRID = Path(__file__).parents[2] / "grids" / "quickstart.yaml"
NUM_EPOCHS = 12
SETTINGS = {
    **BRIEF,
    "reward": "own_rewards:brightness",  # of a folder that the launcher trusts, and says so to the cells
    "budget.epochs": NUM_EPOCHS,
    "evaluation.num_prompts": 2,
    "evaluation.every": NUM_EPOCHS,
}
PLAN = make_plan(load_grid(GRID, SETTINGS), identify)


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A head without cores, and two nodes with one core and one GPU each."""
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    from ray.cluster_utils import Cluster  # noqa: PLC0415

    trusted = os.environ["ABLATE_PLUGINS"]
    monkeypatch.delenv("ABLATE_PLUGINS")  # nodes know nothing of it
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        cluster.nodes_of_cells = [cluster.add_node(num_cpus=1, num_gpus=1) for _ in range(2)]
        monkeypatch.setenv("ABLATE_PLUGINS", trusted)
        yield cluster
    finally:
        cluster.shutdown()


def parent(pid: int) -> int:
    return int(Path("/proc", str(pid), "stat").read_text().rpartition(")")[2].split()[1])


def at_work(folder: Path, attempt: int) -> int:
    """The process of a cell that has an epoch behind it in this attempt."""
    wait_until(lambda: len(read_attempts(folder)) >= attempt and is_locked(folder))
    lines = len(read_metrics(folder))
    wait_until(lambda: len(read_metrics(folder)) > max(1, lines))
    return int(owner(folder)["pid"])


def test_a_grid_outlives_its_workers_and_a_node(cluster: Any, tmp_path: Path) -> None:
    results, cells = tmp_path / PLAN.grid, PLAN.cells[:2]
    freeze(results, PLAN.keep(lambda cell: cell in cells), "name: quickstart\n")
    first, second = (results / cell.id for cell in cells)

    begin(first, Attempt(host="a node that is no more"))

    def strike() -> None:
        os.kill(parent(at_work(first, 2)), signal.SIGKILL)  # the worker of Ray
        worker = parent(at_work(second, 1))
        node = next(n for n in cluster.nodes_of_cells if n.all_processes["raylet"][0].process.pid == parent(worker))
        cluster.remove_node(node, allow_graceful=False)

    settings = {"address": cluster.address}
    launcher = make_launcher("ray", results, workers=None, devices=1, settings=settings, attempts=4)
    striker = threading.Thread(target=strike)
    striker.start()
    states = run_cells(results, cells, console=Console(quiet=True), launcher=launcher, attempts=4)
    striker.join()
    assert launcher.ray.is_initialized()  # for the cells of another rung
    launcher.close()
    with pytest.raises(InputError, match=r"the connection to .* is closed"):
        launcher.submit([first])
    assert [state.status for state in states] == ["done", "done"]
    assert read_attempts(first)[0].failure is Failure.NODE_LOST
    for folder, number in ((first, 2), (second, 1)):
        record, attempts = read_record(folder), read_attempts(folder)
        assert record is not None
        assert record.attempts == len(attempts) > number
        assert [line["epoch"] for line in read_metrics(folder)] == list(range(NUM_EPOCHS + 1))
        killed = attempts[number - 1]
        assert (killed.status, killed.failure) == (Status.FAILED, Failure.KILLED)
        assert [a.status for a in attempts].count(Status.DONE) == 1
        assert record.cost.lost == pytest.approx(3600 * sum(a.lost_device_hours for a in attempts), abs=1e-3)


def test_what_no_node_has_is_refused(cluster: Any, tmp_path: Path) -> None:
    settings = {"address": cluster.address, "gpus": 2}
    with pytest.raises(InputError, match="a cell needs 2 GPUs, which no node of"):
        make_launcher("ray", tmp_path, workers=None, devices=1, settings=settings, attempts=1)


@pytest.mark.parametrize("settings", [{"adress": "local"}, {"gpus": "two"}, {"address": "127.0.0.1:1"}])
def test_settings_that_cannot_be_are_refused_in_one_line(tmp_path: Path, settings: dict[str, Any]) -> None:
    with contextlib.suppress(ImportError), pytest.raises(InputError) as refused:
        make_launcher("ray", tmp_path, workers=None, devices=1, settings=settings, attempts=1)
    assert len(str(refused.value).splitlines()) == 1
