"""A cell as a job of SLURM: what runs on its node, and when its job goes back into the queue."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ablate.attempts import complete_last
from ablate.lock import Taken, lock
from ablate.record import Failure, Record, Status, read_cell, write_atomic, write_record
from ablate.source import InputError
from runners.closing import Before, close, note_lost_node
from runners.launchers.processes import CellProcesses, environments, fair_threads, start
from runners.launchers.protocol import Ended
from runners.stop_files import ask_cell
from runners.stopping import stop_requests

FRUITLESS = 3  # starts in a row, none with a new line of metrics, after which a job does not go back into the queue

NOWHERE = (
    f"SLURM has ended it {FRUITLESS} times in a row before it had trained an epoch: give it more time "
    "(--launcher-set time=MINUTES), a later signal (signal_delay_s=SECONDS) or a partition that is not taken away"
)
LATE = (
    "the time limit came before it had saved itself: announce it earlier (--launcher-set signal_delay_s=SECONDS), an "
    "epoch has to fit"
)


class SlurmTask:
    """What a job runs."""

    def __init__(self, processes: int, where: str) -> None:
        self.processes, self.where = processes, where

    def __call__(self, folder: str, word: str) -> None:
        """The processes of a cell until they have ended; how, is written to the file `word`.

        Requests are passed on, as SLURM's signals reach the processes of some sites alone, and not before they listen.
        If the cell has then saved itself, its job goes back into the queue without a word.
        """
        with stop_requests() as requests:  # in place of submitit's handlers
            self._run(Path(folder), Path(word), requests)

    def _run(self, folder: Path, word: Path, requests: Sequence[float]) -> None:
        if Path(self.where).is_dir():
            os.chdir(self.where)  # for components of the user's own
        if os.environ.get("SLURM_RESTART_COUNT"):  # by itself: a cell that was asked to stop has closed its attempt
            note_lost_node(folder)
        _note_start(folder, word)
        before, heard = Before.of(folder), 0
        threads = fair_threads(self.processes)
        cell = start(folder, environments(self.processes, threads=threads), tied=True)
        while (ended := cell.poll()) is None:
            if len(requests) > heard:
                heard = len(requests)
                _ask(folder, cell, again=heard > 1)
            time.sleep(0.2)
        stopped = request_of(word).exists()
        record = _close(folder, ended, before, stopped=stopped or bool(requests))
        if requests and not stopped and record and record.status is Status.INTERRUPTED:
            state, reason = _whereabouts()
            if state == "RUNNING" and _is_fruitless(folder, word):
                ended = _fail(folder, record, Failure.BAD_CONFIG, NOWHERE)
            elif state == "RUNNING" and _requeue():
                return
            elif reason == "TimeLimit":
                ended = _fail(folder, record, Failure.KILLED, LATE)
        write_atomic(word, json.dumps({"code": ended.code, "rank": ended.rank, "size": ended.size}))


def _ask(folder: Path, cell: CellProcesses, *, again: bool) -> None:
    """Ask a cell to save itself: by its file first, as a second signal might end it while it writes its record."""
    with suppress(OSError):
        if not again and ask_cell(folder):
            return
    cell.cancel()  # it has not begun, or is to end at once


def _note_start(folder: Path, word: Path) -> None:
    """Note for this start of a job how many lines of metrics there were."""
    with _starts(word).open("a", encoding="ascii") as file:
        file.write(f"{_lines(folder)}\n")


def _is_fruitless(folder: Path, word: Path) -> bool:
    """Whether the last starts of a job have all ended without a new line of metrics."""
    before = [int(line) for line in _starts(word).read_text(encoding="ascii").split()]
    return len(before) >= FRUITLESS and {*before[-FRUITLESS:], _lines(folder)} == {before[-1]}


def _lines(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def _close(folder: Path, ended: Ended, before: Before, *, stopped: bool) -> Record | None:
    """Close a cell on its node, as its launcher knows only how often it had been started when it was handed over."""
    try:
        return close(folder, read_cell(folder), ended, before, stopped=stopped)
    except (OSError, InputError):  # a full disk, a damaged file: left to the launcher, which says so
        return None


def _this_job() -> str:
    """Its id with its place in the array, whose own id one of its jobs has too."""
    return str(submitit().JobEnvironment().job_id)


def _whereabouts() -> tuple[str, str]:
    """State and reason of this job: RUNNING unless scancel or its time limit has ended it; empty if nobody knows."""
    try:
        state, _, reason = command("squeue", "--noheader", "--format=%T %r", f"--jobs={_this_job()}").partition(" ")
    except OSError:
        return "", ""
    return state, reason.strip()


def _requeue() -> bool:
    """Put this job back into the queue; whether it is there."""
    try:
        command("scontrol", "requeue", _this_job())
    except OSError as error:
        print(f"The job cannot go back into the queue: {error}", file=sys.stderr)
        return False
    return True


def _fail(folder: Path, record: Record, failure: Failure, message: str) -> Ended:
    """Make an interrupted cell a failed one; the end of its processes, which adds nothing to that."""
    found = {"status": Status.FAILED, "failure": failure}
    with suppress(OSError, Taken), lock(folder):
        complete_last(folder, **found)
        write_record(folder, record.model_copy(update={**found, "message": message}))
    return Ended(code=1)


def request_of(word: Path) -> Path:
    """The file that says that a launcher has asked a cell to stop."""
    return word.with_suffix(".stop")


def _starts(word: Path) -> Path:
    """The file with a line for each start of a job."""
    return word.with_suffix(".starts")


def command(*words: str) -> str:
    """What a command prints. Raises OSError where there is none, or where it fails."""
    ended = subprocess.run(words, capture_output=True, text=True, check=False)
    if ended.returncode:
        raise OSError(f"{words[0]}: {ended.stderr.strip() or ended.returncode}")
    return ended.stdout


def submitit() -> Any:
    """The library. Raises InputError where it is not installed."""
    try:
        import submitit as module  # noqa: PLC0415
    except ImportError:
        raise InputError("--launcher slurm: submitit is not installed; pip install 'ablate[slurm]'") from None
    return module
