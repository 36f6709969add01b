"""The processes of one cell on this machine, as any launcher starts them."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path

from ablate.record import read_cell
from ablate.source import InputError
from runners.launchers.protocol import Ended

PATIENCE = 5  # seconds that the other processes of a cell get, once one has failed
QUIET = {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "PYTHONWARNINGS": "ignore"}
MEETING_POINT = "ABLATE_MEETING_POINT"
PR_SET_PDEATHSIG = 1  # of prctl(2)


class CellProcesses:
    """The processes of a cell in order of ranks: a Job."""

    def __init__(self, processes: Sequence[subprocess.Popen[bytes]]) -> None:
        self.processes = tuple(processes)
        self.failures: dict[int, int] = {}  # exit codes by rank, in the order in which they were seen
        self.ended_here: set[int] = set()  # ranks that were killed for want of another

    def poll(self) -> Ended | None:
        """How they ended. Where one fails, the others wait for it in vain: they are killed, PATIENCE seconds later."""
        if self._note_failures() and self._any_runs():
            time.sleep(PATIENCE)
            self._note_failures()
            self._kill()
        elif self._any_runs():
            return None
        else:
            self._note_failures()  # what has ended since
        rank, code = self._cause()
        return Ended(code=code, rank=rank, size=len(self.processes))

    def cancel(self, *, force: bool = False) -> None:
        """SIGTERM, which a cell answers by saving itself; a second one ends it at once; with `force` SIGKILL."""
        if force:
            self._kill()
            return
        for process in self.processes:
            process.terminate()  # not SIGINT: a sweep started in the background hands on that it is ignored

    def wait(self) -> None:
        """Until they have ended; safe in a signal handler, as it leaves their exit codes to `poll`."""
        for process in self.processes:
            if process.returncode is None:
                os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)

    def _any_runs(self) -> bool:
        return any(process.poll() is None for process in self.processes)

    def _note_failures(self) -> bool:
        """Whether a process has failed of itself, not by being killed here."""
        for rank, process in enumerate(self.processes):
            if (code := process.poll()) and rank not in self.ended_here:
                self.failures.setdefault(rank, code)
        return bool(self.failures)

    def _cause(self) -> tuple[int, int]:
        """Rank and exit code of the process at fault: one that was killed, else the first that failed; code 0: none.

        Where one is killed, the others fail for want of it, and often end before the death is seen.
        """
        killed = ((rank, code) for rank, code in self.failures.items() if code < 0)
        return next(killed, next(iter(self.failures.items()), (0, 0)))

    def _kill(self) -> None:
        for rank, process in enumerate(self.processes):
            if process.poll() is None:
                self.ended_here.add(rank)
                process.kill()
        for process in self.processes:
            process.wait()


def start(folder: Path, environments: Sequence[Mapping[str, str]], *, tied: bool = False) -> CellProcesses:
    """Start `ablate cell FOLDER` once per environment, all writing to the folder's log.txt.

    `tied`: they are killed when the thread that starts them ends, however that comes; else they outlive it.
    """
    with (folder / "log.txt").open("ab") as log:
        return CellProcesses(
            [
                subprocess.Popen(
                    [sys.executable, "-m", "ablate.cli", "cell", str(folder)],
                    stdout=log,
                    stderr=log,
                    stdin=subprocess.DEVNULL,
                    env={**os.environ, **QUIET, **own},
                    start_new_session=True,  # a Ctrl-C in the terminal is the launcher's to pass on
                    preexec_fn=_die_with_parent if tied else None,  # noqa: PLW1509  (one system call)
                )
                for own in environments
            ]
        )


def processes_of(folder: Path) -> int:
    """How many processes a launcher starts for a cell, by its recipe: one per device.

    One, if it cannot be read: which the process then says, and ends the cell alone.
    """
    try:
        return read_cell(folder).recipe.devices
    except InputError:
        return 1


def environments(processes: int, devices: Sequence[str] = (), threads: int | None = None) -> list[dict[str, str]]:
    """What tells the processes of a cell, in order of ranks, of each other, of their GPUs and threads.

    The same variables as torchrun's, which cannot be used here: half a minute after it was asked to stop it kills, and
    an epoch takes longer. They meet at a file that nobody else has, not at a port, which another may take before them.
    Without `devices` they see the GPUs that this process sees.
    """
    shared = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)} if threads else {}
    if devices:
        shared["CUDA_VISIBLE_DEVICES"] = ",".join(devices)
    if processes == 1:
        return [shared]
    shared[MEETING_POINT] = str(
        Path(tempfile.gettempdir(), f"ablate-{uuid.uuid4().hex}")
    )  # the last to leave removes it
    shared |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    return [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]


def fair_threads(processes: int) -> int:
    """Threads for each of so many processes: OMP_NUM_THREADS, or a share of the cores that this process may use."""
    return int(os.environ.get("OMP_NUM_THREADS") or max(1, len(os.sched_getaffinity(0)) // processes))


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
