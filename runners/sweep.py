"""Many cells: one process each, a finished one never again, an interrupted one from its checkpoint.

The folders under results/ are the state; there is no other. A failed cell ends its own process and is tried again by
the next `ablate run`.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console, Group
from rich.text import Text

from ablate.lock import is_locked
from ablate.plan import Cell, Plan
from ablate.record import Record, Status, read_json, read_record, read_spent, write_atomic
from ablate.source import InputError
from runners.cell_state import CellState, state_of
from runners.live import live, live_table
from runners.stopping import ONE_REQUEST, stop_requests

PATIENCE = 5  # seconds that the other processes of a cell get, once one has failed
AT_ONCE = 60  # seconds that cells get to end, once they were asked to stop at once


def freeze(results: Path, plan: Plan, grid_text: str) -> None:
    """Write the plan and a folder with its cell.json for every cell;
    an existing one is left alone, but for what is no part of its id.
    """
    if (results / "plan.json").exists():
        read_json(results / "plan.json")  # refuses results of another version
    try:
        results.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{results}: cannot be made a folder: {error.strerror}") from None
    write_atomic(results / "grid.yaml", grid_text)
    write_atomic(results / "plan.json", plan.to_json())
    for cell in plan.cells:
        path, text = results / cell.id / "cell.json", cell.model_dump_json(indent=1) + "\n"
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.parent.mkdir(exist_ok=True)
            write_atomic(path, text)


def run_cells(
    results: Path,
    cells: Sequence[Cell],
    *,
    console: Console,
    workers: int = 1,
    processes: int = 1,
    device_hours: float | None = None,
) -> list[CellState]:
    """Run the cells that are not finished, `workers` at a time and `processes` each, and show them live.

    Once all cells of the plan, not these alone, have spent `device_hours`, with what was lost, none is started, and
    running ones are asked to stop. Raises KeyboardInterrupt when asked to stop, by SIGINT or SIGTERM, once every
    running cell has saved itself.
    """
    todo = [cell for cell in in_order(cells) if not _finished(results / cell.id)]
    running: dict[str, _Running] = {}

    def table() -> Group:
        return live_table(console, results, cells, {name: cell.start for name, cell in running.items()})

    planned = [cell["id"] for cell in read_json(results / "plan.json")["cells"]] if device_hours is not None else []

    def spent() -> bool:
        return device_hours is not None and sum(_hours(results / name) for name in planned) >= device_hours

    with live(console, table) as refresh, stop_requests() as requests:
        try:
            while todo or running:
                if requests:  # here, and not in the midst of starting a process, which nobody would know of
                    raise KeyboardInterrupt
                if spent():
                    console.print(f"The grid has spent its {device_hours:g} device-hours; every cell saves itself.")
                    _stop(running, console, requests)
                    break
                while todo and len(running) < workers:
                    cell = todo.pop(0)
                    if is_locked(results / cell.id):
                        console.print(f"{cell.id}: left to the process that is running it")
                        continue
                    slot = min(set(range(workers)) - {other.slot for other in running.values()})
                    running[cell.id] = _start(results / cell.id, cell, slot, workers, processes)
                for name in [name for name, cell in running.items() if _ended(cell)]:
                    _close(running.pop(name), console)
                refresh()
                time.sleep(0.5)
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                console.print(
                    "Stopping: each running cell finishes its epoch and saves. "
                    f"Ctrl-C again, {ONE_REQUEST} seconds from now or later: at once."
                )
            _stop(running, console, requests)
            raise
    return [state_of(results, cell) for cell in cells]


def in_order(cells: Sequence[Cell]) -> list[Cell]:
    """Round-robin over seeds, so that a grid stopped early is a balanced design."""
    return sorted(cells, key=lambda cell: cell.seed)


@dataclass(frozen=True, kw_only=True)
class _Running:
    """A cell and its processes."""

    folder: Path
    cell: Cell
    slot: int  # of as many as there are workers
    processes: tuple[subprocess.Popen[bytes], ...]  # in order of ranks
    start: tuple[float, float]  # time.monotonic() and the share of the budget that was spent

    failures: dict[int, int] = field(default_factory=dict)  # exit codes by rank, in the order in which they were seen

    @property
    def cause(self) -> tuple[int, int]:
        """Rank and exit code of the process at fault: one that was killed, else the first that failed; code 0: none.

        Where one is killed, the others fail for want of it, and often end before the death is seen.
        """
        killed = ((rank, code) for rank, code in self.failures.items() if code < 0)
        return next(killed, next(iter(self.failures.items()), (0, 0)))


def _hours(folder: Path) -> float:
    """Device-hours that a cell has spent so far, with what was lost."""
    spent = read_spent(folder)
    return spent.device_hours + spent.lost / 3600


def _finished(folder: Path) -> bool:
    record = read_record(folder)
    return record is not None and record.status.final


def _start(folder: Path, cell: Cell, slot: int, workers: int, processes: int) -> _Running:
    (folder / "record.json").unlink(missing_ok=True)
    fraction = state_of(folder.parent, cell).fraction
    cores = len(os.sched_getaffinity(0)) // (workers * processes)
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, cores))
    quiet = {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "PYTHONWARNINGS": "ignore"}
    with (folder / "log.txt").open("ab") as log:
        started = tuple(
            subprocess.Popen(
                [sys.executable, "-m", "ablate.cli", "cell", str(folder)],
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                env={**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, **quiet, **own},
                start_new_session=True,  # a Ctrl-C in the terminal is ours to pass on
            )
            for own in process_environments(slot, workers, processes)
        )
    return _Running(folder=folder, cell=cell, slot=slot, processes=started, start=(time.monotonic(), fraction))


def process_environments(slot: int, workers: int, processes: int) -> list[dict[str, str]]:
    """What tells the processes of a cell, in order of ranks, of each other, and which GPUs are theirs.

    The same variables as torchrun's, which cannot be used here: half a minute after it was asked to stop it kills, and
    an epoch takes longer.
    """
    visible: dict[str, str] = {}
    if workers > 1 and (devices := _gpus()):
        own = [devices[(slot * processes + rank) % len(devices)] for rank in range(processes)]
        visible = {"CUDA_VISIBLE_DEVICES": ",".join(own)}
    if processes == 1:
        return [visible]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), **visible}
    sizes = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    return [{**shared, **sizes, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]


def check_gpus(processes: int) -> None:
    """Raises InputError if a machine with GPUs has fewer of them than a cell has processes.

    Cells may share a GPU, as small ones leave it idle most of the time; processes of one cell may not: NCCL refuses.
    """
    if processes > 1 and 0 < len(gpus := _gpus()) < processes:
        raise InputError(
            f"--processes {processes}: each process needs a GPU of its own, and this machine has {len(gpus)}; expected "
            f"{len(gpus)} at most"
        )


def _gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    from torch.cuda import device_count  # noqa: PLC0415  (plans and tables start without torch)

    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    return given.split(",") if given else [str(i) for i in range(device_count())]


def _ended(cell: _Running) -> bool:
    """Whether all processes of a cell have ended. Where one fails, the others wait for it in vain, and end too."""
    if _note_failures(cell) and any(process.poll() is None for process in cell.processes):
        time.sleep(PATIENCE)
        _note_failures(cell)
        _kill(cell)
    return all(process.poll() is not None for process in cell.processes)


def _note_failures(cell: _Running) -> bool:
    """Whether a process has failed of itself, not by being killed here."""
    for rank, process in enumerate(cell.processes):
        if code := process.poll():
            cell.failures.setdefault(rank, code)
    return bool(cell.failures)


def _kill(cell: _Running) -> None:
    for process in cell.processes:
        process.kill()
    for process in cell.processes:
        process.wait()


def _close(ended: _Running, console: Console, *, stopped: bool = False) -> None:
    """Make sure an ended cell has a record, and say so at once if it failed."""
    folder, (rank, code) = ended.folder, ended.cause
    record = read_record(folder)
    ending = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    if len(ended.processes) > 1:
        ending = f"process {rank} of {len(ended.processes)}: {ending}"
    if record is None and is_locked(folder):  # another `ablate run` was faster
        return
    if record and record.status is Status.FAILED and code < 0 and not stopped:  # written for want of the one killed
        record = record.model_copy(update={"message": ending})
        write_atomic(folder / "record.json", record.model_dump_json(indent=1) + "\n")
    if record is None:
        lines = (folder / "log.txt").read_text(encoding="utf-8", errors="replace").strip().splitlines()
        starts = folder / "attempts.jsonl"
        record = Record(
            id=folder.name,
            status=Status.INTERRUPTED if stopped else Status.FAILED,
            message="" if stopped else f"{ending}: {lines[-1]}" if lines and code > 0 else ending,
            seed=ended.cell.seed,
            attempts=len(starts.read_text().splitlines()) if starts.exists() else 0,
        )
        write_atomic(folder / "record.json", record.model_dump_json(indent=1) + "\n")
    if record.status in (Status.FAILED, Status.DIVERGED, Status.REWARD_UNAVAILABLE):
        console.print(Text(f"{folder.name} {record.status}: {record.message} (see {folder}/)", style="red"))


def _stop(running: dict[str, _Running], console: Console, requests: Sequence[float]) -> None:
    """Ask all cells to stop, and wait until they have saved themselves. A further request: at once, then by force."""
    heard = len(requests)
    try:
        _terminate(running)
        while not _all_ended(running) and len(requests) == heard:
            time.sleep(0.1)
        if len(requests) > heard:
            time.sleep(0.5)  # a cell heard of the first request a moment later, and ignores what follows too soon
            _terminate(running)
            end = time.monotonic() + AT_ONCE
            while not _all_ended(running) and len(requests) == heard + 1 and time.monotonic() < end:
                time.sleep(0.1)
    finally:
        for cell in running.values():
            _kill(cell)
    for cell in running.values():
        _close(cell, console, stopped=True)


def _terminate(running: Mapping[str, _Running]) -> None:
    for cell in running.values():
        for process in cell.processes:
            process.terminate()  # not SIGINT: a sweep started in the background hands on that it is ignored


def _all_ended(running: Mapping[str, _Running]) -> bool:
    return all(_ended(cell) for cell in running.values())
