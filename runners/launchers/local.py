"""Cells on this machine: a pool over its cores and GPUs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from ablate.source import InputError
from runners.launchers.processes import CellProcesses, environments, fair_threads, start
from runners.launchers.protocol import Job


class LocalLauncher:
    """`places` cells at a time, `processes` each; GPUs and cores are dealt out between them.

    Cells outlive a launcher that is killed: the next `ablate run` leaves them alone while they run.
    """

    def __init__(self, places: int = 1, processes: int = 1) -> None:
        self.places, self.processes = places, processes
        self.slots: dict[int, CellProcesses] = {}

    def submit(self, folders: Sequence[Path]) -> list[Job]:
        return [self._start(folder) for folder in folders]

    def close(self) -> None:
        pass

    def _start(self, folder: Path) -> CellProcesses:
        self.slots = {slot: cell for slot, cell in self.slots.items() if cell.poll() is None}
        slot = min(set(range(self.places)) - self.slots.keys())
        threads = fair_threads(self.places * self.processes)
        own = environments(self.processes, devices_of(slot, self.places, self.processes), threads)
        cell = self.slots[slot] = start(folder, own)
        return cell


def devices_of(slot: int, places: int, processes: int = 1) -> list[str]:
    """The GPUs of one of `places`; with fewer GPUs than processes, they share them."""
    devices = visible_gpus() if places > 1 else []
    first = slot * processes
    return [devices[(first + rank) % len(devices)] for rank in range(processes)] if devices else []


def check_gpus(processes: int) -> None:
    """Raises InputError if a machine with GPUs has fewer of them than a cell has processes.

    Cells may share a GPU, as small ones leave it idle most of the time; processes of one cell may not: NCCL refuses.
    """
    if processes > 1 and 0 < len(gpus := visible_gpus()) < processes:
        raise InputError(
            f"--processes {processes}: each process needs a GPU of its own, and this machine has {len(gpus)}; expected "
            f"{len(gpus)} at most"
        )


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    from torch.cuda import device_count  # noqa: PLC0415  (plans and tables start without torch)

    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    return given.split(",") if given else [str(i) for i in range(device_count())]
