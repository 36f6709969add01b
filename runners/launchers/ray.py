"""Cells as tasks of a Ray cluster, one each: Ray finds GPUs and cores for them, and starts those again whose worker or
node is lost.

Of Ray there is the core alone. Results must lie on a disk that all nodes share.
"""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ablate.attempts import read_attempts
from ablate.plugins import VARIABLE
from ablate.source import InputError
from runners.closing import note_lost_node
from runners.launchers import check_settings
from runners.launchers.processes import environments, processes_of, start
from runners.launchers.protocol import Ended, Job

SETTINGS = {"address": str, "gpus": int, "cpus": int}
PASSED_ON = (VARIABLE, "PYTHONSAFEPATH", "PYTHONPATH", "ABLATE_CACHE")


class RayLauncher:
    """One task per cell, with as many GPUs as its recipe asks for, `most` at most, if the cluster has any.

    `settings`: `address` of a cluster, by default RAY_ADDRESS or one of this machine alone; `gpus` and `cpus` per cell.
    """

    def __init__(self, workers: int | None, most: int, settings: Mapping[str, Any], attempts: int) -> None:
        check_settings(settings, SETTINGS)
        self.ray = _ray()
        self.places, self.settings = workers or sys.maxsize, settings
        self.address = address = settings.get("address") or os.environ.get("RAY_ADDRESS") or "local"
        alone: dict[str, Any] = {"include_dashboard": False} if address == "local" else {}
        try:
            _knock(address)
            self.ray.init(address=address, log_to_driver=False, **alone)
        except (OSError, RuntimeError, ValueError) as error:
            raise InputError(f"--launcher ray: no cluster at {address}: {str(error).splitlines()[0]}") from None
        self.has_gpus = bool(self.ray.cluster_resources().get("GPU"))
        for name, wanted in zip(("GPU", "CPU"), self._needs(most), strict=True):
            if wanted > max(node["Resources"].get(name, 0) for node in self.ray.nodes() if node["Alive"]):
                self.close()
                raise InputError(f"--launcher ray: a cell needs {wanted} {name}s, which no node of {address} has")
        self.task = self.ray.remote(max_retries=attempts - 1, max_calls=1)(run_task)

    def submit(self, folders: Sequence[Path]) -> list[Job]:
        if not self.ray.is_initialized():  # it would start a cluster of its own
            raise InputError(f"--launcher ray: the connection to {self.address} is closed")
        return [self._submit(folder.resolve()) for folder in folders]

    def taken_by(self, orphans: Sequence[Path]) -> int:
        return 0

    def close(self) -> None:
        self.ray.shutdown()

    def _submit(self, folder: Path) -> RayJob:
        processes = processes_of(folder)
        gpus, cpus = self._needs(processes)
        task = self.task.options(name=folder.name, num_gpus=gpus, num_cpus=cpus)
        given = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
        return RayJob(self.ray, task.remote(str(folder), os.getcwd(), processes, cpus, given), folder)

    def _needs(self, processes: int) -> tuple[int, int]:
        """GPUs and cores of a cell."""
        gpus = self.settings.get("gpus", processes if self.has_gpus else 0)
        return gpus, self.settings.get("cpus", processes)


class RayJob:
    """A task."""

    def __init__(self, ray: Any, reference: Any, folder: Path) -> None:
        self.ray, self.reference, self.folder = ray, reference, folder
        self.starts = len(read_attempts(folder))

    def poll(self) -> Ended | None:
        if not self.ray.wait([self.reference], timeout=0)[0]:
            return None
        try:
            code, rank, size = self.ray.get(self.reference)
        except self.ray.exceptions.TaskCancelledError:
            return Ended(started=len(read_attempts(self.folder)) > self.starts)
        except self.ray.exceptions.RayError as error:
            return Ended(node_lost=f"its worker or node was lost: {str(error).strip().splitlines()[0]}")
        return Ended(code=code, rank=rank, size=size)

    def cancel(self, *, force: bool = False) -> None:
        self.ray.cancel(self.reference, force=force)


def run_task(folder: str, where: str, processes: int, cpus: int, given: Mapping[str, str]) -> tuple[int, int, int]:
    """On a node: the processes of a cell, until they have ended; exit code, rank at fault, number of processes.

    `given`: variables of the launcher's environment that theirs has to have. Ray's request to cancel comes as a
    KeyboardInterrupt, and is passed on. They are killed if the worker is.
    """
    if Path(where).is_dir():
        os.chdir(where)  # for components of the user's own
    left_open = [attempt.host for attempt in read_attempts(Path(folder)) if attempt.status is None]
    if left_open and left_open[-1] not in {n["NodeManagerHostname"] for n in _ray().nodes() if n["Alive"]}:
        note_lost_node(Path(folder))
    own = environments(processes, threads=max(1, cpus // processes))
    cell = start(Path(folder), [{**given, **variables} for variables in own], tied=True)
    while True:
        try:
            while (ended := cell.poll()) is None:
                time.sleep(0.2)
            return ended.code, ended.rank, ended.size
        except KeyboardInterrupt:
            cell.cancel()


def _knock(address: str) -> None:
    """Raises OSError if nobody listens at a host:port; Ray would try for minutes."""
    host, _, port = address.rpartition(":")
    if host and "/" not in host and port.isdigit():
        socket.create_connection((host, int(port)), timeout=10).close()


def _ray() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray  # noqa: PLC0415
        import ray.exceptions  # noqa: PLC0415
    except ImportError:
        raise InputError("--launcher ray: Ray is not installed; pip install 'ablate[ray]'") from None
    return ray
