"""Cells as jobs of a SLURM array, by submitit.

Before its time limit, or where SLURM takes its place away, a cell saves itself and its job goes back into the queue.
What has become of a cell is in its folder; SLURM is asked only whether a job is still there, as its accounting may be
missing. Results must lie on a disk that all nodes share.
"""

from __future__ import annotations

import json
import math
import os
import time
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from ablate.attempts import Attempt, read_attempts, write_attempts
from ablate.lock import lock
from ablate.record import write_atomic
from ablate.source import InputError, shown
from runners.cell import finished
from runners.launchers.processes import processes_of
from runners.launchers.protocol import Ended, Job
from runners.launchers.slurm_task import SlurmTask, command, request_of, submitit

ARRAY = 1000  # jobs of one array; SLURM's MaxArraySize is 1001 unless a site has changed it
LOOK = 5.0  # seconds between looks at the queue
GONE = 60.0  # seconds that a job is missing from the queue, with no word of its end, until it is taken for lost
DEFAULTS = {"time": 24 * 60, "signal_delay_s": 600}  # minutes; seconds before that limit
AT_LEAST = 120  # seconds between the start of a job and its signal, which SLURM may send a minute too early


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
        executor = submitit().SlurmExecutor(self.folder)
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
                if not (word.exists() or request_of(word).exists()):
                    found[cell] = job, word
        return found

    def _cells_of(self, array: str) -> Path:
        return self.folder / f"{array}.cells.json"

    def _word(self, cell: str, array: str) -> Path:
        return self.folder / f"{cell}-{array}.json"


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
            listed = command("squeue", "--me", "--noheader", "--array", "--format=%i %j")
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
        request_of(self.word).touch()
        for options in ([],) if force else (["--state=PENDING"], ["--signal=TERM"]):
            try:
                command("scancel", *options, self.id)
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


def _state(job: str) -> str:
    """What SLURM says of a job that has ended, for as long as it remembers it; else nothing."""
    try:
        listed = command("scontrol", "show", "job", job, "--oneliner")
    except OSError:
        return ""
    return next((word.partition("=")[2] for word in listed.split() if word.startswith("JobState=")), "")


def _has_gpus(partition: str | None) -> bool:
    """Whether nodes have GPUs to ask for."""
    where = [f"--partition={partition}"] if partition else []
    return "gpu" in command("sinfo", "--noheader", "--format=%G", *where)
