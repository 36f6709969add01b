"""Cells as jobs of a SLURM array, by submitit.

Before its time limit, or where SLURM takes its place away, a cell saves itself and its job goes back into the queue.
What has become of a cell is in its folder; SLURM is asked only whether a job is still there, as its accounting may be
missing. Results must lie on a disk that all nodes share.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ablate.attempts import Attempt, complete_last, read_attempts, write_attempts
from ablate.lock import Taken, lock
from ablate.record import Failure, Record, Status, read_cell, write_atomic
from ablate.source import InputError, shown
from runners.cell import finished
from runners.closing import Before, close, note_lost_node
from runners.launchers.processes import CellProcesses, environments, fair_threads, processes_of, start
from runners.launchers.protocol import Ended, Job
from runners.stop_files import ask_cell
from runners.stopping import stop_requests

ARRAY = 1000  # jobs of one array; SLURM's MaxArraySize is 1001 unless a site has changed it
LOOK = 5.0  # seconds between looks at the queue
GONE = 60.0  # seconds that a job is missing from the queue, with no word of its end, until it is taken for lost
DEFAULTS = {"time": 24 * 60, "signal_delay_s": 600}  # minutes; seconds before that limit
AT_LEAST = 120  # seconds between the start of a job and its signal, which SLURM may send a minute too early
FRUITLESS = 3  # starts in a row, none with a new line of metrics, after which a job does not go back into the queue

NOWHERE = (
    f"SLURM has ended it {FRUITLESS} times in a row before it had trained an epoch: give it more time "
    "(--launcher-set time=MINUTES), a later signal (signal_delay_s=SECONDS) or a partition that is not taken away"
)
LATE = (
    "the time limit came before it had saved itself: announce it earlier (--launcher-set signal_delay_s=SECONDS), an "
    "epoch has to fit"
)


class SlurmLauncher:
    """Arrays of jobs, `workers` of them at a time, with as many GPUs as a cell asks for if the site has any.

    Cells that ask for the same number of GPUs are one array. A cell whose job is in the queue already, as its launcher
    was killed, keeps that job.

    `settings` are submitit's, such as partition, time in minutes, signal_delay_s, account, mem, gpus_per_node.
    """

    def __init__(self, results: Path, workers: int | None, settings: Mapping[str, Any]) -> None:
        self.places = ARRAY
        self.folder = (results / "slurm").resolve()
        at_once = {"array_parallelism": workers or ARRAY}
        self.parameters = {"job_name": "ablate", **DEFAULTS, "stderr_to_stdout": True, **at_once, **settings}
        _check_limit(self.parameters["time"], self.parameters["signal_delay_s"])
        try:
            self.has_gpus = _has_gpus(settings.get("partition"))
            self.folder.mkdir(parents=True, exist_ok=True)
            self._executor(1, "")
        except (OSError, RuntimeError) as error:
            raise InputError(f"--launcher slurm: {error}; is this a machine that can submit jobs?") from None
        except ValueError as error:
            raise InputError(f"--launcher-set: {str(error).replace(chr(10), ' ')}") from None
        self.queue = Queue()

    def submit(self, folders: Sequence[Path]) -> list[Job]:
        queued = self._queued()
        jobs = {f: SlurmJob(*queued[f.name], f, self.queue) for f in folders if f.name in queued}
        alike: dict[int, list[Path]] = {}
        for folder in folders:
            if folder not in jobs:
                alike.setdefault(processes_of(folder), []).append(folder)
        for processes, some in alike.items():
            jobs |= {job.folder: job for job in self._submit(processes, some)}
        return [jobs[folder] for folder in folders]

    def taken_by(self, orphans: Sequence[Path]) -> int:
        return 0

    def close(self) -> None:
        pass

    def _executor(self, processes: int, array: str) -> Any:
        """What submits cells of so many processes. Raises what submitit does."""
        executor = _submitit().SlurmExecutor(self.folder)
        cores = {"cpus_per_task": processes} if processes > 1 else {}
        gpus = {"gpus_per_node": processes} if self.has_gpus else {}
        name = {"job_name": f"{self.parameters['job_name']}-{array}"}
        executor.update_parameters(**cores, **gpus, **{**self.parameters, **name})
        return executor

    def _submit(self, processes: int, folders: Sequence[Path]) -> list[SlurmJob]:
        """One array. Its name leads to the list of its cells, which is there before the jobs are."""
        array = uuid.uuid4().hex[:8]
        write_atomic(self._cells_of(array), json.dumps([folder.name for folder in folders]))
        words = [self._word(folder.name, array) for folder in folders]
        given = [(str(folder.resolve()), str(word)) for folder, word in zip(folders, words, strict=True)]
        task = SlurmTask(processes, os.getcwd())
        try:
            jobs = self._executor(processes, array).map_array(task, *zip(*given, strict=True))
        except (OSError, RuntimeError) as error:
            problem = str(error).strip().rpartition("\n")[2]
            raise InputError(f"--launcher slurm: {problem}; nothing is lost, the same command goes on") from None
        return [
            SlurmJob(job.job_id, word, folder, self.queue)
            for job, folder, word in zip(jobs, folders, words, strict=True)
        ]

    def _queued(self) -> dict[str, tuple[str, Path]]:
        """Job and word of each cell that has a job in the queue, unless it has ended or was asked to."""
        found: dict[str, tuple[str, Path]] = {}
        for job, name in self.queue.look().items():
            array = name.rpartition("-")[2]
            if (cells := self._cells_of(array)).exists():
                cell = json.loads(cells.read_text(encoding="utf-8"))[int(job.partition("_")[2] or 0)]
                word = self._word(cell, array)
                if not (word.exists() or _request(word).exists()):
                    found[cell] = job, word
        return found

    def _cells_of(self, array: str) -> Path:
        return self.folder / f"{array}.cells.json"

    def _word(self, cell: str, array: str) -> Path:
        return self.folder / f"{cell}-{array}.json"


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
        stopped = _request(word).exists()
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


class Queue:
    """The jobs that SLURM knows of, looked up every LOOK seconds."""

    def __init__(self) -> None:
        self.jobs: dict[str, str] = {}  # their names
        self.seen: dict[str, float] = {}  # time.monotonic() of the last look that found a job
        self.looked = float("-inf")

    def missing(self, job: str) -> float:
        """Seconds since a job was last seen; 0 while it is there, and while nobody knows."""
        now = time.monotonic()
        self.seen.setdefault(job, now)
        if now - self.looked >= LOOK:
            self.look()
        return 0.0 if job in self.jobs else self.looked - self.seen[job]

    def look(self) -> dict[str, str]:
        """The names of all jobs by their ids, of those in arrays too."""
        now = time.monotonic()
        try:
            listed = _command("squeue", "--me", "--noheader", "--array", "--format=%i %j")
        except OSError:  # the controller is away
            self.seen = dict.fromkeys(self.seen, now)
            return self.jobs
        self.jobs = {job: name for job, _, name in (line.partition(" ") for line in listed.splitlines())}
        self.looked = now
        self.seen |= {job: now for job in self.seen if job in self.jobs}
        return self.jobs


class SlurmJob:
    """A job of the array."""

    def __init__(self, id: str, word: Path, folder: Path, queue: Queue) -> None:
        self.id, self.word, self.folder, self.queue = id, word, folder, queue
        self.starts = len(read_attempts(folder))
        self.cancelled = False

    def poll(self) -> Ended | None:
        if self.word.exists():
            return Ended(**json.loads(self.word.read_text(encoding="utf-8")))
        missing = self.queue.missing(self.id)
        if self.cancelled and missing > 0:
            return Ended(started=len(read_attempts(self.folder)) > self.starts)
        return self._lost() if missing >= GONE else None

    def cancel(self, *, force: bool = False) -> None:
        self.cancelled = True
        _request(self.word).touch()
        for options in ([],) if force else (["--state=PENDING"], ["--signal=TERM"]):
            try:
                _command("scancel", *options, self.id)
            except OSError:  # it has ended meanwhile
                continue

    def _lost(self) -> Ended:
        """How a job has ended that could not say so: its node was lost, or a signal came before it could listen."""
        state = _state(self.id)
        with suppress(OSError, InputError), lock(self.folder):  # taken, or left to who closes it to complain about
            attempts = read_attempts(self.folder)
            if not finished(self.folder) and (not attempts or attempts[-1].status):  # it could not note that it started
                if state == "CANCELLED":  # while it waited
                    return Ended(started=False)
                write_attempts(self.folder, [*attempts, Attempt()])
        ending = f" ({state})" if state else ""
        return Ended(node_lost=f"job {self.id} has left the queue without a word{ending}; see {self.word.parent}/")


def _check_limit(minutes: object, delay: object) -> None:
    """Raises InputError if a job would be asked to save itself too soon after its start: it would do nothing else."""
    limit = 60 * _positive("time", minutes, "minutes")
    delay = _positive("signal_delay_s", delay, "seconds")
    allowed = min(limit // 2, limit - AT_LEAST)
    if delay <= allowed:
        return
    enough = max(math.ceil(delay / 30), math.ceil((delay + AT_LEAST) / 60))
    less = f", or signal_delay_s={allowed}" if allowed > 0 else ""
    raise InputError(
        f"--launcher-set time={minutes}: a job is asked to save itself {delay} s (signal_delay_s) before its limit of "
        f"{limit} s, which leaves too little to train: at least half of the limit and {AT_LEAST} s; take "
        f"time={enough}{less}"
    )


def _positive(name: str, value: object, unit: str) -> int:
    if type(value) is not int or value <= 0:
        raise InputError(f"--launcher-set {name}: got {shown(value)}, expected a whole number of {unit}, 1 at least")
    return value


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
    return str(_submitit().JobEnvironment().job_id)


def _whereabouts() -> tuple[str, str]:
    """State and reason of this job: RUNNING unless scancel or its time limit has ended it; empty if nobody knows."""
    try:
        state, _, reason = _command("squeue", "--noheader", "--format=%T %r", f"--jobs={_this_job()}").partition(" ")
    except OSError:
        return "", ""
    return state, reason.strip()


def _requeue() -> bool:
    """Put this job back into the queue; whether it is there."""
    try:
        _command("scontrol", "requeue", _this_job())
    except OSError as error:
        print(f"The job cannot go back into the queue: {error}", file=sys.stderr)
        return False
    return True


def _fail(folder: Path, record: Record, failure: Failure, message: str) -> Ended:
    """Make an interrupted cell a failed one; the end of its processes, which adds nothing to that."""
    found = {"status": Status.FAILED, "failure": failure}
    with suppress(OSError, Taken), lock(folder):
        complete_last(folder, **found)
        failed = record.model_copy(update={**found, "message": message})
        write_atomic(folder / "record.json", failed.model_dump_json(indent=1) + "\n")
    return Ended(code=1)


def _request(word: Path) -> Path:
    """The file that says that a launcher has asked a cell to stop."""
    return word.with_suffix(".stop")


def _starts(word: Path) -> Path:
    """The file with a line for each start of a job."""
    return word.with_suffix(".starts")


def _state(job: str) -> str:
    """What SLURM says of a job that has ended, for as long as it remembers it; else nothing."""
    try:
        listed = _command("scontrol", "show", "job", job, "--oneliner")
    except OSError:
        return ""
    return next((word.partition("=")[2] for word in listed.split() if word.startswith("JobState=")), "")


def _has_gpus(partition: str | None) -> bool:
    """Whether nodes have GPUs to ask for."""
    where = [f"--partition={partition}"] if partition else []
    return "gpu" in _command("sinfo", "--noheader", "--format=%G", *where)


def _command(*words: str) -> str:
    """What a command prints. Raises OSError where there is none, or where it fails."""
    ended = subprocess.run(words, capture_output=True, text=True, check=False)
    if ended.returncode:
        raise OSError(f"{words[0]}: {ended.stderr.strip() or ended.returncode}")
    return ended.stdout


def _submitit() -> Any:
    try:
        import submitit  # noqa: PLC0415
    except ImportError:
        raise InputError("--launcher slurm: submitit is not installed; pip install 'ablate[slurm]'") from None
    return submitit
