"""Cells on this machine: a pool over its cores and GPUs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from ablate.attempts import read_attempts
from ablate.source import InputError
from runners.launchers.processes import CellProcesses, environments, fair_threads, processes_of, start
from runners.launchers.protocol import Job


class LocalLauncher:
    """`places` cells at a time, of `most` processes each at most; GPUs and cores are dealt out between them.

    Cells outlive a launcher that is killed: the next `ablate run` leaves them alone, and their places, while they run.
    """

    def __init__(self, places: int = 1, most: int = 1) -> None:
        self.places, self.most = places, most
        self.slots: dict[int, CellProcesses] = {}
        self.foreign: set[str] = set()  # GPUs of cells that a killed launcher has left at work

    def submit(self, folders: Sequence[Path]) -> list[Job]:
        return [self._start(folder) for folder in folders]

    def taken_by(self, orphans: Sequence[Path]) -> int:
        self.foreign = {device for folder in orphans for device in _devices(folder)}
        return len(orphans)

    def close(self) -> None:
        pass

    def _start(self, folder: Path) -> CellProcesses:
        self.slots = {slot: cell for slot, cell in self.slots.items() if cell.poll() is None}
        free = set(range(self.places)) - self.slots.keys()
        idle = {slot for slot in free if not self.foreign & set(devices_of(slot, self.places, self.most))}
        slot = min(idle or free)
        processes = processes_of(folder)
        devices = devices_of(slot, self.places, self.most)[:processes]
        own = environments(processes, devices, fair_threads(self.places * processes))
        cell = self.slots[slot] = start(folder, own)
        return cell


def _devices(folder: Path) -> tuple[str, ...]:
    """The devices of a cell's newest attempt."""
    attempts = read_attempts(folder)
    return attempts[-1].devices if attempts else ()


def devices_of(slot: int, places: int, each: int = 1) -> list[str]:
    """The GPUs of one of `places`, so many for each; with fewer GPUs than that, places share them."""
    devices = visible_gpus() if places > 1 else []
    return [devices[(slot * each + rank) % len(devices)] for rank in range(each)] if devices else []


def check_gpus(devices: int) -> None:
    """Raises InputError if a machine with GPUs has fewer of them than a cell asks for.

    Cells may share a GPU, as small ones leave it idle most of the time; processes of one cell may not: NCCL refuses.
    """
    if devices > 1 and 0 < len(gpus := visible_gpus()) < devices:
        raise InputError(
            f"devices = {devices}: each process of a cell needs a GPU of its own, and this machine has {len(gpus)}; "
            f"expected {len(gpus)} at most, as by --set devices={len(gpus)}"
        )


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    from torch.cuda import device_count  # noqa: PLC0415  (plans and tables start without torch)

    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    return given.split(",") if given else [str(i) for i in range(device_count())]
